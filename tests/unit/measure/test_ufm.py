"""The unconstrained-features model: closed forms, the central path's theorem, perturbations near collapse."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lineament.core.checks import InputError
from lineament.measure.collapse.central_path import central_path
from lineament.measure.collapse.near_collapse import PerturbationMap, block_spectrum, cross_norm, map_spectrum
from lineament.measure.collapse.ufm import UFM, ReducedHessian, conjugate_gradients, minimise

PROBLEM = UFM(3, 4, lambda_w=0.5, lambda_h=0.1)
PAPER = UFM(4, 10, lambda_w=math.sqrt(2), lambda_h=0.25)


def features(problem: UFM, d: int = 5, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(d, problem.classes * problem.samples, generator=g, dtype=torch.float64)


def test_the_best_weight_is_stationary_and_gives_the_closed_form_of_the_loss():
    H = features(PROBLEM)
    W = PROBLEM.best_weight(H).requires_grad_()
    (slope,) = torch.autograd.grad(PROBLEM.objective(W, H), W)
    assert slope.abs().max() < 1e-15
    Y = PROBLEM.targets(H)
    gram = H.T @ H + PROBLEM.samples * PROBLEM.lambda_w * torch.eye(12, dtype=H.dtype)
    closed = PROBLEM.lambda_w / 6 * torch.trace(Y @ torch.linalg.inv(gram) @ Y.T)
    closed = closed + PROBLEM.lambda_h / 24 * H.square().sum()
    assert PROBLEM.reduced(H) == pytest.approx(float(closed), rel=1e-13)


def test_gradient_and_hessian_are_those_of_finite_differences():
    H, D = features(PROBLEM), features(PROBLEM, seed=1)
    step = 1e-5
    slope = (PROBLEM.reduced(H + step * D) - PROBLEM.reduced(H - step * D)) / (2 * step)
    assert slope == pytest.approx(float((PROBLEM.gradient(H) * D).sum()), rel=1e-8)
    beta = 0.7
    bend = 12 * (PROBLEM.gradient(H + step * D) - PROBLEM.gradient(H - step * D)) / (2 * step) + beta * D
    np.testing.assert_allclose(ReducedHessian(PROBLEM, H, beta=beta) @ D, bend, rtol=1e-6, atol=1e-8)


def test_the_hessian_is_the_schur_complement_of_the_joint_one():
    H = features(PROBLEM)
    W = PROBLEM.best_weight(H)

    def joint(v):
        return 12 * PROBLEM.objective(v[:15].view(3, 5), v[15:].view(5, 12), torch.zeros_like(H), 0.3)

    full = torch.autograd.functional.hessian(joint, torch.cat([W.flatten(), H.flatten()]))
    ww, wh, hh = full[:15, :15], full[:15, 15:], full[15:, 15:]
    schur = hh - wh.T @ torch.linalg.solve(ww, wh)
    D = features(PROBLEM, seed=2)
    found = ReducedHessian(PROBLEM, H, beta=0.3) @ D
    np.testing.assert_allclose(found.flatten(), schur @ D.flatten(), rtol=1e-10, atol=1e-12)


@given(st.floats(0.01, 3.0), st.floats(0.01, 3.0), st.integers(2, 5), st.integers(1, 4), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_the_closed_form_minimiser_is_stationary_and_has_its_value(lw, lh, classes, samples, more):
    problem = UFM(classes, samples, lw, lh)
    d = classes + more
    W, H = problem.collapsed(d, generator=torch.Generator().manual_seed(0))
    assert problem.gradient(H).abs().max() < 1e-12
    if problem.c < 1:
        np.testing.assert_allclose(problem.best_weight(H), W, atol=1e-12)
        gram = problem.means(H).T @ problem.means(H)
        np.testing.assert_allclose(gram, problem.rho * torch.eye(classes), atol=1e-12)
        assert problem.value(W, H) == pytest.approx(problem.c - problem.c**2 / 2, abs=1e-12)
    else:
        assert not H.any() and not W.any() and problem.value(W, H) == pytest.approx(0.5)
    # No other point is lower.
    near = H + 0.1 * torch.randn(H.shape, generator=torch.Generator().manual_seed(1), dtype=H.dtype)
    assert problem.reduced(near) >= problem.reduced(H) - 1e-12


def test_a_collapsed_anchor_is_its_own_minimiser():
    W, H = PROBLEM.collapsed(6, generator=torch.Generator().manual_seed(2))
    found = minimise(PROBLEM, H, beta=0.5)
    assert found.converged
    np.testing.assert_allclose(found.H, H, atol=1e-10)
    np.testing.assert_allclose(found.W, W, atol=1e-10)


@pytest.mark.parametrize("beta", [0.5, 2.0, 50.0])
@pytest.mark.parametrize("loss", ["mse", "ce"])
def test_minimise_finds_a_stationary_point_below_its_start(loss, beta):
    problem = UFM(3, 4, 0.05, 0.05, loss=loss)
    H0 = features(problem)
    found = minimise(problem, H0, beta)
    W, H = found.W.clone().requires_grad_(), found.H.clone().requires_grad_()
    slopes = torch.autograd.grad(12 * problem.objective(W, H, H0, beta), (W, H))
    assert found.converged and max(float(s.abs().max()) for s in slopes) < 1e-10
    start = UFM(3, 4, 0.05, 0.05).best_weight(H0)
    assert found.value < problem.value(start, H0, H0, beta)
    assert found.value == pytest.approx(problem.value(found.W, found.H, H0, beta))
    if loss == "mse":
        np.testing.assert_allclose(problem.implicit_step(found.H, H0, beta), found.H, atol=1e-11)
        np.testing.assert_allclose(beta * (found.H - H0), -12 * problem.gradient(found.H), atol=1e-11)


def test_minimise_reaches_the_global_collapse_without_an_anchor():
    problem = UFM(3, 4, 0.05, 0.05)
    found = minimise(problem, features(problem), 0.0)
    assert found.converged and found.value == pytest.approx(problem.c - problem.c**2 / 2, abs=1e-12)
    within, between = problem.traces(found.H)
    assert within < 1e-20 and between > 0.1


def test_cross_entropy_collapses_to_a_simplex():
    problem = UFM(3, 4, 0.01, 0.01, loss="ce")
    found = minimise(problem, features(problem), 0.0)
    means = problem.means(found.H)
    gram = (means / means.norm(dim=0)).T @ (means / means.norm(dim=0))
    within, between = problem.traces(found.H)
    assert found.converged and within / between < 1e-12
    np.testing.assert_allclose(gram, 1.5 * torch.eye(3) - 0.5, atol=1e-6)


def test_minimise_in_float32_and_cut_short():
    found = minimise(PROBLEM, features(PROBLEM).float(), 2.0)
    assert found.H.dtype == torch.float32 and found.converged
    exact = minimise(PROBLEM, features(PROBLEM), 2.0)
    np.testing.assert_allclose(found.H, exact.H, atol=1e-4)
    assert not minimise(PROBLEM, features(PROBLEM), 2.0, tolerance=1e-300, max_iterations=1).converged


def test_conjugate_gradients_solves_and_follows_negative_curvature():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(8, 8, generator=g, dtype=torch.float64)
    A = A @ A.T + torch.eye(8)
    b = torch.randn(8, generator=g, dtype=torch.float64)
    np.testing.assert_allclose(conjugate_gradients(lambda v: A @ v, b), torch.linalg.solve(A, b), rtol=1e-9)
    assert torch.equal(conjugate_gradients(lambda v: -v, b), b)


@pytest.mark.parametrize("method", ["dop853", "rk45", "rk4"])
@pytest.mark.parametrize("lambda_h", [0.0, 0.1])
def test_the_theorem_of_the_central_path(method, lambda_h):
    problem = UFM(3, 5, 0.5, lambda_h)
    H0 = features(problem, 6)
    path = central_path(problem, H0, torch.linspace(0, 6, 25), method=method)
    assert torch.equal(path.features[0], H0)
    assert (path.nc1_tilde.diff() < 0).all() and (path.loss.diff() < 0).all()
    assert (path.scaled_within.diff() < 0).all() and (path.scaled_between.diff() > 0).all()
    if lambda_h == 0:
        assert torch.equal(path.scaled_within, path.trace_within)
    # The integrators agree: three discretisations of one flow.
    exact = central_path(problem, H0, torch.linspace(0, 6, 25), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(path.features, exact.features, atol=2e-6)


def test_deviations_obey_their_own_equation():
    H0 = features(PROBLEM, 6)
    h = 1e-4
    ahead = central_path(PROBLEM, H0, [h], rtol=1e-12, atol=1e-14).features[0]
    rest = lambda H: H - PROBLEM.spread(PROBLEM.means(H))  # noqa: E731
    W = PROBLEM.best_weight(H0)
    wanted = -(W.T @ W + PROBLEM.lambda_h * torch.eye(6)) @ rest(H0)
    np.testing.assert_allclose((rest(ahead) - rest(H0)) / h, wanted, atol=2e-3)


def test_collapsed_features_stay_collapsed_and_reach_the_minimisers_length():
    _, H = PROBLEM.collapsed(4, generator=torch.Generator().manual_seed(1))
    path = central_path(PROBLEM, 0.5 * H, [0.0, 1.0, 200.0])
    assert path.trace_within.max() < 1e-20
    norms = PROBLEM.means(path.features[-1]).square().sum(0)
    np.testing.assert_allclose(norms, PROBLEM.rho, rtol=1e-6)
    late = central_path(PROBLEM, features(PROBLEM, 4), [0.0, 300.0])
    np.testing.assert_allclose(PROBLEM.means(late.features[-1]).square().sum(0), PROBLEM.rho, rtol=1e-2)


def test_for_large_beta_the_minimiser_is_a_gradient_step_and_less_variable():
    H0 = features(PROBLEM, 6)
    within, between = PROBLEM.traces(H0)
    errors = []
    for beta in (100.0, 1000.0):
        H = minimise(PROBLEM, H0, beta).H
        errors.append(float((H - H0 + 12 * PROBLEM.gradient(H0) / beta).norm()))
        a, b = PROBLEM.traces(H)
        assert a / b < within / between
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(("classes", "samples", "d"), [(3, 3, 6), (4, 2, 4), (2, 5, 3), (2, 1, 4)])
def test_closed_spectra_are_those_of_the_maps(classes, samples, d):
    problem, beta = UFM(classes, samples, 0.8, 0.3), 40.0
    _, H = problem.collapsed(d, generator=torch.Generator().manual_seed(0))
    exact = PerturbationMap(problem, H, beta=beta)
    values = torch.linalg.eigvalsh(exact.dense()).flip(0)
    np.testing.assert_allclose(values, map_spectrum(problem, d, beta).expanded(), atol=1e-13)
    expansion = PerturbationMap(problem, H, beta=beta, method="expansion")
    for k in range(classes):
        found = torch.linalg.svdvals(expansion.block(k, k))
        np.testing.assert_allclose(found, block_spectrum(problem, d, beta).expanded(), atol=1e-13)
        cross = torch.linalg.svdvals(expansion.block(k, (k + 1) % classes))
        assert cross[0] == pytest.approx(cross_norm(problem, beta), abs=1e-14)
        assert not len(cross[1:]) or cross[1] < 1e-14


def test_the_papers_extremes():
    beta = 100.0
    found = block_spectrum(PAPER, 10, beta)
    assert found.values[0] == 1
    assert found.values[-1] == pytest.approx(1 - math.sqrt(PAPER.lambda_h / PAPER.lambda_w) / beta)
    assert cross_norm(PAPER, beta) == pytest.approx(2 / beta * PAPER.lambda_h * (1 - PAPER.c))
    assert sum(found.multiplicities) == 100 and sum(map_spectrum(PAPER, 10, beta).multiplicities) == 400
    # A fraction (1 - K/d)/n of the block's singular values is 1, and none of them is within a class.
    assert found.multiplicities[0] / 100 == pytest.approx((1 - 4 / 10) / 10)
    assert "class mean" in found.kinds[0]


@given(st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_the_least_value_is_the_papers_whatever_c(c):
    problem = UFM(3, 2, 1.3, c**2 / 1.3)
    found = block_spectrum(problem, 5, 50.0)
    assert found.values[-1] == pytest.approx(1 - math.sqrt(problem.lambda_h / 1.3) / 50, abs=1e-15)


def test_operator_dense_and_blocks_are_one_map():
    _, H = PROBLEM.collapsed(5, generator=torch.Generator().manual_seed(3))
    D = features(PROBLEM, seed=4)
    for method in ("exact", "expansion"):
        F = PerturbationMap(PROBLEM, H, beta=7.0, method=method)
        dense = F.dense()
        np.testing.assert_allclose((F @ D).T.flatten(), dense @ D.T.flatten(), atol=1e-11)
        assert dense.shape == F.shape == (60, 60)
        np.testing.assert_allclose(F.block(1, 2), dense[20:40, 40:60], atol=1e-15)


def test_the_map_predicts_the_true_minimiser_also_away_from_collapse():
    H0, change = features(PROBLEM, 6), 1e-5 * features(PROBLEM, 6, seed=9)
    beta = 5.0
    before = minimise(PROBLEM, H0, beta)
    after = minimise(PROBLEM, H0 + change, beta)
    F = PerturbationMap(PROBLEM, before.H, beta=beta)
    dH = F @ change
    assert float((dH - (after.H - before.H)).norm() / dH.norm()) < 1e-4
    dW = F.weight_change(dH)
    assert float((dW - (after.W - before.W)).norm() / dW.norm()) < 1e-4


def test_the_expansions_error_falls_with_the_square_of_beta():
    _, H = PROBLEM.collapsed(5)
    change = features(PROBLEM)
    errors = []
    for beta in (100.0, 1000.0):
        maps = [PerturbationMap(PROBLEM, H, beta=beta, method=m) @ change for m in ("exact", "expansion")]
        errors.append(float((maps[0] - maps[1]).norm()))
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.05)


def test_bad_input_is_named():
    H = features(PROBLEM)
    with pytest.raises(InputError, match="classes: got 1"):
        UFM(1, 4)
    with pytest.raises(InputError, match="lambda_w: got 0"):
        UFM(3, 4, lambda_w=0.0)
    with pytest.raises(InputError, match="loss: got 'hinge'"):
        UFM(3, 4, loss="hinge")
    with pytest.raises(InputError, match=r"expected a tensor of shape \(d, 12\)"):
        minimise(PROBLEM, H[:, :5], 1.0)
    with pytest.raises(InputError, match="beta: got -1"):
        minimise(PROBLEM, H, -1.0)
    with pytest.raises(InputError, match="loss='mse' only"):
        UFM(3, 4, loss="ce").best_weight(H)
    with pytest.raises(InputError, match="loss='mse' only"):
        central_path(UFM(3, 4, loss="ce"), H, [0.0, 1.0])
    with pytest.raises(InputError, match="increasing times"):
        central_path(PROBLEM, H, [1.0, 0.5])
    with pytest.raises(InputError, match="method: got 'euler'"):
        central_path(PROBLEM, H, [1.0], method="euler")
    with pytest.raises(InputError, match="NaN"):
        central_path(PROBLEM, H * float("nan"), [1.0])
    with pytest.raises(InputError, match="d: got 2"):
        PROBLEM.collapsed(2)
    with pytest.raises(InputError, match="0 < c < 1"):
        map_spectrum(UFM(3, 4, 2.0, 2.0), 5, 10.0)
    big = UFM(10, 50, 0.5, 0.1)
    F = PerturbationMap(big, big.collapsed(10)[1], beta=10.0)
    with pytest.raises(InputError, match="5000 x 5000, expected at most 4000; use the operator form"):
        F.dense()
    with pytest.raises(InputError, match=r"change: .*expected"):
        F @ H
    with pytest.raises(InputError, match="to: got 10"):
        F.block(10, 0)


def test_results_plot_and_become_plain():
    path = central_path(PROBLEM, features(PROBLEM), [0.0, 1.0])
    assert path.plot().get_legend() is not None and len(path.to_dict()["times"]) == 2
    spectrum = map_spectrum(PAPER, 10, 100.0)
    assert spectrum.plot().get_xlabel() == "index" and sum(spectrum.to_dict()["multiplicities"]) == 400
    found = minimise(PROBLEM, features(PROBLEM), 5.0)
    assert found.plot().get_ylabel() == "feature" and found.to_dict()["converged"] is True
