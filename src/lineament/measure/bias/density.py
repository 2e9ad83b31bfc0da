"""Over how many units is a feature spread? Density and participation of the units' variance explained.

Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847) find hard features represented more sparsely.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks


def density(units: Float[Tensor, " units"], threshold: float = 0.1) -> float:
    """The share of units whose R² is above a threshold.

    >>> density(torch.tensor([0.5, 0.05, 0.0, 0.2]))
    0.5
    """
    checks.tensor("units", units, shape=("units",), floating=True)
    return float((units > threshold).double().mean())


def participation(units: Float[Tensor, " units"]) -> float:
    """(Σu)² / (d Σu²) with u = max(R², 0): 1 where all units explain alike, 1/d where one does; 0 where none does.

    >>> participation(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    0.5
    """
    u = checks.tensor("units", units, shape=("units",), floating=True).double().clamp_min(0)
    squares = float(u.square().sum())
    return float(u.sum()) ** 2 / (len(u) * squares) if squares > 0 else 0.0


def cumulative(units: Float[Tensor, " units"]) -> Float[Tensor, " units"]:
    """The share of the summed R² that the 1, 2, ... strongest units hold.

    >>> cumulative(torch.tensor([1.0, 3.0])).tolist()
    [0.75, 1.0]
    """
    u = checks.tensor("units", units, shape=("units",), floating=True).double().clamp_min(0)
    u = u.sort(descending=True).values
    return u.cumsum(0) / u.sum().clamp_min(torch.finfo(torch.float64).tiny)
