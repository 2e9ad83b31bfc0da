"""TrAct: training the activations of the first layer (arXiv 2410.23970)."""
