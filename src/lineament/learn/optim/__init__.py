"""Optimizers: every one a ``torch.optim.Optimizer``."""

from lineament.learn.optim.sam import ASAM, SAM

__all__ = ["ASAM", "SAM"]
