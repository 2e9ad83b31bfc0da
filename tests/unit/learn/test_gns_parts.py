"""Problems against finite differences, γ(x) against closed forms and bounds, the calculus, the forms' reductions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.learn.optim import (
    Chebyshev,
    Dense,
    Diagonal,
    Equations,
    Linear,
    Logistic,
    LogSumExp,
    LowRank,
    Operator,
    PowerOfResiduals,
    Rosenbrock,
    Softmax,
    Zero,
    minimize,
)
from lineament.learn.optim.gns_forms import as_dense, as_form, reduced
from lineament.learn.optim.gns_metric import Metric
from lineament.learn.optim.gns_problems import dense_curvature
from lineament.learn.optim.gns_smoothness import (
    QSC,
    harmonic,
    hoelder_hessian,
    lower_bound,
    self_concordant,
    smoothness,
    swap_smoothness,
)
from lineament.learn.optim.gns_solvers import Spectral, cubic_step, system

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


CLOSED = [
    ("cubic", lambda x: x.abs() * x / 2, lambda x: x.abs(), 0.7, {1.0: 1.4, 0.5: 0.7, 0.0: 0.35}),
    ("exp", torch.exp, torch.exp, 0.7, {1.0: math.e, 0.5: 2.0, 0.0: 1.0}),
    ("quadratic", lambda x: 3 * x, lambda x: 3 * torch.ones_like(x), -0.7, {1.0: math.inf, 0.0: 0.7}),
]


@pytest.mark.parametrize(("name", "gradient", "second", "at", "wanted"), CLOSED, ids=[c[0] for c in CLOSED])
def test_gamma_in_closed_form(name, gradient, second, at, wanted):
    x = torch.tensor([at], dtype=F64)
    for scale, gamma in wanted.items():
        assert smoothness(gradient, x, scale * second(x), grid=400) == pytest.approx(gamma, rel=1e-5)


@pytest.mark.slow
def test_gamma_keeps_its_bounds():
    problem = LogSumExp.centred(2 * random(20, 5).sigmoid() - 1, random(20, seed=1))
    gradient = lambda x: problem.value_and_grad(x)[1]  # noqa: E731
    bound = self_concordant(problem.concordance())
    for seed in range(3):
        x = random(5, seed=seed + 7)
        exact = smoothness(gradient, x, dense_curvature(problem, x), directions=40, seed=seed)
        other = smoothness(gradient, x, dense_curvature(problem, x, "gauss_newton"), directions=40, seed=seed)
        g = gradient(x)
        # ‖ggᵀ/μ‖ = ‖g‖²/μ = ‖g‖/γ_12, so that γ_12 = μ/‖g‖.
        assert exact >= bound and other >= harmonic(bound, problem.mu / float(g.norm()))
        # Third derivatives of log-sum-exp are below M times its curvature, so that the Hessian is M·L-Lipschitz.
        L = problem.concordance() * float(torch.linalg.matrix_norm(problem.A, 2) ** 2)
        assert exact >= hoelder_hessian(float(g.norm()), L)
    assert math.exp(QSC) == pytest.approx(1 + 2 * QSC, rel=1e-12)


@pytest.mark.slow
def test_gamma_ignores_scale_and_affine_maps():
    problem, x = LogSumExp(random(20, 3), random(20, seed=1)), random(3, seed=2)
    gradient, H = (lambda x: problem.value_and_grad(x)[1]), dense_curvature(problem, x)
    plain = smoothness(gradient, x, H, directions=20)
    assert smoothness(lambda x: 7 * gradient(x), x, 7 * H, directions=20) == pytest.approx(plain, rel=1e-9)
    T = torch.tril(random(3, 3, seed=3)) + 3 * torch.eye(3, dtype=F64)
    # The metric TᵀT has the Cholesky factor R, and T = QR: directions differ by the rotation Q, so many are needed.
    moved = smoothness(
        lambda y: T.T @ gradient(T @ y), torch.linalg.solve(T, x), T.T @ H @ T, metric=T.T @ T, directions=400
    )
    assert moved == pytest.approx(smoothness(gradient, x, H, directions=400), rel=0.02)


def test_calculus_of_the_bounds():
    assert lower_bound(4.0, {1: 2.0, 0: 0.5}) == 1.0 and harmonic(1.0, math.inf) == 1.0
    assert swap_smoothness(2.0, C1=1.0, C2=1.0, beta=0) == pytest.approx(1 / 1.5)
    assert swap_smoothness(4.0, C1=1.0, C2=1.0, beta=1) == 2.0
    with pytest.raises(InputError, match="the gradient is zero there"):
        smoothness(lambda x: 0 * x, torch.ones(1, dtype=F64))


def test_reductions_keep_what_they_say():
    V = random(3, 40)
    like = V[0]
    low, dense = LowRank(V), Dense(V.T @ V)
    for form in (low, dense, Operator(V.T @ V)):
        nystrom = reduced(form, "low_rank", like, rank=3, seed=1)
        torch.testing.assert_close(as_dense(nystrom, 40), V.T @ V, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(reduced(low, "diagonal", like).entries, dense.matrix.diagonal())
    torch.testing.assert_close(reduced(dense, "diagonal", like).entries, dense.matrix.diagonal())
    pinned = Operator(torch.diag(like.abs()))
    torch.testing.assert_close(reduced(pinned, "diagonal", like, rank=2).entries, like.abs())
    torch.testing.assert_close(reduced(low, "dense", like).matrix, dense.matrix)
    assert isinstance(reduced(Zero(), "low_rank", like), Zero)
    indefinite = Dense(torch.diag(torch.tensor([3.0, -2.0], dtype=F64)))
    found = as_dense(reduced(indefinite, "low_rank", like[:2], rank=2), 2)
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12
    assert isinstance(as_form(LowRank(random(9, 4)), like[:4]), Dense)
    with pytest.raises(InputError, match="at most 5000"):
        as_dense(Operator(object()), 6000)


@pytest.mark.parametrize(("form", "rank"), [("diagonal", 1), ("low_rank", 3), ("operator", 1), ("dense", 1)])
@pytest.mark.parametrize("name", ["lse", "logistic", "softmax", "linear, p 3"])
def test_every_form_of_every_problem_descends(name, form, rank):
    problem, n = PROBLEMS[name]
    kind = problem.kinds[1]
    found = minimize(
        problem, torch.ones(n, dtype=F64), hess=kind, form=form, rank=rank, max_iters=40, grad_tol=1e-6
    )
    values = found.column("value")
    assert values == sorted(values, reverse=True) and found.log[-1].grad_norm < 0.1 * found.log[0].grad_norm
    assert (found.nprod > 0) == (form == "operator")


def test_the_krylov_space_serves_every_shift():
    H = random(60, 60)
    H = H @ H.T / 60
    g = random(60, seed=1)
    B = Metric(None, g)
    equations = system(Operator(H), B, g, g, cg_tol=1e-12, cg_steps=60)
    equations.solve(1e-2)
    spent = equations.products
    for lam in (1e-1, 1.0, 10.0):
        h = equations.solve(lam)
        torch.testing.assert_close(
            h, -torch.linalg.solve(H + lam * torch.eye(60, dtype=F64), g), rtol=1e-8, atol=1e-10
        )
    assert equations.products == spent <= 60


def test_conjugate_gradients_meet_their_tolerance_and_the_ball():
    H = random(50, 50)
    H, g = H @ H.T, random(50, seed=1)
    B = Metric(H.diagonal().clone(), g)
    z = B.inverse(g)
    gamma = 0.5
    lam = B.dual(g, z) / gamma
    h = system(Operator(H), B, g, z, cg_tol=0.1).solve(lam)
    residual = H @ h + lam * B.apply(h) + g
    assert B.dual(residual, B.inverse(residual)) <= 0.1 * lam * B.norm(h) * (1 + 1e-9)
    assert B.norm(h) <= gamma and float(g @ h) < 0


def test_cubic_step_is_the_minimiser():
    A = random(5, 5)
    H, g, M = A + A.T, random(5, seed=1), 2.0
    B = Metric(None, g)
    h, lam, value = cubic_step(Spectral.of(H, B, g, "reject"), M)
    model = lambda h: float(g @ h + 0.5 * h @ H @ h + M / 6 * h.norm() ** 3)  # noqa: E731
    assert value == pytest.approx(model(h), rel=1e-9) and lam == pytest.approx(
        0.5 * M * float(h.norm()), rel=1e-9
    )
    assert all(model(h + 0.3 * random(5, seed=s)) >= value for s in range(2, 200))
    # The hard case: no gradient along the direction of negative curvature.
    d, g = torch.tensor([-2.0, 1.0], dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    h, lam, value = cubic_step(Spectral(d, g, lambda y: y), 1.0)
    assert lam >= 2.0 - 1e-9 and abs(float(h[0])) > 1 and value < 0


def test_singular_and_degenerate_hessians():
    for H in (
        torch.zeros(3, 3, dtype=F64),
        torch.ones(3, 3, dtype=F64),
        torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=F64)),
    ):
        found = minimize(
            lambda x: ((x**2).sum(), 2 * x), torch.ones(3, dtype=F64), jac=True, hess=lambda x, H=H: H
        )
        assert found.success and float(found.x.norm()) < 1e-7
    assert isinstance(as_form(None, torch.ones(2)), Zero) and isinstance(
        as_form(torch.ones(2), torch.ones(2)), Diagonal
    )


def test_nn_module_of_one_layer_is_softmax_regression():
    from lineament.learn.optim import Network

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
