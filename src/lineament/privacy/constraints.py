"""Where a search may go: balls of the l1 norm, spheres, and the rate of its steps.

Fang et al. 2023, arXiv 2308.04699, section 1.4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lineament.core.checks import number


def l1_projection(x: Tensor, radius: float) -> Tensor:
    """The nearest point with Σ |y| <= radius, sample by sample (axis 0), exactly.

    >>> l1_projection(torch.tensor([[3.0, 1.0]]), 2.0).tolist()
    [[2.0, 0.0]]
    """
    number("radius", radius, low=0, open_low=True)
    flat = x.flatten(1)
    size = flat.abs()
    ordered, total = size.sort(1, descending=True).values, size.sort(1, descending=True).values.cumsum(1)
    place = torch.arange(1, flat.shape[1] + 1, device=x.device, dtype=x.dtype)
    last = (place * ordered > total - radius).to(x.dtype).mul(place).argmax(1, keepdim=True)
    threshold = (total.gather(1, last) - radius) / (last + 1)
    found = flat.sign() * (size - threshold).clamp(min=0)
    inside = size.sum(1, keepdim=True) < radius
    return torch.where(inside, flat, found).view(x.shape)


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
