"""One small network fitted to residuals: L-BFGS as published, or variable projection, which solves the output weights in closed form.

arXiv 1909.12098, section 1.1: 0.5 mean |r - h(x)|² + l2 / 2n |weights|², the mean over samples and the sum over outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import expit

Array = np.ndarray

# The activation, and its derivative as a function of the activation's value.
ACTIVATIONS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "logistic": (expit, lambda a: a * (1 - a)),
    "tanh": (np.tanh, lambda a: 1 - a * a),
    "relu": (lambda z: np.maximum(z, 0), lambda a: (a > 0).astype(float)),
    "identity": (lambda z: z, np.ones_like),
}


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

    @property
    def finite(self) -> bool:
        return all(bool(np.isfinite(v).all()) for v in (self.W1, self.b1, self.W2, self.b2))


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
    start: Sub, X: Array, r: Array, weights: Array, *, solver: str, l2: float, max_iter: int, tol: float
) -> Sub:
    """The network after training on residuals r [n, K], from ``start``.

    Args:
        solver: ``"lbfgs"`` or ``"varpro"``. weights: of the samples; one of weight 2 is two samples. tol: where the largest gradient entry is smaller, it ends.
    """
    if solver == "varpro" and start.W1.size <= 2000:
        return _projected(start, X, r, weights, l2, max_iter, tol)
    return _descended(start, X, r, weights, l2, max_iter, tol)


def _descended(start: Sub, X: Array, r: Array, weights: Array, l2: float, max_iter: int, tol: float) -> Sub:
    act, slope = ACTIVATIONS[start.activation]
    d = X.shape[1]
    units, outputs = start.W2.shape
    cut = np.cumsum([d * units, units, units * outputs])
    total = weights.sum()
    XT, share, penalty = np.ascontiguousarray(X.T), (weights / total)[:, None], l2 / total

    def parts(theta: Array) -> tuple[Array, Array, Array, Array]:
        W1, b1, W2, b2 = np.split(theta, cut)
        return W1.reshape(d, units), b1, W2.reshape(units, outputs), b2

    def objective(theta: Array) -> tuple[float, Array]:
        W1, b1, W2, b2 = parts(theta)
        a = act(X @ W1 + b1)
        error = a @ W2 + b2 - r
        weighed = error * share
        value = 0.5 * (np.vdot(error, weighed) + penalty * (np.vdot(W1, W1) + np.vdot(W2, W2)))
        back = (weighed @ W2.T) * slope(a)
        gradient = np.empty_like(theta)
        gradient[: cut[0]] = (XT @ back + penalty * W1).ravel()
        gradient[cut[0] : cut[1]] = back.sum(0)
        gradient[cut[1] : cut[2]] = (a.T @ weighed + penalty * W2).ravel()
        gradient[cut[2] :] = weighed.sum(0)
        return float(value), gradient

    theta = np.concatenate([v.ravel() for v in (start.W1, start.b1, start.W2, start.b2)])
    found = minimize(
        objective,
        theta,
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": max_iter, "maxfun": 15_000, "gtol": tol},
    )
    return Sub(*parts(found.x), start.activation)


def _projected(start: Sub, X: Array, r: Array, weights: Array, l2: float, max_iter: int, tol: float) -> Sub:
    """Gauss-Newton steps of the hidden weights on what the best output weights leave, damped as Levenberg and Marquardt."""
    act, slope = ACTIVATIONS[start.activation]
    n, d = X.shape
    root = np.sqrt(weights)[:, None]
    inputs = np.hstack([X, np.ones((n, 1))])
    target = r * root
    decay = np.append(np.full(start.W1.shape[0], l2), 0.0)[:, None]

    def solved(V: Array) -> tuple[Array, Array, Array, Array, float]:
        a = act(inputs @ V)
        basis = np.hstack([a, np.ones((n, 1))]) * root
        gram = basis.T @ basis
        # Enough to keep it regular where two units are one.
        ridge = np.append(np.full(a.shape[1], l2), 0.0) + 1e-10 * np.trace(gram) / len(gram)
        factor = cho_factor(gram + np.diag(ridge))
        U = cho_solve(factor, basis.T @ target)
        left = target - basis @ U
        value = 0.5 * (np.vdot(left, left) + l2 * np.vdot(U[:-1], U[:-1]) + np.vdot(decay * V, V))
        return a, basis, U, left, float(value)

    V = np.vstack([start.W1, start.b1])
    units = V.shape[1]
    a, basis, U, left, value = solved(V)
    damping = 1e-2
    for _ in range(max_iter):
        # Columns: how each hidden weight moves its unit; what the basis can undo is taken out (Kaufman).
        moves = ((slope(a) * root)[:, None, :] * inputs[:, :, None]).reshape(n, -1)
        q = np.linalg.qr(basis)[0]
        moves -= q @ (q.T @ moves)
        mixing = np.tile(U[:-1] @ U[:-1].T, (d + 1, d + 1))
        curvature = (moves.T @ moves) * mixing
        gradient = np.einsum("nk,nk->k", moves, np.tile(left @ U[:-1].T, d + 1)) - (decay * V).ravel()
        if np.abs(gradient).max() <= max(tol, 1e-8) * n:
            break
        diagonal = curvature.diagonal() + decay.repeat(units)
        improved = False
        while damping < 1e8:
            system = curvature + np.diag(decay.repeat(units) + damping * (diagonal + 1e-12 * diagonal.max()))
            trial = V + np.linalg.solve(system, gradient).reshape(V.shape)
            made = solved(trial)
            if made[-1] < value:
                improved = value - made[-1] > 1e-7 * value
                V, (a, basis, U, left, value) = trial, made
                damping = max(damping / 5, 1e-8)
                break
            damping *= 4
        if not improved:
            break
    return Sub(V[:-1], V[-1], U[:-1], U[-1], start.activation)
