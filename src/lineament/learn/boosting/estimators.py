"""Boosted networks as scikit-learn estimators.

Emami, Martínez-Muñoz, arXiv 1909.12098. One network of all outputs is grown; its units come in order of importance, so that the first of
them are a smaller network that needs no training.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.core.estimator_data import validated, weights_of
from lineament.core.estimator_files import SavedEstimator
from lineament.core.models import usable
from lineament.learn.boosting.additive import Additive, Grown, Growth, grow
from lineament.learn.boosting.losses import (
    Array,
    Binary,
    Huber,
    Loss,
    Multiclass,
    Poisson,
    Quantile,
    Squared,
    coded,
    weighted_quantile,
)
from lineament.learn.boosting.subnetwork import ACTIVATIONS, SOLVERS, Training


class _Boosted(SavedEstimator, BaseEstimator):
    """What classifier and regressor share: growing, truncation, stages, export."""

    total_units: int
    units_per_step: Any
    learning_rate: float
    subsample: float
    solver: str
    activation: str
    line_search: str
    l2: float
    max_iter: int
    tol: float
    batch_size: Any
    learning_rate_init: float
    backtrack: bool
    n_iter_no_change: int | None
    validation_fraction: float
    warm_start: bool
    random_state: Any
    device: Any
    n_features_in_: int

    @classmethod
    def as_published(cls, **changes: Any) -> Any:
        """The settings of the released code: a rate of 1, one unit a step, no safeguard."""
        return cls(**{"learning_rate": 1.0, "units_per_step": 1, "tol": 0.0, "backtrack": False, **changes})

    def truncate(self, units: int) -> Any:
        """A copy that keeps the first ``units`` units, whole steps only."""
        check_is_fitted(self)
        made = copy.copy(self)
        made.network_, made._rng = self.network_.truncated(units), None
        made.n_iter_ = made.network_.parts
        if hasattr(self, "train_losses_"):
            made.train_losses_ = self.train_losses_[: made.n_iter_]
        return made

    def to_torch(self, units: int | None = None) -> Any:
        """One plain ``nn.Sequential(Linear, activation, Linear)`` in float64: logits of classes, or predictions; of the first ``units`` units."""
        check_is_fitted(self)
        network = self.network_ if units is None else self.network_.truncated(units)
        return network.to_torch(self.loss_.factor)

    def _learned(self) -> tuple[dict[str, Array], dict[str, Any]]:
        check_is_fitted(self)
        network = self.network_
        arrays = {name: getattr(network, name) for name in ("F0", "W1", "b1", "W2", "b2", "steps")}
        classes = getattr(self, "classes_", np.zeros(0))
        return arrays, {
            "activation": network.activation,
            "classes": classes.tolist(),
            "flat": getattr(self, "_flat", True),
        }

    def _relearned(self, arrays: dict[str, Array], told: dict[str, Any]) -> None:
        self.network_ = Additive(**arrays, activation=one_of("activation", told["activation"], ACTIVATIONS))
        self.n_features_in_ = arrays["W1"].shape[1]
        self.n_iter_ = len(arrays["steps"])
        if told["classes"]:
            self.classes_ = np.array(told["classes"])
            self.loss_: Loss = Binary() if len(self.classes_) == 2 else Multiclass()
        else:
            self._flat, self.loss_ = bool(told["flat"]), Squared()

    def _growth(self, n: int) -> Growth:
        number("total_units", self.total_units, low=1, integer=True)
        per = self.units_per_step
        if per == "auto":
            per = min(4, max(1, self.total_units // 50))
        number("units_per_step", per, low=1, integer=True)
        require(
            per <= self.total_units,
            f"total_units: got {self.total_units}, expected at least units_per_step ({per})",
        )
        number("learning_rate", self.learning_rate, low=0, open_low=True)
        number("subsample", self.subsample, low=0, high=1, open_low=True)
        require(
            int(self.subsample * n) >= 1,
            f"subsample: {self.subsample} of {n} samples leaves none; expected more",
        )
        one_of("solver", self.solver, SOLVERS)
        one_of("activation", self.activation, ACTIVATIONS)
        one_of("line_search", self.line_search, ("newton", "newton-full", "exact", "none"))
        number("l2", self.l2, low=0)
        number("max_iter", self.max_iter, low=1, integer=True)
        number("tol", self.tol, low=0)
        number("learning_rate_init", self.learning_rate_init, low=0, open_low=True)
        batch = 200 if self.batch_size == "auto" else self.batch_size
        number("batch_size", batch, low=1, integer=True)
        if self.n_iter_no_change is not None:
            number("n_iter_no_change", self.n_iter_no_change, low=1, integer=True)
            number(
                "validation_fraction", self.validation_fraction, low=0, high=1, open_low=True, open_high=True
            )
        training = Training(self.solver, self.l2, self.max_iter, self.tol, batch, self.learning_rate_init)
        return Growth(
            self.total_units, per, self.learning_rate, self.subsample, self.activation, self.line_search,
            self.backtrack, training, _device(self.device),
        )  # fmt: skip

    def _before(self, growth: Growth, outputs: int) -> Additive | None:
        """The network that ``warm_start`` goes on from."""
        network = getattr(self, "network_", None) if self.warm_start else None
        if network is None:
            return None
        had = (network.W1.shape[1], len(network.F0), network.b1.shape[1], network.activation)
        now = (self.n_features_in_, outputs, growth.units_per_step, growth.activation)
        for what, one, other in zip(("features", "outputs", "units_per_step", "activation"), had, now):
            require(
                one == other,
                f"warm_start: the fitted network has {what} {one}, these settings and data {other}; expected the same",
            )
        require(
            self.total_units >= network.units,
            f"total_units: got {self.total_units}, the network to go on from has {network.units}; expected as many or more",
        )
        return network

    def _grow(self, loss: Loss, X: Array, y: Array, weights: Array, stratify: Array | None = None) -> None:
        growth = self._growth(len(X))
        network = self._before(growth, y.shape[1])
        rng = getattr(self, "_rng", None) if network is not None else None
        rng = check_random_state(self.random_state) if rng is None else rng
        stop = None
        if self.n_iter_no_change is not None:
            try:
                chosen = train_test_split(
                    np.arange(len(X)), test_size=self.validation_fraction, random_state=rng, stratify=stratify
                )
            except ValueError as error:
                raise InputError(
                    f"validation_fraction: {self.validation_fraction} of {len(X)} samples cannot be held out ({error})"
                ) from error
            (X, held), (y, y_held) = ([v[i] for i in chosen] for v in (X, y))
            weights, w_held = (weights[i] for i in chosen)
            stop = _Stop(loss, held, y_held, w_held, self.n_iter_no_change)
        before = None
        F0 = loss.start(y, weights) if network is None else network.F0
        if network is not None:
            F = network.scores(X)
            losses = getattr(self, "train_losses_", np.full(network.parts, np.nan)).tolist()
            # The data may be others than at the last fit.
            losses[-1:] = [loss.mean(y, F, weights)] * min(1, network.parts)
            subs = [network.part(t) for t in range(network.parts)]
            before = Grown(subs, network.steps.tolist(), F, losses)
        if stop is not None:
            stop.F = np.repeat(F0[None], len(stop.X), 0)
        grown = grow(loss, X, y, F0, growth, rng, weights=weights, before=before, stop=stop)
        self.loss_, self._rng = loss, rng
        self.network_ = grown.model(F0, X.shape[1], growth)
        self.train_losses_ = np.array(grown.losses)
        self.n_iter_ = len(grown.steps)

    def _scores(self, X: Any) -> Array:
        check_is_fitted(self)
        return self.network_.scores(self._checked(X))

    def _stages(self, X: Any) -> Iterator[Array]:
        check_is_fitted(self)
        return self.network_.stages(self._checked(X))

    def _checked(self, X: Any) -> Any:
        return validated(self, X, reset=False, dtype=np.float64)


def check_settings(estimator: GBNNClassifier | GBNNRegressor, samples: int) -> None:
    """Raise an :class:`~lineament.core.checks.InputError` if a setting of sizes, rates or solver cannot be used for so many samples.

    >>> check_settings(GBNNClassifier(8, 2), 100)
    """
    estimator._growth(samples)


def _device(given: Any) -> torch.device:
    with usable("cpu" if given is None else given):
        found = torch.device("cpu" if given is None else given)
        # Residuals and steps are in float64, which some accelerators lack.
        torch.zeros(1, dtype=torch.float64, device=found) if found.type != "mps" else None
    require(
        found.type != "mps", "device: 'mps' has no float64, which growing needs; expected 'cpu' or 'cuda'"
    )
    return found


class _Stop:
    """True when the loss on held-out samples has not fallen for some steps."""

    def __init__(self, loss: Loss, X: Array, y: Array, weights: Array, patience: int):
        self.loss, self.X, self.y, self.weights, self.patience = loss, X, y, weights, patience
        self.F = np.zeros(())
        self.best, self.since, self.seen = np.inf, 0, 0

    def __call__(self, grown: Grown) -> bool:
        for t in range(self.seen, len(grown.subs)):
            self.F = self.F + grown.steps[t] * grown.subs[t](self.X)
        self.seen = len(grown.subs)
        now = self.loss.mean(self.y, self.F, self.weights)
        self.since = 0 if now < self.best else self.since + 1
        self.best = min(self.best, now)
        return self.since >= self.patience


class GBNNClassifier(ClassifierMixin, _Boosted):
    """A network with one hidden layer, grown by gradient boosting.

    Each step fits a network of a few units to the gradient of the loss, scales it by a line search and ``learning_rate``, and adds it.

    Args:
        total_units: hidden units of the whole network; fewer where steps are left out or training stops early.
        units_per_step: of each small network; ``"auto"`` takes 1 to 4.
        learning_rate: the paper's code has 1, which overfits; 0.1 is robust.
        subsample: share of the samples that each step is fitted to.
        solver: of the small networks. ``"lbfgs"`` as published; ``"varpro"`` solves the output weights in closed form (for up to 2,000 hidden weights a step);
            ``"adam"`` and ``"sgd"`` (Nesterov's momentum) take minibatches, for many samples.
        activation: ``"logistic"``, ``"tanh"``, ``"relu"``, ``"identity"``.
        line_search: ``"newton"`` as published (the softmax Hessian's diagonal), ``"newton-full"``, ``"exact"`` or ``"none"``.
        init: the first scores of several classes: ``"zeros"`` as published, or ``"prior"``.
        l2, max_iter, tol: penalty, iterations and smallest gradient of each small network; of Adam and SGD epochs, and the share by which the loss must fall in ten of them.
        batch_size, learning_rate_init: of Adam and SGD; ``"auto"`` takes 200 samples or all.
        backtrack: halve a step until the training loss falls.
        n_iter_no_change, validation_fraction: stop when the loss on so much held-out data has not fallen for so many steps.
        class_weight: as in scikit-learn. warm_start: go on from the last fit, to more units; the data may be others.
        random_state: of first weights, subsamples and minibatches.
        device: where small networks are trained, such as ``"cuda"``; the CPU by default.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> net = GBNNClassifier(total_units=8, random_state=0).fit(X, y)
    >>> bool(net.score(X, y) > 0.9), net.to_torch()[0].out_features
    (True, 8)
    """

    def __init__(
        self,
        total_units: int = 200,
        units_per_step: Any = "auto",
        learning_rate: float = 0.1,
        subsample: float = 0.5,
        *,
        solver: str = "lbfgs",
        activation: str = "logistic",
        line_search: str = "newton",
        init: str = "zeros",
        l2: float = 1e-4,
        max_iter: int = 200,
        tol: float = 1e-4,
        batch_size: Any = "auto",
        learning_rate_init: float = 0.03,
        backtrack: bool = True,
        n_iter_no_change: int | None = None,
        validation_fraction: float = 0.1,
        class_weight: Any = None,
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = None,
    ):
        self.total_units = total_units
        self.units_per_step = units_per_step
        self.learning_rate = learning_rate
        self.subsample = subsample
        self.solver = solver
        self.activation = activation
        self.line_search = line_search
        self.init = init
        self.l2 = l2
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.backtrack = backtrack
        self.n_iter_no_change = n_iter_no_change
        self.validation_fraction = validation_fraction
        self.class_weight = class_weight
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Grow the network on X [n, features] and class labels y [n]."""
        one_of("init", self.init, ("zeros", "prior"))
        X, y = validated(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        had = getattr(self, "classes_", None) if self.warm_start else None
        self.classes_ = np.unique(y)
        require(
            had is None or np.array_equal(had, self.classes_),
            f"warm_start: the fitted network has the classes {had}, the labels {self.classes_}; expected the same",
        )
        require(len(self.classes_) > 1, f"y: one class only ({self.classes_.tolist()}), expected two or more")
        weights = weights_of(sample_weight, X)
        if self.class_weight is not None:
            try:
                weights = weights * compute_sample_weight(self.class_weight, y)
            except ValueError as error:
                raise InputError(f"class_weight: got {show(self.class_weight)} ({error})") from error
        empty = [c for c in self.classes_.tolist() if not weights[y == c].any()]
        require(not empty, f"sample_weight: the samples of class {empty[:1]} weigh nothing; leave them out")
        loss = Binary() if len(self.classes_) == 2 else Multiclass(self.init == "prior")
        self._grow(loss, X, coded(y, self.classes_), weights, y)
        return self

    def decision_function(self, X: Any) -> Array:
        """Scores F: [n] of the larger label where there are two classes, else [n, classes]."""
        found = self._scores(X)
        return found[:, 0] if len(self.classes_) == 2 else found

    def predict_proba(self, X: Any) -> Array:
        """Probabilities [n, classes]."""
        return _probabilities(self._scores(X))

    def predict(self, X: Any) -> Array:
        """Labels [n]."""
        return self._labels(self._scores(X))

    def _labels(self, F: Array) -> Array:
        return self.classes_[(F[:, 0] > 0).astype(int) if len(self.classes_) == 2 else F.argmax(1)]

    def staged_decision_function(self, X: Any) -> Iterator[Array]:
        """:meth:`decision_function` after each step."""
        return (F[:, 0] if len(self.classes_) == 2 else F for F in self._stages(X))

    def staged_predict_proba(self, X: Any) -> Iterator[Array]:
        """:meth:`predict_proba` after each step."""
        return (_probabilities(F) for F in self._stages(X))

    def staged_predict(self, X: Any) -> Iterator[Array]:
        """:meth:`predict` after each step."""
        return (self._labels(F) for F in self._stages(X))


def _probabilities(F: Array) -> Array:
    if F.shape[1] == 1:
        second = expit(2 * F)
        return np.hstack([expit(-2 * F), second])
    return softmax(F, axis=1)


class GBNNRegressor(RegressorMixin, _Boosted):
    """The same for one target or several; see :class:`GBNNClassifier`.

    Args:
        loss: ``"auto"`` (``"squared_error"``), ``"absolute"``, ``"huber"`` (linear beyond the 90 % quantile of the first residuals), ``"quantile"`` or ``"poisson"``.
        quantile: of the quantile loss.

    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> bool(GBNNRegressor(total_units=10, random_state=0).fit(X, y).score(X, y) > 0.2)
    True
    """

    def __init__(
        self,
        total_units: int = 200,
        units_per_step: Any = "auto",
        learning_rate: float = 0.1,
        subsample: float = 0.5,
        *,
        solver: str = "lbfgs",
        activation: str = "logistic",
        line_search: str = "newton",
        loss: str = "auto",
        quantile: float = 0.5,
        l2: float = 1e-4,
        max_iter: int = 200,
        tol: float = 1e-4,
        batch_size: Any = "auto",
        learning_rate_init: float = 0.03,
        backtrack: bool = True,
        n_iter_no_change: int | None = None,
        validation_fraction: float = 0.1,
        warm_start: bool = False,
        random_state: Any = None,
        device: Any = None,
    ):
        self.total_units = total_units
        self.units_per_step = units_per_step
        self.learning_rate = learning_rate
        self.subsample = subsample
        self.solver = solver
        self.activation = activation
        self.line_search = line_search
        self.loss = loss
        self.quantile = quantile
        self.l2 = l2
        self.max_iter = max_iter
        self.tol = tol
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.backtrack = backtrack
        self.n_iter_no_change = n_iter_no_change
        self.validation_fraction = validation_fraction
        self.warm_start = warm_start
        self.random_state = random_state
        self.device = device

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Any:
        """Grow the network on X [n, features] and targets y [n] or [n, targets]."""
        one_of("loss", self.loss, ("auto", "squared_error", "absolute", "huber", "quantile", "poisson"))
        X, y = validated(self, X, y, dtype=np.float64, multi_output=True, y_numeric=True)
        y = np.asarray(y, dtype=float)
        self._flat = y.ndim == 1
        y = y.reshape(len(y), -1)
        weights = weights_of(sample_weight, X)
        self._grow(self._chosen(y, weights), X, y, weights)
        return self

    def _chosen(self, y: Array, weights: Array) -> Loss:
        if self.loss == "poisson":
            require(
                bool((y >= 0).all()) and bool((y.sum(0) > 0).all()),
                "y: the Poisson loss needs targets that are not negative, and not all zero",
            )
            return Poisson()
        if self.loss == "huber":
            first = np.abs(y - np.median(y, axis=0)).max(1)
            return Huber(max(weighted_quantile(first, weights, 0.9), 1e-12))
        if self.loss in ("quantile", "absolute"):
            share = 0.5 if self.loss == "absolute" else self.quantile
            return Quantile(number("quantile", share, low=0, high=1, open_low=True, open_high=True))
        return Squared()

    def predict(self, X: Any) -> Array:
        """Predictions [n] or [n, targets]."""
        return self._told(self._scores(X))

    def _told(self, F: Array) -> Array:
        made = np.exp(F) if self.loss == "poisson" else F
        return made[:, 0] if self._flat else made

    def staged_predict(self, X: Any) -> Iterator[Array]:
        """:meth:`predict` after each step."""
        return (self._told(F) for F in self._stages(X))
