"""Closed forms, invariants and limits of deep kernels: arXiv 2204.14126, and section 8 of its specification's oracles."""

from __future__ import annotations

import math
from typing import Any

import mpmath
import numpy as np
import pytest
import torch

from lineament.kernels.dimension import intrinsic_dimension
from lineament.kernels.duals import dual_of, leaky_relu, moebius, monomial, polynomial
from lineament.kernels.gaussian_processes import InfiniteKernel, nngp, ntk, psi
from lineament.kernels.recursion import log_nngp, log_ntk, log_psi
from lineament.kernels.regimes import optimal_activation, optimal_dual, regime
from lineament.kernels.scores import hilbert_scores, nearest
from lineament.kernels.sphere import SphereMap
from lineament.kernels.table import LogTable, ValueTable, optimal_table

DELTAS = np.array([1e-12, 1e-8, 1e-4, 0.03, 0.5, 0.9, 1 - 1e-9])


@pytest.mark.parametrize("depth", [1, 7, 40, math.inf])
def test_a_table_of_moebius_is_its_closed_form(depth):
    a = 0.3
    xi = 1 - DELTAS
    at_depth = 0.0 if depth == math.inf else a**depth
    truth = (
        np.log(xi) - np.log(DELTAS)
        if depth == math.inf
        else depth * math.log(a) + np.log(xi) - np.log(DELTAS + at_depth * xi)
    )
    table = LogTable(moebius(a), depth)
    np.testing.assert_allclose(table(DELTAS), truth, rtol=0, atol=1e-8)
    found = ValueTable(table)(DELTAS.copy())
    shift = 600.0 if depth == math.inf else 0.0
    top = math.log((1 - 5e-25) / 5e-25) if depth == math.inf else 0.0
    # By straight pieces: near ξ = 0 a value is right as a share of the kernel at ξ = 2^-12.
    np.testing.assert_allclose(found[:-1], np.exp(truth - top + shift)[:-1], rtol=3e-7)
    assert found[-1] < found[-2] * 1e-6


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="no numbers wider than double precision")
def test_logarithms_of_a_nearest_neighbour_are_right_to_the_last_place_at_depth_40():
    xi, found = np.array([0.013, 0.3, 0.77, 0.99, 0.9999]), []
    with mpmath.workdps(60):
        for z in map(mpmath.mpf, xi.tolist()):
            for _ in range(40):
                z = (z**2 + z**4) / 2
            found.append(float(mpmath.log(z)))
    np.testing.assert_array_equal(log_nngp(polynomial([0, 0, 0.5, 0, 0.5]), 40, xi=xi), found)


@pytest.mark.parametrize(
    "activation",
    ["erf", "sin", *(optimal_dual(d) for d in (1, 2, 3.5, 8))],
    ids=lambda v: getattr(v, "name", v),
)
def test_koenigs_function_keeps_its_equation_and_is_convex(activation):
    dual, table = dual_of(activation), LogTable(activation)
    xi = np.linspace(0.01, 0.95, 60)
    layer = table(1 - dual.value(xi))
    np.testing.assert_allclose(layer, math.log(dual.a) + table(1 - xi), rtol=0, atol=1e-7)
    values = np.exp(table(1 - xi))
    assert (np.diff(values) > 0).all() and (np.diff(values, 2) > -1e-9).all()
    assert float(np.exp(table(np.array(1 - 1e-7)))) / 1e-7 == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("dimension", "constant"),
    [(1, 0.718), (2, 1.2103), (3, 2.7074), (4, 5.8596), (5, 12.9352), (8, 184.0)],
)
def test_the_optimal_kernel_is_distance_to_the_minus_dimension(dimension, constant):
    delta = np.array([1e-10, 1e-12])
    found = np.exp(LogTable(optimal_dual(dimension))(delta)) * (2 * delta) ** (dimension / 2)
    np.testing.assert_allclose(found, constant, rtol=2e-3)


@pytest.mark.parametrize(("kernel", "logs"), [("nngp", log_nngp), ("ntk", log_ntk)])
@pytest.mark.parametrize(
    "activation",
    ["erf", "relu", "square", polynomial([0.2, 0.2, 0, 0, 0.6])],
    ids=lambda v: getattr(v, "name", v),
)
def test_a_table_is_the_recursion_at_any_depth(activation, kernel, logs):
    for depth in (1, 10, 40):
        table = LogTable(activation, depth, kernel)
        truth = logs(activation, depth, delta=DELTAS)
        np.testing.assert_allclose(table(DELTAS), truth, rtol=1e-9, atol=1e-7)
        assert table.error < 1e-8 and table(0.0) == logs(activation, depth, delta=0.0)


def test_koenigs_function_of_erf_ends_when_it_is_found():
    # The quotient of the last step differs from the slope by rounding, at every step to come.
    assert float(log_psi("erf", xi=0.5)) == pytest.approx(
        float(log_nngp("erf", 300, xi=0.5)) - 300 * math.log(dual_of("erf").a)
    )


@pytest.mark.parametrize("activation", ["tanh", "softsign", torch.atan])
def test_what_quadrature_leaves_of_an_odd_activation_is_no_mean(activation):
    assert dual_of(activation).at_zero == 0
    assert regime(activation).limit == "singular kernel"
    assert math.isfinite(log_psi(activation, xi=0.5))


def test_deep_kernels_are_what_finite_wide_networks_have():
    rng = np.random.default_rng(0)
    X = np.abs(rng.normal(size=(4, 6)))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    width, inputs = 4096, torch.from_numpy(X).float()
    torch.manual_seed(0)
    W1, W2, w3 = torch.randn(width, 6), torch.randn(width, width), torch.randn(width)

    def net(parts, x):
        h = math.sqrt(2) * torch.relu(parts[0] @ x)
        h = math.sqrt(2) * torch.relu(parts[1] @ h / math.sqrt(width))
        return parts[2] @ h / math.sqrt(width)

    rows = [torch.func.grad(net)((W1, W2, w3), x) for x in inputs]
    found = np.array([[sum(float((a * b).sum()) for a, b in zip(p, q)) for q in rows] for p in rows])
    np.testing.assert_allclose(found, ntk(X, depth=2), rtol=0.15)
    hidden = math.sqrt(2) * torch.relu(math.sqrt(2) * torch.relu(inputs @ W1.T) @ W2.T / math.sqrt(width))
    np.testing.assert_allclose((hidden @ hidden.T / width).numpy(), nngp(X, depth=2), rtol=0.1)


@pytest.mark.parametrize("kernel", [ntk, nngp])
def test_kernel_matrices_are_positive_and_turn_with_the_data(kernel):
    rng = np.random.default_rng(1)
    X = np.abs(rng.normal(size=(20, 5)))
    K = kernel(X, activation="erf", depth=3)
    assert np.linalg.eigvalsh(K).min() > 0
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    np.testing.assert_allclose(kernel(X @ turn, activation="erf", depth=3), K, rtol=1e-7)
    np.testing.assert_allclose(kernel(X[::-1], X, activation="erf", depth=3), K[::-1], rtol=1e-12)
    scaled = InfiniteKernel("erf", 3, kernel.__name__)(X)
    np.testing.assert_allclose(scaled * K[0, 0], K, rtol=1e-9)
    assert psi(X[:1], X[1:2])[0, 0] > 0


def test_the_optimal_activation_has_the_dual_of_its_name():
    z, w = np.polynomial.hermite_e.hermegauss(120)
    w = w / w.sum()
    pairs: Any = ((1, "hermite"), (2, "moebius"), (2, "hermite"), (4, "sine"), (8, "hermite"))
    for dimension, family in pairs:
        phi = np.asarray(optimal_activation(dimension, family)(z))
        slope = (w @ (z * phi)) ** 2
        assert w @ phi**2 == pytest.approx(1, abs=1e-6)
        assert abs(w @ phi) < 1e-8
        assert slope == pytest.approx(optimal_dual(dimension, family).a, abs=1e-6)
        assert regime(optimal_dual(dimension, family)).exponent == pytest.approx(dimension)


@pytest.mark.parametrize("kind", ["cap", "split"])
def test_on_the_sphere_no_cosine_is_negative(kind):
    X = np.random.default_rng(2).normal(size=(50, 3)) + 4
    mapping = SphereMap.fitted(kind, X)
    rows = mapping(X)
    assert (rows @ rows.T).min() >= -1e-12
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1)
    assert mapping.beyond(X) == 0
    far = X[:2] + 1000
    assert mapping.beyond(far) == (2 if kind == "cap" else 0)
    assert (mapping(far) @ rows.T).min() >= -1e-12


@pytest.mark.parametrize("dimension", [1, 2, 5])
def test_the_dimension_of_a_manifold_is_found(dimension):
    rng = np.random.default_rng(0)
    X = rng.uniform(size=(2000, dimension)) @ rng.normal(size=(dimension, 12))
    found = intrinsic_dimension(X)
    assert found.two_nn == pytest.approx(dimension, rel=0.15)
    assert found.maximum_likelihood == pytest.approx(dimension, rel=0.15)
    assert abs(found.two_nn - dimension) < 6 * found.two_nn_error


@pytest.mark.parametrize(("dimension", "family"), [(62, "hermite"), (16, "sine"), (30, "sine")])
def test_a_slope_at_zero_may_be_tiny_but_is_not_zero(dimension: float, family: Any):
    found = regime(optimal_dual(dimension, family))
    assert found.limit == "singular kernel" and found.exponent == pytest.approx(dimension, rel=1e-6)
    assert regime(polynomial([1e-12, 1e-10, 1.0])).limit == "nearest neighbour"


def test_a_monomial_singles_the_nearest_out():
    logs = log_nngp(monomial(3), 12, xi=np.array([0.9, 0.89]))
    assert logs[0] - logs[1] == pytest.approx(3**12 * math.log(0.9 / 0.89))
    near, far = optimal_table(2)(np.array([1e-30, 1e-20]))
    # Closer than 1e-12 is one point, and one point outweighs a billion others.
    assert near > 1e4 * far


@pytest.mark.parametrize(
    ("activation", "alpha"),
    [(torch.nn.ReLU(), 0.0), (torch.relu, 0.0), (torch.nn.PReLU(), 0.25), (torch.abs, -1.0), (lambda z: -3 * z.clamp(max=0), 0.0)],
)  # fmt: skip
def test_a_leaky_relu_is_known_whatever_form_it_has(activation, alpha):
    xi, dual = np.linspace(0, 1, 9), dual_of(activation)
    np.testing.assert_allclose(dual.value(xi), leaky_relu(alpha).value(xi), rtol=0, atol=1e-12)
    told = regime(activation)
    assert (told.limit, told.needs_ridge, told.b) == ("majority", False, pytest.approx(1, abs=1e-12))
    if isinstance(activation, torch.nn.PReLU):
        assert activation.weight.dtype == torch.float32


def test_kinks_have_the_slope_at_one_that_their_series_leaves_out():
    # E φ'² = P(|Z| < 1) and E φ² = P(|Z| < 1) - 2 n(1) + P(|Z| > 1) for a clamp to ±1.
    inside, height = math.erf(math.sqrt(0.5)), math.exp(-0.5) / math.sqrt(2 * math.pi)
    second = 1 - 2 * height
    told = regime(torch.nn.Hardtanh())
    assert told.b == pytest.approx(inside / second, rel=1e-9) and told.a == pytest.approx(
        inside**2 / second, rel=1e-9
    )
    assert told.exponent == pytest.approx(-2 * math.log(told.a) / math.log(told.b))
    # Its own series, of which ξ = 1 - 1e-3 has hardly any.
    dual, long = dual_of(torch.nn.Hardtanh()), dual_of(torch.nn.Hardtanh(), terms=400)
    delta = np.array([1e-3, 0.02, 0.3])
    np.testing.assert_allclose(dual.complement(delta), long.complement(delta), rtol=3e-3)
    assert dual.tail > 1e-4 and not regime(torch.nn.ReLU6()).needs_ridge


def test_rules_of_distances_take_rows_of_any_length():
    rng = np.random.default_rng(0)
    X, Z, y = 5 * rng.normal(size=(20, 3)), 5 * rng.normal(size=(6, 3)), rng.normal(size=20)
    weights = np.linalg.norm(Z[:, None] - X, axis=2) ** -3.0
    np.testing.assert_allclose(hilbert_scores(X, y, Z, 3), weights @ y / weights.sum(1), rtol=1e-12)
    np.testing.assert_array_equal(nearest(X, y, Z), y[weights.argmax(1)])
