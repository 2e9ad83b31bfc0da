"""The problems of the recipe, each minimised by every method that it compares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.data.digits import digit_images
from lineament.optim.gns.algorithm import Minimum, minimize
from lineament.optim.gns.problems import (
    Linear,
    Logistic,
    LogSumExp,
    PowerOfResiduals,
    Softmax,
    dense_curvature,
)
from lineament.optim.gns.rules import Backtracking, SuperUniversal
from lineament.optim.gns.solvers import StepOptions
from lineament.optim.gns.theory import self_concordant, smoothness
from lineament.recipes.gns.equations import Chebyshev, Rosenbrock
from lineament.recipes.gns.fast_gradient import fast_gradient

POWERS = (2, 3, 4, 5, 6, 8)
GRADIENT: dict[str, Any] = {"hess": None, "rule": Backtracking()}


@dataclass(frozen=True)
class Run:
    """What the claims and figures need of a run; ``solves`` and ``seconds`` are those spent until each iterate."""

    iterations: int
    total_solves: int
    gap: float
    gaps: list[float]
    solves: list[int]
    seconds: list[float]
    gammas: list[float]
    norms: list[float]

    @property
    def reached(self) -> bool:
        return self.gap < 1e-8

    @property
    def count(self) -> float:
        """Iterations, infinite where the goal was not reached."""
        return float(self.iterations) if self.reached else float("inf")


Runs = dict[str, Run]


@dataclass(frozen=True)
class Gammas:
    """γ(x_k) by sampling along a run, what the search accepted, and the bound of the theory."""

    sampled: list[float]
    accepted: list[float]
    bound: float


def _run(result: Minimum, f_star: float) -> Run:
    return Run(
        result.nit,
        result.nsolve,
        result.fun - f_star,
        [value - f_star for value in result.column("value")],
        result.column("solves"),
        result.column("seconds"),
        [gamma for gamma in result.column("gamma") if gamma is not None],
        result.column("grad_norm"),
    )


def _runs(
    problem: Any, x0: Tensor, f_star: float, methods: dict[str, dict[str, Any]], max_iters: int
) -> Runs:
    """Each method's run to f - f* < 1e-8; a method is what it changes in the call of :func:`minimize`."""
    common: dict[str, Any] = {"f_star": f_star, "grad_tol": 0.0, "max_iters": max_iters}
    return {name: _run(minimize(problem, x0, **{**common, **how}), f_star) for name, how in methods.items()}


def _start(n: int, value: float = 1.0) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


def _with_bias(rows: np.ndarray) -> Tensor:
    return torch.from_numpy(np.c_[rows, np.ones(len(rows))])


def _draws(seed: int, m: int, n: int) -> tuple[Tensor, Tensor]:
    """The notebook's A (m, n) and b, uniform in [-1, 1]."""
    draw = np.random.RandomState(seed)
    return torch.from_numpy(draw.uniform(-1, 1, (m, n))), torch.from_numpy(draw.uniform(-1, 1, m))


def log_sum_exp(config: Any) -> Runs:
    """The notebook's convex problem: the minimiser is 0, the start (1, ..., 1), B = AᵀA before the shift."""
    n = config.lse_size
    raw, b = _draws(config.seed, n, n)
    problem, x0, B = LogSumExp.centred(raw, b), _start(n), {"metric": raw.T @ raw}
    f_star = problem.value_and_grad(_start(n, 0.0))[0]
    methods: dict[str, dict[str, Any]] = {
        "exact": B,
        "weighted Gauss-Newton": {"hess": "gauss_newton", **B},
        "no curvature": {"hess": None, **B},
        "gradient method, metric B": {**GRADIENT, **B},
        "gradient method": GRADIENT,
        "cubic Newton": {"rule": "cubic", **B},
    }
    for alpha in (0.0, 0.5, 1.0):
        methods[f"super-universal, α = {alpha:g}"] = {"rule": SuperUniversal(alpha=alpha), **B}
    found = _runs(problem, x0, f_star, methods, config.slow_iterations)
    fast = fast_gradient(problem, x0, metric=B["metric"], f_star=f_star, max_iters=config.slow_iterations)
    return {**found, "fast gradient method, metric B": _run(fast, f_star)}


def power_of_residuals(config: Any) -> Runs:
    """(1/4)‖Ax - b‖⁴ with more unknowns than equations; B = AᵀA + 1e-8 I."""
    A, b = _draws(config.seed, 100, 200)
    B = {"metric": A.T @ A + 1e-8 * torch.eye(200, dtype=torch.float64)}
    methods: dict[str, dict[str, Any]] = {
        "exact": B,
        "Fisher term (rank one)": {"hess": "fisher", **B},
        "gradient method, metric B": {**GRADIENT, **B},
        "gradient method": GRADIENT,
    }
    problem = PowerOfResiduals(Linear(A, b), p=4)
    return _runs(problem, _start(200), 0.0, methods, config.slow_iterations)


def rosenbrock() -> dict[str, Runs]:
    """(1/p)‖u‖^p with Rosenbrock's residuals, from (-2, 2), by matrix and then p."""
    x0 = torch.tensor([-2.0, 2.0], dtype=torch.float64)
    methods = {
        "exact": {"max_iters": 1000},
        "gauss_newton": {"hess": "gauss_newton", "max_iters": 1000},
        "gradient method": GRADIENT,
    }
    by_power = {
        str(p): _runs(PowerOfResiduals(Rosenbrock(), p=p), x0, 0.0, methods, max_iters=5000) for p in POWERS
    }
    return {name: {p: runs[name] for p, runs in by_power.items()} for name in methods}


def chebyshev(config: Any) -> Runs:
    """The chain on which the reference code breaks down with the exact (indefinite) Hessian."""
    x0 = torch.from_numpy(np.random.RandomState(config.seed).uniform(0, 1, config.chebyshev_size))
    methods = {
        "exact": {},
        "exact, shifted": {"step": StepOptions(indefinite="shift")},
        "Gauss-Newton": {"hess": "gauss_newton"},
        "gradient method": {**GRADIENT, "max_iters": 200},
    }
    return _runs(PowerOfResiduals(Chebyshev(), p=4), x0, 0.0, methods, max_iters=1000)


def logistic(config: Any) -> Runs:
    """Breast cancer, standardised, with a bias."""
    from sklearn.datasets import load_breast_cancer

    rows, labels = load_breast_cancer(return_X_y=True)
    A, y = _with_bias((rows - rows.mean(0)) / rows.std(0)), torch.from_numpy(labels)
    methods: dict[str, dict[str, Any]] = {
        "exact": {},
        "Fisher": {"hess": "fisher"},
        "Fisher, metric AᵀA/n": {"hess": "fisher", "metric": A.T @ A / len(A)},
        "no curvature": {"hess": None},
        "gradient method": GRADIENT,
    }
    found = {}
    for l2 in (1e-4, 1e-2):
        problem, x0 = Logistic(A, y, l2=l2), _start(A.shape[1], 0.0)
        f_star = minimize(problem, x0, grad_tol=1e-12).fun
        runs = _runs(problem, x0, f_star, methods, 2 * config.slow_iterations)
        found |= {f"{name}, l2 = {l2:g}": run for name, run in runs.items()}
    return found


def softmax(config: Any) -> Runs:
    """Digits with a bias, 650 parameters."""
    digits = digit_images()
    # The pixels are whole sixteenths, so double precision has them exactly.
    A = _with_bias(digits.inputs.flatten(1).double().numpy())
    problem = Softmax(A, digits.targets, l2=1e-3)
    x0 = _start(problem.size, 0.0)
    f_star = minimize(problem, x0, grad_tol=1e-12).fun
    methods = {
        "exact": {},
        "diag(p) alone": {"hess": "gauss_newton"},
        "Fisher": {"hess": "fisher"},
        "gradient method": {**GRADIENT, "max_iters": config.slow_iterations},
    }
    return _runs(problem, x0, f_star, methods, config.fisher_iterations)


def measured_gamma(config: Any) -> Gammas:
    """γ(x_k) along a run on a 40 x 10 log-sum-exp."""
    A, b = _draws(config.seed, 40, 10)
    problem, B = LogSumExp.centred(A, b), A.T @ A
    f_star = problem.value_and_grad(_start(10, 0.0))[0]
    points: list[Tensor] = []
    result = minimize(
        problem,
        _start(10),
        metric=B,
        f_star=f_star,
        grad_tol=0.0,
        callback=lambda x, record: points.append(x),
    )
    measure = partial(
        smoothness, lambda x: problem.value_and_grad(x)[1], metric=B, directions=config.directions
    )
    sampled = [measure(x, dense_curvature(problem, x)) for x in points[:-1]]
    return Gammas(sampled, result.column("gamma")[: len(sampled)], self_concordant(problem.concordance(B)))
