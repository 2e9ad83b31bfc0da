"""Optimizers: SAM and ASAM, diffGrad, and Newton-type minimisation of functions and networks (GNS).

Each is a ``torch.optim.Optimizer``, held to ``tests/contracts/test_optimizers.py``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
