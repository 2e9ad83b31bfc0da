"""The reference code's oracles, steps and trajectories: γ and the linear solves exactly, values within its 1e-8 in λ."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tests.golden.common import files

from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.equations import Chebyshev, Linear, Rosenbrock
from lineament.optim.gns.forms import Dense
from lineament.optim.gns.linear_algebra import Metric
from lineament.optim.gns.problems import Logistic, LogSumExp, PowerOfResiduals, Softmax, dense_curvature
from lineament.optim.gns.solvers import StepOptions, system
from lineament.optim.gns.theory import smoothness

# f_0 .. f_K and x_0 .. x_7 come from a code that divides by γ + 1e-8.
VALUES, POINTS = {"rtol": 1e-5, "atol": 1e-7}, {"rtol": 0, "atol": 1e-6}


def problems(a):
    """{prefix: (problem, {name of a stored matrix: kind})} for those whose inputs are there."""
    found = {}
    if "lse_A" in a:
        found["lse"] = (
            LogSumExp(a["lse_A"], a["lse_b"], mu=float(a["lse_mu"])),
            {"hess": "exact", "wgn": "gauss_newton"},
        )
    if "nle_A" in a:
        equations = Linear(a["nle_A"], a["nle_b"])
        found["nle"] = PowerOfResiduals(equations, p=int(a["nle_p"])), {"hess": "exact", "fisher": "fisher"}
    for prefix, equations in (("ros", Rosenbrock()), ("cheb", Chebyshev())):
        if f"{prefix}_p" in a:
            power = PowerOfResiduals(equations, p=int(a[f"{prefix}_p"]))
            found[prefix] = power, {"hess": "exact", "gn": "gauss_newton"}
    if "log_A" in a:
        logistic = Logistic(a["log_A"], a["log_y"], l2=float(a["log_l2"]))
        found["log"] = logistic, {"hess": "exact", "fisher": "fisher"}
    if "soft_A" in a:
        softmax = Softmax(a["soft_A"], a["soft_Y"].argmax(1), classes=a["soft_Y"].shape[1])
        found["soft"] = softmax, {"hess": "exact", "wgn": "gauss_newton", "fisher": "fisher"}
    return found


# Trajectory: (kind of H, metric, f*).
TRAJECTORIES = {
    "lse_exact_B": ("exact", "lse_B", "lse_fstar"),
    "lse_exact_I": ("exact", None, "lse_fstar"),
    "lse_wgn_B": ("gauss_newton", "lse_B", "lse_fstar"),
    "nle_exact": ("exact", "nle_B", "nle_fstar"),
    "nle_fisher": ("fisher", "nle_B", "nle_fstar"),
    "ros_gn": ("gauss_newton", None, None),
    "cheb_gn": ("gauss_newton", None, None),
    "cheb_exact_retry": ("exact", None, None),
    "log_exact": ("exact", None, None),
    "log_fisher": ("fisher", None, None),
}
ONE_POINT = (
    "x",
    "f",
    "grad",
    "hess",
    "wgn",
    "fisher",
    "gn",
    "A",
    "b",
    "mu",
    "p",
    "B",
    "fstar",
    "y",
    "Y",
    "l2",
)


def check_oracles(a, prefix, problem, matrices):
    x = a[f"{prefix}_x"]
    value, gradient = problem.value_and_grad(x)
    np.testing.assert_allclose(value, float(a[f"{prefix}_f"]), rtol=1e-10)
    scale = float(a[f"{prefix}_grad"].abs().max())
    np.testing.assert_allclose(gradient, a[f"{prefix}_grad"], rtol=1e-10, atol=1e-10 * scale)
    for name, kind in matrices.items():
        want = a[f"{prefix}_{name}"]
        np.testing.assert_allclose(
            dense_curvature(problem, x, kind), want, rtol=1e-10, atol=1e-10 * float(want.abs().max())
        )


def check_step(a):
    problem = LogSumExp(a["lse_A"], a["lse_b"], mu=float(a["lse_mu"]))
    x, B = a["lse_x"], Metric(a["lse_B"], a["lse_x"])
    g = problem.value_and_grad(x)[1]
    z = B.inverse(g)
    lam = B.dual(g, z) / float(a["step_gamma"])
    np.testing.assert_allclose(lam, float(a["step_lambda"]), rtol=1e-9)
    for name, kind in (("step_h", "exact"), ("step_h_wgn", "gauss_newton")):
        for solver in ("cholesky", "eigh", "cg"):
            form = Dense(dense_curvature(problem, x, kind))
            h = system(form, B, g, z, StepOptions(solver=solver, cg_tol=1e-13)).solve(lam)
            np.testing.assert_allclose(h, a[name], rtol=1e-9, atol=1e-9 * float(a[name].abs().max()))


def check_trajectory(a, name, problem):
    kind, metric, least = TRAJECTORIES[name]
    prefix = name.split("_")[0]
    independent = f"{name}_solves" not in a
    stop = (
        {"grad_tol": 1e-7}
        if prefix == "log"
        else {"f_star": float(a[least]) if least else 0.0, "grad_tol": 0.0}
    )
    start = a.get(
        f"{name}_x0", a["cheb_x"] if prefix == "cheb" else torch.zeros_like(a.get("log_x", torch.zeros(0)))
    )
    seen = []
    result = minimize(
        problem,
        start,
        hess=kind,
        metric=None if metric is None else a[metric],
        callback=lambda x, record: seen.append(x) and None,
        **stop,
    )
    assert result.success
    if independent:
        assert result.column("gamma")[:-1] == a[f"{name}_gamma"].tolist()
    else:
        assert result.column("gamma_start") == a[f"{name}_gamma"].tolist()
        assert result.column("solves") == a[f"{name}_solves"].tolist()
        np.testing.assert_allclose(result.column("grad_norm"), a[f"{name}_gnorm"], rtol=1e-5, atol=1e-7)
        stored = a[f"{name}_x"]
        np.testing.assert_allclose(torch.stack(seen[: len(stored)]), stored, **POINTS)
    np.testing.assert_allclose(result.column("value"), a[f"{name}_f"], **VALUES)
    if f"{name}_xfinal" in a:
        np.testing.assert_allclose(result.x, a[f"{name}_xfinal"], **POINTS)


def check_arrays(a):
    known = problems(a)
    owned = {"step_gamma", "step_lambda", "step_h", "step_h_wgn"}
    for prefix, (problem, matrices) in known.items():
        check_oracles(a, prefix, problem, matrices)
        owned |= {f"{prefix}_{part}" for part in ONE_POINT}
    if "step_gamma" in a:
        check_step(a)
    for name in TRAJECTORIES:
        if f"{name}_gamma" in a:
            check_trajectory(a, name, known[name.split("_")[0]][0])
            owned |= {f"{name}_{part}" for part in ("x0", "f", "gnorm", "gamma", "solves", "x", "xfinal")}
    assert known and a.keys() <= owned, f"arrays that nothing read: {sorted(a.keys() - owned)}"


FUNCTIONS = {
    "cubic |x|^3/6": (lambda x: x.abs() * x / 2, lambda x: x.abs()),
    "exp(x)": (torch.exp, torch.exp),
    "softplus(x)": (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "x^4/4": (lambda x: x**3, lambda x: 3 * x**2),
    "cosh(x)": (torch.sinh, torch.cosh),
}


def check_gamma(case):
    key = next((k for k in FUNCTIONS if k.split("(")[0] == case["f"].split("(")[0]), None)
    assert key is not None, f"no function named {case['f']!r}"
    gradient, second = FUNCTIONS[key]
    x = torch.tensor([case["x"]], dtype=torch.float64)
    found = smoothness(gradient, x, case["hess_scale"] * second(x), grid=400)
    # The stored values come from a grid with an error of up to 1e-4.
    np.testing.assert_allclose(found, case["gamma"], rtol=1e-4)


@pytest.mark.parametrize("path", files("gns"), ids=lambda path: path.name)
def test_golden(path):
    if path.suffix == ".json":
        for case in json.loads(path.read_text()):
            check_gamma(case)
    elif path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as stored:
            arrays = {k: stored[k] for k in stored.files}
        check_arrays({k: torch.from_numpy(v) if v.ndim else v for k, v in arrays.items()})
    else:
        pytest.fail(f"{path.name}: no adapter knows this kind of file")
