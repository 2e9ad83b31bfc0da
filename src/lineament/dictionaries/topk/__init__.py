"""The TopK step: the k best latents of a row, found exactly in two stages, and the gradients of what was kept."""
