"""The reference code's oracles, steps and trajectories: γ and the linear solves exactly, values within its 1e-8 in λ."""

from __future__ import annotations

from typing import Any

import torch
from tests.golden.common import File, Scope, golden
from torch import Tensor

from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.linear_algebra import Metric
from lineament.optim.gns.problems import (
    Linear,
    Logistic,
    LogSumExp,
    PowerOfResiduals,
    Softmax,
    dense_curvature,
)
from lineament.optim.gns.rules import Smoothness
from lineament.optim.gns.solvers import Dense, StepOptions, system
from lineament.optim.gns.theory import smoothness
from lineament.recipes.gns.equations import Chebyshev, Rosenbrock

PROBLEMS = {
    "lse": lambda case, a: LogSumExp(a("A"), a("b"), mu=case["mu"]),
    "nle": lambda case, a: PowerOfResiduals(Linear(a("A"), a("b")), p=case["p"]),
    "ros": lambda case, a: PowerOfResiduals(Rosenbrock(), p=case["p"]),
    "cheb": lambda case, a: PowerOfResiduals(Chebyshev(), p=case["p"]),
    "log": lambda case, a: Logistic(a("A"), a("y"), l2=case["l2"]),
    "soft": lambda case, a: Softmax(a("A"), a("Y").argmax(1), classes=a("Y").shape[1], l2=case["l2"]),
}
HESSIANS = {"hess": "exact", "wgn": "gauss_newton", "gn": "gauss_newton", "fisher": "fisher"}
STOPS = {
    "f - fstar < tol": lambda case: {"f_star": case["fstar"], "eps": case["tol"], "grad_tol": 0.0},
    "||g|| < tol": lambda case: {"grad_tol": case["tol"]},
}
GAMMAS = {
    "start of the iteration": lambda found: found.column("gamma_start"),
    "accepted": lambda found: found.column("gamma")[:-1],
}
# A factorisation that fails rejects the probe; where the official code would stop, none failed.
FAILURES = {"error": "reject", "reject": "reject"}


def problem_of(case: Scope, prefix: str) -> Any:
    return PROBLEMS[case["function"]](case, lambda key: case.input(f"{prefix}_{key}"))


def metric_of(case: Scope) -> Tensor | None:
    given = case["metric"]
    return given if isinstance(given, Tensor) else {"identity": None}[given]


def check_oracle(case: Scope) -> None:
    at = case.name
    if not case.has(f"{at}_x"):
        return
    problem, x = problem_of(case, at), case.input(f"{at}_x")
    value, gradient = problem.value_and_grad(x)
    case.compare(f"{at}_f", value)
    case.compare(f"{at}_grad", gradient)
    for name, kind in HESSIANS.items():
        case.compare(f"{at}_{name}", lambda kind=kind: dense_curvature(problem, x, kind))
    if case.has(f"{at}_fstar"):
        least = {"lse": lambda: torch.zeros_like(x), "nle": lambda: least_squares(case)}[case["function"]]()
        case.compare(f"{at}_fstar", problem.value_and_grad(least)[0])
    if case.has(f"{at}_B"):
        A = case.input(f"{at}_A")
        case.compare(f"{at}_B", A.T @ A)


def least_squares(case: Scope) -> Tensor:
    A, b = (case.input(f"{case.name}_{key}") for key in "Ab")
    return torch.linalg.lstsq(A, b[:, None]).solution[:, 0]


def check_step(case: Scope) -> None:
    problem, x = problem_of(case, case["function"]), case["x"]
    B = Metric(metric_of(case), x)
    g = problem.value_and_grad(x)[1]
    z = B.inverse(g)
    lam = B.dual(g, z) / (case["gamma"] + case["lambda_eps"])
    case.compare(f"{case.name}_lambda", lam)
    for name, kind in HESSIANS.items():
        array = f"{case.name}_h" if name == "hess" else f"{case.name}_h_{name}"
        for solver in ("cholesky", "eigh", "cg") if case.has(array) else ():
            form = Dense(dense_curvature(problem, x, kind))
            case.compare(array, system(form, B, g, z, StepOptions(solver=solver, cg_tol=1e-13)).solve(lam))


def check_trajectory(case: Scope) -> None:
    problem, start = problem_of(case, case["function"]), case["x0"]
    if not isinstance(start, Tensor):
        start = {"zeros": torch.zeros(problem.size, dtype=torch.float64)}[start]
    seen: list[Tensor] = []
    rule = Smoothness(
        start=case["initial_gamma"],
        growth=case["gamma_increase"],
        shrinkage=case["gamma_decrease"],
        least=case["gamma_min"],
    )
    found = minimize(
        problem,
        start,
        hess=HESSIANS[case["hessian"]],
        metric=metric_of(case),
        rule=rule,
        step=StepOptions(indefinite=FAILURES[case["failed_cholesky"]]),
        callback=lambda x, record: seen.append(x),
        **STOPS[case["stop"]](case),
    )
    assert found.success
    at = case.name
    case.compare(f"{at}_gamma", torch.tensor(GAMMAS[case["stored_gamma"]](found), dtype=torch.float64))
    case.compare(f"{at}_solves", torch.tensor(found.column("solves")))
    case.compare(f"{at}_f", torch.tensor(found.column("value"), dtype=torch.float64))
    case.compare(f"{at}_gnorm", torch.tensor(found.column("grad_norm"), dtype=torch.float64))
    case.compare(f"{at}_xfinal", found.x)
    case.compare(f"{at}_x", lambda: torch.stack(seen[: case.length(f"{at}_x")]))


PARTS = {"oracle": check_oracle, "step": check_step, "trajectory": check_trajectory}


def check_gns(file: File) -> None:
    for case in file.cases:
        PARTS[case["part"]](case)


FUNCTIONS = {
    "cubic": (lambda x: x.abs() * x / 2, lambda x: x.abs()),
    "exp": (torch.exp, torch.exp),
    "softplus": (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "x^4": (lambda x: x**3, lambda x: 3 * x**2),
    "cosh": (torch.sinh, torch.cosh),
}


def check_gamma(file: File) -> None:
    for k in range(len(file.nodes[""])):
        name, point, scale = (file.input(f"[{k}].{key}") for key in ("f", "x", "hess_scale"))
        gradient, second = next(pair for key, pair in FUNCTIONS.items() if name.startswith(key))
        x = torch.tensor([point], dtype=torch.float64)
        file.compare(f"[{k}].gamma", smoothness(gradient, x, scale * second(x), grid=400))


test_golden, test_a_wrong_number_is_noticed = golden(
    "gns",
    {"gns": check_gns, "gamma_1d": check_gamma},
    fixed=("acceptance", "lambda_eps"),
)
