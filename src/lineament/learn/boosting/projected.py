"""Variable projection: the output weights of a small network in closed form, its hidden weights by damped Gauss-Newton steps on what these leave.

Golub, Pereyra 1973, with Kaufman's approximation of the derivative: what the output weights can undo is taken out of each move of a hidden weight.
"""

from __future__ import annotations

import numpy as np
from scipy.linalg import get_lapack_funcs

from lineament.learn.boosting.subnetwork import ACTIVATIONS, Array, Sub, Training

# Called directly: a system of a few unknowns is solved in less time than it takes to check it.
_solve, _again = get_lapack_funcs(("posv", "potrs"), (np.zeros(1),))


def projected(start: Sub, inputs: Array, r: Array, weights: Array, training: Training) -> Sub:
    """The network fitted to residuals r [n, K]; ``inputs`` [n, d + 1] end in 1. The damping follows the ratio of the decrease to its prediction (Nielsen 1999)."""
    act, slope = ACTIVATIONS[start.activation]
    n, width = inputs.shape
    units, l2 = start.W1.shape[1], training.l2
    root = np.sqrt(weights)[:, None]
    target = r * root
    decay = np.full((width, units), l2)
    decay[-1] = 0
    decay = decay.ravel()

    def solved(v: Array) -> tuple[float, Array, Array, Array, Array, Array]:
        a = act(inputs @ v.reshape(width, units))
        basis = np.empty((n, units + 1))
        np.multiply(a, root, out=basis[:, :-1])
        basis[:, -1:] = root
        gram = basis.T @ basis
        diagonal = gram.reshape(-1)[:: units + 2]
        # Enough to keep it regular where two units are one.
        floor = 1e-10 * diagonal.sum() / (units + 1)
        diagonal[:-1] += l2
        diagonal += floor
        factor, U, failed = _solve(gram, basis.T @ target)
        if failed:
            return np.inf, a, basis, U, target, factor
        left = target - basis @ U
        out = U[:-1].ravel()
        value = 0.5 * (left.ravel() @ left.ravel() + l2 * (out @ out) + decay @ (v * v))
        return (value if np.isfinite(value) else np.inf), a, basis, U, left, factor

    v = np.vstack([start.W1, start.b1]).ravel()
    value, a, basis, U, left, factor = solved(v)
    if value == np.inf:
        return start
    damping, growth = 1e-2, 2.0
    for _ in range(training.max_iter):
        # Columns: how each hidden weight moves its unit.
        pace = slope(a) * root
        moves = (inputs[:, :, None] * pace[:, None, :]).reshape(n, -1)
        out, undone = U[:-1], basis.T @ moves
        curvature = moves.T @ moves - undone.T @ _again(factor, undone)[0]
        curvature = curvature.reshape(width, units, width, units) * (out @ out.T)[:, None, :]
        curvature = curvature.reshape(v.size, v.size)
        gradient = (inputs.T @ (left @ out.T * pace)).ravel() - decay * v
        if np.abs(gradient).max() <= max(training.tol, 1e-8) * weights.sum():
            break
        diagonal = curvature.diagonal() + decay
        scaled = diagonal + 1e-12 * diagonal.max()
        improved = False
        while damping < 1e8:
            system = curvature.copy()
            system.reshape(-1)[:: v.size + 1] += decay + damping * scaled
            step, failed = _solve(system, gradient)[1:]
            made = None if failed else solved(v + step)
            gain = 0.0 if made is None else value - made[0]
            if made is not None and gain > 0:
                improved = gain > 1e-7 * value
                ratio = gain / (0.5 * float(step @ (damping * scaled * step + gradient)))
                v = v + step
                value, a, basis, U, left, factor = made
                damping, growth = max(damping * max(1 / 5, 1 - (2 * min(ratio, 1) - 1) ** 3), 1e-8), 2.0
                break
            damping, growth = damping * growth, growth * 2
        if not improved:
            break
    return Sub.unstacked(v.reshape(width, units), U, start.activation)
