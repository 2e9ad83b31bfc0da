"""Read-outs of features, batched over thousands of targets: ridge in closed form, logistic by L-BFGS.

:func:`ridge` takes every penalty from one decomposition and leaves one sample out in closed form; :func:`logistic` solves
all targets in step along a path of penalties. Both take (samples, features) and (samples, targets).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
