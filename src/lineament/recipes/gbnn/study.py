"""What the gbnn recipe measures: tables by the reference's protocol, units switched off, solvers, and a boosted head."""

from __future__ import annotations

import importlib
import importlib.util
import time
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import sklearn.datasets
import torch
from sklearn.base import is_classifier
from sklearn.ensemble import (
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
)
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neural_network import MLPClassifier, MLPRegressor
from sklearn.preprocessing import StandardScaler
from torch import nn

from lineament.data.digits import digit_images
from lineament.edit.pruning import prune
from lineament.learn.boosting.estimators import GBNNClassifier, GBNNRegressor
from lineament.learn.boosting.network import boosted_head
from lineament.train.loop import fit

Array = np.ndarray


@dataclass(frozen=True)
class Known:
    """The reference code's settings, and its mean and deviation over eight seeds at 200 iterations."""

    units: int
    per_step: int
    subsample: float
    classes: bool
    mean: float
    deviation: float


REFERENCE = {
    "diabetes": Known(50, 1, 0.5, False, 57.8229, 1.6529),
    "breast_cancer": Known(50, 1, 0.5, True, 0.97295, 0.00967),
    "wine": Known(40, 2, 0.5, True, 0.98148, 0.01604),
    "friedman1": Known(60, 4, 1.0, False, 2.01055, 0.11),
    "digits": Known(60, 4, 0.5, True, 0.924, 0.016),
}


@dataclass(frozen=True)
class Score:
    """Test scores by method, and the largest rise of the training loss between two steps."""

    by: dict[str, float]
    rise: float


@dataclass(frozen=True)
class Cut:
    """Accuracy on digits with the first ``units`` units, by method."""

    units: list[int]
    kept: dict[str, list[float]]
    trained_anew: dict[str, float]


@dataclass(frozen=True)
class Solvers:
    """L-BFGS and variable projection on one split."""

    data: str
    lbfgs: float
    varpro: float
    lbfgs_seconds: float
    varpro_seconds: float


@dataclass(frozen=True)
class Head:
    """A small CNN on held-out images, and with a head grown on its features."""

    network: float
    boosted: float


def table(name: str) -> tuple[Array, Array]:
    """A data set as the reference takes it."""
    if name == "friedman1":
        return sklearn.datasets.make_friedman1(n_samples=600, noise=1.0, random_state=0)
    X, y = getattr(sklearn.datasets, f"load_{name}")(return_X_y=True)
    if name == "digits":
        rows = np.random.default_rng(0).permutation(len(X))[:600]
        X, y = X[rows], y[rows]
    return X, y


def parts(name: str, seed: int) -> tuple[Array, Array, Array, Array]:
    """Training and test part, inputs standardised by the former."""
    X, y = table(name)
    stratify = y if REFERENCE[name].classes else None
    X, Z, y, z = train_test_split(X, y, test_size=0.3, random_state=seed, stratify=stratify)
    scale: Any = StandardScaler().fit(X)
    return scale.transform(X), scale.transform(Z), np.asarray(y), np.asarray(z)


def score_of(net: Any, Z: Array, z: Array) -> float:
    """Accuracy, or the root of the mean squared error."""
    if is_classifier(net):
        return float((net.predict(Z) == z).mean())
    return float(np.sqrt(np.mean((net.predict(Z) - z) ** 2)))


def boosted(name: str, seed: int, iterations: int, **changes: Any) -> Any:
    """The estimator with the reference's settings."""
    told = REFERENCE[name]
    kind = GBNNClassifier if told.classes else GBNNRegressor
    settings = {"tol": 0.0, "max_iter": iterations, "random_state": seed, **changes}
    return kind(
        settings.pop("units", told.units),
        told.per_step,
        settings.pop("rate", 0.1),
        told.subsample,
        **settings,
    )


def scored(name: str, seed: int, iterations: int) -> Score:
    """Boosted networks and their rivals on one split."""
    X, Z, y, z = parts(name, seed)
    told = REFERENCE[name]
    classes = told.classes
    start = time.process_time()
    net = boosted(name, seed, iterations).fit(X, y)
    seconds = time.process_time() - start
    fast = boosted(name, seed, 12, solver="varpro").fit(X, y)
    mlp: Any = MLPClassifier if classes else MLPRegressor
    trees: Any = HistGradientBoostingClassifier if classes else HistGradientBoostingRegressor
    linear: Any = LogisticRegression(max_iter=500) if classes else RidgeCV()
    early = mlp(
        hidden_layer_sizes=(200,),
        early_stopping=True,
        learning_rate_init=0.01,
        max_iter=200,
        random_state=seed,
    )
    rng = np.random.default_rng(seed)
    weights, bias = (
        rng.normal(size=(X.shape[1], told.units)) / np.sqrt(X.shape[1]),
        rng.normal(size=told.units),
    )
    rivals = {
        "MLP, 200 units, L-BFGS": mlp(
            hidden_layer_sizes=(200,), solver="lbfgs", max_iter=200, random_state=seed
        ),
        "MLP, same units, L-BFGS": mlp(
            hidden_layer_sizes=(told.units,), solver="lbfgs", max_iter=200, random_state=seed
        ),
        "MLP, 200 units, Adam, early stopping": early,
        "MLP, the same, L2 tuned": GridSearchCV(early, {"alpha": [1e-4, 1e-2, 1.0]}, cv=3),
        "HistGB": trees(random_state=seed, max_iter=60),
        **_other_trees(classes, seed),
        # No step of the hidden weights: they stay as drawn, and each part's output weights are solved.
        "random hidden units, boosted": boosted(name, seed, 1, solver="varpro", tol=1e300),
    }
    found = {"boosted, lbfgs": score_of(net, Z, z), "boosted, varpro": score_of(fast, Z, z)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = boosted(name, seed, iterations, line_search="none").fit(X, y)
        found["boosted, rho = 1"] = score_of(plain, Z, z)
        for label, rival in rivals.items():
            found[label] = score_of(rival.fit(X, y), Z, z)
        found["random hidden units"] = score_of(
            linear.fit(np.tanh(X @ weights + bias), y), np.tanh(Z @ weights + bias), z
        )
    paced = for_seconds(seconds, mlp, told.units, X, y, seed)
    found["MLP, same units, same seconds"] = score_of(paced, Z, z)
    return Score(found, float(np.diff(net.train_losses_).max(initial=0.0)))


def for_seconds(seconds: float, kind: Any, units: int, X: Array, y: Array, seed: int) -> Any:
    """A perceptron trained by Adam for so many seconds of processor time (at least one epoch), as it was after its best epoch on a tenth held out."""
    end = time.process_time() + seconds
    mlp = kind(hidden_layer_sizes=(units,), learning_rate_init=0.01, random_state=seed)
    first = {"classes": np.unique(y)} if is_classifier(mlp) else {}
    left, held, target, truth = train_test_split(
        X, y, test_size=0.1, random_state=seed, stratify=y if first else None
    )
    best, kept = -np.inf, None
    while kept is None or time.process_time() < end:
        mlp.partial_fit(left, target, **first)
        score = mlp.score(held, truth)
        if score > best:
            best, kept = score, [[a.copy() for a in layers] for layers in (mlp.coefs_, mlp.intercepts_)]
    mlp.coefs_, mlp.intercepts_ = kept
    return mlp


def _other_trees(classes: bool, seed: int) -> dict[str, Any]:
    """Of LightGBM and XGBoost what is installed."""
    found: dict[str, Any] = {}
    kind = "Classifier" if classes else "Regressor"
    for label, module, prefix in (("LightGBM", "lightgbm", "LGBM"), ("XGBoost", "xgboost", "XGB")):
        if importlib.util.find_spec(module) is not None:
            made = getattr(importlib.import_module(module), prefix + kind)
            quiet = {"verbosity": -1} if module == "lightgbm" else {"verbosity": 0}
            found[label] = made(n_estimators=60, n_jobs=1, random_state=seed, **quiet)
    return found


def cut(seed: int, units: int, iterations: int) -> Cut:
    """A boosted network and MLPs of as many units, with only the first of them; an MLP's are sorted by the norm of their output weights first."""
    X, y = sklearn.datasets.load_digits(return_X_y=True)
    X, Z, y, z = train_test_split(X, y, test_size=0.3, random_state=seed, stratify=y)
    scale = StandardScaler().fit(X)
    X, Z = scale.transform(X), scale.transform(Z)
    net = GBNNClassifier(units, 4, 0.1, 0.5, max_iter=min(iterations, 100), random_state=seed).fit(X, y)
    marks = sorted({4 * max(1, round(units * share / 4)) for share in (0.04, 0.1, 0.25, 0.5, 0.75, 1.0)})
    stages = [float((labels == z).mean()) for labels in net.staged_predict(Z)]
    kept = {"boosted": [stages[m // 4 - 1] for m in marks if m // 4 <= len(stages)]}
    marks = marks[: len(kept["boosted"])]
    anew = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for solver in ("adam", "lbfgs"):
            mlp = MLPClassifier((units,), solver=solver, max_iter=150, random_state=seed).fit(X, y)
            order = np.argsort(-np.linalg.norm(mlp.coefs_[1], axis=1))
            hidden = np.maximum(Z @ mlp.coefs_[0] + mlp.intercepts_[0], 0)
            kept[f"MLP {solver}, units sorted"] = [
                float(
                    (
                        np.asarray(mlp.classes_)[
                            (hidden[:, order[:m]] @ mlp.coefs_[1][order[:m]] + mlp.intercepts_[1]).argmax(1)
                        ]
                        == z
                    ).mean()
                )
                for m in marks
            ]
            if solver == "adam":
                kept["MLP adam, pruned by ModHiFi"] = [_pruned(mlp, X, m, (Z, z)) for m in marks]
        for width in (marks[0], marks[len(marks) // 2], marks[-1]):
            anew[str(width)] = float(
                MLPClassifier((width,), max_iter=150, random_state=seed).fit(X, y).score(Z, z)
            )
    return Cut(marks, kept, anew)


def _pruned(mlp: Any, X: Any, units: int, test: tuple[Any, Any]) -> float:
    """Accuracy of a perceptron of ReLUs pruned to so many hidden units, without labels, the units that stay adjusted to those that go."""
    layers = [nn.Linear(*W.shape, dtype=torch.float64) for W in mlp.coefs_]
    for layer, W, b in zip(layers, mlp.coefs_, mlp.intercepts_):
        layer.weight.data, layer.bias.data = torch.from_numpy(W.T.copy()), torch.from_numpy(b.copy())
    net: nn.Module = nn.Sequential(layers[0], nn.ReLU(), layers[1])
    whole = len(mlp.intercepts_[0])
    if units < whole:
        net = prune(net, torch.from_numpy(X), keep=units / whole).model
    with torch.no_grad():
        answers = net(torch.from_numpy(test[0])).argmax(1).numpy()
    return float((np.asarray(mlp.classes_)[answers] == test[1]).mean())


def solvers(config: Any) -> list[Solvers]:
    """Each solver on the first seed of each table, in seconds of processor time."""
    found = []
    for name in config.sets:
        X, Z, y, z = parts(name, config.seeds[0])
        values = []
        for how in ({"iterations": config.iterations}, {"iterations": 12, "solver": "varpro"}):
            start = time.process_time()
            net = boosted(name, config.seeds[0], **how).fit(X, y)
            values += [score_of(net, Z, z), time.process_time() - start]
        found.append(Solvers(name, values[0], values[2], values[1], values[3]))
    return found


def head(seed: int, config: Any) -> Head:
    """A small CNN on digits, its own head against one grown on its frozen features."""
    torch.manual_seed(seed)
    train, test = (
        digit_images("auto", split, count=config.images, data_folder=config.data_folder, seed=seed)
        for split in ("train", "test")
    )
    side = train.inputs.shape[-1]
    inner = 8 * (side // 4) ** 2
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(inner, 10),
    )  # fmt: skip
    x, y = train.inputs.float(), train.targets
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    fit(net, (x, y), optimizer=optimizer, epochs=config.epochs, batch_size=64, seed=seed)
    grown = GBNNClassifier(100, 10, 0.3, 0.5, max_iter=60, random_state=seed)
    made = boosted_head(net, (x, y), head=grown)
    with torch.no_grad():
        right = [
            float((m(test.inputs.float()).argmax(1) == test.targets).float().mean())
            for m in (net.eval(), made.eval())
        ]
    return Head(*right)
