"""Nesterov's fast gradient method with backtracking and a metric: the first-order baseline of the paper.

For convex functions. It is not monotone, so the best point is kept.
"""

from __future__ import annotations

import math
import time
from typing import Any

from torch import Tensor

from lineament.optim.gns.algorithm import MESSAGES, Counts, Minimum, Record, measured
from lineament.optim.gns.linear_algebra import Metric


def fast_gradient(
    problem: Any,
    x0: Tensor,
    *,
    metric: Tensor | None,
    f_star: float,
    eps: float = 1e-8,
    max_iters: int = 1000,
) -> Minimum:
    """Accelerated steps x = y - B⁻¹g(y)/L with L halved after a step and doubled until f(x) ≤ f(y) - ‖g(y)‖_*²/(2L).

    With La² = A + a: y = (Ax + av)/(A + a), v ← v - aB⁻¹g(y), A ← A + a. ``gamma_start`` in the log is ‖g‖_*/L.
    """
    B, counts, began = Metric(metric, x0), Counts(), time.perf_counter()

    def at(x: Tensor) -> Any:
        counts.evaluations += 1
        value, gradient = problem.value_and_grad(x)
        return measured(x, value, gradient, B)

    best = here = at(x0.clone())
    v, A, L = here.x, 0.0, 1.0
    log: list[Record] = []
    for k in range(max_iters + 1):
        seconds = time.perf_counter() - began
        log.append(Record(k, here.f, here.norm, here.norm / L, None, None, 0, *counts.columns(), seconds))
        if here.f - f_star < eps or k == max_iters:
            break
        while True:
            a = (1 + math.sqrt(1 + 4 * L * A)) / (2 * L)
            y = at((A * here.x + a * v) / (A + a))
            new = at(y.x - y.z / L)
            if new.f <= y.f - y.norm**2 / (2 * L) + 1e-15 * max(1.0, abs(y.f)):
                break
            L *= 2
        v, A = v - a * y.z, A + a
        here, L = new, max(L / 2, 1e-5)
        best = here if here.f < best.f else best
    status = "target" if best.f - f_star < eps else "max_iters"
    return Minimum(
        x=best.x, fun=best.f, jac=best.g, success=status == "target", status=status, message=MESSAGES[status], nit=len(log) - 1,
        nfev=counts.evaluations, njev=counts.evaluations, nhev=0, nsolve=0, nprod=0, log=tuple(log),
    )  # fmt: skip
