"""The commands that are more than one call: `lineament explain` and `lineament train` (`audit` has its own in its wing)."""
