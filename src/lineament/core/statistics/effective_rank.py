"""How many dimensions features span: Roy and Vetterli, EUSIPCO 2007."""

from __future__ import annotations

import torch
from torch import Tensor


def effective_rank(x: Tensor) -> float:
    """exp of the entropy of the shares of principal variances.

    >>> round(effective_rank(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])), 4)
    2.0
    """
    variances = torch.linalg.svdvals((x - x.mean(0)).double()).square()
    total = variances.sum()
    if not total > 0:
        return 0.0
    shares = variances[variances > 0] / total
    return float(torch.exp(-(shares * shares.log()).sum()))
