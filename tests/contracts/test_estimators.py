"""What every estimator keeps: scikit-learn's own checks, none of them skipped but the one that needs an environment variable."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits, load_iris
from sklearn.utils.estimator_checks import check_estimator
from torch import nn

from lineament.core.checks import InputError
from lineament.handcrafted.estimators import GaborFeatures, HogFeatures, InkImages, LbpFeatures
from lineament.handcrafted.lbp import lbp
from lineament.kernels.classifiers import InfiniteClassifier, InfiniteRegressor
from lineament.kernels.dimension import intrinsic_dimension
from lineament.kernels.gaussian_processes import InfiniteKernel, nngp, ntk
from lineament.kernels.hermite import hermite_coefficients
from lineament.kernels.recursion import log_ntk
from lineament.kernels.regimes import optimal_activation
from lineament.kernels.scores import hilbert_scores, kernel_scores, laplace_scores
from lineament.learn.boosting.estimators import GBNNClassifier, GBNNRegressor
from lineament.learn.boosting.network import SiteFeatures
from lineament.learn.boosting.search import search
from lineament.learn.boosting.subnetwork import SOLVERS

FLAT = {"image_shape": (1, -1)}


class Network(nn.Sequential):
    """One that takes rows of any length, in double precision.

    It is copied by its numbers: copies of tensors are pickled with other addresses, by which the check that parameters stay as they are would see a change.
    """

    def __init__(self, state: dict[str, np.ndarray] | None = None):
        layers = (
            nn.Conv1d(1, 4, 3, padding=1),
            nn.Tanh(),
            nn.AdaptiveAvgPool1d(2),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
        super().__init__(*layers)
        self.double()
        if state is not None:
            self.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})

    def __reduce__(self):
        return Network, ({name: value.numpy() for name, value in self.state_dict().items()},)


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
    SiteFeatures(Network(), "3", input_shape=(1, -1)),
    SiteFeatures(Network(), "1", input_shape=(1, -1), pool="flatten", batch_size=7),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "estimator",
    ESTIMATORS,
    ids=lambda e: (
        f"{type(e).__name__}-{getattr(e, 'codes', getattr(e, 'solver', getattr(e, 'activation', getattr(e, 'site', ''))))}"
    ),
)
def test_it_passes_the_common_checks(estimator):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = check_estimator(estimator, on_fail=None, on_skip=None)
    left = {check["check_name"]: check["exception"] for check in found if check["status"] != "passed"}
    # The array API is asked for by an environment variable, before SciPy is imported: see the test below.
    assert set(left) <= {"check_array_api_input"}, left
    assert len(found) > 40


@pytest.mark.slow
def test_the_check_of_the_array_api_passes_where_scipy_has_it():
    code = (
        "from sklearn.utils.estimator_checks import estimator_checks_generator\n"
        "from tests.contracts.test_estimators import ESTIMATORS\n"
        "for e in {type(e).__name__: e for e in ESTIMATORS}.values():\n"
        "    for made, check in estimator_checks_generator(e):\n"
        "        if getattr(check, 'func', check).__name__ == 'check_array_api_input':\n"
        "            check(made), print(type(e).__name__)\n"
    )
    made = subprocess.run([sys.executable, "-c", code], env={**os.environ, "SCIPY_ARRAY_API": "1"}, capture_output=True, text=True)  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert {type(e).__name__ for e in ESTIMATORS} == set(made.stdout.split())


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


def _with_nan(X):
    X = np.array(X, dtype=float)
    X.flat[3] = np.nan
    return X


X, Y = np.random.default_rng(0).normal(size=(30, 4)), np.arange(30) % 3
PICTURES = np.random.default_rng(1).random((5, 32, 32))
REFUSED: dict[str, tuple[Any, str]] = {
    "NaN in pictures": (lambda: HogFeatures().fit(_with_nan(PICTURES)), "NaN"),
    "NaN in rows": (lambda: GBNNClassifier(4).fit(_with_nan(X), Y), "NaN"),
    "NaN in targets": (lambda: GBNNRegressor(4).fit(X, _with_nan(X[:, 0])), "NaN"),
    "NaN in a kernel": (lambda: InfiniteClassifier().fit(_with_nan(X), Y), "NaN"),
    "unequal sizes": (lambda: LbpFeatures().fit([PICTURES[0], PICTURES[1][:20]]), "unequal sizes"),
    "one row of numbers": (lambda: HogFeatures().fit(np.ones(5)), "1D array"),
    "no pictures": (lambda: GaborFeatures().fit(PICTURES[:0]), "0 sample"),
    "too large a block": (lambda: HogFeatures(cell=16, block=3).fit(PICTURES), "block"),
    "one class": (lambda: InfiniteClassifier().fit(X, 0 * Y), "one class"),
    "a class that weighs nothing": (
        lambda: GBNNClassifier(4).fit(X, Y, sample_weight=(Y > 0) * 1.0),
        "weigh nothing",
    ),
    "a negative weight": (lambda: GBNNRegressor(4).fit(X, X[:, 0], sample_weight=X[:, 1]), "sample_weight"),
    "too few to hold out": (
        lambda: GBNNClassifier(4, n_iter_no_change=2).fit(X[:6], Y[:6]),
        "validation_fraction",
    ),
    "a weight of no class": (lambda: GBNNClassifier(4, class_weight={7: 1.0}).fit(X, Y), "class_weight"),
    "a jump": (lambda: InfiniteClassifier(torch.sign).fit(X, Y), "jump"),
    "a jump elsewhere": (
        lambda: InfiniteClassifier(lambda z: z.sin() + (z > 1.234) * 0.1).fit(X, Y),
        "jump",
    ),
    "not normalisable": (lambda: InfiniteClassifier(lambda z: (z * z / 4).exp()).fit(X, Y), "infinite"),
    "linear": (lambda: InfiniteClassifier(lambda z: 2 * z).fit(X, Y), "linear"),
    "b < 1": (lambda: InfiniteClassifier("sigmoid").fit(X, Y), "ridge"),
    "dimension": (lambda: InfiniteClassifier(dimension=0.5).fit(X, Y), "dimension"),
    "a zero row": (lambda: InfiniteClassifier(sphere="split", dimension=2).fit(0 * X, Y), "zero"),
    "an array of unequal pictures": (
        lambda: HogFeatures().fit(np.array([PICTURES[0], PICTURES[1][:20]], dtype=object)),
        "unequal sizes",
    ),
    "a long row": (
        lambda: GBNNClassifier(4).fit(np.arange(900.0), np.arange(900) % 2),
        "^Expected 2D array, got 1D.{0,200}$",
    ),
    "one frequency": (lambda: GaborFeatures(0.1).fit(PICTURES), "a list of"),
    "no angle": (lambda: GaborFeatures(orientations=[np.nan]).fit(PICTURES), "orientations"),
    "edges that fall": (
        lambda: lbp(torch.ones(1, 9, 9), codes="var", edges=torch.tensor([2.0, 1.0])),
        "ascending",
    ),
    "a million labels": (lambda: LbpFeatures(24, codes="default").fit(PICTURES), "16,777,216"),
    "one value of a setting": (lambda: search(X, Y, {"total_units": 3}), "a list of the values"),
    "no frequencies": (lambda: GaborFeatures([]).fit(PICTURES), "frequencies"),
    "white that is black": (lambda: InkImages(white=0).fit(PICTURES), "white"),
    "NaN in a kernel function": (lambda: ntk(_with_nan(X)), r"row \[0\] has NaN"),
    "a vector": (lambda: nngp(X[0]), "rows"),
    "no rows": (lambda: ntk(X[:0]), "rows"),
    "narrow rows": (lambda: ntk(X, X[:, :2]), "2 numbers, expected 4"),
    "NaN in a dimension": (lambda: intrinsic_dimension(_with_nan(X)), "NaN"),
    "a negative exponent": (lambda: hilbert_scores(X, Y, X, -1.0), "exponent"),
    "NaN in Laplace's kernel": (lambda: laplace_scores(_with_nan(X), Y, X), "NaN"),
    "NaN in machine's kernel": (lambda: kernel_scores("erf", 3, X, Y, _with_nan(X)), "NaN"),
    "rows of any length": (lambda: kernel_scores("erf", 3, X, Y, X), "expected unit rows"),
    "too few targets": (lambda: hilbert_scores(X, Y[:3], X, 2.0), "one target for each of 30"),
    "a word for rows": (lambda: ntk("rows"), "of numbers"),
    "an infinite kernel matrix": (lambda: InfiniteKernel("erf", np.inf)(X), "depth"),
    "neither cosine nor distance": (lambda: log_ntk("relu", 3), "one of them"),
    "a pole": (lambda: InfiniteClassifier(lambda z: 1 / z.abs()).fit(X, Y), "pole at 0"),
    "a sine of too many dimensions": (lambda: optimal_activation(300, "sine"), "up to 180"),
    "a sine on a line": (lambda: optimal_activation(1, "sine"), "above 1 and"),
    "Moebius elsewhere": (lambda: optimal_activation(3, "moebius"), "has 2 only"),
    "NaN in a search": (lambda: search(_with_nan(X), Y, {"l2": [1.0]}), "NaN"),
    "one class in a search": (lambda: search(X, 0 * Y, {"l2": [1.0]}), "one class"),
    "more folds than samples": (lambda: search(X, Y, {"l2": [1.0]}, outer=31), "outer"),
    "a share above 1": (lambda: search(X, Y, {"subsample": [1.5]}, outer=2, inner=2), "subsample"),
    "a share of none": (lambda: search(X, Y, {"subsample": [0.01]}, outer=2, inner=2), "leaves none"),
    "a negative rate": (lambda: search(X, Y, {"learning_rate": [-1.0]}, outer=2, inner=2), "rate"),
    "an unknown activation": (lambda: search(X, Y, {"activation": ["tahn"]}, outer=2, inner=2), "tanh"),
    "fewer units than a step": (
        lambda: search(X, Y, {"total_units": [2], "units_per_step": [3]}, outer=2, inner=2),
        "units_per_step",
    ),
    "memory": (lambda: InfiniteRegressor(memory="1B").fit(X, X[:, 0]), "memory"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_bad_input_is_refused_in_one_line(what):
    call, word = REFUSED[what]
    with pytest.raises(InputError, match=word) as told:
        call()
    assert "\n" not in str(told.value)


def test_what_is_odd_but_usable_is_told():
    pictures = PICTURES.copy()
    pictures[2] = 0.5
    assert HogFeatures().fit(PICTURES).notes_ == ()
    rows, constant = HogFeatures(cell=5).fit(pictures).notes_
    assert rows.startswith("2 rows and 2 columns") and constant.startswith("1 of 5 images are constant")
    assert (HogFeatures().fit_transform(pictures)[2] == 0).all()
    assert "larger than the images" in GaborFeatures(grid=2).fit(PICTURES[:, :8, :8]).notes_[0]
    twice, labels = np.vstack([X, X[:4]]), np.r_[Y, (Y[:4] + 1) % 3]
    net = InfiniteClassifier(dimension=2).fit(twice, labels)
    assert [note.split()[0] for note in net.notes_] == ["4", "4"]
    assert any(
        "negative cosines" in note
        for note in InfiniteClassifier(sphere="normalize", dimension=2).fit(X, Y).notes_
    )
    with pytest.warns(UserWarning, match="negative cosines"):
        ntk(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (ntk(X, sphere="split") > 0).all()
    dark = InkImages().fit((20 * PICTURES).round())
    assert dark.notes_[0].startswith("grey levels end at 20") and dark.transform(20 * PICTURES).max() <= 1


def test_kinks_are_no_jumps_and_numbers_of_numpy_are_numbers():
    for name in ("relu", "gelu", "elu", "hardtanh", "leaky_relu", "tanh", "softplus", "selu"):
        assert np.isfinite(hermite_coefficients(getattr(torch.nn.functional, name)).slope_moment), name
    net = GBNNClassifier(np.int64(4), np.int64(2), np.float32(0.5), max_iter=np.int32(3), random_state=0).fit(
        X, Y
    )
    assert net.network_.units == 4
    few = GaborFeatures([0.2], np.int64(3), grid=np.int64(2)).fit(PICTURES)
    assert len(few.get_feature_names_out()) == few.transform(PICTURES).shape[1] == 24
