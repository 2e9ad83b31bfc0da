"""Newton-type minimisation with any positive semi-definite Hessian approximation and nothing to tune.

Semenov, Jaggi, Doikov (2025), *Gradient-Normalized Smoothness for Optimization with Approximate Hessians*, arXiv 2506.13710. The step is
h = -(H + (‖g‖_*/γ) B)⁻¹ g, and γ is doubled and halved until f falls by ‖g_new‖_*²/(8λ): one number absorbs both the error of the Taylor
model and that of H. What is not obvious: H is evaluated once an iteration, whatever the number of probes; and a factorisation
that fails, or a value that has NaN or infinite values, is a rejected probe, so that no stale step is ever taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.blas import at_home, like, tensor
from lineament.optim.gns.forms import FORMS, Dense, Form, as_dense, as_form, reduced
from lineament.optim.gns.functions import Problem, as_problem, is_problem
from lineament.optim.gns.metric import Metric
from lineament.optim.gns.result import MESSAGES, Minimum, Record
from lineament.optim.gns.rules import Cubic, Point, Rule, Trial, as_rule
from lineament.optim.gns.solvers import INDEFINITE, SOLVERS, System, chosen_system

Evaluate = Callable[[Any], tuple[float, Any]]  # of a tensor, or of an array


def minimize(
    fun: Callable[..., Any] | Problem,
    x0: Any,
    *,
    jac: Callable[..., Any] | bool | None = None,
    hess: Any = "exact",
    metric: Any = None,
    rule: str | Rule = "gns",
    form: str = "as is",
    rank: int = 10,
    solver: str = "auto",
    indefinite: str = "reject",
    grad_tol: float = 1e-8,
    f_star: float | None = None,
    eps: float = 1e-8,
    max_iters: int = 1000,
    max_probes: int = 60,
    cg_tol: float = 0.1,
    cg_steps: int = 250,
    seed: int = 0,
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
        form: ``"as is"``, ``"dense"``, ``"diagonal"``, ``"low_rank"`` (Nyström of ``rank``) or ``"operator"``: what is kept of H.
        solver: ``"auto"``, ``"cholesky"``, ``"eigh"``, ``"woodbury"``, ``"rank1"`` or ``"cg"``.
        indefinite: what an H with negative eigenvalues gets: ``"reject"`` (the probe, until λ is large enough), ``"shift"``, ``"project"``.
        grad_tol: stop at ‖g‖_* < this. f_star, eps: stop at f - f_star < eps, when f_star is given.
        max_iters, max_probes: iterations, and probes of one search. cg_tol, cg_steps: see :func:`system`.
        seed: of the random directions in ``form``. callback: called with (x, record) at each iterate; a true answer stops.

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
    checks.one_of("form", form, FORMS)
    checks.one_of("solver", solver, SOLVERS)
    checks.one_of("indefinite", indefinite, INDEFINITE)
    checks.number("grad_tol", grad_tol, low=0)
    checks.number("eps", eps, low=0)
    for name, value in (("max_iters", max_iters), ("max_probes", max_probes), ("cg_steps", cg_steps)):
        checks.number(name, value, low=0 if name == "max_iters" else 1, integer=True)
    checks.number("cg_tol", cg_tol, low=0, open_low=True)
    if f_star is not None:
        checks.number("f_star", f_star)
    x = starting_point(x0, fun)
    problem, hess = as_problem(fun, jac, hess, isinstance(x0, Tensor))
    out = (lambda v: v.clone()) if isinstance(x0, Tensor) else (lambda v: v.cpu().numpy().copy())
    moving = metric if callable(metric) else None
    B = Metric(None if moving else metric, x)
    shape = x
    if at_home(x) and getattr(problem, "arrays", False):
        x = x.numpy()
        out = (lambda v: torch.from_numpy(v.copy())) if isinstance(x0, Tensor) else (lambda v: v.copy())
    counts = Counts()
    rounding = getattr(problem, "eps", torch.finfo(shape.dtype).eps)
    began = time.perf_counter()

    def curvature(x: Any) -> Form:
        counts.hessians += 1
        at = tensor(x)
        found = as_form(problem.curvature(x, hess), at, symmetric=True)
        if form != "as is":
            found = reduced(found, form, at, rank=rank, seed=seed)
        return Dense(as_dense(found, len(at)).to(at)) if isinstance(chosen, Cubic) else found

    value, gradient = counts.evaluate(problem.value_and_grad, x)
    bad = int((~torch.isfinite(tensor(gradient))).sum())
    checks.require(
        math.isfinite(value) and bad == 0,
        f"x0: f is {value:g} there and {bad} of {len(x)} entries of its gradient are not finite; expected a point where both are",
    )
    here = measured(x, value, gradient, B)
    number = chosen.start
    log: list[Record] = []
    status = ""
    for k in range(max_iters + 1):
        if moving is not None and here.norm > 0:
            B = Metric(moving(out(here.x)), shape)
            here = measured(here.x, here.f, here.g, B)
        arrival = (*counts.columns(), time.perf_counter() - began)
        status = "max_iters" if k == max_iters else ""
        if here.norm < grad_tol or here.norm == 0:
            status = "converged"
        if f_star is not None and here.f - f_star < eps:
            status = "target"
        if callback is not None or status:
            record = Record(k, here.f, here.norm, number, None, None, 0, *arrival)
            if callback is not None and callback(out(here.x), record):
                status = "stopped"
            if status:
                log.append(record)
                break
        solver_here = "eigh" if isinstance(chosen, Cubic) else solver
        g = tensor(here.g)
        z = g if here.z is here.g else tensor(here.z)
        equations = chosen_system(curvature(here.x), B, g, z, solver_here, indefinite, cg_tol, cg_steps)
        step = search(
            problem.value_and_grad, here, equations, B, chosen, number, max_probes, counts, eps=rounding
        )
        counts.products += equations.products
        if step.trial is None:
            status = "precision" if step.tiny else "search_failed"
            log.append(Record(k, here.f, here.norm, number, None, None, step.probes, *arrival))
            break
        log.append(Record(k, here.f, here.norm, number, step.gamma, step.trial.lam, step.probes, *arrival))
        number, here = step.number, step.trial.new
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

    def evaluate(self, evaluate: Evaluate, x: Any) -> tuple[float, Any]:
        self.evaluations += 1
        return evaluate(x)

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


# A trial far out may overflow; it is rejected for that.
@np.errstate(over="ignore", invalid="ignore")
def search(
    evaluate: Evaluate,
    here: Point,
    equations: System,
    metric: Metric,
    rule: Rule,
    number: float,
    max_probes: int,
    counts: Counts,
    eps: float = torch.finfo(torch.float64).eps,
) -> Step:
    """Probe until the rule accepts: the inner loop of Algorithm 3, for one H."""
    first: Trial | None = None
    for probe in range(1, max_probes + 1):
        trial = _tried(evaluate, here, equations, metric, rule, number, counts, eps)
        first = first or trial
        if trial is not None and rule.accepts(trial):
            probes = probe
            while probe == 1 and getattr(rule, "aggressive", False) and probes < max_probes:
                larger = rule.grow(number)
                further = _tried(evaluate, here, equations, metric, rule, larger, counts, eps)
                probes += 1
                if (
                    larger == number
                    or further is None
                    or not rule.accepts(further)
                    or further.new.f >= trial.new.f
                ):
                    break
                number, trial = larger, further
            return Step(trial, rule.grow(number), rule.gamma(number, trial.lam, here.norm), probes)
        number = rule.shrink(number)
    # The fall that the first trial promised is below the rounding of f: nothing can be told any more.
    tiny = first is not None and abs(float(here.g.dot(first.h))) <= 2 * first.rounding
    return Step(None, number, 0.0, max_probes, tiny)


def _tried(
    evaluate: Evaluate,
    here: Point,
    equations: System,
    metric: Metric,
    rule: Rule,
    number: float,
    counts: Counts,
    eps: float,
) -> Trial | None:
    """One probe: solve, evaluate; ``None`` where the solve failed or the values are not finite."""
    counts.solves += 1
    h, lam, model = rule.step(number, equations, here)
    if h is None:
        return None
    h = like(h, here.x)
    # The square of a step that is not finite is not.
    if not math.isfinite(float(h.dot(h))):
        return None
    x = here.x + h
    value, gradient = counts.evaluate(evaluate, x)
    if not math.isfinite(value):
        return None
    new = measured(x, value, gradient, metric)
    if not math.isfinite(new.norm):
        return None
    return Trial(here, new, h, lam, model, eps)


def measured(x: Any, value: float, gradient: Any, metric: Metric) -> Point:
    """The point with its dual norm."""
    z = metric.inverse(gradient)
    return Point(x, value, gradient, z, metric.dual(gradient, z))


def starting_point(x0: Any, fun: Any) -> Tensor:
    """A copy of x0, of the size and dtype that a problem takes."""
    if isinstance(x0, Tensor):
        x = x0.detach().clone()
        x = x if x.is_floating_point() or x.is_complex() else x.double()
    else:
        found = np.array(x0)
        x = torch.from_numpy(found if np.iscomplexobj(found) else found.astype(np.float64))
    checks.tensor("x0", x, shape=("n",))
    checks.require(
        x.dtype in (torch.float64, torch.float32),
        f"x0: got {checks.show(x0)}, expected real numbers in float64 (or float32)",
    )
    if is_problem(fun):
        size, dtype = getattr(fun, "size", None) or len(x), getattr(fun, "dtype", None) or x.dtype
        if (len(x), x.dtype) != (size, dtype):
            wanted = checks.show(torch.empty(size, dtype=dtype))
            raise checks.InputError(
                f"x0: got {checks.show(x0)}, expected {wanted} for this {type(fun).__name__}"
            )
    return x
