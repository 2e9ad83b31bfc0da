"""How inputs must change so that the gradient they cause comes nearer to another: exactly, and in the memory of one chunk.

For g(x) = Σ_k ∇_w loss(x_k) and a distance D(g), the derivative of D by x needs every chunk's second derivative at w = ∂D/∂g only, which is known once g is: first g
without a graph, chunk by chunk, then ∂D/∂g, then the derivative of ⟨∂D/∂g, ∇_w loss(x_k)⟩ by each chunk. The loss must be a sum over chunks: no layer may mix samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lineament.core.checks import require

Loss = Callable[[int, Tensor], Tensor]


def summed_gradient(loss: Loss, weights: Sequence[Tensor], chunks: Sequence[Tensor]) -> list[Tensor]:
    """Σ_k ∇_w loss(k, chunk_k), without a graph.

    >>> w = torch.ones(2, requires_grad=True)
    >>> summed_gradient(lambda k, x: (x * w).sum(), [w], [torch.ones(2), torch.ones(2)])[0].tolist()
    [2.0, 2.0]
    """
    total: list[Tensor] = []
    for k, chunk in enumerate(chunks):
        found = _gradient(loss(k, chunk), weights)
        if not total:
            total = [g.detach().to(w.dtype) for g, w in zip(found, weights)]
        else:
            for held, new in zip(total, found):
                held += new.detach()
        del found  # before the next chunk's are made
    return total


def matched_gradient(
    loss: Loss,
    weights: Sequence[Tensor],
    chunks: Sequence[Tensor],
    distance: Callable[[list[Tensor]], Tensor],
) -> tuple[Tensor, list[Tensor]]:
    """D(Σ_k ∇_w loss(k, chunk_k)) and its derivative by every chunk.

    Args:
        loss: of one chunk, by its number and values; the losses of all chunks add up. weights: what gradients are taken of.
        distance: of a list of gradients, one a weight.

    >>> w = torch.ones(2, requires_grad=True)
    >>> value, (g,) = matched_gradient(lambda k, x: (x * w).sum(), [w], [torch.tensor([1.0, 3.0])], lambda g: g[0].square().sum())
    >>> value.item(), g.tolist()
    (10.0, [2.0, 6.0])
    """
    require(
        len(chunks) > 0 and len(weights) > 0, "chunks: got none, or no weights; expected at least one of each"
    )
    leaves = [chunk.detach().requires_grad_() for chunk in chunks]
    if len(leaves) == 1:
        found = _gradient(loss(0, leaves[0]), weights, graph=True)
        value = distance(found)
        return value.detach(), list(torch.autograd.grad(value, leaves))
    value, slopes = _distance(
        distance, summed_gradient(loss, weights, [leaf.detach() for leaf in leaves])
    )  # what they were taken of is free from here on
    return value, [_slope(loss(k, leaf), weights, slopes, leaf) for k, leaf in enumerate(leaves)]


def _slope(loss: Tensor, weights: Sequence[Tensor], direction: Sequence[Tensor], x: Tensor) -> Tensor:
    """The derivative by x of ⟨direction, ∇_w loss⟩."""
    found = _gradient(loss, weights, graph=True)
    moved = [k for k, g in enumerate(found) if g.requires_grad]
    return torch.autograd.grad([found[k] for k in moved], x, [direction[k] for k in moved])[0]


def _distance(
    distance: Callable[[list[Tensor]], Tensor], gradient: list[Tensor]
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The distance of a gradient, and its derivative."""
    value = distance([g.requires_grad_() for g in gradient])
    return value.detach(), torch.autograd.grad(value, gradient)


def _gradient(loss: Tensor, weights: Sequence[Tensor], *, graph: bool = False) -> list[Tensor]:
    found = torch.autograd.grad(
        loss, list(weights), create_graph=graph, allow_unused=True, materialize_grads=True
    )
    return list(found)
