"""Hessian, Gauss-Newton and Fisher as operators; their eigenpairs, trace and spectral density."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
