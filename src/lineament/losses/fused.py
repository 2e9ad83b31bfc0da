"""A soft-max loss over many classes without its logits: rows in chunks, gradients computed with the loss.

Of a batch of B and C classes only a few rows of the B x C logits lie in memory at once, and each is computed once: three matrix products, as
plain autograd needs, but none of its copies. Class weights are never normalised in memory: logits are divided by the classes' norms, and the
gradient's part along each class direction is taken off at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lineament.core.batching import auto_batch
from lineament.core.checks import require

# Logits that lie in memory at once.
_ENTRIES = 11_000_000


def cosine_softmax_loss(
    unit: Tensor,
    norms: Tensor,
    weight: Tensor,
    labels: Tensor,
    target: Callable[[Tensor, Tensor], Tensor],
    *,
    scale: float | None,
    weights: Tensor,
    also: Tensor | None = None,
    chunk: int | str = "auto",
) -> Tensor:
    """Σ_i weights_i (ln(e^(t_i) + Σ_{j ≠ y_i} e^(s cos_ij) + e^also) - t_i), a scalar.

    Args:
        unit, norms: the embeddings' directions [n, d] and lengths [n]. weight: class rows [C, d] of any length. labels: [n].
        target: gives the targets' logits t [n] of their cosines and the norms.
        scale: s; ``None`` takes each embedding's norm. also: a scalar logit that joins every denominator.
        chunk: rows at a time; ``"auto"``: what takes 44 MB, and half of it each time memory runs out.

    >>> x, w = torch.eye(2), torch.eye(2)
    >>> loss = cosine_softmax_loss(x, torch.ones(2), w, torch.tensor([0, 1]), lambda c, n: c, scale=1.0, weights=torch.full((2,), 0.5))
    >>> round(loss.item(), 4)
    0.3133
    """
    rows = unit * (norms[:, None] if scale is None else scale)
    return _apply(rows, unit, norms, weight, labels, target, weights, also, chunk, torch.is_grad_enabled())


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        rows, unit, norms, weight, labels, target, weights, also, chunk, grad = arguments
        wanted = grad and any(ctx.needs_input_grad)
        goal = _goal(unit, norms, weight, labels, target)
        loss, ctx.found = _passes(rows, unit, norms, weight, labels, goal, weights, also, chunk, wanted)
        ctx.save_for_backward(rows, unit, norms, weight, labels, weights, also)
        ctx.goal, ctx.chunk = goal, chunk
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        if ctx.found is None:  # a second backward: the first gave its gradients away
            rows, unit, norms, weight, labels, weights, also = ctx.saved_tensors
            ctx.found = _passes(rows, unit, norms, weight, labels, ctx.goal, weights, also, ctx.chunk, True)[
                1
            ]
        found, ctx.found = ctx.found, None
        upstream = grads[0]
        d_rows, d_unit, d_norms, d_weight, d_also = (
            None if each is None else each.mul_(upstream.to(each.dtype)) for each in found
        )
        return d_rows, d_unit, d_norms, d_weight, None, None, None, d_also, None, None


# A compiler that takes this autograd function apart may mistake its gradients (torch 2.13, aot_eager: those of ``unit`` beside ``also``); it has nothing to fuse here.
_apply: Any = torch.compiler.disable(_Loss.apply)


def _goal(
    unit: Tensor, norms: Tensor, weight: Tensor, labels: Tensor, target: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The targets' cosines, the norms, and the logits of both, which random margins draw once."""
    mine = weight.detach()[labels].to(unit.dtype)
    own = ((unit.detach() * mine).sum(1) / mine.norm(dim=1)).clamp(-1, 1)
    with torch.enable_grad(), torch.autocast(unit.device.type, enabled=False):
        cosines, sizes = own.requires_grad_(), norms.detach().requires_grad_()
        return cosines, sizes, target(cosines, sizes)


@torch.no_grad()
def _passes(
    rows: Tensor, unit: Tensor, norms: Tensor, weight: Tensor, labels: Tensor, goal: tuple[Tensor, Tensor, Tensor], weights: Tensor,
    also: Tensor | None, chunk: int | str, wanted: bool,
) -> tuple[Tensor, Any]:  # fmt: skip
    """The loss, and the gradients to rows, unit, norms, weight and also."""
    kind = rows.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        lengths = class_lengths(weight)
        inverse = lengths.to(rows.dtype).reciprocal()
        matrix = weight.to(low)
        goals = goal[2].detach()
        d_rows, d_goals = torch.empty_like(rows), torch.empty_like(goals)
        d_weight = torch.zeros_like(weight) if wanted else weight
        d_also = None if also is None else torch.zeros_like(also)

        def part(start: int, stop: int) -> Tensor:
            x, t, w, y = (each[start:stop] for each in (rows, goals, weights, labels))
            at = torch.arange(stop - start, device=x.device)
            shares = (x.to(low) @ matrix.T).to(x.dtype).mul_(inverse)
            shares[at, y] = t
            top = shares.amax(1)
            top = top if also is None else torch.maximum(top, also)
            shares.sub_(top[:, None]).exp_()
            total = shares.sum(1)
            besides = None if also is None else (also - top).exp()
            total = total if besides is None else total + besides
            loss = (w * (total.log() + top - t)).sum()
            if wanted:
                each = w / total
                d_goals[start:stop] = each * shares[at, y] - w
                if besides is not None and d_also is not None:
                    d_also.add_((each * besides).sum())
                shares[at, y] = 0
                shares.mul_(inverse)
                torch.mul((shares.to(low) @ matrix).to(x.dtype), each[:, None], out=d_rows[start:stop])
                _add_product(d_weight, shares, x * each[:, None], low)
            return loss

        most, kind_of = max(1, _ENTRIES // len(weight)), (weight.shape, weight.dtype, weight.device)
        loss = sum(
            auto_batch(part, len(rows), batch_size=chunk, memory=(_Loss, kind_of), most=most),
            rows.new_zeros(()),
        )
        if not wanted:
            return loss, None
        d_own, d_norms = torch.autograd.grad(
            goal[2], goal[:2], d_goals, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        along = (d_own * inverse[labels])[:, None]
        d_unit = along * weight[labels].to(unit.dtype)
        d_weight.index_add_(0, labels, (along * unit).to(d_weight.dtype))
        for direction, length, gradient in zip(weight.split(512), lengths.split(512), d_weight.split(512)):
            part_along = (direction * gradient).sum(1) / length.square()
            gradient.addcmul_(direction, part_along[:, None], value=-1)
        return loss, (d_rows, d_unit, d_norms, d_weight, d_also)


def _add_product(into: Tensor, shares: Tensor, rows: Tensor, low: torch.dtype) -> None:
    if low == into.dtype == shares.dtype:
        into.addmm_(shares.T, rows)
    else:
        into.add_((shares.to(low).T @ rows.to(low)).to(into.dtype))


def class_lengths(weight: Tensor) -> Tensor:
    """The norms of class rows; an error for one without direction."""
    lengths = weight.detach().norm(dim=1)
    require(bool((lengths > 0).all()), "weight: a class centre is zero or NaN, so that it has no direction")
    return lengths
