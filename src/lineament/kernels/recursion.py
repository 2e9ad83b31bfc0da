"""Kernels of infinitely wide networks at any depth, in logarithms, and their limit at infinite depth.

Radhakrishnan, Belkin, Uhler 2022, arXiv 2204.14126, sections 1.1 and 2.1. Σ_l = φ̂(Σ_{l-1}), K_l = Σ_l + K_{l-1} φ̂'(Σ_{l-1}), Σ_0 = K_0 = ξ.
A point is carried as ξ, δ = 1 - ξ and ln ξ at once, each as precise as it can be; K is carried as ln(K / Σ), which stays small where
both kernels are e^(-10^12).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lineament.core.checks import number, require
from lineament.kernels.duals import Dual, dual_of

Array = np.ndarray
# Below this the leading term is φ̂ to the last bit.
_TINY = 1e-20


@dataclass(frozen=True)
class Points:
    """Cosines, carried as ξ, 1 - ξ and ln ξ."""

    xi: Array
    delta: Array
    log: Array

    @classmethod
    def of(cls, *, xi: Any = None, delta: Any = None) -> Points:
        """From cosines in [0, 1], or from δ = 1 - ξ where they are close to 1."""
        require((xi is None) != (delta is None), "xi, delta: expected one of them, a cosine or 1 less it")
        given = np.asarray(delta if xi is None else xi, dtype=float)
        require(
            bool(((given >= 0) & (given <= 1)).all()),
            f"{'delta' if xi is None else 'xi'}: expected numbers in [0, 1]; the theory is about cosines that are not negative",
        )
        with np.errstate(divide="ignore"):
            # In extended precision where the machine has it: at depth 40 a logarithm has been multiplied by 2^40.
            if xi is None:
                return cls(1 - given, given, np.log1p(-given.astype(np.longdouble)))
            return cls(given, 1 - given, np.log(given.astype(np.longdouble)))


def through(dual: Dual, at: Points) -> Points:
    """One layer: φ̂ of every point."""
    delta = dual.complement(at.delta)
    xi = np.where(delta < 0.5, 1 - delta, dual.value(at.xi))
    k, c = dual.lead
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.where(delta < 0.5, np.log1p(-delta), np.log(xi))
        if k:
            low = np.full_like(at.xi, True, dtype=bool) if dual.exact_power else at.xi < _TINY
            log = np.where(low, np.log(np.longdouble(c)) + k * at.log, log)
    return Points(xi, delta, log)


def elasticity(dual: Dual, at: Points) -> Array:
    """ξ φ̂'(ξ) / φ̂(ξ), which is k where φ̂ is c ξ^k."""
    k = dual.lead[0]
    if dual.exact_power:
        return np.full_like(at.xi, float(k))
    low = at.xi < _TINY
    safe = np.where(low, 1.0, at.xi)
    slope = dual.slope(safe)
    if dual.slope_near is not None:
        slope = np.where(at.delta < 0.5, dual.slope_near(at.delta), slope)
    return np.where(low, float(k), safe * slope / dual.value(safe))


def log_nngp(activation: Any, depth: int, *, xi: Any = None, delta: Any = None) -> Array:
    """ln Σ_L at cosines ``xi``, or at 1 - ``delta``.

    >>> round(float(log_nngp("square", 40, xi=0.5)) / math.log(2) / 2**40, 6)
    -1.0
    """
    return _logs(activation, depth, xi, delta)[0].astype(float)


def log_ntk(activation: Any, depth: int, *, xi: Any = None, delta: Any = None) -> Array:
    """ln K_L at cosines ``xi``, or at 1 - ``delta``; at 1 it is ln(1 + b + ... + b^L).

    >>> round(float(log_ntk("relu", 3, xi=1.0)), 6) == round(math.log(4), 6)
    True
    """
    nngp, ratio = _logs(activation, depth, xi, delta)
    return (nngp + ratio).astype(float)


def _logs(activation: Any, depth: int, xi: Any, delta: Any) -> tuple[Array, Array]:
    """ln Σ_L and ln(K_L / Σ_L)."""
    dual = dual_of(activation)
    number("depth", depth, low=0, integer=True)
    at = Points.of(xi=xi, delta=delta)
    if dual.lead[0] > 1:
        at = Points(at.xi.astype(np.longdouble), at.delta.astype(np.longdouble), at.log)
    ratio = np.zeros_like(at.xi)
    for _ in range(depth):
        with np.errstate(divide="ignore"):
            ratio = np.logaddexp(0, ratio + np.log(elasticity(dual, at)))
        at = through(dual, at)
    return at.log, ratio


def log_psi(activation: Any, *, xi: Any = None, delta: Any = None) -> Array:
    """ln ψ, Koenigs' function: ψ(φ̂(ξ)) = a ψ(ξ), ψ'(0) = 1; the limit of Σ_L / a^L, and of K_L / ((L + 1) a^L).

    Raises:
        InputError: φ̂(0) > 0, or a not in (0, 1): then there is no such limit (see :func:`regime`).

    >>> round(float(np.exp(log_psi("erf", xi=0.5))), 4)
    0.5687
    """
    dual = dual_of(activation)
    a = dual.a
    require(
        dual.at_zero == 0 and 0 < a < 1,
        f"activation: {dual.name} has φ̂(0) = {dual.at_zero:g} and φ̂'(0) = {a:g}; the singular limit needs φ̂(0) = 0 and 0 < φ̂'(0) < 1",
    )
    at = Points.of(xi=xi, delta=delta)
    steps = 0
    # A point at 1 stays there: ψ(1) is infinite.
    moving = at.delta > 0
    while steps < 100_000:
        gap = np.abs(dual.value(np.where(moving, at.xi, 0.0)) - a * np.where(moving, at.xi, 0.0))
        # Some units in the last place: closer than the rounding of φ̂ it need never come.
        if bool((gap <= 2e-15 * a * at.xi).all()):
            break
        at, steps = through(dual, at), steps + 1
    with np.errstate(invalid="ignore"):
        return np.where(moving, at.log - steps * math.log(a), math.inf).astype(float)
