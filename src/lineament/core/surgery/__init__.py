"""Take channels, heads and units out of a network, reorder or merge them: coupled groups traced and proved, one operation, saved without pickle."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
