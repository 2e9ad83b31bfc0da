"""How much of a feature is left in a random part of the units?

Fel et al. (NeurIPS 2024, arXiv 2407.06076, section 5), after Nanda et al.'s diffused redundancy (2023, arXiv 2306.00183): the mean over random masks m
of CKA(a ∘ m, z) / CKA(a, z). Masking takes a part of the moments, so that any number of masks costs no pass over the data:
with S = Cov(a), s = Cov(a, z) and the masks as rows of M, CKA is (M s²) / √diag(M S² Mᵀ) over Var z, squares elementwise.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable
from lineament.measure.complexity.features import Features, Reading, site_of
from lineament.measure.complexity.readouts import ReadoutMoments


@dataclass(frozen=True)
class Redundancy(Readable):
    """Redundancy of features in the units of a site.

    Attributes:
        site: where; keep: the share of units that a mask keeps, one or several.
        values: the mean over masks, by share and feature; errors: its standard error over the masks.
        masks: how many were drawn for each share; empty: how many of them left nothing (not counted).
        samples: how many rows the moments come from.
    """

    site: str
    keep: tuple[float, ...]
    values: Float[Tensor, "shares features"]
    errors: Float[Tensor, "shares features"]
    masks: int
    empty: int
    samples: int

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists."""
        return {name: results.plain(value) for name, value in vars(self).items()}

    def plot(self, ax: Any = None) -> Any:
        """The mean over features, and its middle half, against the share kept."""
        ax = results.axes(ax)
        low, middle, high = (self.values.cpu().nanquantile(q, dim=1) for q in (0.25, 0.5, 0.75))
        ax.plot(self.keep, middle, "o-")
        ax.fill_between(self.keep, low, high, alpha=0.25)
        ax.set(xlabel="share of units kept", ylabel="CKA with the feature, relative to all units")
        return ax


def masked_ratios(
    covariance: Float[Tensor, "width width"],
    cross: Float[Tensor, "width features"],
    masks: Float[Tensor, "masks width"],
) -> Float[Tensor, "masks features"]:
    """CKA of the masked units with each feature, relative to that of all units; NaN for a mask that leaves nothing.

    >>> masks = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    >>> masked_ratios(torch.eye(2), torch.tensor([[1.0], [0.0]]), masks).flatten().round(decimals=4).tolist()
    [1.0, 1.4142]
    """
    checks.tensor("masks", masks, shape=("masks", len(covariance)))
    s, c = covariance.double(), cross.double()
    weights = masks.to(s).square()
    size = ((weights @ s.square()) * weights).sum(1).clamp(min=0).sqrt()
    whole = torch.linalg.matrix_norm(s)
    shared, all_shared = weights @ c.square(), c.square().sum(0)
    ratio = (shared / all_shared) * (whole / size)[:, None]
    return ratio.masked_fill((size == 0)[:, None] | (all_shared == 0), torch.nan)


def redundancy_from_moments(
    covariance: Float[Tensor, "width width"],
    cross: Float[Tensor, "width features"],
    masks: Float[Tensor, "masks width"],
) -> Float[Tensor, " features"]:
    """The mean of :func:`masked_ratios` over the masks that leave something (a warning counts the others).

    >>> redundancy_from_moments(torch.eye(2), torch.tensor([[1.0], [0.0]]), torch.tensor([[1.0, 1.0], [0.0, 1.0]])).round(decimals=12).tolist()
    [0.5]
    """
    ratios = masked_ratios(covariance, cross, masks)
    _tell(int(ratios.isnan().all(1).sum()), len(ratios))
    return ratios.nanmean(0)


def _tell(empty: int, count: int) -> None:
    if empty:
        warnings.warn(
            f"{empty} of {count} masks leave no unit that varies: they are not counted",
            RuntimeWarning,
            stacklevel=3,
        )


def redundancy(
    model: nn.Module,
    data: Any,
    features: Features,
    *,
    site: str | None = None,
    keep: float | Sequence[float] = 0.5,
    masks: int = 32,
    pool: int | str = 1,
    rows: str | None = None,
    seed: int = 0,
) -> Redundancy:
    """How much of each feature's CKA with a site is left when each unit is kept with a probability.

    Args:
        model, data, features, pool, rows: as for :func:`~lineament.measure.complexity.layers.complexity`.
        site: whose units; by default that of the features.
        keep: the probability, or several. masks: drawn for each.
        seed: of the masks.

    Raises:
        InputError: a probability that is not above 0, features without a site where none is given.

    >>> x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> round(redundancy(net, (x, torch.zeros(64)), "1", keep=1.0).values.mean().item(), 6)
    1.0
    """
    shares = [keep] if isinstance(keep, (int, float)) else checks.listed("keep", keep, "probabilities")
    for share in shares:
        checks.number("keep", share, low=0, high=1, open_low=True)
    checks.number("masks", masks, low=1, integer=True)
    place = site or site_of(model, features)
    require(
        place is not None, "site: the features have none of their own; name the site whose units are masked"
    )
    reading = Reading(model, data, features, sites=str(place), pool=pool, rows=rows, seed=seed)
    require(len(reading.sites) == 1, f"site: {site!r} names {len(reading.sites)} sites, expected one")
    name = reading.sites[0]
    moments = ReadoutMoments()
    for look in reading.walk("all", "redundancy"):
        moments.update(look.activations, look.z)
    covariance, cross = moments.activations[name].covariance, moments.cross_covariance()[name]
    cross = cross.masked_fill(moments.constant, 0.0)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    values, errors, empty = [], [], 0
    for share in shares:
        drawn = torch.rand(masks, len(covariance), generator=generator) < share
        ratios = masked_ratios(covariance, cross, drawn.to(covariance))
        blank = ~drawn.any(1)
        empty += int(blank.sum())
        counted = (~ratios.isnan()).sum(0).clamp(min=1)
        mean = ratios.nanmean(0)
        spread = (ratios - mean).square().nansum(0) / (counted - 1).clamp(min=1)
        values.append(mean)
        errors.append((spread / counted).sqrt())
    _tell(empty, masks * len(shares))
    return Redundancy(
        name, tuple(map(float, shares)), torch.stack(values), torch.stack(errors), masks, empty, moments.count
    )
