"""Boosted networks: the pieces of each step from the stored sub-networks, and whole fits as the released code does on average."""

from __future__ import annotations

import json
import statistics
from functools import cache
from typing import Any

import numpy as np
import pytest
import sklearn.datasets
import torch
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from tests.golden.common import File, Scope, golden
from torch import Tensor

from lineament.learn.boosting.additive import Additive
from lineament.learn.boosting.estimators import GBNNClassifier, GBNNRegressor, _probabilities
from lineament.learn.boosting.losses import Binary, Loss, Multiclass, Squared, coded, step_size

LOSSES: dict[str, type[Loss]] = {"squared_error": Squared, "binary": Binary, "multiclass": Multiclass}


def array(value: Any) -> Tensor:
    return torch.from_numpy(np.asarray(value))


def columns(value: Tensor) -> np.ndarray:
    return value.double().numpy().reshape(len(value), -1)


def each(loss: Loss, y: np.ndarray, F: np.ndarray) -> np.ndarray:
    """The loss of each sample; the released code averages squares over targets, too."""
    found = loss.each(y, F)
    return found / y.shape[1] if isinstance(loss, Squared) else found


def check_pieces(case: Scope) -> None:
    loss, name = LOSSES[case["loss"]](), case.name
    given = case.input(f"{name}_Y" if case.has(f"{name}_Y") else f"{name}_y")
    y, F, h = columns(given), columns(case.input(f"{name}_F")), columns(case.input(f"{name}_h"))
    weights, flat = np.ones(len(y)), given.ndim == 1
    case.compare(f"{name}_F0", array(loss.start(y, weights)))
    residual = loss.residual(y, F)
    case.compare(f"{name}_resid", array(residual[:, 0] if flat else residual))
    step = lambda how: step_size(loss, y, F, h, weights, how)  # noqa: E731
    case.compare(f"{name}_rho", step("newton"))
    case.compare(f"{name}_rho_exact", lambda: step("newton-full"))
    case.compare(f"{name}_rho_full_hessian", lambda: step("newton-full"))
    case.compare(f"{name}_prob", lambda: array(_probabilities(F)))
    for key in ("loss", "loss_mean"):
        case.compare(f"{name}_{key}", lambda: each(loss, y, F).mean())


def check_fit(case: Scope) -> None:
    loss, name = LOSSES[case["loss"]](), case.name
    X, given = case.input(f"{name}_X").double().numpy(), case.input(f"{name}_y")
    sorts = case["loss"] != "squared_error"
    classes = np.unique(np.asarray(given)) if sorts else np.zeros(0)
    y = coded(np.asarray(given), classes) if sorts else columns(given)
    weights = np.ones(len(y))
    F = np.repeat(loss.start(y, weights)[None], len(y), 0)
    parts = [case.input(f"{name}_{key}").numpy() for key in ("W1", "b1", "W2", "b2")]
    model = Additive(F[0], *parts, np.zeros(len(parts[0])), case["activation"])
    steps, outputs, scores, losses = [], [], [], []
    for t in range(model.parts):
        h = model.part(t)(X)
        steps.append(case["eta"] * step_size(loss, y, F, h, weights, "newton"))
        F = F + steps[-1] * h
        outputs.append(h)
        scores.append(F)
        losses.append({"mean": np.mean, "sum": np.sum}[case["losses_reduction"]](each(loss, y, F)))
    model = Additive(model.F0, *parts, np.array(steps), case["activation"])
    flat = sorts or given.ndim == 1
    squeezed = lambda v: array(np.stack(v)[..., 0] if F.shape[1] == 1 and flat else np.stack(v))  # noqa: E731
    case.compare(f"{name}_F0", array(model.F0))
    case.compare(f"{name}_h", squeezed(outputs))
    case.compare(f"{name}_steps", array(steps))
    case.compare(f"{name}_staged_F", squeezed(scores))
    case.compare(f"{name}_losses", array(losses))
    assert np.allclose(np.stack(list(model.stages(X))), np.stack(scores), rtol=0, atol=1e-10)
    net = model.merged(loss.factor)
    assert loss.factor == case["output_factor_merged"]
    for key in ("W1", "b1", "W2", "b2"):
        case.compare(f"{name}_nn_{key}", array(getattr(net, key)))
    found = model.scores(X)
    if not sorts:
        case.compare(f"{name}_pred", squeezed([found])[0])
        return
    # Labels may be words, which are no numbers to be compared.
    likely = classes[_probabilities(found).argmax(1)]
    for key, value in (("classes", classes), ("pred", likely)):
        if value.dtype.kind != "U":
            case.compare(f"{name}_{key}", array(value))
        elif case.has(f"{name}_{key}"):
            assert case.input(f"{name}_{key}") == value.tolist()
    case.compare(f"{name}_proba", lambda: array(_probabilities(found)))


def check_gbnn(file: File) -> None:
    for case in file.cases:
        {"loss": check_pieces, "fit": check_fit}[case["part"]](case)


@cache
def score(settings: str, row: str, seed: int) -> float:
    """The test score of one fit, as the file's protocol has it."""
    told, row = json.loads(settings), json.loads(row)
    make = told["generators"].get(row["data"])
    if make is not None:
        X, y = getattr(sklearn.datasets, f"make_{row['data']}")(**make)
    else:
        X, y = getattr(sklearn.datasets, f"load_{row['data']}")(return_X_y=True)
    if row["n"] < len(X):
        chosen = np.random.default_rng(told["subset_seed"]).permutation(len(X))[: row["n"]]
        X, y = X[chosen], y[chosen]
    kind = {"rmse": GBNNRegressor, "accuracy": GBNNClassifier}[row["metric"]]
    stratify = y if kind is GBNNClassifier and told["stratify_classification"] else None
    X, test, y, truth = train_test_split(
        X, y, test_size=told["test_size"], random_state=seed, stratify=stratify
    )
    scaler = {"standard": StandardScaler}[told["scaler"]]().fit(X)
    net = kind(
        row["total_units"], row["J"], row["eta"], row["subsample"], solver=told["solver"], l2=told["alpha"],
        activation=told["activation"], max_iter=row["max_iter"], tol=told["tol"], random_state=seed,
    ).fit(scaler.transform(X), y)  # fmt: skip
    found = net.predict(scaler.transform(test))
    return float(np.sqrt(np.mean((found - truth) ** 2)) if kind is GBNNRegressor else np.mean(found == truth))


def check_stats(file: File) -> None:
    """Means over seeds within two standard errors and one percent, or better: solver and first weights are our own."""
    limit, settings = file.spec["tolerance"], json.dumps(file.values)
    for row in file.input(""):
        mean = statistics.mean(score(settings, json.dumps(row), seed) for seed in file["seeds"])
        room = limit["standard_errors"] * row["std"] / len(file["seeds"]) ** 0.5 + limit["rtol"] * row["mean"]
        worse = mean - row["mean"] if row["metric"] == "rmse" else row["mean"] - mean
        if worse > room:
            file.problems.append(
                f"{row['data']}: {mean:.4f}, stored is {row['mean']:.4f}, allowed {room:.4f}"
            )


pytestmark = pytest.mark.slow
CHECKS = {"gbnn": check_gbnn, "official_stats": check_stats}
test_golden, test_a_wrong_number_is_noticed = golden(
    "gbnn",
    CHECKS,
    # A stored network is what its subsample left behind; the protocol of means over seeds: other settings give other means, not wrong ones.
    fixed=("gbnn:subsample", "official_stats:*"),
)
