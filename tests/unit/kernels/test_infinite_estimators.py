"""Infinitely wide estimators against what they must be: other rules, brute force, and their own slow paths."""

from __future__ import annotations

import math
import weakref
from functools import partial

import numpy as np
import pytest
from sklearn.datasets import load_iris

from lineament.core import batching
from lineament.core.checks import InputError
from lineament.kernels.classifiers import InfiniteClassifier, InfiniteRegressor
from lineament.kernels.gaussian_processes import InfiniteKernel, ntk
from lineament.kernels.recursion import log_psi
from lineament.kernels.regimes import optimal_dual
from lineament.kernels.scores import hilbert_scores, kernel_scores, laplace_scores, nearest
from lineament.kernels.tiles import Preconditioner, Rows, bytes_of, conjugate_gradients


@pytest.fixture(scope="module")
def pairs():
    """Dirichlet pairs on the positive part of a sphere in three dimensions."""
    rng = np.random.default_rng(0)
    y = (rng.random(700) < 0.6).astype(int)
    X = np.where(y[:, None] == 1, rng.dirichlet((2.5, 0.1, 0.5), 700), rng.dirichlet((0.5, 0.5, 2.5), 700))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return X[:400], y[:400], X[400:460]


@pytest.fixture(scope="module")
def apart():
    """Points in seven dimensions, far from each other, whose kernel matrices are well conditioned."""
    X = np.random.default_rng(0).dirichlet(np.ones(8), 400)
    y = (X[:, 0] > X[:, 1]).astype(int)
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    return X[:300], y[:300], X[300:]


def test_a_square_is_the_nearest_neighbour_and_relu_the_majority(pairs):
    X, y, Z = pairs
    np.testing.assert_array_equal(
        InfiniteClassifier("square", sphere=None).fit(X, y).predict(Z), nearest(X, y, Z)
    )
    net = InfiniteClassifier("relu", sphere=None).fit(X, y)
    assert set(net.predict(Z)) == {1}
    np.testing.assert_array_equal(net.predict(X), y)


@pytest.mark.parametrize("activation", ["erf", "sin", "optimal"])
def test_an_infinite_depth_adds_psi_up(pairs, activation):
    X, y, Z = pairs
    net = InfiniteClassifier(activation, dimension=2, sphere=None).fit(X, y)
    delta = np.square(Z[:, None] - X[None]).sum(2) / 2
    logs = log_psi(optimal_dual(2) if activation == "optimal" else activation, delta=delta)
    top = logs.max(1, keepdims=True)
    scores = np.stack([(np.exp(logs - top) * (y == c)).sum(1) for c in (0, 1)], 1)
    truth = (scores[:, 1] - scores[:, 0]) / scores.max(1)
    np.testing.assert_allclose(net.decision_function(Z), truth, rtol=0, atol=1e-6)
    np.testing.assert_allclose(net.log_scale(Z), np.log(scores.max(1)) + top[:, 0], rtol=0, atol=1e-6)
    if activation == "optimal":
        hilbert = hilbert_scores(X, 2.0 * y - 1, Z, 2.0)
        assert (np.sign(hilbert) == np.sign(truth)).mean() > 0.98


def test_the_laplace_kernel_solves_its_own_equations(pairs):
    X, y, Z = pairs
    signs = 2.0 * y - 1
    np.testing.assert_allclose(laplace_scores(X, signs, X), signs, atol=1e-8)
    distance = lambda A: np.sqrt(np.square(A[:, None] - X[None]).sum(2))  # noqa: E731
    width = np.median(distance(X)[np.triu_indices(len(X), 1)])
    for asked, ridge in ((None, 0.0), (0.3, 0.1)):
        inside, across = (np.exp(-distance(A) / (asked or width)) for A in (X, Z))
        truth = across @ np.linalg.solve(inside + ridge * np.eye(len(X)), np.stack([signs, -signs], 1))
        found = laplace_scores(X, np.stack([signs, -signs], 1), Z, bandwidth=asked, ridge=ridge)
        np.testing.assert_allclose(found, truth, atol=1e-8)
    twice = np.concatenate([X[:3], X[:1]])
    with pytest.raises(InputError, match="ridge"):
        laplace_scores(twice, signs[:4], Z)
    with pytest.raises(InputError, match="bandwidth"):
        laplace_scores(X, signs, Z, bandwidth=0)


@pytest.mark.parametrize("kernel", ["nngp", "ntk"])
@pytest.mark.parametrize(("activation", "depth"), [("erf", 12), ("relu", 3), ("square", 9)])
def test_a_finite_depth_is_the_kernel_machine(apart, activation, depth, kernel):
    X, y, Z = apart
    net = InfiniteClassifier(activation, depth, kernel, sphere=None).fit(X, y)
    factor, _ = kernel_scores(activation, depth, X, 2.0 * y - 1, Z, kernel=kernel)
    found = net.decision_function(Z)
    clear = np.abs(factor) > 1e-3 * np.abs(factor).max()
    np.testing.assert_array_equal(np.sign(found)[clear], np.sign(factor)[clear])
    assert net.residual_ < 1e-6


def test_tiles_and_conjugate_gradients_give_what_cholesky_gives(apart):
    Z = apart[2]
    many = np.random.default_rng(1).dirichlet(np.ones(8), 900)
    label = (many[:, 0] > many[:, 1]).astype(int)
    for kind in (InfiniteClassifier, InfiniteRegressor):
        # Tiles alone take some megabytes, two matrices of 900 points 13.
        whole, tiled = (
            kind("erf", 60, "nngp", sphere="normalize", memory=memory).fit(many, label)
            for memory in ("1GB", "11MB")
        )
        assert whole.passes_ == 0 and 0 < tiled.passes_ <= 60
        ask = "decision_function" if kind is InfiniteClassifier else "predict"
        np.testing.assert_allclose(getattr(tiled, ask)(Z), getattr(whole, ask)(Z), atol=2e-6)


def test_the_choice_of_the_dimension_is_brute_force_leave_one_out(pairs):
    X, y, _ = pairs
    X, y = X[:150], y[:150]
    net = InfiniteClassifier(sphere=None).fit(X, y)
    for dimension, found in net.left_out_.items():
        right = 0
        for i in range(len(X)):
            rest = np.arange(len(X)) != i
            one = InfiniteClassifier(dimension=dimension, sphere=None).fit(X[rest], y[rest])
            right += int(one.predict(X[i : i + 1])[0] == y[i])
        assert found == pytest.approx(right / len(X))
    assert net.dimension_ is not None and net.left_out_[net.dimension_] == max(net.left_out_.values())


def test_contradicting_duplicates_have_their_majority_and_order_does_not_matter():
    X, y = load_iris(return_X_y=True)
    doubled, labels = np.vstack([X, X[:1], X[:1]]), np.concatenate([y, [2, 2]])
    net = InfiniteClassifier().fit(doubled, labels)
    assert net.predict(X[:1])[0] == 2 and net.duplicates_ == 3 and net.contradictions_ == 1
    order = np.random.default_rng(0).permutation(len(X))
    one, other = (InfiniteClassifier(dimension=3).fit(X[k], y[k]) for k in (order, np.arange(len(X))))
    queries = X + 0.05
    np.testing.assert_allclose(one.decision_function(queries), other.decision_function(queries), atol=1e-9)
    np.testing.assert_allclose(
        other.decision_function(queries[7:8]), other.decision_function(queries)[7:8], atol=1e-9
    )


@pytest.mark.parametrize(
    ("made", "word"),
    [
        (InfiniteRegressor(depth=math.inf), "vanish"),
        (InfiniteClassifier("step"), "jump"),
        (InfiniteClassifier(lambda x: x), "linear"),
        (InfiniteClassifier("sigmoid"), "ridge"),
        (InfiniteClassifier("sigmoid", 5), "ridge"),
        (InfiniteClassifier(lambda x: 0 * x), "cannot be scaled"),
        (InfiniteClassifier(dimension=0.5), "dimension"),
        (InfiniteClassifier(dimension="atuo"), "auto"),
        (InfiniteClassifier(sphere="normalise"), "normalize"),
        (InfiniteClassifier("erf", 10, memory="1kB"), "memory"),
        (InfiniteClassifier(depth=0), "depth"),
        (InfiniteClassifier(kernel="nkt"), "ntk"),
    ],
)
def test_refusals_name_the_argument(made, word):
    X, y = load_iris(return_X_y=True)
    with pytest.raises(InputError, match=word):
        made.fit(X, y)


def test_zero_rows_and_sizes_are_refused():
    with pytest.raises(InputError, match="zero"):
        InfiniteClassifier(sphere="normalize").fit([[0.0, 0.0], [1.0, 0.0]], [0, 1])
    with pytest.raises(InputError, match="memory"):
        bytes_of("much")


def test_a_strip_of_tiles_is_halved_when_memory_runs_out(pairs, apart, monkeypatch):
    def answers():
        X, y, Z = pairs
        yield InfiniteClassifier(sphere=None).fit(X, y)._scores(Z)[0]
        yield InfiniteClassifier("square", sphere=None).fit(X, y).decision_function(Z)
        yield ntk(X, Z, activation="erf")
        X, y, Z = apart
        yield InfiniteClassifier("erf", 12, sphere=None).fit(X, y).decision_function(Z)
        yield InfiniteClassifier("erf", 12, sphere=None, memory="20MB").fit(X, y).weights_
        yield InfiniteRegressor("relu", 3, ridge=0.01, sphere=None).fit(X, y).predict(Z)

    expected, original, heights = list(answers()), Rows._tiles, []

    def scarce(self, down, others, columns):
        # It runs out after the first tile was used: what was summed must not count twice.
        heights.append(down.stop - down.start)
        for tile in original(self, down, others, columns):
            yield tile
            if down.stop - down.start > 20:
                raise MemoryError("out of memory")

    monkeypatch.setattr(Rows, "_tiles", scarce)
    monkeypatch.setattr(batching, "_fitted", weakref.WeakKeyDictionary())
    for found, truth in zip(answers(), expected, strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-6, atol=1e-9)
    assert max(heights) == 256 and sum(height > 20 for height in heights) >= 6


def test_columns_of_the_matrix_spare_passes_where_few_directions_hold_it():
    X = np.random.default_rng(0).normal(size=(600, 4))
    X /= np.linalg.norm(X, axis=1, keepdims=True)
    K = InfiniteKernel("relu", 1, sphere=None)(np.abs(X))
    y, ridge, chosen = X[:, :2].copy(), 1e-4, np.arange(0, 600, 6)
    solve = partial(conjugate_gradients, lambda p: K @ p + ridge * p, y, most=2000)
    plain, few = solve(), solve(nearly=Preconditioner(K[:, chosen], chosen, ridge))
    assert few[2] < plain[2] / 3 and few[1].max() < 1e-10
    truth = np.linalg.solve(K + ridge * np.eye(600), y)
    np.testing.assert_allclose(few[0], truth, atol=1e-6 * np.abs(truth).max())
