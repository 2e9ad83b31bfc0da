"""Where a search may go: balls of the l1 norm, spheres, and the rate of its steps.

Fang et al. 2023, arXiv 2308.04699, section 1.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number

_LONG, _BLOCK, _SAMPLE, _MOST = 2**16, 2**16, 2**13, 200


def l1_projection(x: Tensor, radius: float, *, warm: Tensor | None = None) -> Tensor:
    """The nearest point with Σ |y| <= radius, sample by sample (axis 0), exactly.

    y = sign(x) max(|x| - tau, 0), where Newton's method finds the tau of Σ max(|x| - tau, 0) = radius: the sum is convex and made of straight pieces, so that
    a few passes end at the root itself, where sorting takes n log n.

    Args:
        warm: the tau of each sample in the step before [n], from which the search starts and which is overwritten with the one found.

    >>> l1_projection(torch.tensor([[3.0, 1.0]]), 2.0).tolist()
    [[2.0, 0.0]]
    """
    number("radius", radius, low=0, open_low=True)
    flat = x.flatten(1)
    if flat.device.type == "cpu" and flat.shape[1] >= _LONG:
        rows, starts = [], [0.0] * len(flat) if warm is None else warm.tolist()
        for k, (row, start) in enumerate(zip(flat, starts)):
            tau = _threshold(row, radius, start)
            if warm is not None:
                warm[k] = tau
            rows.append(F.softshrink(row, tau) if tau > 0 else row)
        return torch.stack(rows).view(x.shape)
    size = flat.abs()
    total, count = size.sum(1), flat.new_full((len(flat),), float(flat.shape[1]))
    inside = total < radius
    tau = torch.zeros_like(total) if warm is None else warm.clone()
    for _ in range(_MOST):
        above = size > tau[:, None]
        held = above.sum(1).to(x.dtype)
        # Beyond every entry there is no slope to follow: begin below all of them.
        fresh = torch.where(
            held > 0, ((size * above).sum(1) - radius) / held.clamp(min=1), (total - radius) / count
        )
        settled = bool((fresh == tau).all())
        tau = fresh
        if settled:
            break
    if warm is not None:
        warm.copy_(tau)
    found = flat.sign() * (size - tau[:, None]).clamp(min=0)
    return torch.where(inside[:, None], flat, found).view(x.shape)


def _threshold(row: Tensor, radius: float, start: float) -> float:
    """The tau of one long row, 0 inside the ball; each pass goes through blocks that stay in the processor's cache, and sums them in double precision."""
    row = row.detach()
    blocks, tau = row.split(_BLOCK), max(start, 0.0)
    if tau == 0 and len(row) >= 4 * _SAMPLE:  # every so many-th entry gives a start near the root
        some = row[:: len(row) // _SAMPLE].contiguous()
        tau = _threshold(some, radius * len(some) / len(row), 0.0)
    for _ in range(_MOST):
        sums, held = [], []
        for block in blocks:
            over = F.softshrink(block, tau)
            sums.append(torch.linalg.vector_norm(over, 1))
            held.append(torch.count_nonzero(over))
        count = int(torch.stack(held).sum())
        if count == 0 and tau > 0:  # beyond every entry there is no slope to follow
            tau = 0.0
            continue
        fresh = tau + (float(torch.stack(sums).double().sum()) - radius) / max(count, 1)
        if not math.isfinite(fresh) or (fresh <= 0 and tau == 0):
            return 0.0
        fresh = max(fresh, 0.0)
        # Rounded sums of the same entries: nearer than one step of their precision there is nothing to find.
        if abs(fresh - tau) <= torch.finfo(row.dtype).eps * tau:
            return fresh
        tau = fresh
    return tau


def to_sphere(moved: Tensor, before: Tensor, *, eps: float = 1e-9) -> Tensor:
    """``moved`` at the radius of ``before``: over axes from 2 on, or over everything where there are none.

    >>> to_sphere(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).round(decimals=4).tolist()
    [[1.0, 0.0]]
    """
    axes = tuple(range(2, moved.ndim)) or tuple(range(moved.ndim))
    radius = lambda v: (v.square().sum(axes, keepdim=True) + eps).sqrt()  # noqa: E731
    return moved * radius(before) / radius(moved)


def rate(share: float, peak: float, *, down: float = 0.75, up: float = 0.05) -> float:
    """The learning rate at a share of the steps: a linear rise over ``up``, a cosine fall over the last ``down``.

    >>> rate(0.0, 0.1), rate(0.2, 0.1)
    (0.0, 0.1)
    """
    fall = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (1 - share) / down))
    return peak * fall * min(1.0, share / up)
