"""Optimizers: SAM and ASAM, diffGrad, and Newton-type minimisation of functions and networks (GNS).

Each is a ``torch.optim.Optimizer``, held to ``tests/contracts/test_optimizers.py``.
"""

from lineament.optim.diffgrad import DiffGrad
from lineament.optim.gns.optimizer import GNS
from lineament.optim.sam import ASAM, SAM

__all__ = ["ASAM", "GNS", "SAM", "DiffGrad"]
