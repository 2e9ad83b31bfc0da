"""The paper's functions of one variable, and the way of an optimizer down them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from lineament.optim.diffgrad import DiffGrad


class Function(NamedTuple):
    """A function of one variable, its derivative, and where its minimum is."""

    value: Callable[[float], float]
    slope: Callable[[float], float]
    minimum: float


def _f2(x: float) -> float:
    return -40 * x - 35.15 if x <= -0.9 else x**3 + x * math.sin(8 * x) + 0.85


def _f3(x: float) -> float:
    x = abs(x) if x > -0.5 else x
    return x * x if abs(x) > 0.5 or x == -0.5 else 0.75 - x if x > 0.4 else 0.875 * x


def _f3_slope(x: float) -> float:
    if x <= -0.5 or x > 0.5:
        return 2 * x
    return 1.0 if x <= -0.4 else -0.875 if x <= 0 else 0.875 if x <= 0.4 else -1.0


FUNCTIONS = {
    "F1": Function(
        lambda x: (x + 0.3) ** 2 if x <= 0 else (x - 0.2) ** 2 + 0.05,
        lambda x: 2 * x + 0.6 if x <= 0 else 2 * x - 0.4,
        -0.3,
    ),
    "F2": Function(
        _f2,
        lambda x: -40.0 if x <= -0.9 else 8 * x * math.cos(8 * x) + math.sin(8 * x) + 3 * x * x,
        -0.6429,
    ),
    # The authors' notebook forgets the factor 8 of the inner derivative.
    "F2, released derivative": Function(
        _f2, lambda x: -40.0 if x <= -0.9 else x * math.cos(8 * x) + math.sin(8 * x) + 3 * x * x, -0.6429
    ),
    "F3": Function(_f3, _f3_slope, 0.0),
}
HALF = "Adam (half the rate)"
WALKERS = {"diffGrad": (1.0, None), "Adam": (1.0, 1.0), HALF: (0.5, 1.0)}


@dataclass(frozen=True)
class Walk:
    """Positions from x = -1, and the mean friction."""

    x: list[float]
    friction: float


def walks_of(lr: float, steps: int) -> dict[str, dict[str, Walk]]:
    """Each function's walks by optimizer, with the notebooks' betas (.95, .999)."""
    return {
        name: {who: _walk(function.slope, who, lr, steps) for who in WALKERS}
        for name, function in FUNCTIONS.items()
    }


def _walk(slope: Callable[[float], float], who: str, lr: float, steps: int) -> Walk:
    share, fixed = WALKERS[who]
    w = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
    optimizer = DiffGrad([w], share * lr, (0.95, 0.999), fixed_friction=fixed, track_friction=True)
    xs, xis = [-1.0], []
    for _ in range(steps):
        w.grad = torch.tensor(slope(xs[-1]), dtype=torch.float64)
        optimizer.step()
        xs.append(w.item())
        xis.append(optimizer.friction_summary().mean)
    return Walk(xs, statistics.mean(xis))
