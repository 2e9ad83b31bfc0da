"""Adam and stochastic gradient descent for one small network.

Residuals are divided by their root mean square first, so that first weights and steps suit them whatever the unit of the targets;
the objective stays the same one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.learn.boosting.subnetwork import Array, Objective, Sub, Training

PATIENCE = 10


def trained(
    start: Sub,
    inputs: Array | Tensor,
    r: Array,
    weights: Array,
    training: Training,
    rng: np.random.RandomState,
) -> Sub:
    """The network after at most ``max_iter`` epochs over residuals r [n, K], fewer where the loss has not fallen by ``tol`` of its size for ten of them.

    Adam as Kingma and Ba 2015 (0.9 and 0.999); otherwise Nesterov's momentum of 0.9.
    """
    n = len(r)
    scale = float(np.sqrt(np.average(np.square(r).sum(1), weights=weights))) or 1.0
    objective = Objective(start, inputs, r, weights, training.l2, scale)
    theta: Any = objective.own(objective.theta)
    update = _adam(theta, training) if training.solver == "adam" else _momentum(theta, training)
    batch = min(training.batch_size, n)
    best, since = np.inf, 0
    for _ in range(training.max_iter):
        if batch == n:
            loss, gradient = objective(theta)
            theta = update(theta, gradient)
        else:
            order = rng.permutation(n)
            if not isinstance(inputs, np.ndarray):
                order = torch.from_numpy(order).to(inputs.device)
            loss = 0.0
            for first in range(0, n, batch):
                rows = order[first : first + batch]
                value, gradient = objective(theta, rows)
                loss = loss + value * (len(rows) / n)
                theta = update(theta, gradient)
        loss = float(loss)
        if not np.isfinite(loss):
            break
        since = 0 if loss < best - training.tol * abs(best) else since + 1
        best = min(best, loss)
        if since >= PATIENCE:
            break
    return objective.sub(theta)


def _adam(theta: Any, training: Training) -> Any:
    mean, square, t = theta * 0, theta * 0, 0

    def update(theta: Any, gradient: Any) -> Any:
        nonlocal mean, square, t
        t += 1
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient * gradient
        size = training.learning_rate_init * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        return theta - size * mean / (square**0.5 + 1e-8)

    return update


def _momentum(theta: Any, training: Training) -> Any:
    velocity = theta * 0

    def update(theta: Any, gradient: Any) -> Any:
        nonlocal velocity
        velocity = 0.9 * velocity - training.learning_rate_init * gradient
        return theta + 0.9 * velocity - training.learning_rate_init * gradient

    return update
