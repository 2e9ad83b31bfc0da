"""Lineament: find, measure, test and change the features that neural networks learn.

Start with :func:`lineament.audit.audit` (the command ``lineament audit``), or with one method:

>>> from lineament.explain.saliency.maps import normgrad
>>> from lineament.measure.collapse.metrics import collapse_metrics
"""

__version__ = "0.1.0"
