"""Losses of boosted networks: where they start, which way they fall, how far a step goes.

Emami, Martínez-Muñoz, "Sequential training of neural networks with gradient boosting", IEEE Access 2023, arXiv 1909.12098, section 1.2. Scores
F are [n, outputs]; targets are coded by :meth:`Loss.code` once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import expit, log1p, logsumexp, softmax, xlogy

from lineament.core.checks import InputError, require

Array = np.ndarray


@dataclass(frozen=True)
class Loss:
    """What a loss must say; :class:`Squared` and the others say it. ``factor``: scores times it are the logits of a plain network."""

    factor = 1.0
    newton = True

    def start(self, y: Array, weights: Array) -> Array:
        """The best constant, [outputs]."""
        raise NotImplementedError

    def each(self, y: Array, F: Array) -> Array:
        """The loss of each sample, [n]."""
        raise NotImplementedError

    def residual(self, y: Array, F: Array) -> Array:
        """The negative gradient, [n, outputs]."""
        raise NotImplementedError

    def bend(self, y: Array, F: Array, h: Array, *, full: bool = False) -> Array:
        """The second derivative along ``h`` of each sample, [n]; ``full``: with the terms between outputs."""
        raise NotImplementedError

    def mean(self, y: Array, F: Array, weights: Array) -> float:
        return float(np.average(self.each(y, F), weights=weights))


@dataclass(frozen=True)
class Squared(Loss):
    """(y - F)², whose residual is of one half of it; one output a target. Its published step is 1."""

    newton = False

    def start(self, y: Array, weights: Array) -> Array:
        return np.average(y, axis=0, weights=weights)

    def each(self, y: Array, F: Array) -> Array:
        return np.square(y - F).sum(1)

    def residual(self, y: Array, F: Array) -> Array:
        return y - F

    def bend(self, y: Array, F: Array, h: Array, *, full: bool = False) -> Array:
        return np.square(h).sum(1)


@dataclass(frozen=True)
class Binary(Loss):
    """ln(1 + exp(-2yF)) for y = ±1; the probability of +1 is sigmoid(2F)."""

    factor = 2.0

    def start(self, y: Array, weights: Array) -> Array:
        mean = np.average(y, axis=0, weights=weights)
        return 0.5 * (log1p(mean) - log1p(-mean))

    def each(self, y: Array, F: Array) -> Array:
        return np.logaddexp(0, -2 * y * F)[:, 0]

    def residual(self, y: Array, F: Array) -> Array:
        return 2 * y * expit(-2 * y * F)

    def bend(self, y: Array, F: Array, h: Array, *, full: bool = False) -> Array:
        r = self.residual(y, F)
        return (np.square(h) * r * (2 * y - r))[:, 0]


@dataclass(frozen=True)
class Multiclass(Loss):
    """Cross-entropy of softmax(F); y is one-hot. ``prior``: start at the logarithms of the class frequencies, not at 0 as published."""

    prior: bool = False

    def start(self, y: Array, weights: Array) -> Array:
        if not self.prior:
            return np.zeros(y.shape[1])
        return np.log(np.average(y, axis=0, weights=weights))

    def each(self, y: Array, F: Array) -> Array:
        return logsumexp(F, axis=1) - (y * F).sum(1)

    def residual(self, y: Array, F: Array) -> Array:
        return y - softmax(F, axis=1)

    def bend(self, y: Array, F: Array, h: Array, *, full: bool = False) -> Array:
        p = softmax(F, axis=1)
        if full:
            return (p * h * h).sum(1) - np.square((p * h).sum(1))
        return (h * h * p * (1 - p)).sum(1)


@dataclass(frozen=True)
class Poisson(Loss):
    """exp(F) - yF, up to what does not depend on F: half the deviance; predictions are exp(F)."""

    def start(self, y: Array, weights: Array) -> Array:
        return np.log(np.average(y, axis=0, weights=weights))

    def each(self, y: Array, F: Array) -> Array:
        return (np.exp(F) - y * F + xlogy(y, np.where(y > 0, y, 1)) - y).sum(1)

    def residual(self, y: Array, F: Array) -> Array:
        return y - np.exp(F)

    def bend(self, y: Array, F: Array, h: Array, *, full: bool = False) -> Array:
        return (np.exp(F) * h * h).sum(1)


@dataclass(frozen=True)
class Quantile(Loss):
    """alpha max(y - F, 0) + (1 - alpha) max(F - y, 0); at 1/2 half of the absolute error. Its step is found by a line search."""

    alpha: float = 0.5
    newton = False

    def start(self, y: Array, weights: Array) -> Array:
        return np.array([weighted_quantile(column, weights, self.alpha) for column in y.T])

    def each(self, y: Array, F: Array) -> Array:
        gap = y - F
        return np.maximum(self.alpha * gap, (self.alpha - 1) * gap).sum(1)

    def residual(self, y: Array, F: Array) -> Array:
        return np.where(y > F, self.alpha, np.where(y < F, self.alpha - 1, 0.0))


@dataclass(frozen=True)
class Huber(Loss):
    """Half the squared error up to ``delta``, linear beyond."""

    delta: float = 1.0
    newton = False

    def start(self, y: Array, weights: Array) -> Array:
        return np.array([weighted_quantile(column, weights, 0.5) for column in y.T])

    def each(self, y: Array, F: Array) -> Array:
        gap = np.abs(y - F)
        inner = np.minimum(gap, self.delta)
        return (inner * (gap - inner / 2)).sum(1)

    def residual(self, y: Array, F: Array) -> Array:
        return np.clip(y - F, -self.delta, self.delta)


def weighted_quantile(values: Array, weights: Array, share: float) -> float:
    """The smallest value up to which ``share`` of the weight lies.

    >>> weighted_quantile(np.array([3.0, 1.0, 2.0]), np.ones(3), 0.5)
    2.0
    """
    order = np.argsort(values, kind="stable")
    total = np.cumsum(weights[order])
    return float(values[order][np.searchsorted(total, share * total[-1])])


def step_size(
    loss: Loss, y: Array, F: Array, h: Array, weights: Array, how: str, *, floor: float = 1e-12
) -> float:
    """ρ of F + ρh: one Newton step from 0, the minimum along the line, or 1.

    Args:
        how: ``"newton"`` (1 for the squared error, as published; the diagonal of the softmax Hessian), ``"newton-full"``, ``"exact"``, ``"none"``.
        floor: a second derivative below it gives 0: every answer is certain already.

    >>> y, F = np.array([[1.0], [-1.0]]), np.zeros((2, 1))
    >>> step_size(Binary(), y, F, y, np.ones(2), "newton")
    1.0
    """
    if how == "none" or (how == "newton" and isinstance(loss, Squared)):
        return 1.0
    if how == "exact" or not (loss.newton or isinstance(loss, Squared)):
        found: Any = minimize_scalar(lambda rho: loss.mean(y, F + rho * h, weights), bracket=(0.0, 1.0))
        return float(found.x) if found.fun < loss.mean(y, F, weights) else 0.0
    if how not in ("newton", "newton-full"):
        raise InputError(f"line_search: got {how!r}, expected 'newton', 'newton-full', 'exact' or 'none'")
    slope = float(weights @ (loss.residual(y, F) * h).sum(1))
    bend = float(weights @ loss.bend(y, F, h, full=how == "newton-full"))
    return slope / bend if bend > floor else 0.0


def coded(y: Array, classes: Array) -> Array:
    """Class labels as ±1 (the larger label is +1) or one-hot, [n, outputs].

    >>> coded(np.array(["b", "a"]), np.array(["a", "b"])).tolist()
    [[1.0], [-1.0]]
    """
    index = np.searchsorted(classes, y)
    require(
        bool((index < len(classes)).all())
        and bool((classes[np.minimum(index, len(classes) - 1)] == y).all()),
        "y: a label is none of the classes",
    )
    if len(classes) == 2:
        return (2.0 * index - 1)[:, None]
    return np.eye(len(classes))[index]
