"""What every estimator keeps: scikit-learn's own checks, none of them skipped but the one that needs an environment variable."""

from __future__ import annotations

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.utils.estimator_checks import check_estimator

from lineament.core.checks import InputError
from lineament.handcrafted.estimators import GaborFeatures, HogFeatures, InkImages, LbpFeatures
from lineament.kernels.classifiers import InfiniteClassifier, InfiniteRegressor
from lineament.learn.boosting.estimators import GBNNClassifier, GBNNRegressor
from lineament.learn.boosting.subnetwork import SOLVERS

FLAT = {"image_shape": (1, -1)}
# Few iterations: twice a sample and a weight of two part by rounding, which many iterations of L-BFGS make visible.
SMALL = {
    "total_units": 20,
    "units_per_step": 4,
    "learning_rate": 1.0,
    "subsample": 1.0,
    "random_state": 0,
}
ESTIMATORS: list[Any] = [
    HogFeatures(cell=1, block=1, **FLAT),
    LbpFeatures(grid=1, **FLAT),
    LbpFeatures(codes="var", grid=None, **FLAT),
    GaborFeatures(grid=1, **FLAT),
    InkImages(size=8, **FLAT),
    *(
        kind(**{**SMALL, "max_iter": 40 if s in ("adam", "sgd") else 5, "solver": s})
        for kind in (GBNNClassifier, GBNNRegressor)
        for s in SOLVERS
    ),
    InfiniteClassifier(),
    InfiniteClassifier("square"),
    InfiniteClassifier("relu"),
    InfiniteClassifier("erf", 20),
    InfiniteRegressor(),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    ESTIMATORS,
    ids=lambda e: (
        f"{type(e).__name__}-{getattr(e, 'codes', getattr(e, 'solver', getattr(e, 'activation', '')))}"
    ),
)
def test_it_passes_the_common_checks(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(estimator, on_fail=None, on_skip=None)
    left = {check["check_name"]: check["exception"] for check in found if check["status"] != "passed"}
    assert set(left) <= {"check_array_api_input"}, left
    assert len(found) > 40


TRANSFORMERS = [HogFeatures(), LbpFeatures(), LbpFeatures(codes="var"), GaborFeatures(), InkImages()]


@pytest.mark.parametrize(
    "estimator", TRANSFORMERS, ids=lambda e: f"{type(e).__name__}-{getattr(e, 'codes', '')}"
)
def test_images_and_flat_rows_give_the_same_named_features(estimator):
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16), dtype=np.uint8)
    estimator = clone(estimator)
    if not isinstance(estimator, InkImages):
        estimator.set_params(**({"cell": 4} if isinstance(estimator, HogFeatures) else {"grid": 2}))
    found = estimator.fit(images).transform(images)
    flat = clone(estimator).set_params(image_shape=(16, 16)).fit_transform(images.reshape(5, -1))
    np.testing.assert_allclose(found, flat, rtol=1e-6, atol=1e-9)
    names = estimator.get_feature_names_out()
    assert len(names) == len(set(names)) == found.shape[1]
    again = pickle.loads(pickle.dumps(estimator)).transform(images[2:3])
    np.testing.assert_allclose(again, found[2:3], rtol=1e-6, atol=1e-9)
    with pytest.raises(InputError, match="fitted on"):
        estimator.transform(images.reshape(5, 8, 32))


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_truncated_network_is_its_stage_and_one_plain_network(solver):
    X, y = load_iris(return_X_y=True)
    net = GBNNClassifier(12, 3, subsample=0.8, solver=solver, max_iter=20, random_state=0).fit(X, y)
    stages = list(net.staged_decision_function(X))
    for m, stage in enumerate(stages, 1):
        small = net.truncate(3 * m)
        np.testing.assert_allclose(small.decision_function(X), stage, rtol=0, atol=1e-10)
        import torch

        plain = net.to_torch(3 * m)(torch.from_numpy(X)).detach().numpy()
        np.testing.assert_allclose(plain, stage, rtol=0, atol=1e-10)
    assert (np.diff(net.train_losses_) <= 0).all()
    other = GBNNClassifier(12, 3, subsample=0.8, solver=solver, max_iter=20, random_state=0).fit(X, y)
    np.testing.assert_array_equal(other.decision_function(X), net.decision_function(X))


def test_the_larger_label_has_the_positive_scores_and_the_start_is_the_log_odds():
    X, y = load_iris(return_X_y=True)
    X, y = X[20:100], y[20:100]
    net = GBNNClassifier(12, 2, 1.0, max_iter=50, random_state=0).fit(X, y)
    assert float(net.network_.F0[0]) == pytest.approx(0.5 * np.log(50 / 30))
    assert ((net.decision_function(X) > 0) == (y == 1)).all()
    swapped = GBNNClassifier(12, 2, 1.0, max_iter=50, random_state=0).fit(X, 1 - y)
    assert float(swapped.network_.F0[0]) == pytest.approx(-0.5 * np.log(50 / 30))
    assert ((swapped.decision_function(X) > 0) == (y == 0)).all()


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"total_units": 2, "units_per_step": 4}, "total_units"),
        ({"subsample": 0.0}, "subsample"),
        ({"subsample": 1e-6}, "subsample"),
        ({"solver": "lbgfs"}, "lbfgs"),
        ({"line_search": "newton-"}, "newton"),
    ],
)
def test_bad_options_are_named(options, word):
    X, y = load_digits(return_X_y=True)
    with pytest.raises(InputError, match=word):
        GBNNClassifier(**{"total_units": 4, "units_per_step": 1, **options}).fit(X[:50], y[:50])
