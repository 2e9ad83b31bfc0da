"""One small network fitted to residuals: its objective, L-BFGS as published, and the choice among the solvers.

arXiv 1909.12098, section 1.1: 0.5 mean |r - h(x)|² + l2 / 2n |weights|², the mean over samples and the sum over outputs. The objective is written once
for NumPy's arrays and for tensors of any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torch import Tensor

Array = np.ndarray

# The activation, and its derivative as a function of the activation's value.
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Any], Any]]] = {
    "logistic": (expit, lambda a: a * (1 - a)),
    "tanh": (np.tanh, lambda a: 1 - a * a),
    "relu": (lambda z: np.maximum(z, 0), lambda a: (a > 0) * 1.0),
    "identity": (lambda z: z, lambda a: a * 0 + 1),
}
TORCH: dict[str, Callable[[Tensor], Tensor]] = {
    "logistic": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": torch.relu,
    "identity": lambda z: z,
}
SOLVERS = ("lbfgs", "varpro", "adam", "sgd")


@dataclass(frozen=True)
class Sub:
    """A network act(x W1 + b1) W2 + b2: W1 [d, J], b1 [J], W2 [J, K], b2 [K]."""

    W1: Array
    b1: Array
    W2: Array
    b2: Array
    activation: str

    def hidden(self, X: Array) -> Array:
        return ACTIVATIONS[self.activation][0](X @ self.W1 + self.b1)

    def __call__(self, X: Array) -> Array:
        return self.hidden(X) @ self.W2 + self.b2

    def of(self, inputs: Array | Tensor) -> Array:
        """The same of rows that end in 1, computed where they lie."""
        V, U = self.stacked
        if isinstance(inputs, np.ndarray):
            return ACTIVATIONS[self.activation][0](inputs @ V) @ U[:-1] + U[-1]
        V, U = (torch.from_numpy(v).to(inputs) for v in (V, U))
        return (TORCH[self.activation](inputs @ V) @ U[:-1] + U[-1]).cpu().numpy()

    @property
    def stacked(self) -> tuple[Array, Array]:
        """Weights with biases below them: hidden [d + 1, J] and output [J + 1, K]."""
        return np.vstack([self.W1, self.b1]), np.vstack([self.W2, self.b2])

    @classmethod
    def unstacked(cls, V: Array, U: Array, activation: str) -> Sub:
        """From weights with biases below them."""
        return cls(V[:-1], V[-1], U[:-1], U[-1], activation)

    @property
    def finite(self) -> bool:
        return all(bool(np.isfinite(v).all()) for v in (self.W1, self.b1, self.W2, self.b2))


@dataclass(frozen=True)
class Training:
    """How each small network is trained; see :class:`~lineament.learn.boosting.estimators.GBNNClassifier`."""

    solver: str = "lbfgs"
    l2: float = 1e-4
    max_iter: int = 200
    tol: float = 1e-4
    batch_size: int = 200
    learning_rate_init: float = 0.03


def initial(d: int, units: int, outputs: int, activation: str, rng: np.random.RandomState) -> Sub:
    """Glorot's uniform weights and biases, as scikit-learn draws them."""
    scale = 2.0 if activation == "logistic" else 6.0
    made: list[Array] = []
    for fan_in, fan_out in ((d, units), (units, outputs)):
        bound = math.sqrt(scale / (fan_in + fan_out))
        made += [rng.uniform(-bound, bound, (fan_in, fan_out)), rng.uniform(-bound, bound, fan_out)]
    W1, b1, W2, b2 = made
    return Sub(W1, b1, W2, b2, activation)


def fitted(
    start: Sub,
    inputs: Array | Tensor,
    r: Array,
    weights: Array,
    training: Training,
    rng: np.random.RandomState,
) -> Sub:
    """The network after training on residuals r [n, K], from ``start``.

    Args:
        inputs: rows [n, d + 1] that end in 1; a tensor is worked on where it lies. weights: of the samples; one of weight 2 is two samples.
        rng: of minibatches.
    """
    from lineament.learn.boosting import batched, minibatch, projected

    if training.solver == "varpro" and start.W1.size <= 2000:
        if isinstance(inputs, np.ndarray):
            return projected.projected(start, inputs, r, weights, training)
        return batched.one(start, inputs, r, weights, training)
    if training.solver in ("adam", "sgd"):
        return minibatch.trained(start, inputs, r, weights, training, rng)
    return _descended(start, Objective(start, inputs, r, weights, training.l2), training)


class Objective:
    """Value and gradient at a flat vector: hidden weights [d + 1, J], then output weights [J + 1, K]; arrays or tensors, as ``inputs`` are.

    ``scale``: of the residuals, which are divided by it; so are the output weights, and the penalty of the hidden weights by its square.
    """

    def __init__(
        self,
        start: Sub,
        inputs: Array | Tensor,
        r: Array,
        weights: Array,
        l2: float,
        scale: float = 1.0,
    ):
        V, U = start.stacked
        self.shapes, self.activation, self.scale = (V.shape, U.shape), start.activation, scale
        self.theta = np.concatenate([V.ravel(), U.ravel()])
        total = float(weights.sum())
        decay = [np.full(V.shape, l2 / total / scale**2), np.full(U.shape, l2 / total)]
        for each in decay:
            each[-1] = 0
        self.inputs: Any = inputs
        self.own: Callable[[Array], Any] = (
            (lambda v: v) if isinstance(inputs, np.ndarray) else (lambda v: torch.from_numpy(v).to(inputs))
        )
        self.r, self.share = self.own(r / scale), self.own((weights / total)[:, None])
        self.decay = self.own(np.concatenate([v.ravel() for v in decay]))
        act, self.slope = ACTIVATIONS[start.activation]
        self.act: Callable[[Any], Any] = act if isinstance(inputs, np.ndarray) else TORCH[start.activation]
        self.join: Callable[[Any], Any] = np.concatenate if isinstance(inputs, np.ndarray) else torch.cat

    def __call__(self, theta: Any, rows: Any = None) -> tuple[Any, Any]:
        """Of all samples, or an estimate from some ``rows``."""
        inputs, r, share = self.inputs, self.r, self.share
        if rows is not None:
            count = len(r)
            inputs, r, share = inputs[rows], r[rows], share[rows] * (count / len(rows))
        cut = self.shapes[0][0] * self.shapes[0][1]
        V, U = theta[:cut].reshape(self.shapes[0]), theta[cut:].reshape(self.shapes[1])
        out = U[:-1]
        a = self.act(inputs @ V)
        error = a @ out + U[-1] - r
        weighed = error * share
        pull = self.decay * theta
        back = (weighed @ out.T) * self.slope(a)
        gradient = self.join(((inputs.T @ back).ravel(), (a.T @ weighed).ravel(), weighed.sum(0)))
        return 0.5 * (error.ravel() @ weighed.ravel() + theta @ pull), gradient + pull

    def sub(self, theta: Any) -> Sub:
        """The network of a flat vector."""
        theta = theta if isinstance(theta, np.ndarray) else theta.cpu().numpy()
        cut = self.shapes[0][0] * self.shapes[0][1]
        V, U = theta[:cut].reshape(self.shapes[0]), theta[cut:].reshape(self.shapes[1])
        return Sub.unstacked(V, U * self.scale, self.activation)


def _descended(start: Sub, objective: Objective, training: Training) -> Sub:
    def on_device(theta: Array) -> tuple[float, Array]:
        value, gradient = objective(objective.own(theta))
        return float(value), gradient.cpu().numpy()

    found = minimize(
        objective if isinstance(objective.inputs, np.ndarray) else on_device,
        objective.theta,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": training.max_iter, "maxfun": 15_000, "gtol": training.tol},
    )
    return objective.sub(found.x)
