"""What do fixed descriptors and classical classifiers reach? The table of Wahid, Shahriar, Sobuj 2022, arXiv 2201.10102: each descriptor with each classifier.

Descriptors need no training, so they are computed once; classifiers are tuned by stratified cross-validation on the training part only, fitted to all of it,
and look at the test part once. Above 20,000 samples a kernel SVM becomes a Nystroem map and a linear one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier, RandomForestClassifier
from sklearn.kernel_approximation import Nystroem
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, LinearSVC

from lineament.core.checks import InputError, one_of, require
from lineament.core.results import Readable
from lineament.handcrafted.gabor import gabor
from lineament.handcrafted.hog import hog
from lineament.handcrafted.images import batch_of
from lineament.handcrafted.ink import ink, white_of
from lineament.handcrafted.lbp import lbp
from lineament.handcrafted.scores import ClassScores, class_scores

Array = np.ndarray
Effort = Literal["none", "small", "full"]
EFFORTS = ("none", "small", "full")
DESCRIPTORS = ("pixels", "hog", "lbp", "gabor", "hog-fine", "lbp-whole", "gabor-whole")
CLASSIFIERS = ("svm", "knn", "forest", "gbdt")
# A kernel matrix of more samples does not fit; libsvm would take hours.
MANY = 20_000


@dataclass(frozen=True)
class Entry(Readable):
    """One descriptor with one classifier.

    ``settings`` are what the search chose, ``validation`` their cross-validated accuracy (``None`` without a search); ``predicted`` [n] are the labels of the
    test part, and ``margin`` [n] how far the best score is above the second, where the classifier tells. Seconds are of the search and fit, and of predicting.
    """

    descriptor: str
    classifier: str
    features: int
    settings: Mapping[str, Any]
    validation: float | None
    scores: ClassScores
    predicted: Array
    margin: Array | None
    seconds: float
    seconds_predicting: float


def grey_range(images: Any) -> tuple[float, float]:
    """The stored levels that are black and white: 0 and 1 of floats up to 1, 255 of other numbers, or their largest where that is below 128 or above; of images with negative numbers the two extremes.

    >>> grey_range(torch.tensor([[[0.0, 20.0]]])), grey_range(torch.tensor([[[-2.0, 2.0]]]))
    ((0.0, 20.0), (-2.0, 2.0))
    """
    images = torch.as_tensor(images)
    least, most = (float(end) for end in batch_of(images).aminmax())
    return (least, most) if least < 0 else (0.0, max(white_of(images, most)[0], most))


def described(
    name: str, images: Any, *, prepare: bool = False, levels: tuple[float, float] | None = None
) -> Array:
    """The descriptor of every image, [n, features], float64.

    Args:
        name: ``"pixels"``, ``"hog"`` (cells of a quarter of the image's smaller side), ``"hog-fine"`` (half of that), ``"lbp"``, ``"gabor"`` (a grid of 4 x 4),
            or ``"lbp-whole"``, ``"gabor-whole"`` (histograms and statistics of the whole image, which are far weaker).
        images: [n, height, width] or [n, channels, height, width].
        prepare: :func:`~lineament.handcrafted.ink` first, for glyphs.
        levels: stored levels that are black and white; those of these images (:func:`grey_range`) by default.

    >>> described("hog", torch.rand(3, 32, 32)).shape, described("lbp-whole", torch.rand(3, 32, 32)).shape
    ((3, 324), (3, 59))
    """
    one_of("descriptor", name, DESCRIPTORS)
    images = torch.as_tensor(images)
    if prepare:
        images = ink(images, white=None if levels is None else levels[1]).images
    else:
        black, white = grey_range(images) if levels is None else levels
        images = ((batch_of(images) - black) / max(white - black, 1e-12)).clamp(0, 1)
    if name == "pixels":
        return images.flatten(1).double().numpy()
    side = min(images.shape[-2:])
    require(side >= 8, f"images: {name} needs sides of 8 pixels or more, got {tuple(images.shape[-2:])}")
    if name.startswith("hog"):
        return hog(images, cell=max(2, side // (4 if name == "hog" else 8))).double().numpy()
    grid = None if name.endswith("whole") else 4
    if name.startswith("lbp"):
        # Bytes, so that ties are certain.
        return lbp((images * 255).round().to(torch.uint8), grid=grid).double().numpy()
    return gabor(images, grid=grid).double().numpy()


def classifier(
    name: str, *, effort: Effort = "small", samples: int = 0, seed: int = 0
) -> tuple[Any, dict[str, list[Any]]]:
    """A pipeline of scaling and classifier, and the grid to search.

    Args:
        effort: ``"none"`` takes usual settings, ``"small"`` a few, ``"full"`` the specification's grid.
        samples: of the training part; above 20,000 an SVM is approximated.

    >>> made, grid = classifier("knn", effort="full")
    >>> sorted(grid), list(made.named_steps)
    (['model__n_neighbors', 'model__p', 'model__weights'], ['scale', 'model'])
    """
    one_of("classifier", name, CLASSIFIERS)
    one_of("effort", effort, EFFORTS)
    grid: dict[str, list[Any]] = {}
    full = effort == "full"
    # Block-normalised histograms lose by dividing each number by its own deviation.
    scale = StandardScaler(with_std=False)
    if name == "knn":
        model: Any = KNeighborsClassifier(3, weights="distance")
        if full:
            grid = {"n_neighbors": [1, 3, 5, 7, 9], "weights": ["uniform", "distance"], "p": [1, 2]}
        elif effort == "small":
            grid = {"n_neighbors": [1, 3, 5]}
    elif name == "svm":
        if samples > MANY:
            model = make_pipeline(
                Nystroem(gamma=None, n_components=1000, random_state=seed), LinearSVC(dual="auto")
            )
            grid = {"linearsvc__C": [0.1, 1.0, 10.0] if effort != "none" else [1.0]}
        else:
            model = SVC(C=10.0, random_state=seed)
            if full:
                grid = {
                    "kernel": ["linear", "rbf", "poly"],
                    "C": [0.1, 1, 10, 100],
                    "gamma": ["scale", 1e-3, 1e-2, 0.1, 1],
                }
            elif effort == "small":
                grid = {"C": [1, 10, 100]}
    elif name == "forest":
        scale = "passthrough"
        model = RandomForestClassifier(300, random_state=seed)
        if full:
            grid = {
                "n_estimators": [100, 300, 500],
                "max_features": ["sqrt", "log2"],
                "max_depth": [None, 20],
            }
        elif effort == "small":
            grid = {"max_features": ["sqrt", "log2"]}
    else:
        scale = "passthrough"
        model, grid = _boosted_trees(effort, seed)
    if effort == "none":
        grid = {}
    return Pipeline([("scale", scale), ("model", model)]), {f"model__{k}": v for k, v in grid.items()}


def evaluated(
    descriptor: str,
    name: str,
    made: Any,
    grid: Mapping[str, list[Any]],
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    *,
    labels: Any = None,
    folds: int = 5,
    seed: int = 0,
) -> tuple[Entry, Any]:
    """Tune on the training part, fit to all of it, and look at the test part once.

    Args:
        made, grid: what :func:`classifier` gives, or any estimator and its grid.
        train, test: features and labels.
        labels: all classes in their order.
        folds: of the stratified search; fewer where a class has fewer samples.

    Returns:
        The entry and the fitted estimator.

    Raises:
        InputError: a class of the test part that the training part lacks.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> found, _ = evaluated("columns", "knn", *classifier("knn"), (X[::2], y[::2]), (X[1::2], y[1::2]))
    >>> found.scores.accuracy > 0.9, list(found.settings)
    (True, ['n_neighbors'])
    """
    (X, y), (Z, z) = train, test
    known, counts = np.unique(y, return_counts=True)
    require(
        len(known) > 1, f"y: one class only ({known.tolist()}) in the training part, expected two or more"
    )
    lacking = np.setdiff1d(z if labels is None else labels, known)
    if len(lacking):
        raise InputError(
            f"y: class {lacking[:1].tolist()[0]!r} has no sample in the training part; expected each class there"
        )
    start = time.perf_counter()
    settings, validation = {}, None
    folds = min(folds, int(counts.min()))
    if sum(len(v) for v in grid.values()) > len(grid) and folds >= 2:
        chosen = GridSearchCV(
            made, dict(grid), cv=StratifiedKFold(folds, shuffle=True, random_state=seed)
        ).fit(X, y)
        settings = {k.removeprefix("model__"): v for k, v in chosen.best_params_.items()}
        validation, made = float(chosen.best_score_), chosen.best_estimator_
    else:
        made = made.fit(X, y)
    fitted = time.perf_counter()
    predicted = made.predict(Z)
    done = time.perf_counter()
    return (
        Entry(
            descriptor, name, X.shape[1], settings, validation, class_scores(z, predicted, labels), predicted,
            _margin(made, Z), fitted - start, done - fitted,
        ),
        made,
    )  # fmt: skip


def _margin(made: Any, Z: Array) -> Array | None:
    ask: Callable[..., Any] | None = getattr(made, "decision_function", None) or getattr(
        made, "predict_proba", None
    )
    if ask is None:
        return None
    scores = np.asarray(ask(Z))
    if scores.ndim == 1:
        return np.abs(scores)
    best = np.sort(scores, 1)
    return best[:, -1] - best[:, -2]


def _boosted_trees(effort: str, seed: int) -> tuple[Any, dict[str, list[Any]]]:
    """LightGBM or XGBoost where installed, else scikit-learn's histogram trees, with the same grid in their words."""
    rates, rounds = ([0.05, 0.1, 0.2], [100, 200, 300]) if effort == "full" else ([0.1, 0.2], [100])
    try:
        from lightgbm import LGBMClassifier  # pyright: ignore

        model: Any = LGBMClassifier(n_estimators=100, random_state=seed, n_jobs=1, verbose=-1)
        leaves = {"num_leaves": [15, 31]}
        count = "n_estimators"
    except ImportError:
        try:
            from xgboost import XGBClassifier  # pyright: ignore

            model = XGBClassifier(n_estimators=100, random_state=seed, n_jobs=1, tree_method="hist")
            leaves, count = {"max_depth": [4, 6]}, "n_estimators"
        except ImportError:
            model = HistGradientBoostingClassifier(random_state=seed, early_stopping=False)  # pyright: ignore
            leaves, count = {"max_leaf_nodes": [15, 31]}, "max_iter"
    return model, {"learning_rate": rates, count: rounds, **(leaves if effort == "full" else {})}
