"""How training shapes features: TrAct trains first-layer activations, USEFUL resamples what is learned late."""
