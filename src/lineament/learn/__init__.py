"""How training shapes features: optimizers, first layers, resampling, heads, losses, boosting."""
