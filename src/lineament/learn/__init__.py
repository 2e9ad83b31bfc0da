"""How training shapes features: TrAct trains first-layer activations, USEFUL resamples what is learned late."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
