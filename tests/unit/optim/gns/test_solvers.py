"""The forms' reductions; conjugate gradients, the cubic step, and Hessians without an inverse."""

from __future__ import annotations

import pytest
import torch

from lineament.core.checks import InputError
from lineament.optim.gns.algorithm import minimize
from lineament.optim.gns.linear_algebra import Metric
from lineament.optim.gns.rules import cubic_step
from lineament.optim.gns.solvers import (
    Dense,
    Diagonal,
    LowRank,
    Operator,
    Spectral,
    StepOptions,
    Zero,
    as_dense,
    as_form,
    reduced,
    system,
)

F64 = torch.float64


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_reductions_keep_what_they_say():
    V = random(3, 40)
    like = V[0]
    low, dense = LowRank(V), Dense(V.T @ V)
    for form in (low, dense, Operator(V.T @ V)):
        nystrom = reduced(form, like, StepOptions(form="low_rank", rank=3, seed=1))
        torch.testing.assert_close(as_dense(nystrom, 40), V.T @ V, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(
        reduced(low, like, StepOptions(form="diagonal")).entries, dense.matrix.diagonal()
    )
    torch.testing.assert_close(
        reduced(dense, like, StepOptions(form="diagonal")).entries, dense.matrix.diagonal()
    )
    pinned = Operator(torch.diag(like.abs()))
    torch.testing.assert_close(
        reduced(pinned, like, StepOptions(form="diagonal", rank=2)).entries, like.abs()
    )
    torch.testing.assert_close(reduced(low, like, StepOptions(form="dense")).matrix, dense.matrix)
    assert isinstance(reduced(Zero(), like, StepOptions(form="low_rank")), Zero)
    indefinite = Dense(torch.diag(torch.tensor([3.0, -2.0], dtype=F64)))
    found = as_dense(reduced(indefinite, like[:2], StepOptions(form="low_rank", rank=2)), 2)
    assert float(torch.linalg.eigvalsh(found)[0]) > -1e-12
    assert isinstance(as_form(LowRank(random(9, 4)), like[:4]), Dense)
    with pytest.raises(InputError, match="at most 5000"):
        as_dense(Operator(object()), 6000)


def test_the_krylov_space_serves_every_shift():
    H = random(60, 60)
    H = H @ H.T / 60
    g = random(60, seed=1)
    B = Metric(None, g)
    equations = system(Operator(H), B, g, g, StepOptions(cg_tol=1e-12, cg_steps=60))
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
    h = system(Operator(H), B, g, z, StepOptions(cg_tol=0.1)).solve(lam)
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
