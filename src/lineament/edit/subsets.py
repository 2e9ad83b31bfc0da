"""Which k inputs rebuild an output best? Naive, greedy, random and exhaustive choices, and sets of high fidelity.

Kashyap et al., NeurIPS 2025, arXiv 2511.19566, section 1.2 of the method: the best subset of a size (k-MFS) is NP-hard, so that every cheap choice is a
lower bound. With uncorrelated contributions the naive one is optimal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import number, one_of, require, show
from lineament.core.results import Readable
from lineament.edit.components import component_scores

CHOICES = ("naive", "greedy", "random")


@dataclass(frozen=True, repr=False)
class FidelityCurve(Readable):
    """Fidelity of the chosen subsets of every size from 1 on.

    ``fidelity`` [outputs, inputs]; ``order`` [outputs, inputs]: the inputs as they were added, ``None`` for random subsets.
    """

    fidelity: Tensor
    order: Tensor | None


def fidelity_curve(
    Q: Tensor,
    choice: Literal["naive", "greedy", "random"] = "greedy",
    *,
    draws: int = 100,
    seed: int = 0,
) -> FidelityCurve:
    """Subset fidelity against the number of inputs, of each output.

    Args:
        Q: the similarity of components [outputs, inputs, inputs].
        choice: ``"naive"``: by singleton fidelity; ``"greedy"``: each time the input that adds most; ``"random"``: the best of ``draws`` random subsets of
            each size, as the paper estimates the curve.
        seed: of those draws.

    Raises:
        InputError: another shape or choice.

    >>> fidelity_curve(torch.diag(torch.tensor([1.0, 3.0]))[None]).fidelity.tolist()
    [[0.75, 1.0]]
    """
    require(
        Q.ndim == 3 and Q.shape[1] == Q.shape[2] and Q.numel() > 0,
        f"Q: got {show(Q)}, expected the similarity [outputs, inputs, inputs] of components",
    )
    one_of("choice", choice, CHOICES)
    Q = Q.double()
    if choice == "greedy":
        order, values = _greedy(Q)
        return FidelityCurve(values, order)
    if choice == "naive":
        order = component_scores(Q).fidelity.argsort(dim=1, descending=True, stable=True)
        return FidelityCurve(_along(Q, order), order)
    number("draws", draws, low=1, integer=True)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    best = torch.zeros(Q.shape[:2], dtype=Q.dtype)
    for _ in range(draws):
        order = torch.randperm(Q.shape[1], generator=generator).expand(len(Q), -1)
        best = torch.maximum(best, _along(Q, order))
    return FidelityCurve(best, None)


def hifi_sizes(Q: Tensor, eta: float = 0.8, choice: Literal["naive", "greedy"] = "greedy") -> Tensor:
    """The smallest k for which the chosen k inputs are a (k, η)-HiFi set, of each output; 0 for outputs that are always zero.

    >>> hifi_sizes(torch.diag(torch.tensor([1.0, 3.0]))[None], 0.7).tolist()
    [1]
    """
    number("eta", eta, low=0, high=1, open_low=True)
    one_of("choice", choice, CHOICES[:2])
    curve = fidelity_curve(Q, choice).fidelity
    reached = curve >= eta - 1e-9
    size = torch.where(reached.any(1), reached.to(torch.uint8).argmax(1) + 1, Q.shape[1])
    return torch.where(component_scores(Q.double()).total > 0, size, 0)


def _along(Q: Tensor, order: Tensor) -> Tensor:
    """Fidelity of the first 1, 2, ... of an order: of the ordered matrix L Lᵀ, the forward substitution's squares add up."""
    rows = Q.gather(1, order[:, :, None].expand_as(Q))
    ordered = rows.gather(2, order[:, None, :].expand_as(Q))
    right, values = Q.sum(2).gather(1, order), []
    left, total = ordered.clone(), component_scores(Q).total
    floor = ordered.diagonal(dim1=1, dim2=2) * Q.shape[1] * torch.finfo(Q.dtype).eps
    for k in range(Q.shape[1]):
        left, right, gain = _eliminated(left, right, torch.full((len(Q),), k), floor)
        values.append(gain)
    return _shares(torch.stack(values, 1), total)


def _greedy(Q: Tensor) -> tuple[Tensor, Tensor]:
    left, right, total = Q.clone(), Q.sum(2), component_scores(Q).total
    floor = Q.diagonal(dim1=1, dim2=2) * Q.shape[1] * torch.finfo(Q.dtype).eps
    free = torch.ones(Q.shape[:2], dtype=torch.bool, device=Q.device)
    order, values = [], []
    for _ in range(Q.shape[1]):
        rest = left.diagonal(dim1=1, dim2=2)
        gains = torch.where(rest > floor, right.square() / rest.clamp_min(1e-300), 0)
        best = torch.where(free, gains, -1).argmax(1)
        left, right, gain = _eliminated(left, right, best, floor)
        free[torch.arange(len(Q)), best] = False
        order.append(best)
        values.append(gain)
    return torch.stack(order, 1), _shares(torch.stack(values, 1), total)


def _eliminated(left: Tensor, right: Tensor, at: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of Gaussian elimination: what is left of the others beside the chosen input, and what that one explains."""
    each = torch.arange(len(left), device=left.device)
    column, pivot = left[each, at], left[each, at, at]
    some = pivot > floor[each, at]
    inverse = torch.where(some, 1 / torch.where(some, pivot, 1), 0)
    gain = right[each, at].square() * inverse
    factor = column * inverse[:, None]
    return left - factor[:, :, None] * column[:, None], right - factor * right[each, at][:, None], gain


def _shares(gains: Tensor, total: Tensor) -> Tensor:
    shares = gains.cumsum(1) / torch.where(total > 0, total, 1)[:, None]
    return torch.where(total[:, None] > 0, shares.clamp(max=1), 0)
