"""Nesterov's fast gradient method with backtracking and a metric: the first-order baseline beside the method.

Semenov, Jaggi, Doikov (2025, arXiv 2506.13710) compare with it. For convex functions; it is not monotone, so the best point is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks
from lineament.optim.gns.algorithm import Counts, measured, starting_point
from lineament.optim.gns.functions import as_problem
from lineament.optim.gns.metric import Metric
from lineament.optim.gns.result import MESSAGES, Minimum, Record


def fast_gradient(
    fun: Callable[..., Any] | Any,
    x0: Any,
    *,
    jac: Callable[..., Any] | bool | None = None,
    metric: Any = None,
    start: float = 1.0,
    least: float = 1e-5,
    grad_tol: float = 1e-8,
    f_star: float | None = None,
    eps: float = 1e-8,
    max_iters: int = 1000,
    max_probes: int = 60,
) -> Minimum:
    """Minimise a convex function by accelerated steps x = y - B⁻¹g(y)/L with L found by doubling and halving.

    With La² = A + a: y = (Ax + av)/(A + a), v ← v - aB⁻¹g(y), A ← A + a; L is accepted when f(x) ≤ f(y) - ‖g(y)‖_*²/(2L).

    Args:
        fun, x0, jac, metric, grad_tol, f_star, eps, max_iters, max_probes: as for :func:`minimize`.
        start, least: L_0 and the least L.

    Returns:
        A :class:`Minimum`; ``gamma`` in its log is ‖g‖_*/L.

    Raises:
        InputError: as :func:`minimize`.

    >>> found = fast_gradient(lambda x: (x**2).sum(), torch.ones(3, dtype=torch.float64), f_star=0.0)
    >>> found.success
    True
    """
    checks.number("start", start, low=0, open_low=True)
    checks.number("least", least, low=0, open_low=True)
    x = starting_point(x0, fun)
    problem, _ = as_problem(fun, jac, None, isinstance(x0, Tensor))
    out = (lambda v: v.clone()) if isinstance(x0, Tensor) else (lambda v: v.cpu().numpy().copy())
    B, counts, began = Metric(metric, x), Counts(), time.perf_counter()
    value, gradient = counts.evaluate(problem.value_and_grad, x)
    checks.require(
        math.isfinite(value) and bool(torch.isfinite(gradient).all()),
        f"x0: f is {value:g} there or its gradient has NaN or infinite values; expected a point where both are",
    )
    best = here = measured(x, value, gradient, B)
    v, A, L = x.clone(), 0.0, start
    log: list[Record] = []
    status = "max_iters"
    for k in range(max_iters + 1):
        log.append(
            Record(
                k,
                here.f,
                here.norm,
                here.norm / L,
                None,
                None,
                0,
                *counts.columns(),
                time.perf_counter() - began,
            )
        )
        if f_star is not None and here.f - f_star < eps:
            status = "target"
            break
        if here.norm < grad_tol or here.norm == 0:
            status = "converged"
            break
        if k == max_iters:
            break
        found = None
        for _ in range(max_probes):
            a = (1 + math.sqrt(1 + 4 * L * A)) / (2 * L)
            y = (A * here.x + a * v) / (A + a)
            at = measured(y, *counts.evaluate(problem.value_and_grad, y), B)
            x = y - at.z / L
            value, gradient = counts.evaluate(problem.value_and_grad, x)
            rounding = 4 * torch.finfo(torch.float64).eps * max(1.0, abs(at.f))
            if math.isfinite(value) and value <= at.f - at.norm**2 / (2 * L) + rounding:
                found = measured(x, value, gradient, B)
                v, A = v - a * at.z, A + a
                break
            L *= 2
        if found is None:
            status = "search_failed"
            break
        here, L = found, max(L / 2, least)
        best = here if here.f < best.f else best
    return Minimum(
        x=out(best.x), fun=best.f, jac=out(best.g), success=status in ("converged", "target"), status=status,
        message=MESSAGES[status], nit=len(log) - 1, nfev=counts.evaluations, njev=counts.evaluations, nhev=0,
        nsolve=0, nprod=0, log=tuple(log),
    )  # fmt: skip
