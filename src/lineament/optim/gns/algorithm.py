"""Newton-type minimisation with any positive semi-definite Hessian approximation and nothing to tune.

Semenov, Jaggi, Doikov (2025), *Gradient-Normalized Smoothness for Optimization with Approximate Hessians*, arXiv 2506.13710. The step is
h = -(H + (‖g‖_*/γ) B)⁻¹ g, and γ is doubled and halved until f falls by ‖g_new‖_*²/(8λ): one number absorbs both the error of the Taylor
model and that of H. What is not obvious: H is evaluated once an iteration, whatever the number of probes; and a factorisation
that fails, or a value that is NaN or infinite, is a rejected probe, so no stale step is ever taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable
from lineament.optim.gns.functions import Problem, as_problem, starting_point
from lineament.optim.gns.linear_algebra import Metric, at_home, blas_threads, like, tensor
from lineament.optim.gns.rules import Cubic, Point, Rule, Trial, as_rule
from lineament.optim.gns.solvers import (
    USUAL,
    Dense,
    Form,
    StepOptions,
    System,
    as_dense,
    as_form,
    reduced,
    system,
)

Evaluate = Callable[[Any], tuple[float, Any]]  # of a tensor, or of an array


def minimize(
    fun: Callable[..., Any] | Problem,
    x0: Any,
    *,
    jac: Callable[..., Any] | bool | None = None,
    hess: Any = "exact",
    metric: Any = None,
    rule: str | Rule = "gns",
    step: StepOptions = USUAL,
    grad_tol: float = 1e-8,
    f_star: float | None = None,
    eps: float = 1e-8,
    max_iters: int = 1000,
    callback: Callable[[Any, Record], Any] | None = None,
) -> Minimum:
    """Minimise a smooth function, convex or not, from ``x0``.

    x_{k+1} = x_k - (H_k + λ_k B)⁻¹ g_k with λ_k = ‖g_k‖_*/γ_k; γ is doubled after an accepted step and halved until
    f(x_k) - f(x_{k+1}) ≥ ‖g_{k+1}‖_*²/(8λ_k).

    Args:
        fun: f(x), of NumPy arrays or tensors as ``x0`` is; or a problem of this package (:class:`LogSumExp`, :class:`Network`, ...).
        x0: (n,), float64 advised.
        jac: the gradient as a function, ``True`` when ``fun`` returns (f, gradient), ``None`` to differentiate a PyTorch function.
        hess: H. A function of x that returns a matrix (n, n), a diagonal (n,), an operator with ``@``, a form or ``None``; a name that
            the problem knows (``"exact"``, ``"gauss_newton"``, ``"fisher"``, ...); a SciPy ``HessianUpdateStrategy`` (quasi-Newton);
            ``None`` for the normalised gradient method.
        metric: B, symmetric positive definite: ``None``, (n,), (n, n), or a function of x that returns one (a preconditioner).
        rule: ``"gns"``, ``"super_universal"``, ``"cubic"``, ``"gradient"``, or a rule with its own settings such as ``Smoothness(start=0.1)``.
        step: what is kept of H and how a step is solved for, such as ``StepOptions(form="low_rank", rank=50)``.
        grad_tol: stop at ‖g‖_* < this. f_star, eps: stop at f - f_star < eps, when f_star is given.
        max_iters: at most so many iterations. callback: called with (x, record) at each iterate; a true answer stops.

    Returns:
        A :class:`Minimum`; ``x`` is a NumPy array or a tensor as ``x0`` was.

    Raises:
        InputError: an ``x0`` that does not fit the problem, f or its gradient not finite there, wrong shapes, H not symmetric, B not positive definite, unknown names.

    Source: Semenov, Jaggi, Doikov (2025), arXiv 2506.13710, Algorithm 3.

    >>> rosenbrock = lambda x: (1 - x[0]) ** 2 + 100 * (x[1] - x[0] ** 2) ** 2
    >>> found = minimize(rosenbrock, torch.tensor([-2.0, 2.0], dtype=torch.float64), f_star=0.0)
    >>> found.status, found.nit, found.nsolve
    ('target', 51, 105)
    """
    chosen = as_rule(rule)
    checks.require(isinstance(step, StepOptions), f"step: got {checks.show(step)}, expected a StepOptions")
    checks.number("grad_tol", grad_tol, low=0)
    checks.number("eps", eps, low=0)
    checks.number("max_iters", max_iters, low=0, integer=True)
    if f_star is not None:
        checks.number("f_star", f_star)
    x = shape = starting_point(x0, fun)
    problem, hess = as_problem(fun, jac, hess, isinstance(x0, Tensor))
    if at_home(x) and getattr(problem, "arrays", False):
        x = x.numpy()
    moving = metric if callable(metric) else None
    solving = replace(step, solver="eigh") if isinstance(chosen, Cubic) else step
    rounding = getattr(problem, "eps", torch.finfo(shape.dtype).eps)
    began = time.perf_counter()

    def out(v: Any) -> Any:
        copy = tensor(v).clone()
        return copy if isinstance(x0, Tensor) else copy.cpu().numpy()

    def curvature(x: Any) -> Form:
        counts.hessians += 1
        at, given = tensor(x), None if hess == "zero" else problem.curvature(x, hess)
        found = reduced(as_form(given, at, symmetric=True), at, step)
        return Dense(as_dense(found, len(at)).to(at)) if solving is not step else found

    with blas_threads(len(x)):
        B = Metric(None if moving else metric, shape)
        search = Search(problem.value_and_grad, B, chosen, step.max_probes, rounding)
        counts = search.counts
        value, gradient = search.evaluated(x)
        bad = int((~torch.isfinite(tensor(gradient))).sum())
        checks.require(
            math.isfinite(value) and bad == 0,
            f"x0: f is {value:g} there and {bad} of {len(x)} entries of its gradient are not finite; expected a point where both are",
        )
        here, number, status = measured(x, value, gradient, B), chosen.start, ""
        log: list[Record] = []
        for k in range(max_iters + 1):
            if moving is not None and here.norm > 0:
                search.metric = Metric(moving(out(here.x)), shape)
                here = measured(here.x, here.f, here.g, search.metric)
            seconds = time.perf_counter() - began
            arrival = Record(k, here.f, here.norm, number, None, None, 0, *counts.columns(), seconds)
            status = "max_iters" if k == max_iters else ""
            if here.norm < grad_tol or here.norm == 0:
                status = "converged"
            if f_star is not None and here.f - f_star < eps:
                status = "target"
            if callback is not None and callback(out(here.x), arrival):
                status = "stopped"
            if status:
                log.append(arrival)
                break
            equations = system(curvature(here.x), search.metric, tensor(here.g), tensor(here.z), solving)
            taken = search.run(here, equations, number)
            counts.products += equations.products
            if taken.trial is None:
                status = "precision" if taken.tiny else "search_failed"
                log.append(replace(arrival, probes=taken.probes))
                break
            log.append(replace(arrival, gamma=taken.gamma, lam=taken.trial.lam, probes=taken.probes))
            number, here = taken.number, taken.trial.new
    return Minimum(
        x=out(here.x), fun=here.f, jac=out(here.g), success=status in ("converged", "target", "stopped"),
        status=status, message=MESSAGES[status], nit=len(log) - 1, nfev=counts.evaluations, njev=counts.evaluations,
        nhev=counts.hessians, nsolve=counts.solves, nprod=counts.products, log=tuple(log),
    )  # fmt: skip


@dataclass(slots=True)
class Counts:
    """Oracle calls so far."""

    solves: int = 0
    products: int = 0
    evaluations: int = 0
    hessians: int = 0

    def columns(self) -> tuple[int, int, int, int]:
        """In the order of a :class:`Record`."""
        return self.solves, self.products, self.evaluations, self.hessians


@dataclass(slots=True)
class Step:
    """The outcome of one search: the accepted trial (or ``None``), the next number, γ, and how many probes it took."""

    trial: Trial | None
    number: float
    gamma: float
    probes: int
    tiny: bool = False


@dataclass(slots=True)
class Search:
    """The inner loop of Algorithm 3: probes until the rule accepts, for one H after the other."""

    evaluate: Evaluate
    metric: Metric
    rule: Rule
    max_probes: int
    eps: float  # the rounding of one value of f
    counts: Counts = field(default_factory=Counts)

    def evaluated(self, x: Any) -> tuple[float, Any]:
        self.counts.evaluations += 1
        return self.evaluate(x)

    # A trial far out may overflow; it is rejected for that.
    @np.errstate(over="ignore", invalid="ignore")
    def run(self, here: Point, equations: System, number: float) -> Step:
        rule, most = self.rule, self.max_probes
        first: Trial | None = None
        for probe in range(1, most + 1):
            trial = self._tried(here, equations, number)
            first = first or trial
            if trial is not None and rule.accepts(trial):
                probes = probe
                while probe == 1 and getattr(rule, "aggressive", False) and probes < most:
                    larger = rule.grow(number)
                    further = self._tried(here, equations, larger)
                    probes += 1
                    better = further is not None and rule.accepts(further) and further.new.f < trial.new.f
                    if larger == number or further is None or not better:
                        break
                    number, trial = larger, further
                return Step(trial, rule.grow(number), rule.gamma(number, trial.lam, here.norm), probes)
            number = rule.shrink(number)
        # The fall that the first trial promised is below the rounding of f: nothing can be told any more.
        tiny = first is not None and abs(float(here.g.dot(first.h))) <= 2 * first.rounding
        return Step(None, number, 0.0, most, tiny)

    def _tried(self, here: Point, equations: System, number: float) -> Trial | None:
        """One probe: solve, evaluate; ``None`` where the solve failed or the values are not finite."""
        self.counts.solves += 1
        h, lam, model = self.rule.step(number, equations, here)
        if h is None:
            return None
        h = like(h, here.x)
        # The square of a step that is not finite is not finite.
        if not math.isfinite(float(h.dot(h))):
            return None
        x = here.x + h
        value, gradient = self.evaluated(x)
        if not math.isfinite(value):
            return None
        new = measured(x, value, gradient, self.metric)
        return Trial(here, new, h, lam, model, self.eps) if math.isfinite(new.norm) else None


def measured(x: Any, value: float, gradient: Any, metric: Metric) -> Point:
    """The point with its dual norm."""
    z = metric.inverse(gradient)
    return Point(x, value, gradient, z, metric.dual(gradient, z))


@dataclass(frozen=True)
class Record:
    """An iterate x_k and what led on from it; counts are cumulative, up to the arrival at x_k.

    ``gamma_start`` is γ when the iteration began, ``gamma`` the accepted one (of other rules: ‖g‖_*/λ), ``lam`` its λ and ``probes``
    the trials it took, all ``None``/0 at the last iterate. ``solves``: linear solves; ``products``: products with H;
    ``evaluations``: of f with its gradient; ``hessians``: of H.
    """

    iteration: int
    value: float
    grad_norm: float
    gamma_start: float
    gamma: float | None = None
    lam: float | None = None
    probes: int = 0
    solves: int = 0
    products: int = 0
    evaluations: int = 0
    hessians: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Minimum(Readable):
    """The result: SciPy's ``x``, ``fun``, ``jac``, ``success``, ``status``, ``message``, ``nit``, ``nfev``, ``njev``, ``nhev``; and ``nsolve``,
    ``nprod`` and the ``log``.

    ``status`` is ``"converged"`` (gradient), ``"target"`` (f - f* < eps), ``"max_iters"``, ``"precision"`` (f cannot tell the iterates apart
    any more), ``"search_failed"`` or ``"stopped"`` (by the callback). ``x`` is always the best point seen.
    """

    x: Any
    fun: float
    jac: Any
    success: bool
    status: str
    message: str
    nit: int
    nfev: int
    njev: int
    nhev: int
    nsolve: int
    nprod: int
    log: tuple[Record, ...]

    def column(self, name: str) -> list[Any]:
        """One field of the log over the iterations.

        Raises:
            InputError: an unknown field.
        """
        checks.one_of("name", name, Record.__dataclass_fields__)
        return [getattr(record, name) for record in self.log]

    def to_dict(self) -> dict[str, Any]:
        plain = {k: getattr(self, k) for k in self.__dataclass_fields__ if k not in ("x", "jac", "log")}
        x, jac = ((v if isinstance(v, Tensor) else np.asarray(v)).tolist() for v in (self.x, self.jac))
        return {**plain, "x": x, "jac": jac, "log": [asdict(record) for record in self.log]}

    def plot(self, ax: Any = None) -> Any:
        """f - (its smallest value) and ‖g‖_* over the iterations, on a logarithmic axis."""
        import matplotlib.pyplot as plt

        ax = plt.subplots()[1] if ax is None else ax
        values = np.array(self.column("value"))
        gap = values - values.min()
        ax.semilogy(np.where(gap > 0, gap, np.nan), label="f minus its smallest value")
        norms = np.array(self.column("grad_norm"))
        ax.semilogy(np.where(norms > 0, norms, np.nan), "--", label="norm of the gradient")
        ax.set(xlabel="iteration")
        ax.legend()
        return ax


MESSAGES = {
    "converged": "the norm of the gradient is below grad_tol",
    "target": "f is within eps of f_star",
    "max_iters": "max_iters iterations were made",
    "precision": "f cannot tell the iterates apart any more: differences are below its rounding",
    "search_failed": "no probe of the last search was accepted; x is the best point. Is the gradient that of f?",
    "stopped": "the callback asked to stop",
}
