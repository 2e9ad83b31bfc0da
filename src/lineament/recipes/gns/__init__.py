"""Gradient-normalised smoothness: does one adaptive number make every Hessian approximation as good as its theory says?

Semenov, Jaggi, Doikov, 2025, arXiv 2506.13710. The authors' notebook (log-sum-exp, a power of linear residuals, Rosenbrock, the Chebyshev
chain) and regressions on real data. Iterations and linear solves are compared, which no machine changes; seconds are in the benchmark.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core.checkpoint import Checkpoint
from lineament.data.digits import digit_images
from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.equations import Chebyshev, Linear, Rosenbrock
from lineament.optim.gns.problems import Logistic, LogSumExp, PowerOfResiduals, Softmax, dense_curvature
from lineament.optim.gns.rules import Backtracking, SuperUniversal
from lineament.optim.gns.solvers import StepOptions
from lineament.optim.gns.theory import self_concordant, smoothness
from lineament.recipes.gns.claims import POWERS, claims
from lineament.recipes.gns.fast_gradient import fast_gradient
from lineament.recipes.gns.figures import draw_all
from lineament.recipes.kit.presets import presets
from lineament.report.outcome import Outcome, Table

SLUG = "gns"
TITLE = "Gradient-Normalized Smoothness for Optimization with Approximate Hessians"


@dataclass(frozen=True)
class Config:
    """One run: sizes of the log-sum-exp and the Chebyshev chain, iterations at most of slow methods, directions of a measured γ."""

    lse_size: int = 200
    chebyshev_size: int = 100
    slow_iterations: int = 1000
    fisher_iterations: int = 50
    directions: int = 30
    seed: int = 3124
    preset: str = presets(
        quick={},
        small={"lse_size": 1000, "chebyshev_size": 1000, "fisher_iterations": 300, "directions": 200},
        paper={"lse_size": 10_000, "chebyshev_size": 1000, "fisher_iterations": 2000, "directions": 1000},
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    stages = Checkpoint(out / ".stages", asdict(config))
    parts = {
        "lse": lambda: log_sum_exp(config),
        "power": lambda: power_of_residuals(config),
        "rosenbrock": rosenbrock,
        "chebyshev": lambda: chebyshev(config),
        "logistic": lambda: logistic(config),
        "softmax": lambda: softmax(config),
        "gamma": lambda: measured_gamma(config),
    }
    found: dict[str, Any] = {name: stages.stage(name, part) for name, part in parts.items()}
    tables = [
        Table(
            f"{title}: iterations to f - f* < 1e-8",
            ["method", "iterations", "linear solves", "f - f* at the end"],
            [[name, r["iterations"], r["solves"], _short(r["gap"])] for name, r in found[part].items()],
        )
        for part, title in (
            ("lse", f"Log-sum-exp, n = m = {config.lse_size}"),
            ("power", "‖Ax - b‖⁴/4, A 100 x 200"),
            ("chebyshev", f"Chebyshev chain, p = 4, n = {config.chebyshev_size}"),
            ("logistic", "Logistic regression, breast cancer"),
            ("softmax", "Softmax regression, digits, l2 = 1e-3"),
        )
    ]
    tables.append(
        Table(
            "Rosenbrock's residuals from (-2, 2): iterations to 1e-8",
            ["H", *(f"p = {p}" for p in POWERS)],
            [
                [kind, *(row[str(p)]["iterations"] for p in POWERS)]
                for kind, row in found["rosenbrock"].items()
            ],
        )
    )
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims(found), tables, draw_all(found, config, out)
    )


def summary(result: Any, f_star: float) -> dict[str, Any]:
    """What the claims and figures need of a run, as plain numbers."""
    return {
        "iterations": result.nit,
        "solves": result.nsolve,
        "gap": result.fun - f_star,
        "reached": result.fun - f_star < 1e-8,
        "gaps": [value - f_star for value in result.column("value")],
        "spent": {name: result.column(name) for name in ("solves", "seconds")},
        "gammas": [gamma for gamma in result.column("gamma") if gamma is not None],
        "norms": result.column("grad_norm"),
    }


def log_sum_exp(config: Config) -> dict[str, Any]:
    """The notebook's convex problem: the minimiser is 0, the start (1, ..., 1), B = AᵀA before the shift."""
    draw, n = np.random.RandomState(config.seed), config.lse_size
    raw = torch.from_numpy(draw.uniform(-1, 1, (n, n)))
    problem = LogSumExp.centred(raw, torch.from_numpy(draw.uniform(-1, 1, n)))
    x0, f_star = (
        torch.ones(n, dtype=torch.float64),
        problem.value_and_grad(torch.zeros(n, dtype=torch.float64))[0],
    )
    given: dict[str, Any] = {"f_star": f_star, "grad_tol": 0.0, "max_iters": config.slow_iterations}
    B = raw.T @ raw
    first: dict[str, Any] = {"hess": None, "rule": Backtracking(), **given}
    runs = {
        "exact": minimize(problem, x0, metric=B, **given),
        "weighted Gauss-Newton": minimize(problem, x0, hess="gauss_newton", metric=B, **given),
        "no curvature": minimize(problem, x0, hess=None, metric=B, **given),
        "gradient method, metric B": minimize(problem, x0, metric=B, **first),
        "gradient method": minimize(problem, x0, **first),
        "fast gradient method, metric B": fast_gradient(problem, x0, metric=B, **given),
        "cubic Newton": minimize(problem, x0, metric=B, rule="cubic", **given),
    }
    for alpha in (0.0, 0.5, 1.0):
        runs[f"super-universal, α = {alpha:g}"] = minimize(
            problem, x0, metric=B, rule=SuperUniversal(alpha=alpha), **given
        )
    return {name: summary(result, f_star) for name, result in runs.items()}


def power_of_residuals(config: Config) -> dict[str, Any]:
    """(1/4)‖Ax - b‖⁴ with more unknowns than equations; B = AᵀA + 1e-8 I."""
    draw = np.random.RandomState(config.seed)
    A = torch.from_numpy(draw.uniform(-1, 1, (100, 200)))
    problem = PowerOfResiduals(Linear(A, torch.from_numpy(draw.uniform(-1, 1, 100))), p=4)
    B, x0 = A.T @ A + 1e-8 * torch.eye(200, dtype=torch.float64), torch.ones(200, dtype=torch.float64)
    given: dict[str, Any] = {"f_star": 0.0, "grad_tol": 0.0, "max_iters": config.slow_iterations}
    first: dict[str, Any] = {"hess": None, "rule": Backtracking(), **given}
    runs = {
        "exact": minimize(problem, x0, metric=B, **given),
        "Fisher term (rank one)": minimize(problem, x0, hess="fisher", metric=B, **given),
        "gradient method, metric B": minimize(problem, x0, metric=B, **first),
        "gradient method": minimize(problem, x0, **first),
    }
    return {name: summary(result, 0.0) for name, result in runs.items()}


def rosenbrock() -> dict[str, Any]:
    """(1/p)‖u‖^p with Rosenbrock's residuals, from (-2, 2)."""
    x0 = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    problems = {str(p): PowerOfResiduals(Rosenbrock(), p=p) for p in POWERS}
    rows: dict[str, dict[str, Any]] = {
        kind: {
            p: summary(minimize(problem, x0, hess=kind, f_star=0.0, grad_tol=0.0), 0.0)
            for p, problem in problems.items()
        }
        for kind in ("exact", "gauss_newton")
    }
    rows["gradient method"] = {
        p: summary(
            minimize(problem, x0, hess=None, rule=Backtracking(), f_star=0.0, grad_tol=0.0, max_iters=5000),
            0.0,
        )
        for p, problem in problems.items()
    }
    return rows


def chebyshev(config: Config) -> dict[str, Any]:
    """The chain on which the reference code breaks down with the exact (indefinite) Hessian."""
    draw = np.random.RandomState(config.seed)
    x0 = torch.from_numpy(draw.uniform(0, 1, config.chebyshev_size))
    problem = PowerOfResiduals(Chebyshev(), p=4)
    runs = {
        "exact": minimize(problem, x0, f_star=0.0, grad_tol=0.0),
        "exact, shifted": minimize(
            problem, x0, f_star=0.0, grad_tol=0.0, step=StepOptions(indefinite="shift")
        ),
        "Gauss-Newton": minimize(problem, x0, hess="gauss_newton", f_star=0.0, grad_tol=0.0),
        "gradient method": minimize(
            problem, x0, hess=None, rule=Backtracking(), f_star=0.0, grad_tol=0.0, max_iters=200
        ),
    }
    return {name: summary(result, 0.0) for name, result in runs.items()}


def logistic(config: Config) -> dict[str, Any]:
    """Breast cancer, standardised, with a bias."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    scaled = (data.data - data.data.mean(0)) / data.data.std(0)  # pyright: ignore[reportAttributeAccessIssue]
    A = torch.from_numpy(np.c_[scaled, np.ones(len(scaled))])
    y = torch.from_numpy(data.target)  # pyright: ignore[reportAttributeAccessIssue]
    x0, B = torch.zeros(A.shape[1], dtype=torch.float64), A.T @ A / len(A)
    found = {}
    for l2 in (1e-4, 1e-2):
        problem = Logistic(A, y, l2=l2)
        f_star = minimize(problem, x0, grad_tol=1e-12).fun
        given: dict[str, Any] = {"f_star": f_star, "grad_tol": 0.0, "max_iters": 2 * config.slow_iterations}
        runs = {
            "exact": minimize(problem, x0, **given),
            "Fisher": minimize(problem, x0, hess="fisher", **given),
            "Fisher, metric AᵀA/n": minimize(problem, x0, hess="fisher", metric=B, **given),
            "no curvature": minimize(problem, x0, hess=None, **given),
            "gradient method": minimize(problem, x0, hess=None, rule=Backtracking(), **given),
        }
        found |= {f"{name}, l2 = {l2:g}": summary(result, f_star) for name, result in runs.items()}
    return found


def softmax(config: Config) -> dict[str, Any]:
    """Digits with a bias, 650 parameters."""
    pixels, labels = digit_images().pair
    A = torch.cat([pixels.double().flatten(1), torch.ones(len(pixels), 1, dtype=torch.float64)], 1)
    problem = Softmax(A, labels, l2=1e-3)
    x0 = torch.zeros(problem.size, dtype=torch.float64)
    f_star = minimize(problem, x0, grad_tol=1e-12).fun
    given: dict[str, Any] = {"f_star": f_star, "grad_tol": 0.0, "max_iters": config.fisher_iterations}
    runs = {
        "exact": minimize(problem, x0, **given),
        "diag(p) alone": minimize(problem, x0, hess="gauss_newton", **given),
        "Fisher": minimize(problem, x0, hess="fisher", **given),
        "gradient method": minimize(
            problem, x0, hess=None, rule=Backtracking(), **{**given, "max_iters": config.slow_iterations}
        ),
    }
    return {name: summary(result, f_star) for name, result in runs.items()}


def measured_gamma(config: Config) -> dict[str, Any]:
    """γ(x_k) by sampling along a run on a 40 x 10 log-sum-exp, beside what the search accepted and the bound."""
    draw = np.random.RandomState(config.seed)
    A = torch.from_numpy(draw.uniform(-1, 1, (40, 10)))
    problem = LogSumExp.centred(A, torch.from_numpy(draw.uniform(-1, 1, 40)))
    B, f_star = A.T @ A, problem.value_and_grad(torch.zeros(10, dtype=torch.float64))[0]
    points: list[Tensor] = []
    result = minimize(
        problem,
        torch.ones(10, dtype=torch.float64),
        metric=B,
        f_star=f_star,
        grad_tol=0.0,
        callback=lambda x, record: points.append(x),
    )
    sampled = [
        smoothness(
            lambda x: problem.value_and_grad(x)[1],
            x,
            dense_curvature(problem, x),
            metric=B,
            directions=config.directions,
        )
        for x in points[:-1]
    ]
    return {
        "sampled": sampled,
        "accepted": result.column("gamma")[: len(sampled)],
        "probes": result.column("probes")[: len(sampled)],
        "bound": self_concordant(problem.concordance(B)),
    }


def _short(value: float) -> float:
    return float(f"{value:.2g}")
