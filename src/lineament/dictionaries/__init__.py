"""Which directions of a network's activations are features: dictionaries trained, factorised or loaded, and what they keep of the model.

Every dictionary has the interface of :class:`lineament.core.codes.Dictionary`, held by ``tests/contracts/test_dictionaries.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
