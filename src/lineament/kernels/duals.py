"""What does an activation do to the angle between two inputs? Dual activations.

Radhakrishnan, Belkin, Uhler, "Wide and deep neural networks achieve optimality for classification", PNAS 2023, arXiv 2204.14126, section 1.3. The
dual of φ is φ̂(ξ) = E[φ(u) φ(v)] for standard normal u, v of correlation ξ, with φ scaled so that φ̂(1) = 1. Near ξ = 1 the distance δ = 1 - ξ is
carried through (1 - φ̂(1 - δ) without a difference of near numbers), near 0 the logarithm, so that nothing is lost at either end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lineament.core.checks import InputError, number, require, show, suggest
from lineament.kernels.hermite import hermite_coefficients

Array = np.ndarray


@dataclass(frozen=True)
class Dual:
    """A dual activation, φ̂(1) = 1.

    Attributes:
        value, slope: φ̂ and φ̂' of ξ in [0, 1], each number as precise as ``xi`` is.
        complement: 1 - φ̂(1 - δ) of δ.
        slope_near: φ̂'(1 - δ) of δ, where φ̂' is too steep at 1 to be found from ξ.
        lead: (k, c): φ̂(ξ) → c ξ^k as ξ → 0.
        tail: the part of E φ² that a series leaves out.
        scale: what φ was divided by to have E φ² = 1.
        weights: of a polynomial, its coefficients, which are the squares of φ's Hermite coefficients.

    >>> dual = dual_of("erf")
    >>> round(float(dual.value(np.array(0.5))), 6), round(dual.a, 4), round(dual.b, 4)
    (0.465704, 0.9136, 1.2257)
    """

    name: str
    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    complement: Callable[[Array], Array]
    lead: tuple[int, float]
    tail: float = 0.0
    scale: float = 1.0
    weights: tuple[float, ...] = ()
    slope_near: Callable[[Array], Array] | None = None

    @property
    def exact_power(self) -> bool:
        """Whether φ̂ is ξ^k everywhere."""
        return sum(c > 0 for c in self.weights) == 1

    @property
    def at_zero(self) -> float:
        """φ̂(0) = (E φ)²."""
        return float(self.value(np.array(0.0)))

    @property
    def a(self) -> float:
        """φ̂'(0) = (E φ')²."""
        return float(self.slope(np.array(0.0)))

    @property
    def b(self) -> float:
        """φ̂'(1) = E φ'²."""
        return float(self.slope(np.array(1.0)))


def polynomial(
    coefficients: Sequence[float] | Array, name: str = "", *, tail: float = 0.0, scale: float = 1.0
) -> Dual:
    """Σ c_k ξ^k with c_k >= 0, divided by their sum.

    >>> float(polynomial([0, 0.5, 0.5]).value(np.array(0.5)))
    0.375
    """
    c = np.asarray(coefficients, dtype=float)
    require(
        c.ndim == 1 and len(c) > 0 and bool(np.isfinite(c).all()) and bool((c >= 0).all()) and c.sum() > 0,
        f"coefficients: got {show(coefficients)}, expected non-negative numbers, the squares of Hermite coefficients",
    )
    c = c / c.sum()
    k = int(np.flatnonzero(c)[0])
    # 1 - ξ^j = δ (1 + ξ + ... + ξ^(j-1)), so that nothing is subtracted.
    above = c.sum() - np.cumsum(c) if len(c) < 2 else np.cumsum(c[:0:-1])[::-1]

    def value(xi: Array) -> Array:
        return np.polynomial.polynomial.polyval(xi, c)

    def slope(xi: Array) -> Array:
        return (
            np.polynomial.polynomial.polyval(xi, np.polynomial.polynomial.polyder(c))
            if len(c) > 1
            else xi * 0.0
        )

    def complement(delta: Array) -> Array:
        return delta * np.polynomial.polynomial.polyval(1 - delta, above)

    return Dual(
        name or "polynomial", value, slope, complement, (k, float(c[k])), tail, scale, tuple(c.tolist())
    )


def monomial(degree: int) -> Dual:
    """ξ^k, the dual of the normalised Hermite polynomial h_k.

    >>> monomial(2).b
    2.0
    """
    number("degree", degree, low=1, integer=True)
    return polynomial([0] * degree + [1], f"h{degree}")


def sine(amplitude: float = 1.0) -> Dual:
    """sinh(Aξ) / sinh(A), the dual of sin(√A x).

    >>> round(sine(2.676).a, 4)
    0.3702
    """
    A = float(number("amplitude", amplitude, low=0, open_low=True))
    whole = math.expm1(-2 * A)

    def value(xi: Array) -> Array:
        return np.exp(-A * (1 - xi)) * np.expm1(-2 * A * xi) / whole

    def slope(xi: Array) -> Array:
        return -A * np.exp(-A * (1 - xi)) * (1 + np.exp(-2 * A * xi)) / whole

    def complement(delta: Array) -> Array:
        # 2 cosh(A (1 - δ/2)) sinh(Aδ/2) / sinh(A)
        return (1 + np.exp(-A * (2 - delta))) * np.expm1(-A * delta) / whole

    return Dual(f"sine {A:g}", value, slope, complement, (1, float(slope(np.array(0.0)))))


def cosine(amplitude: float = 1.0) -> Dual:
    """cosh(Aξ) / cosh(A), the dual of cos(√A x).

    >>> round(cosine(1.0).b, 4)
    0.7616
    """
    A = float(number("amplitude", amplitude, low=0, open_low=True))
    whole = 1 + math.exp(-2 * A)

    def value(xi: Array) -> Array:
        return np.exp(-A * (1 - xi)) * (1 + np.exp(-2 * A * xi)) / whole

    def slope(xi: Array) -> Array:
        return -A * np.exp(-A * (1 - xi)) * np.expm1(-2 * A * xi) / whole

    def complement(delta: Array) -> Array:
        # 2 sinh(A (1 - δ/2)) sinh(Aδ/2) / cosh(A)
        return np.expm1(-A * (2 - delta)) * np.expm1(-A * delta) / whole

    return Dual(f"cosine {A:g}", value, slope, complement, (0, float(value(np.array(0.0)))))


def erf() -> Dual:
    """arcsin(2ξ/3) / arcsin(2/3).

    >>> round(erf().b, 4)
    1.2257
    """
    c, whole = 2 / 3, math.asin(2 / 3)

    def value(xi: Array) -> Array:
        return np.arcsin(c * xi) / whole

    def slope(xi: Array) -> Array:
        return c / np.sqrt(1 - (c * xi) ** 2) / whole

    def complement(delta: Array) -> Array:
        # arcsin x - arcsin y = arcsin(x √(1-y²) - y √(1-x²)), and that difference as (x² - y²) over the sum
        y = c * (1 - delta)
        gap = c * c * delta * (2 - delta) / (c * np.sqrt(1 - y * y) + y * math.sqrt(1 - c * c))
        return np.arcsin(gap) / whole

    return Dual("erf", value, slope, complement, (1, c / whole))


def leaky_relu(negative_slope: float = 0.0) -> Dual:
    """The dual of max(x, 0) + α min(x, 0): relu for α = 0, the absolute value for α = -1.

    >>> round(float(leaky_relu().value(np.array(0.0))), 6), leaky_relu().b
    (0.31831, 1.0)
    """
    alpha = float(number("negative_slope", negative_slope))
    bend, line = (1 - alpha) ** 2 / (1 + alpha**2), 2 * alpha / (1 + alpha**2)

    def value(xi: Array) -> Array:
        angle = np.arccos(np.clip(xi, -1, 1))
        return bend * (np.sqrt(np.clip(1 - xi * xi, 0, None)) + (math.pi - angle) * xi) / math.pi + line * xi

    def slope(xi: Array) -> Array:
        return bend * (math.pi - np.arccos(np.clip(xi, -1, 1))) / math.pi + line

    def angle_of(delta: Array) -> Array:
        return 2 * np.arcsin(np.sqrt(np.clip(delta / 2, 0, 1)))

    def complement(delta: Array) -> Array:
        return (bend + line) * delta - bend * _sine_less(angle_of(delta)) / math.pi

    def slope_near(delta: Array) -> Array:
        return bend * (math.pi - angle_of(delta)) / math.pi + line

    name = {0.0: "relu", -1.0: "abs"}.get(alpha, f"leaky relu {alpha:g}")
    start = float(value(np.array(0.0)))
    return Dual(name, value, slope, complement, (0, start), slope_near=slope_near)


def _sine_less(angle: Array) -> Array:
    """sin θ - θ cos θ, by its series Σ (-1)^(n+1) 2n θ^(2n+1) / (2n+1)! where the difference would cancel."""
    small = np.minimum(angle, 1.0)
    series = sum(
        (-1) ** (n + 1) * 2 * n * small ** (2 * n + 1) / math.factorial(2 * n + 1) for n in range(1, 11)
    )
    return np.where(angle < 1, series, np.sin(angle) - angle * np.cos(angle))


def exponential(rate: float = 1.0) -> Dual:
    """exp(c² (ξ - 1)), the dual of exp(c x).

    >>> exponential(0.5).b
    0.25
    """
    c2 = float(number("rate", rate)) ** 2
    require(c2 > 0, "rate: got 0, the constant activation")
    return Dual(
        f"exp {rate:g}",
        lambda xi: np.exp(c2 * (xi - 1)),
        lambda xi: c2 * np.exp(c2 * (xi - 1)),
        lambda delta: -np.expm1(-c2 * delta),
        (0, math.exp(-c2)),
    )


def moebius(slope: float) -> Dual:
    """aξ / (1 - (1-a) ξ): Hermite weights a (1-a)^(k-1); all iterates and the Koenigs function ξ / (1-ξ) are explicit.

    >>> round(moebius(0.3).b, 4)
    3.3333
    """
    a = float(number("slope", slope, low=0, high=1, open_low=True, open_high=True))
    return Dual(
        f"moebius {a:g}",
        lambda xi: a * xi / (1 - (1 - a) * xi),
        lambda xi: a / (1 - (1 - a) * xi) ** 2,
        lambda delta: delta / (a + (1 - a) * delta),
        (1, a),
    )


NAMED: dict[str, Callable[..., Dual]] = {
    "erf": erf,
    "relu": leaky_relu,
    "leaky_relu": lambda: leaky_relu(0.01),
    "abs": lambda: leaky_relu(-1.0),
    "sin": sine,
    "cos": cosine,
    "exp": exponential,
    "square": lambda: monomial(2),
    "cube": lambda: monomial(3),
}


def dual_of(activation: Any, *, terms: int = 80) -> Dual:
    """The dual of an activation.

    Args:
        activation: a :class:`Dual`; a name ("erf", "relu", "leaky_relu", "abs", "sin", "cos", "exp", "square", "cube", or of
            ``torch.nn.functional``: "gelu", "tanh", "silu", ...); an ``nn.Module`` or a function of a tensor.
        terms: Hermite coefficients of an activation without a closed form; ``tail`` says what they leave out of E φ². E φ'² is right also where there are kinks.

    Raises:
        InputError: an unknown name, a step (its slope has no finite norm), an activation that cannot be normalised.

    >>> dual_of("tanh").tail < 1e-6, dual_of("square").a
    (True, 0.0)
    """
    if isinstance(activation, Dual):
        return activation
    if isinstance(activation, str):
        if activation in NAMED:
            return NAMED[activation]()
        from torch import nn

        functional = getattr(nn.functional, activation, None)
        if activation in ("step", "sign", "heaviside", "threshold", "hardtanh_"):
            raise InputError(
                f"activation: {activation!r} has a jump, so that E φ'² is infinite and no depth limit exists; expected a continuous activation"
            )
        if not callable(functional):
            raise InputError(
                f"activation: got {activation!r}{suggest(activation, [*NAMED, 'gelu', 'tanh', 'silu', 'sigmoid', 'softplus'])}"
            )
        activation = functional
    found = hermite_coefficients(activation, terms)
    require(
        found.slope_moment < math.inf,
        f"activation: {show(activation)} has a jump, so that E φ'² is infinite and no depth limit exists; expected a continuous activation",
    )
    scale = math.sqrt(found.second_moment)
    if found.negative_slope is not None:
        return replace(leaky_relu(found.negative_slope), scale=scale)
    weights = found.coefficients**2 / found.second_moment
    # What quadrature leaves of a coefficient that is zero: an odd activation has φ̂(0) = 0, not 1e-33.
    weights[weights < 1e-26] = 0.0
    tail = max(0.0, 1 - float(weights.sum()))
    steep = found.slope_moment / found.second_moment - float(np.arange(terms) @ weights)
    if tail > 1e-12 and terms * tail < steep < 1e4 * tail:
        # The terms of a kink go on: two more have the value and the slope at 1 of all that are left out.
        low = int(steep / tail)
        weights = np.append(weights, np.zeros(low + 2 - terms))
        weights[low:] = (low + 1) * tail - steep, steep - low * tail
    name = getattr(activation, "__name__", type(activation).__name__)
    return polynomial(weights, name, tail=tail, scale=scale)
