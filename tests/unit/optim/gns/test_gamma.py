"""γ(x) against closed forms and the theory's bounds."""

from __future__ import annotations

import math

import pytest
import torch

from lineament.core.checks import InputError
from lineament.optim.gns.problems import LogSumExp, dense_curvature
from lineament.optim.gns.theory import QSC, self_concordant, smoothness

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


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
        assert exact >= bound and other >= 1 / (1 / bound + float(g.norm()) / problem.mu)
        # Third derivatives of log-sum-exp are below M times its curvature, so that the Hessian is M·L-Lipschitz.
        L = problem.concordance() * float(torch.linalg.matrix_norm(problem.A, 2) ** 2)
        assert exact >= (2 * float(g.norm()) / L) ** 0.5
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


def test_gamma_needs_a_gradient():
    with pytest.raises(InputError, match="the gradient is zero there"):
        smoothness(lambda x: 0 * x, torch.ones(1, dtype=F64))
