"""How far apart full and sparse attention are, as a loss on both.

Shen et al. 2026, arXiv 2511.20102, section 1.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, one_of
from lineament.core.results import Readable


@dataclass(frozen=True)
class Alignment(Readable):
    """``full_to_sparse``: the loss that moves full attention's outputs; ``sparse_to_full``: the one that moves the sparse ones; their weighted sum."""

    full_to_sparse: Tensor
    sparse_to_full: Tensor
    total: Tensor


def alignment_loss(
    full: Tensor,
    sparse: Tensor,
    *,
    full_weight: float = 1.0,
    sparse_weight: float = 1.0,
    form: Literal["smooth_l1", "l2"] = "smooth_l1",
    beta: float = 1.0,
) -> Alignment:
    """Distance of the two outputs, each once with the other held still; means over all elements.

    With equal weights the gradient is that of one distance without stop-gradients.

    >>> import torch
    >>> alignment_loss(torch.zeros(2), torch.ones(2)).total.item()
    1.0
    """
    one_of("form", form, ("smooth_l1", "l2"))
    number("beta", beta, low=0, open_low=True)
    one, two = distance(full, sparse.detach(), form, beta), distance(sparse, full.detach(), form, beta)
    return Alignment(one, two, full_weight * one + sparse_weight * two)


def distance(one: Tensor, two: Tensor, form: str = "smooth_l1", beta: float = 1.0) -> Tensor:
    """The mean distance of two outputs, both of which it moves."""
    return F.mse_loss(one, two) if form == "l2" else F.smooth_l1_loss(one, two, beta=beta)
