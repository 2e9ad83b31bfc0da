"""Many boosted networks as one program: all folds, seeds and settings of equal size in one batched problem.

A nested validation trains hundreds of networks whose parts have a few units each, and such a fit is nearly all calls and hardly any arithmetic. Here one
call works on all of them: hidden layers are one batched product, and the output weights are solved in closed form (variable projection with damped
Gauss-Newton steps, as ``solver="varpro"``), each problem with a damping of its own. arXiv 1909.12098, sections 2 and 3.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sklearn.base import clone
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.utils.multiclass import check_classification_targets
from torch import Tensor

from lineament.core.checks import InputError, listed, number, require, suggest
from lineament.core.engines import side_by_side
from lineament.core.estimator_data import validated
from lineament.core.results import Readable
from lineament.learn.boosting.batched import project
from lineament.learn.boosting.estimators import GBNNClassifier, GBNNRegressor, check_settings
from lineament.learn.boosting.subnetwork import TORCH

Array = np.ndarray
_BATCHED = ("learning_rate", "subsample", "l2", "units_per_step", "total_units")
# What may differ from the defaults in a batched problem: the last two are of solvers that it does not use.
_FREE = (*_BATCHED, "activation", "random_state", "batch_size", "learning_rate_init")


@dataclass(frozen=True)
class Search(Readable):
    """``scores`` of the outer folds with the settings that the inner folds chose (accuracy, or R²); ``chosen``, those settings; ``cv_results_`` as scikit-learn's: mean and
    spread of the inner scores of each setting over all outer folds.
    """

    scores: list[float]
    chosen: list[dict[str, Any]]
    cv_results_: dict[str, Any] = field(repr=False)

    @property
    def mean(self) -> float:
        """Of the outer folds."""
        return float(np.mean(self.scores))


def search(
    X: Any,
    y: Any,
    grid: Mapping[str, Sequence[Any]],
    *,
    outer: int = 10,
    inner: int = 10,
    estimator: GBNNClassifier | GBNNRegressor | None = None,
    steps: int = 8,
    seed: int = 0,
    n_jobs: int = 1,
) -> Search:
    """Nested cross-validation of boosted networks over a grid.

    Settings that differ from the estimator's defaults in sizes, rates, penalty and activation only are batched, with output weights in closed form as ``solver="varpro"`` has them, also
    where the solver is the default. Any other setting (another solver, loss, line search, weights of classes, ...) and several targets are fitted network by network, side by side in processes.

    Args:
        X, y: [n, features], class labels [n], or targets [n] or [n, targets].
        grid: lists of settings of the estimator; each combination of equal sizes of ``learning_rate``, ``subsample``, ``l2``, ``units_per_step`` and ``total_units`` is one batched problem.
        outer, inner: folds; stratified for classes.
        estimator: what the other settings are taken from; a classifier for whole-number or text labels by default, else a regressor.
        steps: Gauss-Newton steps of each part of a batched problem.
        seed: of folds, subsamples and first weights.
        n_jobs: processes for what is fitted network by network; -1 is one a core.

    Raises:
        InputError: an unknown setting or value, NaN, one class only, more folds than samples.

    >>> from sklearn.datasets import load_iris
    >>> found = search(*load_iris(return_X_y=True), {"learning_rate": [0.1, 0.5], "total_units": [6]}, outer=3, inner=2)
    >>> found.mean > 0.9, len(found.cv_results_["params"])
    (True, 2)
    """
    grid = {
        name: listed(f"grid: {name!r}", values, "the values to be tried") for name, values in grid.items()
    }
    for what, count in (("outer", outer), ("inner", inner)):
        number(what, count, low=2, integer=True)
    number("steps", steps, low=1, integer=True)
    if estimator is None:
        estimator = GBNNRegressor() if np.asarray(y).dtype.kind == "f" else GBNNClassifier()
    sorts = isinstance(estimator, GBNNClassifier)
    X, y = validated(
        clone(estimator),
        X,
        y,
        dtype=np.float64,
        **({} if sorts else {"multi_output": True, "y_numeric": True}),
    )
    known = estimator.get_params()
    for name in grid:
        require(
            name in known, f"grid: {name!r} is no setting of {type(estimator).__name__}{suggest(name, known)}"
        )
    if sorts:
        check_classification_targets(y)
    classes = np.unique(y) if sorts else None
    require(
        classes is None or len(classes) > 1,
        f"y: one class only ({np.unique(y)[:1].tolist()}), expected two or more",
    )
    settings = [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    folds: Any = StratifiedKFold if classes is not None else KFold
    jobs: list[tuple[int, int | None, Array, Array]] = []
    try:
        parts = list(folds(outer, shuffle=True, random_state=seed).split(X, y))
        for o, (train, _) in enumerate(parts):
            inside = folds(inner, shuffle=True, random_state=seed + 1 + o).split(X[train], y[train])
            jobs += [(o, i, train[a], train[b]) for i, (a, b) in enumerate(inside)]
    except ValueError as error:
        raise InputError(
            f"outer, inner: {outer} x {inner} folds of {len(y)} samples cannot be made ({error}); expected fewer"
        ) from error
    fewest = min(len(train) for _, _, train, _ in jobs)
    for setting in settings:
        model: Any = clone(estimator)
        check_settings(model.set_params(**setting), fewest)
    scores = np.zeros((len(settings), outer, inner))

    def fitted(problems: list[tuple[int, Any]]) -> Any:
        fits = [y.ndim == 1 and _fits(estimator, setting) for setting in settings]
        together, apart = ([p for p in problems if fits[p[0]] is kind] for kind in (True, False))
        yield from _fitted(X, y, classes, estimator, settings, together, steps, seed)
        yield from _one_by_one(X, y, estimator, settings, apart, seed, n_jobs)

    for s, job, score in fitted([(s, job) for s in range(len(settings)) for job in jobs]):
        scores[s, job[0], job[1]] = score
    best = scores.mean(2).argmax(0)
    final = np.zeros(outer)
    for _, job, score in fitted([(s, (o, None, *parts[o])) for o, s in enumerate(best.tolist())]):
        final[job[0]] = score
    flat = scores.reshape(len(settings), -1)
    results: dict[str, Any] = {
        "params": settings,
        "mean_test_score": flat.mean(1),
        "std_test_score": flat.std(1),
        "rank_test_score": (-flat.mean(1)).argsort().argsort() + 1,
    }
    results |= {f"param_{name}": [s[name] for s in settings] for name in grid}
    return Search(final.tolist(), [settings[s] for s in best], results)


def _fits(base: Any, setting: dict[str, Any]) -> bool:
    """Whether a batched problem does what this setting asks for: all that it does not know is at its default."""
    usual, asked = type(base)().get_params(), {**base.get_params(), **setting}
    same = {"solver": (usual["solver"], "varpro"), "loss": ("auto", "squared_error")}
    return all(
        name in _FREE or value in same.get(name, (usual[name],)) for name, value in asked.items()
    )  # fmt: skip


def _one_by_one(X: Array, y: Array, base: Any, settings: Any, every: Any, seed: int, n_jobs: int) -> Any:
    """(number of the setting, job, score) of each network, fitted by itself."""
    state = seed if base.random_state is None else base.random_state
    calls = [(base, {"random_state": state, **settings[s]}, X, y, *job[2:]) for s, job in every]
    yield from ((s, job, score) for (s, job), score in zip(every, side_by_side(_score, calls, jobs=n_jobs)))


def _score(base: Any, setting: dict[str, Any], X: Array, y: Array, train: Array, test: Array) -> float:
    model: Any = clone(base)
    return float(model.set_params(**setting).fit(X[train], y[train]).score(X[test], y[test]))


def _fitted(
    X: Array, y: Array, classes: Array | None, base: Any, settings: Any, every: Any, steps: int, seed: int
) -> Any:
    """(number of the setting, job, score) of each problem; those of equal sizes and activation together."""
    groups: dict[tuple[int, int, str], list[Any]] = {}
    for s, job in every:
        made = {name: settings[s].get(name, getattr(base, name)) for name in _BATCHED}
        per = made["units_per_step"]
        if per == "auto":
            per = min(4, max(1, made["total_units"] // 50))
        kind = settings[s].get("activation", base.activation)
        groups.setdefault((per, made["total_units"] // per, kind), []).append((s, job, made))
    for (per, rounds, kind), members in groups.items():
        # As many at a time as keep a gigabyte of moves of the hidden weights.
        room = max(1, int(1e8 / (len(X) * (X.shape[1] + 1) * per)))
        for first in range(0, len(members), room):
            some = members[first : first + room]
            found = _Batch(X, y, classes, some, per, kind, steps, seed).scores(rounds)
            yield from ((s, job, float(v)) for (s, job, _), v in zip(some, found))


class _Batch:
    """Problems of one size: samples outside a problem's training part have weight 0 in it."""

    def __init__(
        self,
        X: Array,
        y: Array,
        classes: Array | None,
        members: Any,
        per: int,
        activation: str,
        steps: int,
        seed: int,
    ):
        tensor = lambda v: torch.as_tensor(v, dtype=torch.float64)  # noqa: E731
        n, B = len(X), len(members)
        self.X = torch.cat([tensor(X), torch.ones(n, 1, dtype=torch.float64)], 1)
        self.per, self.steps, self.classes, self.activation = per, steps, classes, activation
        self.truth = (
            tensor(y)[:, None]
            if classes is None
            else tensor(np.searchsorted(classes, y)[:, None] == np.arange(len(classes)))
        )
        self.train = torch.zeros(B, n, dtype=torch.float64)
        self.test = torch.zeros(B, n, dtype=torch.float64)
        for row, (_, (_, _, inside, held), _) in enumerate(members):
            self.train[row, inside], self.test[row, held] = 1, 1
        pick = lambda name: tensor([made[name] for *_, made in members])  # noqa: E731
        self.rate, self.share, self.l2 = pick("learning_rate"), pick("subsample"), pick("l2")
        self.generator = torch.Generator().manual_seed(seed)

    def scores(self, rounds: int) -> Tensor:
        """Accuracy or R² of each problem's test part after so many parts."""
        B, n = self.train.shape
        # Outputs come before samples: a pass over samples is then over numbers that lie behind one another.
        Y = self.truth.T
        if self.classes is None:
            start = (self.train @ self.truth) / self.train.sum(1, keepdim=True)
        else:
            start = torch.zeros(B, len(Y), dtype=torch.float64)
        F = start[:, :, None].repeat(1, 1, n)
        for _ in range(rounds):
            p = F.softmax(1) if self.classes is not None else F
            r = Y - p
            h = self._part(r)
            if self.classes is None:
                rho = torch.ones(B, dtype=torch.float64)
            else:
                weighted = (self.train[:, None] * h).flatten(1)
                bend = torch.linalg.vecdot(weighted, (h * p * (1 - p)).flatten(1))
                slope = torch.linalg.vecdot(weighted, r.flatten(1))
                rho = torch.where(bend > 1e-12, slope / bend.clamp(min=1e-12), 0)
            step = self.rate * rho
            before, after = self._loss(F), self._loss(F + step[:, None, None] * h)
            for _ in range(20):
                worse = ~(after <= before)
                if not bool(worse.any()):
                    break
                step = torch.where(worse, step / 2, step)
                after = self._loss(F + step[:, None, None] * h)
            step = torch.where(after <= before, step, 0)
            F = F + step[:, None, None] * h.nan_to_num()
        count = self.test.sum(1)
        if self.classes is not None:
            right = (F.argmax(1) == Y.argmax(0)).double()
            return (right * self.test).sum(1) / count
        mean = (self.test @ self.truth) / count[:, None]
        around = (self.test[:, None] * (Y - mean[:, :, None]) ** 2).sum((1, 2))
        return 1 - (self.test[:, None] * (Y - F) ** 2).sum((1, 2)) / around

    def _loss(self, F: Tensor) -> Tensor:
        Y = self.truth.T
        each = (Y - F).square().sum(1) if self.classes is None else F.logsumexp(1) - (Y * F).sum(1)
        return torch.linalg.vecdot(each, self.train)

    def _part(self, r: Tensor) -> Tensor:
        """What a new part of each problem, fitted to r [B, outputs, n], answers to every sample, [B, outputs, n]."""
        B, n = self.train.shape
        d, J = self.X.shape[1] - 1, self.per
        # Only the rows that a problem is fitted to, as many for each: the others would weigh nothing but cost as much.
        count = self.train.sum(1).long()
        draw = self.train
        if bool((self.share < 1).any()):
            draw = torch.rand(B, n, generator=self.generator, dtype=torch.float64) * self.train
            count = (self.share * count).long().clamp(min=1)
        rows = draw.argsort(1, descending=True)[:, : int(count.max())]
        chosen = (torch.arange(rows.shape[1]) < count[:, None]).double()
        inputs, target = self.X[rows], r.gather(2, rows[:, None].expand(-1, r.shape[1], -1)).mT
        scale = 2.0 if self.activation == "logistic" else 6.0
        bound = (scale / (d + J)) ** 0.5
        V = (2 * torch.rand(B, d + 1, J, generator=self.generator, dtype=torch.float64) - 1) * bound
        V, U = project(inputs, target, chosen, V, self.l2, activation=self.activation, steps=self.steps)
        return torch.baddbmm(U[:, -1:].mT, U[:, :-1].mT, TORCH[self.activation](V.mT @ self.X.T))
