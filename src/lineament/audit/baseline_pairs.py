"""One descriptor with one classifier: its pipeline and grid, what it reached on a split, what fewer samples would give, and the best one written to a file."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import clone
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from lineament.core.files import write_json
from lineament.handcrafted.table import CLASSIFIERS, Entry, classifier, evaluated
from lineament.kernels.classifiers import InfiniteClassifier
from lineament.learn.boosting.estimators import GBNNClassifier

EVERY = (*CLASSIFIERS, "gbnn", "infinite")


@dataclass(frozen=True)
class Pair:
    """One descriptor with one classifier on one split, as it is stored."""

    descriptor: str
    classifier: str
    split: int
    features: int
    settings: dict[str, Any]
    validation: float | None
    accuracy: float
    macro_f1: float
    predicted: np.ndarray
    margin: np.ndarray | None
    seconds: float
    seconds_predicting: float


def estimator_of(
    kind: str, *, effort: str = "none", samples: int = 0, width: int = 1, seed: int = 0
) -> tuple[Any, dict[str, list[Any]]]:
    """A pipeline and its grid for any of the six classifiers, for so many training ``samples`` of ``width`` features.

    >>> list(estimator_of("infinite")[0].named_steps), estimator_of("gbnn")[1]
    (['scale', 'model'], {})
    """
    if kind == "gbnn":
        model: Any = GBNNClassifier(100, solver="varpro", max_iter=20, random_state=seed)
        if width > 200:
            # Its Gauss-Newton steps grow with the square of the hidden weights.
            model.set_params(solver="lbfgs", max_iter=30, units_per_step=10)
        grid = {"model__learning_rate": [0.1, 0.3]} if effort != "none" else {}
        return Pipeline([("scale", StandardScaler()), ("model", model)]), grid
    if kind == "infinite":
        return Pipeline([("scale", StandardScaler(with_std=False)), ("model", InfiniteClassifier())]), {}
    return classifier(kind, effort=effort, samples=samples, seed=seed)  # pyright: ignore


def evaluated_pair(
    name: str,
    kind: str,
    X: np.ndarray,
    y: np.ndarray,
    train: Any,
    test: Any,
    split: int,
    effort: str,
    seed: int,
) -> Pair:
    made, grid = estimator_of(kind, effort=effort, samples=len(train), width=X.shape[1], seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Entry = evaluated(
            name,
            kind,
            made,
            grid,
            (X[train], y[train]),
            (X[test], y[test]),
            labels=np.unique(y).tolist(),
            seed=seed,
        )[0]
    settings = {k: (v.item() if isinstance(v, np.generic) else v) for k, v in found.settings.items()}
    return Pair(
        name, kind, split, found.features, settings, found.validation, found.scores.accuracy, found.scores.macro[2],
        np.asarray(found.predicted), found.margin, found.seconds, found.seconds_predicting,
    )  # fmt: skip


def mean_accuracy(pairs: Sequence[Pair], name: str, kind: str) -> float:
    return float(np.mean([p.accuracy for p in pairs if (p.descriptor, p.classifier) == (name, kind)]))


def chosen_estimator(pair: Pair, samples: int, seed: int) -> Any:
    """A pair's pipeline with the settings that were chosen for it, not fitted."""
    made, _ = estimator_of(pair.classifier, samples=samples, width=pair.features, seed=seed)
    return made.set_params(**{f"model__{k}": v for k, v in pair.settings.items()})


def accuracy_by_size(
    top: Pair, X: np.ndarray, y: np.ndarray, train: Any, test: Any, seed: int
) -> list[tuple[int, float]]:
    """Accuracy of the best pair with its chosen settings after fewer training samples, classes kept in proportion."""
    found = []
    classes, counts = len(np.unique(y)), np.unique(y[train], return_counts=True)[1]
    made = chosen_estimator(top, len(train), seed)
    # A class with one training sample cannot be kept in proportion, and k neighbours want as many samples.
    shares = (0.05, 0.1, 0.25, 0.5) if counts.min() > 1 else ()
    sizes = {round(len(train) * share) for share in shares}
    for size in (*sorted(s for s in sizes if s >= max(10, 2 * classes)), len(train)):
        some = train
        if size < len(train):
            some = train_test_split(train, train_size=size, random_state=seed, stratify=y[train])[0]
        if len(np.unique(y[some])) < classes:
            continue
        anew: Any = clone(made)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append((len(some), float((anew.fit(X[some], y[some]).predict(X[test]) == y[test]).mean())))
    return found


def write_settings(folder: Path, pairs: Sequence[Pair], names: Sequence[str], kinds: Sequence[str]) -> None:
    chosen = {
        n: {c: next(p.settings for p in pairs if (p.descriptor, p.classifier) == (n, c)) for c in kinds}
        for n in names
    }
    write_json(folder / "baseline-settings.json", chosen)


def write_best_model(
    folder: Path, top: Pair, X: np.ndarray, y: np.ndarray, train: Any, seed: int, *, told: dict[str, Any]
) -> list[str]:
    """The best pair's estimator, fitted to the training part: safetensors for ours, skops for scikit-learn's; what could not be written, and why. ``told``: how its features are made, which is written beside it."""
    name, kind = top.descriptor, top.classifier
    target = folder / f"baseline-best.{'safetensors' if kind in ('gbnn', 'infinite') else 'skops'}"
    if target.suffix == ".skops":
        try:
            import skops.io  # pyright: ignore
        except ImportError:
            return [
                f"The best model, {name} with {kind}, is not written: that needs skops (pip install skops); its settings are in baseline-settings.json."
            ]
    made = chosen_estimator(top, len(train), seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made.fit(X[train], y[train])
    told = {"features": name, **told}
    if target.suffix == ".skops":
        skops.io.dump(made, target)  # pyright: ignore
    else:
        made.named_steps["model"].save(target)
        scale = made.named_steps["scale"]
        told["mean"] = scale.mean_.tolist()
        told["scale"] = None if scale.scale_ is None else scale.scale_.tolist()
    write_json(folder / "baseline-best.json", told)
    return []
