"""Optimizers: each a ``torch.optim.Optimizer``, each held to the contract in ``tests/contracts/test_optimizers.py``."""

from lineament.learn.optim.diffgrad import DiffGrad
from lineament.learn.optim.sam import ASAM, SAM

__all__ = ["ASAM", "SAM", "DiffGrad"]
