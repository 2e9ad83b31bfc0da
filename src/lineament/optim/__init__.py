"""Optimizers: each a ``torch.optim.Optimizer``, held to ``tests/contracts/test_optimizers.py``.

``sam.py`` has SAM and ASAM, ``diffgrad/`` diffGrad and its friction, ``gns/`` Newton-type minimisation of functions and networks.
"""

from lineament.optim.diffgrad import DiffGrad
from lineament.optim.gns import GNS
from lineament.optim.sam import ASAM, SAM

__all__ = ["ASAM", "GNS", "SAM", "DiffGrad"]
