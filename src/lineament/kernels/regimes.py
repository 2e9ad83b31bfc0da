"""Which classifier does an activation become at infinite depth? Nearest neighbour, majority, or a singular kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy.optimize import brentq

from lineament.core.checks import number, one_of, require
from lineament.core.results import Readable
from lineament.kernels.duals import Dual, dual_of, moebius, polynomial, sine
from lineament.kernels.hermite import hermite_basis


@dataclass(frozen=True)
class Regime(Readable):
    """The limit of an activation's classifier.

    Attributes:
        limit: ``"nearest neighbour"``, ``"singular kernel"``, ``"majority"`` or ``"linear"`` (no limit).
        at_zero, a, b: φ̂(0), φ̂'(0), φ̂'(1).
        exponent: 2s of ψ ~ distance^(-2s), of a singular kernel; the manifold's dimension for which it is optimal.
        fixed_point, slope_there: of a majority vote: where cosines end, and φ̂' there.
        needs_ridge: whether the kernel matrix becomes singular (b < 1).
        meaning: one sentence.
    """

    activation: str
    limit: str
    at_zero: float
    a: float
    b: float
    exponent: float | None
    fixed_point: float | None
    slope_there: float | None
    needs_ridge: bool
    meaning: str

    @property
    def ntk_limit(self) -> float | None:
        """c / (1 - φ̂'(c)): what the tangent kernel of two different points tends to, in a majority vote with b > 1."""
        if self.fixed_point is None or self.slope_there is None or self.fixed_point >= 1:
            return None
        return self.fixed_point / (1 - self.slope_there)


def regime(activation: Any, *, tolerance: float = 1e-9) -> Regime:
    """What an infinitely wide and deep network with this activation does.

    Args:
        activation: as for :func:`~lineament.kernels.dual_of`.
        tolerance: below which φ̂(0) and b - 1 count as zero, and φ̂'(0) beside a φ̂(0) that is not exactly zero.

    >>> regime("relu").limit, regime("erf").limit, regime("square").limit
    ('majority', 'singular kernel', 'nearest neighbour')
    """
    dual = dual_of(activation)
    zero, a, b = dual.at_zero, dual.a, dual.b
    exponent = fixed = there = None
    ridge = False
    if zero > tolerance:
        fixed = fixed_point(dual, tolerance)
        if fixed < 1:
            there = float(dual.slope(np.array(fixed)))
        ridge = b < 1 - tolerance
        limit, meaning = "majority", "it gives every point the most frequent label"
        if ridge:
            meaning += ", and only with a ridge: all points become alike"
    elif a <= tolerance if dual.lead[0] == 0 else dual.lead[0] > 1:
        limit, meaning = "nearest neighbour", "it gives every point the label of its nearest neighbour"
    elif a >= 1 - tolerance:
        limit, meaning = "linear", "it is linear at every depth, so depth has no limit of its own"
    else:
        limit, exponent = "singular kernel", -2 * math.log(a) / math.log(b)
        meaning = f"it weighs every neighbour by distance^-{exponent:.3g}, which is optimal in {exponent:.3g} dimensions"
    return Regime(
        dual.name, limit, zero, a, b, exponent, fixed, there, ridge, f"At infinite depth {meaning}."
    )


def fixed_point(dual: Dual, tolerance: float = 1e-9) -> float:
    """The attracting c < 1 with φ̂(c) = c; 1 where b <= 1.

    >>> round(fixed_point(polynomial([0.2, 0.2, 0, 0, 0.6])), 6)
    0.253077
    """
    if dual.b <= 1 + tolerance:
        return 1.0
    gap = lambda xi: float(dual.value(np.array(xi))) - xi  # noqa: E731
    high = 1 - 1e-3
    while gap(high) >= 0 and 1 - high > 1e-12:
        high = 1 - (1 - high) / 2
    return _root(gap, 0.0, high) if gap(high) < 0 else 1.0


def optimal_dual(dimension: float, family: Literal["hermite", "sine", "moebius"] = "hermite") -> Dual:
    """A dual whose singular kernel is distance^-d, so that its classifier is consistent on a manifold of that dimension: φ̂'(0) = φ̂'(1)^(-d/2).

    Args:
        dimension: d >= 1 of the manifold, one less than that of the space around a sphere.
        family: ``"hermite"`` as published; ``"sine"``: sin(√A x) with A solved for, d > 1; ``"moebius"``: d = 2 only, all in closed form.

    >>> optimal_dual(2).a, optimal_dual(2).b
    (0.5, 2.0)
    """
    one_of("family", family, ("hermite", "sine", "moebius"))
    d = float(number("dimension", dimension, low=1))
    if family == "moebius":
        require(
            d == 2,
            f"dimension: got {d:g}, but the family 'moebius' has 2 only; 'hermite' and 'sine' have any",
        )
        return moebius(0.5)
    if family == "sine":
        require(
            1 < d <= 180,
            f"dimension: got {d:g}, but the family 'sine' has those above 1 and up to 180 only; 'hermite' has any",
        )
        return sine(_amplitude(d))
    name = f"optimal {d:g}"
    if d < 2:
        # A line and a seventh power, as published for d = 1.
        gap = lambda q: math.log(q) + d / 2 * math.log(7 - 6 * q)  # noqa: E731
        q = 0.5 if d == 1 else _root(gap, 1e-6, 1 - 1e-6)
        return polynomial([0, q, 0, 0, 0, 0, 0, 1 - q], name)
    q = 2 ** (-d / 2)
    return polynomial([0, q, 1 - 2 * q, q], name)


def optimal_activation(dimension: float, family: Literal["hermite", "sine", "moebius"] = "hermite") -> Any:
    """The activation itself, a function of tensors or arrays, with E φ² = 1 and the dual :func:`optimal_dual`; Moebius's series up to 2^-60.

    >>> round(optimal_activation(2)(1.0), 4)
    0.1298
    """
    dual = optimal_dual(dimension, family)
    if family == "sine":
        A = _amplitude(float(dimension))
        scale = math.sqrt(2 / -math.expm1(-2 * A))

        def wave(x: Any) -> Any:
            import torch

            return scale * (torch.sin if isinstance(x, torch.Tensor) else np.sin)(math.sqrt(A) * x)

        return wave
    # Moebius's weights a (1-a)^(k-1) at a = 1/2.
    weights = (0.0, *(0.5**k for k in range(1, 61))) if family == "moebius" else dual.weights

    def sum_of_hermite(x: Any) -> Any:
        return sum(math.sqrt(c) * h for c, h in zip(weights, hermite_basis(x, len(weights))))

    return sum_of_hermite


def _amplitude(dimension: float) -> float:
    """A of the sine whose exponent is the dimension."""
    return _root(lambda A: -math.log(sine(A).a) / math.log(sine(A).b) - dimension / 2, 1e-3, 600.0)


def _root(gap: Callable[[float], float], low: float, high: float) -> float:
    found: Any = brentq(gap, low, high, xtol=1e-16)
    return float(found)
