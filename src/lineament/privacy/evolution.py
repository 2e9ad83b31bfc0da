"""A search without derivatives: the covariance matrix adaptation evolution strategy (CMA-ES), by the package ``cma``.

Li et al., "Auditing privacy defenses in federated learning via generative gradient leakage" (GGL), CVPR 2022, arXiv 2203.15696, looks for a generator's code so:
a defence may break the slopes of the matching cost, and its values still tell guesses apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, require


def evolve(
    objective: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    rounds: int,
    seed: int = 0,
    deviation: float = 1.0,
) -> tuple[Tensor, list[float]]:
    """The best point that was found, and the lowest objective of each round.

    Args:
        objective: of points [population, d], a number each; points where it is not finite count as the worst.
        start: the mean of the first round [d]. deviation: of its points.

    Raises:
        InputError: the package ``cma`` is missing; nothing finite was found.

    >>> evolve.__name__  # evolve(lambda z: (z - 1).square().sum(1), torch.zeros(2), rounds=40)
    'evolve'
    """
    number("rounds", rounds, low=1, integer=True)
    try:
        import cma  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "attack: 'ggl' needs the package cma, which is not installed; pip install 'lineament[privacy]'"
        ) from None
    # A seed of 0 stands for the clock there.
    options: Any = {"seed": seed + 1, "verbose": -9, "popsize": population(len(start)), "CMA_diagonal": len(start) > 1000}  # fmt: skip
    strategy: Any = cma.CMAEvolutionStrategy(start.double().cpu().numpy(), deviation, options)
    best, lowest, trace = start, math.inf, []
    for _ in range(rounds):
        asked = strategy.ask()
        points = torch.stack([torch.as_tensor(point) for point in asked]).to(start)
        with torch.no_grad():
            told = objective(points).double().nan_to_num(nan=torch.inf)
        if bool(told.isfinite().any()):
            worst = told[told.isfinite()].max()
            told = torch.where(told.isfinite(), told, worst)
            place = int(told.argmin())
            if float(told[place]) < lowest:
                best, lowest = points[place], float(told[place])
            strategy.tell(asked, told.tolist())
        trace.append(lowest)
    require(math.isfinite(lowest), "attack: no code had a finite objective; is the message finite?")
    return best, trace


def population(size: int) -> int:
    """Points of a round in ``size`` dimensions, 4 + 3 ln(size).

    >>> population(16)
    12
    """
    return 4 + int(3 * math.log(max(size, 1)))
