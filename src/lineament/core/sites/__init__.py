"""Name places in a network; capture, replace and differentiate what passes there."""
