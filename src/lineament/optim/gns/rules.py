"""How strongly to regularise and when to accept: the adaptive rules that the paper compares, one line of mathematics each.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710), Algorithm 3, and the rules of section 2.4 beside it. A rule holds no state: one
number (γ, M or L) goes in and comes out. A trial is judged by the values that were measured, never by a line search.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.solvers import Spectral, System

_EPS = torch.finfo(torch.float64).eps


@dataclass(slots=True)
class Point:
    """f, the gradient g, z = B⁻¹g and ‖g‖_* at x."""

    x: Any
    f: float
    g: Any
    z: Any
    norm: float


@dataclass(slots=True)
class Trial:
    """A step h from ``old`` to ``new`` with the λ that made it; ``model`` is the rule's own prediction of f_new - f."""

    old: Point
    new: Point
    h: Any
    lam: float
    model: float = 0.0
    eps: float = _EPS

    @property
    def rounding(self) -> float:
        """What rounding may do to a difference of two values of f."""
        return 4 * self.eps * max(1.0, abs(self.old.f))


class Rule(Protocol):
    """One number and three decisions."""

    @property
    def start(self) -> float: ...
    def step(self, number: float, system: System, old: Point) -> tuple[Tensor | None, float, float]:
        """(h or None, λ, model)."""
        ...

    def accepts(self, trial: Trial) -> bool: ...
    def grow(self, number: float) -> float: ...
    def shrink(self, number: float) -> float: ...
    def gamma(self, number: float, lam: float, norm: float) -> float: ...


@dataclass(frozen=True)
class Smoothness:
    """Gradient-normalised smoothness: λ = ‖g‖_* / γ, accepted when f - f_new ≥ ‖g_new‖_*² / (8λ).

    Args:
        start: γ_0, in units of the step. growth, shrinkage: factors of γ after an accepted and a rejected probe.
        least, most: bounds of γ. ``most`` keeps λ from vanishing where γ doubles for ever.
        test: ``"decrease"`` as above, or ``"gradient"``: <g_new, -h> ≥ ‖g_new‖_*² / (``constant`` λ), which does not round to
            nothing near a minimum. In the first, a difference of f within rounding is accepted when the gradient did not grow.
        constant: 2 (the lemma's) or 4, for ``test="gradient"``.
        aggressive: after a probe that was accepted at once, try twice the γ in the same iteration as long as f falls further.

    Raises:
        InputError: factors or bounds that are not positive, growth ≤ 1, shrinkage ≥ 1, an unknown test.

    >>> Smoothness().grow(2.0), Smoothness().shrink(2.0)
    (4.0, 1.0)
    """

    start: float = 1.0
    growth: float = 2.0
    shrinkage: float = 0.5
    least: float = 1e-9
    most: float = 1e16
    test: str = "decrease"
    constant: float = 2.0
    aggressive: bool = False

    def __post_init__(self) -> None:
        for name in ("start", "least", "most"):
            checks.number(name, getattr(self, name), low=0, open_low=True)
        checks.number("growth", self.growth, low=1, open_low=True)
        checks.number("shrinkage", self.shrinkage, low=0, high=1, open_low=True, open_high=True)
        checks.one_of("test", self.test, ("decrease", "gradient"))
        checks.require(self.constant in (2, 4), f"constant: got {self.constant!r}, expected 2 or 4")

    def step(self, number: float, system: System, old: Point) -> tuple[Tensor | None, float, float]:
        lam = old.norm / number
        return system.solve(lam), lam, 0.0

    def accepts(self, trial: Trial) -> bool:
        if self.test == "gradient":
            return float(trial.new.g.dot(trial.h)) <= -(trial.new.norm**2) / (self.constant * trial.lam)
        fall = trial.old.f - trial.new.f
        if fall >= trial.new.norm**2 / (8 * trial.lam):
            return True
        return abs(fall) <= trial.rounding and trial.new.norm <= trial.old.norm

    def grow(self, number: float) -> float:
        return min(max(number * self.growth, self.least), self.most)

    def shrink(self, number: float) -> float:
        return number * self.shrinkage

    def gamma(self, number: float, lam: float, norm: float) -> float:
        return number


@dataclass(frozen=True)
class SuperUniversal:
    """Super-universal Newton: λ = M ‖g‖_*^α, accepted when <g_new, -h> ≥ ‖g_new‖_*² / (4λ); M/4 then, 4M otherwise.

    α = 0, 1/2, 1 are made for (quasi-)self-concordant, Lipschitz-Hessian and Lipschitz-gradient functions; with α = 1 the step
    is that of γ = 1/M. Source: Doikov, Mishchenko, Nesterov (2024, arXiv 2208.05888).

    >>> SuperUniversal(alpha=0.5).grow(2.0)
    0.5
    """

    alpha: float = 1.0
    start: float = 1.0
    factor: float = 4.0
    least: float = 1e-5

    def __post_init__(self) -> None:
        checks.number("alpha", self.alpha, low=0, high=1)
        checks.number("start", self.start, low=0, open_low=True)
        checks.number("factor", self.factor, low=1, open_low=True)
        checks.number("least", self.least, low=0, open_low=True)

    def step(self, number: float, system: System, old: Point) -> tuple[Tensor | None, float, float]:
        lam = number * old.norm**self.alpha
        return system.solve(lam), lam, 0.0

    def accepts(self, trial: Trial) -> bool:
        return float(trial.new.g.dot(trial.h)) <= -(trial.new.norm**2) / (4 * trial.lam)

    def grow(self, number: float) -> float:
        return max(number / self.factor, self.least)

    def shrink(self, number: float) -> float:
        return number * self.factor

    def gamma(self, number: float, lam: float, norm: float) -> float:
        return norm / lam if lam else float("inf")


@dataclass(frozen=True)
class _Halving:
    """A number that is halved after an accepted trial and doubled after a rejected one; f may not rise beyond what the trial promises."""

    start: float = 1.0
    least: float = 1e-5

    def __post_init__(self) -> None:
        checks.number("start", self.start, low=0, open_low=True)
        checks.number("least", self.least, low=0, open_low=True)

    def accepts(self, trial: Trial) -> bool:
        fall = trial.old.f - trial.new.f
        return fall >= -trial.model or (abs(fall) <= trial.rounding and trial.new.norm <= trial.old.norm)

    def grow(self, number: float) -> float:
        return max(number / 2, self.least)

    def shrink(self, number: float) -> float:
        return number * 2

    def gamma(self, number: float, lam: float, norm: float) -> float:
        return norm / lam if lam else float("inf")


@dataclass(frozen=True)
class Backtracking(_Halving):
    """The gradient method with backtracking, h = -B⁻¹g / L, accepted when f_new ≤ f - ‖g‖_*² / (2L); L/2 then, 2L otherwise.

    Give it no curvature (``hess=None``): the baseline, preconditioned by the metric.
    """

    def step(self, number: float, system: System, old: Point) -> tuple[Tensor | None, float, float]:
        return system.solve(number), number, -(old.norm**2) / (2 * number)


@dataclass(frozen=True)
class Cubic(_Halving):
    """Adaptive cubic Newton: h minimises <g,h> + <Hh,h>/2 + (M/6)‖h‖³; accepted when f_new ≤ f + that; M/2 then, 2M otherwise.

    The minimiser is global for indefinite H too. One decomposition of (H, B) an iteration.
    Source: Nesterov and Polyak (2006).
    """

    def step(self, number: float, system: System, old: Point) -> tuple[Tensor | None, float, float]:
        assert isinstance(system, Spectral)
        return cubic_step(system, number)


def cubic_step(spectral: Spectral, M: float) -> tuple[Any, float, float]:
    """The global minimiser of <g,h> + <Hh,h>/2 + (M/6)‖h‖³: (h, λ = M‖h‖/2, the model's value there).

    With d and c of :class:`Spectral`, r = ‖h‖ solves r² = Σ c_i² / (d_i + M r / 2)², found by bisection in r above
    max(0, -2 d_min / M); in the hard case the rest of the length goes along the eigenvector of the smallest eigenvalue.

    >>> d, c = torch.zeros(1), torch.tensor([-2.0])
    >>> h, lam, value = cubic_step(Spectral(d, c, lambda y: y), 1.0)
    >>> h.item(), lam
    (2.0, 1.0)
    """
    d, c = spectral.d.double(), spectral.c.double()

    def length(r: float) -> float:
        return float((c / (d + 0.5 * M * r)).norm())

    low = max(0.0, -2 * float(d[0]) / M)
    high = max(2 * low, 1e-300, math.sqrt(2 * float(c.norm()) / M) + 2 * low)
    for _ in range(200):
        r = 0.5 * (low + high)
        if r in (low, high):
            break
        low, high = (r, high) if length(r) > r else (low, r)
    r = high
    y = -c / (d + 0.5 * M * r)
    short = r * r - float(y @ y)
    if float(d[0]) < 0 and short > 1e-8 * r * r:
        y[0] += math.copysign(math.sqrt(short), -float(c[0]) or 1.0)
    value = float(c @ y + 0.5 * (d * y) @ y) + M / 6 * r**3
    return spectral.back(y.to(spectral.c.dtype)), 0.5 * M * r, value


RULES = {"gns": Smoothness, "super_universal": SuperUniversal, "cubic": Cubic, "gradient": Backtracking}


def as_rule(rule: str | Rule) -> Rule:
    """A rule by its name with its defaults, or the rule given.

    >>> as_rule("gns").start
    1.0
    """
    if isinstance(rule, str):
        return RULES[checks.one_of("rule", rule, RULES)]()
    checks.require(
        all(hasattr(rule, name) for name in ("start", "step", "accepts", "grow", "shrink", "gamma")),
        f"rule: got {checks.show(rule)}, expected a rule of lineament.optim.gns or one of {list(RULES)}",
    )
    return rule
