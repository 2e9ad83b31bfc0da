"""One vector of features for each sample from what passes at a site."""

from __future__ import annotations

from torch import Tensor


def pooled(x: Tensor) -> Tensor:
    """Features [batch, width]: maps are averaged over their positions, sequences over their steps.

    >>> import torch
    >>> pooled(torch.ones(2, 3, 4, 4)).shape, pooled(torch.ones(2, 5, 3)).shape
    (torch.Size([2, 3]), torch.Size([2, 3]))
    """
    if x.ndim == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.ndim == 3 else x.reshape(len(x), -1)
