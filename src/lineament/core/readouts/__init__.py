"""Read-outs of features, batched over thousands of targets: ridge in closed form, logistic by L-BFGS.

:func:`ridge` takes every penalty from one decomposition and leaves one sample out in closed form; :func:`logistic` solves
all targets in step along a path of penalties. Both take (samples, features) and (samples, targets).
"""

from __future__ import annotations

from lineament.core.readouts.logistic_readout import Logistic, logistic
from lineament.core.readouts.ridge_readout import Ridge, ridge

__all__ = ["Logistic", "Ridge", "logistic", "ridge"]
