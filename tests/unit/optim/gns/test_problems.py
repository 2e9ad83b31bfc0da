"""The problem library: derivatives against finite differences, what each approximation leaves out, every form of each."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.core.curvature.matrices import fisher
from lineament.optim.gns import network as network_module
from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.network import Network
from lineament.optim.gns.problems import (
    Composite,
    Equations,
    Linear,
    Logistic,
    LogSumExp,
    PowerOfResiduals,
    Softmax,
    dense_curvature,
)
from lineament.optim.gns.solvers import Dense, StepOptions, as_dense
from lineament.recipes.gns.equations import Chebyshev, Rosenbrock

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


G = torch.diag(torch.tensor([1.0, 2.0, 3.0, 0.5], dtype=F64))
PROBLEMS = {
    "lse": (LogSumExp(random(12, 4), random(12, seed=1), mu=0.7), 4),
    "logistic": (Logistic(random(12, 4), (random(12, seed=1) > 0).long(), l2=0.05), 4),
    "softmax": (Softmax(random(12, 3), torch.arange(12) % 4, l2=0.05), 12),
    "linear, p 3": (PowerOfResiduals(Linear(random(9, 4), random(9, seed=1)), p=3), 4),
    "linear, G": (PowerOfResiduals(Linear(random(4, 4), random(4, seed=1)), p=3, G=G), 4),
    "rosenbrock, p 4": (PowerOfResiduals(Rosenbrock(), p=4), 2),
    "chebyshev, p 4": (PowerOfResiduals(Chebyshev(), p=4), 4),
    "chebyshev, G, p 2": (PowerOfResiduals(Chebyshev(), p=2, G=G), 4),
    "composite": (Composite(lambda u: (1 + u**2).sqrt().sum(), Chebyshev()), 4),
    "composite, own": (
        Composite(
            lambda u: torch.logsumexp(u, 0),
            Equations(lambda x: torch.stack([x.square().sum(), x.sin().sum()])),
        ),
        3,
    ),
    "own": (PowerOfResiduals(Equations(lambda x: torch.stack([x[0] ** 2 - x[1], x.sin().sum()])), p=3), 3),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_derivatives_against_finite_differences(name):
    problem, n = PROBLEMS[name]
    x, t = 0.5 * random(n, seed=5), 1e-5
    value, gradient = problem.value_and_grad(x)
    assert math.isfinite(value)
    for d in torch.eye(n, dtype=F64):
        above, below = problem.value_and_grad(x + t * d), problem.value_and_grad(x - t * d)
        assert (above[0] - below[0]) / (2 * t) == pytest.approx(float(gradient @ d), rel=1e-6, abs=1e-7)
        wanted = (above[1] - below[1]) / (2 * t)
        torch.testing.assert_close(dense_curvature(problem, x) @ d, wanted, rtol=1e-5, atol=1e-5)


SIZED = [name for name in PROBLEMS if PROBLEMS[name][0].size]


@pytest.mark.parametrize("name", SIZED)
def test_a_start_that_does_not_fit_is_named(name):
    problem, n = PROBLEMS[name]
    for size in (n - 1, n + 1):
        for x0 in (torch.ones(size, dtype=F64), np.ones(size)):
            with pytest.raises(
                InputError,
                match=rf"x0: got .*\({size},\), expected .*\({n},\) for this {type(problem).__name__}",
            ):
                minimize(problem, x0)
    if problem.dtype is not None:
        with pytest.raises(InputError, match=r"x0: got a float32 tensor .*, expected a float64 tensor"):
            minimize(problem, torch.ones(n))
    for dtype in (torch.float16, torch.bfloat16, torch.complex128):
        with pytest.raises(InputError, match=r"x0: got .*, expected real numbers in float64 \(or float32\)"):
            minimize(problem, torch.ones(n, dtype=dtype))
    with pytest.raises(InputError, match="x0: got a complex128 array"):
        minimize(problem, np.ones(n) + 0j)


def test_problems_of_float32_take_starts_of_float32():
    problem = Softmax(random(12, 3).float(), torch.arange(12) % 4, l2=0.05)
    assert minimize(problem, torch.zeros(12), grad_tol=1e-4).x.dtype == torch.float32
    with pytest.raises(InputError, match=r"x0: got a float64 array .*, expected a float32 tensor"):
        minimize(problem, np.zeros(12))
    network = Network(
        nn.Linear(3, 4), nn.functional.cross_entropy, [(random(12, 3).float(), torch.arange(12) % 4)]
    )
    with pytest.raises(InputError, match=r"x0: got .*, expected a float64 tensor of shape \(16,\)"):
        minimize(network, torch.zeros(7, dtype=F64))


@pytest.mark.parametrize("name", PROBLEMS)
def test_approximations_are_positive_semi_definite(name):
    problem, n = PROBLEMS[name]
    x = 0.5 * random(n, seed=5)
    for kind in problem.kinds[1:]:
        H = dense_curvature(problem, x, kind)
        torch.testing.assert_close(H, H.T)
        assert float(torch.linalg.eigvalsh(H)[0]) > -1e-10 * float(H.abs().max()) - 1e-14


def test_what_the_approximations_leave_out():
    x = random(4, seed=5)
    lse = PROBLEMS["lse"][0]
    g = lse.value_and_grad(x)[1]
    gap = dense_curvature(lse, x, "gauss_newton") - dense_curvature(lse, x)
    torch.testing.assert_close(gap, torch.outer(g, g) / lse.mu)
    power = PROBLEMS["linear, p 3"][0]
    f, g = power.value_and_grad(x)
    fisher = dense_curvature(power, x, "fisher")
    torch.testing.assert_close(fisher, (power.p - 2) / (power.p * f) * torch.outer(g, g))
    torch.testing.assert_close(dense_curvature(power, x, "gauss_newton"), dense_curvature(power, x))
    logistic = PROBLEMS["logistic"][0]
    each = torch.stack([torch.sigmoid(r @ x) * r for r in logistic.rows])
    wanted = each.T @ each / len(each) + 0.05 * torch.eye(4, dtype=F64)
    torch.testing.assert_close(dense_curvature(logistic, x, "fisher"), wanted)
    torch.testing.assert_close(dense_curvature(logistic, x, "gauss_newton"), dense_curvature(logistic, x))


def test_a_composite_of_linear_residuals_is_the_problem_it_spells_out():
    A, b, x = random(12, 4), random(12, seed=1), random(4, seed=5)
    pairs = [
        (Composite(lambda u: 0.7 * torch.logsumexp(u / 0.7, 0), Linear(A, b)), LogSumExp(A, b, mu=0.7)),
        (Composite(lambda u: u.norm() ** 3 / 3, Linear(A, b)), PowerOfResiduals(Linear(A, b), p=3)),
    ]
    for composite, plain in pairs:
        (value, gradient), (other, slope) = (p.value_and_grad(x) for p in (composite, plain))
        assert value == pytest.approx(other, rel=1e-12)
        torch.testing.assert_close(gradient, slope)
        # The residuals are linear, so that nothing is left out.
        for kind in ("exact", "gauss_newton"):
            torch.testing.assert_close(dense_curvature(composite, x, kind), dense_curvature(plain, x))


def test_a_robust_fit_passes_over_outliers_and_what_is_not_convex_is_refused():
    t = torch.linspace(0, 2, 30, dtype=F64)
    data = 2 * torch.exp(-1.5 * t)
    data[::7] += 5.0
    errors = Equations(lambda x: x[0] * torch.exp(-x[1] * t) - data)
    robust = Composite(lambda u: (1e-4 + u**2).sqrt().sum(), errors)
    for kind in ("exact", "gauss_newton"):
        found = minimize(robust, torch.tensor([1.0, 1.0], dtype=F64), hess=kind, grad_tol=1e-6)
        assert found.success and found.x.tolist() == pytest.approx([2.0, 1.5], abs=0.01)
    with pytest.raises(InputError, match="outer: the smallest eigenvalue of its Hessian is -1"):
        Composite(lambda u: u.cos().sum(), Linear(random(3, 2), torch.zeros(3, dtype=F64))).curvature(
            torch.zeros(2, dtype=F64), "gauss_newton"
        )
    with pytest.raises(InputError, match=r"outer: it returned .*expected a tensor of one element"):
        minimize(Composite(lambda u: u, errors), torch.ones(2, dtype=F64))
    with pytest.raises(InputError, match=r"which has no residuals\(\)"):
        Composite(torch.sum, "equations")


@pytest.mark.parametrize("p", [2, 3, 4])
def test_no_curvature_and_no_nan_where_the_equations_hold(p):
    problem = PowerOfResiduals(Rosenbrock(), p=p)
    for kind in problem.kinds:
        H = dense_curvature(problem, torch.ones(2, dtype=F64), kind)
        assert bool(torch.isfinite(H).all()) and (p == 2 or bool((H == 0).all()))
    assert bool((dense_curvature(PowerOfResiduals(Rosenbrock(), p=2), random(2), "fisher") == 0).all())


def test_a_values_overflow_is_infinite_not_an_error():
    value, _ = PowerOfResiduals(Rosenbrock(), p=8).value_and_grad(torch.full((2,), 1e60, dtype=F64))
    assert value == math.inf


@pytest.mark.parametrize(("form", "rank"), [("diagonal", 1), ("low_rank", 3), ("operator", 1), ("dense", 1)])
@pytest.mark.parametrize("name", ["lse", "logistic", "softmax", "linear, p 3"])
def test_every_form_of_every_problem_descends(name, form, rank):
    problem, n = PROBLEMS[name]
    kind = problem.kinds[1]
    found = minimize(
        problem,
        torch.ones(n, dtype=F64),
        hess=kind,
        step=StepOptions(form=form, rank=rank),
        max_iters=40,
        grad_tol=1e-6,
    )
    values = found.column("value")
    assert values == sorted(values, reverse=True) and found.log[-1].grad_norm < 0.1 * found.log[0].grad_norm
    assert (found.nprod > 0) == (form == "operator")


def test_the_fisher_matrix_is_summed_up_within_its_memory(monkeypatch):
    torch.manual_seed(0)
    A, y = random(40, 3), torch.arange(40) % 4
    net = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 4)).double()
    problem = Network(net, nn.functional.cross_entropy, [(A[:25], y[:25]), (A[25:], y[25:])])
    seen = []
    original = network_module.per_sample_gradients
    monkeypatch.setattr(network_module, "_FACTOR_BYTES", 20 * 8 * 7)
    monkeypatch.setattr(
        network_module, "per_sample_gradients", lambda *a, **k: seen.append(len(a[2])) or original(*a, **k)
    )
    found = problem.curvature(problem.x0, "fisher")
    operator = fisher(net, nn.functional.cross_entropy, problem._loader, kind="empirical")
    torch.testing.assert_close(as_dense(found, 20), operator.dense())
    assert isinstance(found, Dense) and seen == [7, 7, 7, 4, 7, 7, 1]


def test_nn_module_of_one_layer_is_softmax_regression():
    torch.manual_seed(0)
    A, y = random(40, 3), torch.arange(40) % 4
    net = nn.Linear(3, 4, bias=False).double()
    with torch.no_grad():
        net.weight.zero_()
    network = Network(net, nn.functional.cross_entropy, [(A[:25], y[:25]), (A[25:], y[25:])])
    library = Softmax(A, y)
    x = random(12, seed=4)
    flipped = x.view(4, 3).T.reshape(-1)
    order = torch.arange(12).view(4, 3).T.reshape(-1)
    value, gradient = network.value_and_grad(x)
    other = library.value_and_grad(flipped)
    assert value == pytest.approx(other[0], rel=1e-12)
    torch.testing.assert_close(gradient[order], other[1])
    for kind, theirs in (
        ("exact", "exact"),
        ("gauss_newton", "exact"),
        ("true_fisher", "exact"),
        ("fisher", "fisher"),
    ):
        found = as_dense(network.curvature(x, kind), 12)
        torch.testing.assert_close(found[order][:, order], dense_curvature(library, flipped, theirs))
