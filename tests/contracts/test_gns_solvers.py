"""What every solver keeps, whatever the form and the metric: the step of the dense solve, in the ball, downhill."""

from __future__ import annotations

import pytest
import torch

from lineament.core.checks import InputError
from lineament.optim.gns.linear_algebra import Metric
from lineament.optim.gns.solvers import (
    Dense,
    Diagonal,
    LowRank,
    Operator,
    StepOptions,
    Zero,
    as_dense,
    system,
)

N = 9


def as_matrix(B):
    return torch.stack([B.apply(e) for e in torch.eye(N, dtype=torch.float64)])


SOLVERS = {
    "dense": ["cholesky", "eigh", "cg"],
    "low rank": ["woodbury", "cholesky", "eigh", "cg"],
    "rank one": ["rank1", "woodbury", "cholesky", "cg"],
    "diagonal": ["auto", "cholesky", "eigh", "cg"],
    "operator": ["auto", "cg", "cholesky"],
    "zero": ["auto"],
}
CASES = [(form, solver) for form, solvers in SOLVERS.items() for solver in solvers]
METRICS = ["identity", "diagonal", "matrix"]


def draw(*shape, dtype, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def form_of(name, dtype):
    V = draw(3, N, dtype=dtype)
    return {
        "dense": lambda: Dense(V.T @ V + torch.eye(N, dtype=dtype)),
        "low rank": lambda: LowRank(V),
        "rank one": lambda: LowRank(V[:1]),
        "diagonal": lambda: Diagonal(V[0].abs()),
        "operator": lambda: Operator(V.T @ V),
        "zero": Zero,
    }[name]()


def metric_of(name, dtype):
    A = draw(N, N, dtype=dtype, seed=2)
    B = {
        "identity": None,
        "diagonal": A[0].abs() + 0.1,
        "matrix": torch.tril(A @ A.T) + torch.tril(A @ A.T, -1).T + torch.eye(N, dtype=dtype),
    }[name]
    return Metric(B, A[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("form", "solver"), CASES)
@pytest.mark.parametrize("gamma", [1e-3, 1.0, 1e3])
def test_the_step_is_that_of_the_matrix(form, solver, metric, gamma, dtype):
    H, B, g = form_of(form, dtype), metric_of(metric, dtype), draw(N, dtype=dtype, seed=3)
    z = B.inverse(g)
    lam = B.dual(g, z) / gamma
    # In single precision a residual of 1e-12 does not exist; conjugate gradients end with the space.
    h = system(H, B, g, z, StepOptions(solver=solver, cg_tol=1e-13)).solve(lam)
    matrix = torch.zeros(N, N, dtype=torch.float64) if form == "zero" else as_dense(H, N).double()
    exact = Metric(
        None if metric == "identity" else B.diagonal.double() if metric == "diagonal" else B.matrix.double(),
        g.double(),
    )
    wanted = -torch.linalg.solve(matrix + lam * as_matrix(exact), g.double())
    tol = 1e-8 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(h.double(), wanted, rtol=tol, atol=tol * float(wanted.abs().max()))
    assert h.dtype == dtype
    if dtype == torch.float64:
        assert exact.norm(h) <= gamma * (1 + 1e-9) and float(g @ h) < 0


@pytest.mark.parametrize("solver", ["cholesky", "eigh", "cg"])
def test_indefinite_matrices_are_refused_shifted_or_projected(solver):
    H = torch.diag(torch.tensor([-2.0, 1.0, 3.0], dtype=torch.float64))
    g = torch.ones(3, dtype=torch.float64)
    B = Metric(None, g)
    make = lambda mode: system(Dense(H), B, g, g, StepOptions(solver=solver, indefinite=mode, cg_tol=1e-12))  # noqa: E731
    assert make("reject").solve(1.0) is None
    torch.testing.assert_close(make("reject").solve(2.5), -1 / (H.diagonal() + 2.5))
    torch.testing.assert_close(make("shift").solve(1.0), -1 / (H.diagonal() + 2 + 1.0))
    torch.testing.assert_close(make("project").solve(1.0), -1 / (H.diagonal().clamp(min=0) + 1.0))


def test_a_solver_that_does_not_fit_is_named():
    g = torch.ones(N, dtype=torch.float64)
    B = Metric(None, g)
    with pytest.raises(InputError, match="solver: got 'woodbury' for a Dense form"):
        system(form_of("dense", torch.float64), B, g, g, StepOptions(solver="woodbury"))
    with pytest.raises(InputError, match="expected a low-rank form of rank 1"):
        system(form_of("low rank", torch.float64), B, g, g, StepOptions(solver="rank1"))


def test_a_low_rank_form_plus_a_multiple_of_the_identity():
    g = draw(N, dtype=torch.float64)
    form = LowRank(draw(3, N, dtype=torch.float64), 0.3)
    for metric in METRICS:
        B = metric_of(metric, torch.float64)
        z = B.inverse(g)
        wanted = -torch.linalg.solve(as_dense(form, N) + 0.7 * as_matrix(B), g)
        torch.testing.assert_close(system(form, B, g, z).solve(0.7), wanted)
