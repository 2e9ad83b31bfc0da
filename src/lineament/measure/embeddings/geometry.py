"""How do embeddings lie on the sphere? Alignment, uniformity, effective rank and hubs, and how far two kinds of negatives are from each other.

Alignment and uniformity: Wang and Isola, ICML 2020, arXiv 2005.10242. Hubs: Radovanović, Nanopoulos, Ivanović, JMLR 2010. UNPG (arXiv 2203.11593) asks whether the negatives that a loss sees
(of class centres, of a batch) are those of all pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core.checks import number, require, show
from lineament.core.pairs import TILE, KernelMean, Neighbours, tiles
from lineament.core.results import Readable
from lineament.core.statistics.effective_rank import effective_rank
from lineament.measure.embeddings.pairs import _checked


@dataclass(frozen=True)
class Geometry(Readable):
    """How unit rows lie.

    ``alignment``: mean squared distance of pairs of one label. ``uniformity``: ln of the mean of exp(-2 d²) over all pairs; lower is more even. ``effective_rank``: directions that they span.
    ``hub``: on how many samples' lists of the ``neighbours`` nearest the most listed sample is; ``lonely``: samples on no list; ``skewness``: of those counts, 0 where all are on as many.
    """

    alignment: float
    uniformity: float
    effective_rank: float
    hub: int
    lonely: int
    skewness: float
    neighbours: int


@torch.no_grad()
def geometry(embeddings: Tensor, labels: Tensor, *, neighbours: int = 10) -> Geometry:
    """Alignment, uniformity, effective rank and hubness of embeddings [n, d] with labels [n], over all pairs in tiles.

    Raises:
        InputError: as :func:`~lineament.measure.recognition`.

    >>> found = geometry(torch.eye(3).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1, 2, 2]), neighbours=1)
    >>> found.alignment, round(found.uniformity, 3), found.hub
    (0.0, -1.539, 1)
    """
    unit, labels = _checked(embeddings, labels)
    number("neighbours", neighbours, low=1, integer=True)
    k = min(neighbours, len(unit) - 1)
    near, kernel, distance, like = Neighbours(len(unit), k, unit), KernelMean(2.0), 0.0, 0
    for tile in tiles(unit):
        near.add(tile)
        kernel.add(tile.values)
        same = labels[tile.start : tile.start + TILE, None] == labels[tile.other : tile.other + TILE]
        if tile.start == tile.other:
            same = same.triu(1)
        distance += float((2 - 2 * tile.scores[same]).sum(dtype=torch.float64))
        like += int(same.sum())
    listed = torch.bincount(near.indices.flatten(), minlength=len(unit)).double()
    spread = listed.std(correction=0)
    skewness = float(((listed - listed.mean()) ** 3).mean() / spread**3) if spread > 0 else 0.0
    return Geometry(
        distance / like, math.log(kernel.mean), effective_rank(unit), int(listed.max()), int((listed == 0).sum()),
        skewness, k,
    )  # fmt: skip


@dataclass(frozen=True)
class Shift(Readable):
    """How far two sets of scores are apart: ``ks``, the largest difference of their distribution functions, and ``wasserstein``, the mean distance between equal quantiles."""

    ks: float
    wasserstein: float


def score_shift(first: Tensor, second: Tensor) -> Shift:
    """Kolmogorov-Smirnov and Wasserstein distance between two sets of scores, as of the negatives of classes, of a batch and of all pairs; of any number each.

    >>> score_shift(torch.tensor([0.0, 1.0]), torch.tensor([0.5, 1.5]))
    Shift
      ks           0.5
      wasserstein  0.5
    """
    for name, scores in (("first", first), ("second", second)):
        fitting = isinstance(scores, Tensor) and scores.numel() > 0 and scores.is_floating_point()
        require(fitting and bool(scores.isfinite().all()), f"{name}: got {show(scores)}, expected some finite scores")  # fmt: skip
    a, b = (scores.detach().double().flatten().sort().values for scores in (first, second))
    every = torch.cat([a, b]).sort().values
    gap = (torch.searchsorted(a, every, right=True) / len(a) - torch.searchsorted(b, every, right=True) / len(b)).abs()  # fmt: skip
    return Shift(float(gap.max()), float((gap[:-1] * every.diff()).sum()))
