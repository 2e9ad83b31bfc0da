"""γ(x) itself: how far the linear model of the gradient is right, measured, and its bound for self-concordant functions.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), Definition 1. γ(x) is the largest γ with ‖∇f(x+h) - ∇f(x) - Hh‖_* ≤ ‖g‖_*‖h‖/γ for
all h with ‖h‖ ≤ γ and <Hh,h> + <g,h> ≤ 0. What is not obvious: that is an infimum without γ in its condition,

    γ(x) = inf over such h of max(‖h‖, ‖g‖_*‖h‖ / ‖∇f(x+h) - ∇f(x) - Hh‖_*),

so that sampled directions give an upper bound, which is exact in one dimension up to the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.linear_algebra import Metric
from lineament.optim.gns.solvers import as_form

# e^t = 1 + 2t: the constant of quasi-self-concordance.
QSC = 1.2564312086261697


def smoothness(
    gradient: Callable[[Tensor], Tensor],
    x: Float[Tensor, "n"],
    hess: Any = None,
    *,
    metric: Any = None,
    directions: int = 200,
    grid: int = 60,
    seed: int = 0,
) -> float:
    """γ(x) from random directions: an upper bound in many dimensions, γ(x) itself in one.

    Args:
        gradient: ∇f as a function of x. x: the point, (n,). hess: H(x) as :func:`minimize` takes it (a matrix, diagonal, form), ``None`` for 0.
        metric: B. directions: how many are tried, besides -g and the Newton-like ones. grid: points along each.

    Returns:
        γ(x), ``inf`` where the model is exact.

    Raises:
        InputError: a gradient of zero or not finite at x.

    >>> x = torch.tensor([1.5], dtype=torch.float64)
    >>> round(smoothness(lambda x: x.abs() * x / 2, x, x.abs()), 4)  # |x|³/6 with its Hessian: 2x
    3.0
    """
    checks.tensor("x", x, shape=("n",), floating=True)
    for name, value in (("directions", directions), ("grid", grid)):
        checks.number(name, value, low=1, integer=True)
    g = gradient(x)
    checks.tensor("gradient", g, shape=(len(x),))
    B = Metric(metric, x)
    z = B.inverse(g)
    norm = B.dual(g, z)
    checks.require(norm > 0, "x: the gradient is zero there, and γ(x) is defined where it is not")
    H = as_form(hess, x)

    def error(change: Tensor) -> float:
        """How far the linear model is off, in the dual norm."""
        off = gradient(x + change) - g - H.product(change)
        return B.dual(off, B.inverse(off))

    # The error of steps so short that only rounding is left in it: no smaller one says anything of the model.
    lines = [(d, float(H.product(d) @ d), float(g @ d)) for d in _directions(B, z, directions, seed)]
    d, curve, slope = lines[0]
    tiny = 1e-10 * -slope / curve if curve > 0 else 1e-13 * B.norm(x)
    noise = 10 * max(torch.finfo(x.dtype).eps * norm, *(error(k * tiny * d) for k in (1, 2, 3, 5, 7)))
    best = math.inf
    for d, curve, slope in lines:
        best = min(best, _along(error, noise, norm, curve, slope, d, grid, best))
    return best


def _directions(B: Metric, z: Tensor, count: int, seed: int) -> list[Tensor]:
    """Unit directions of descent: -B⁻¹g, and random ones."""
    if len(z) == 1:
        count = 0
    generator = torch.Generator().manual_seed(seed)
    found = [-z]
    for _ in range(count):
        d = B.half_t(torch.randn(len(z), generator=generator, dtype=torch.float64).to(z))
        found.append(d if float(B.apply(d) @ z) < 0 else -d)
    return [d / B.norm(d) for d in found]


def _along(
    error: Callable[[Tensor], float],
    noise: float,
    norm: float,
    curve: float,
    slope: float,
    d: Tensor,
    grid: int,
    best: float,
) -> float:
    """The infimum along t d, 0 < t ≤ the edge of the region: a logarithmic grid, then golden section around its smallest value."""
    edge = -slope / curve if curve > 0 else math.inf
    # No t above the smallest value found matters, for max(t, .) ≥ t.
    top = min(edge, best, 1e6 * norm)

    def value(t: float) -> float:
        off = error(t * d)
        return max(t, norm * t / off) if off > noise else math.inf

    ratio = 1e-8 ** (1 / max(grid - 1, 1))
    points, values, k = [], [], 0
    # The first pass finds the scale; the infimum may be the limit t -> 0, so the second goes 8 decades below it.
    for _ in range(2):
        points = [top * ratio**k for k in range(grid)]
        values = [value(t) for t in points]
        k = min(range(grid), key=values.__getitem__)
        if not math.isfinite(values[k]):
            return math.inf
        top = min(top, values[k])
    low, high = points[min(k + 1, grid - 1)], points[max(k - 1, 0)]
    # Golden section: max(t, q(t)) falls to the crossing and rises behind it.
    for _ in range(60):
        a, b = high - (high - low) * 0.6180339887498949, low + (high - low) * 0.6180339887498949
        low, high = (low, b) if value(a) <= value(b) else (a, high)
    return min(values[k], value(0.5 * (low + high)))


def self_concordant(M: float) -> float:
    """t*/M with e^{t*} = 1 + 2t*: the bound for an exact Hessian of a quasi-self-concordant function, wherever x is.

    >>> round(self_concordant(2.0), 4)
    0.6282
    """
    return QSC / checks.number("M", M, low=0, open_low=True)
