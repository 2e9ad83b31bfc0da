"""Lineament: find, measure, test and change the features that neural networks learn.

Everything is loaded when it is touched, and Tab shows what there is: :func:`lineament.audit` is the main job, the command ``lineament audit``;
each wing lists what a user calls.

>>> import lineament
>>> lineament.explain.saliency.__name__, lineament.curvature.hessian.__name__
('saliency', 'hessian')
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

__version__ = "0.1.0"
