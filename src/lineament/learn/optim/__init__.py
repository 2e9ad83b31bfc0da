"""Optimizers: each a ``torch.optim.Optimizer``, each held to the contract in ``tests/contracts/test_optimizers.py``."""

from lineament.learn.optim.diffgrad import DiffGrad

__all__ = ["DiffGrad"]
