"""Is the right one among the first found? Recall at k and reciprocal rank over all samples, and people sought among distractors.

The rank of a sample's best mate is one more than the number of other people's samples that are nearer: counted in tiles, never sorted. MegaFace's protocol hides one mate of a probe
among a million of strangers (Kemelmacher-Shlizerman et al. 2016).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, show
from lineament.core.pairs import TILE, Largest, tiles
from lineament.core.results import Readable
from lineament.measure.embeddings.pairs import _checked


@dataclass(frozen=True)
class Retrieval(Readable):
    """Over the samples with a mate: ``recall`` at each of ``ks``, the share whose nearest mate is among the k nearest others, and the mean reciprocal rank of it."""

    ks: tuple[int, ...]
    recall: tuple[float, ...]
    mrr: float
    samples: int


@torch.no_grad()
def retrieval(embeddings: Tensor, labels: Tensor, ks: Sequence[int] = (1, 5, 10)) -> Retrieval:
    """R@k and MRR of every sample among all others, by cosine; mAP@R is in :func:`~lineament.measure.recognition`.

    Args:
        embeddings: [n, d], of any length but zero. labels: [n], whole numbers. A sample that is exactly as near as the mate does not count as nearer.

    Raises:
        InputError: as :func:`~lineament.measure.recognition`; k below 1.

    >>> found = retrieval(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.8, 0.3]]), torch.tensor([0, 1, 0]), ks=[1, 2])
    >>> found.recall, found.mrr
    ((0.0, 1.0), 0.5)
    """
    unit, labels = _checked(embeddings, labels)
    for k in ks:
        number("ks", k, low=1, integer=True)
    order = labels.argsort(stable=True)
    unit, labels = unit[order], labels[order]
    counts = torch.bincount(labels)
    best = torch.full((len(unit),), -torch.inf, dtype=unit.dtype, device=unit.device)
    starts = counts.cumsum(0) - counts
    for first, count in zip(starts.tolist(), counts.tolist()):
        own = unit[first : first + count]
        for at in range(0, count, 4 * TILE):
            part = own[at : at + 4 * TILE] @ own.T
            rows = torch.arange(len(part), device=unit.device)
            part[rows, at + rows] = -torch.inf
            best[first + at : first + at + len(part)] = part.amax(1)
    nearer = torch.zeros(len(unit), dtype=torch.int64, device=unit.device)
    for tile in tiles(unit):
        rows, others = (slice(at, at + TILE) for at in (tile.start, tile.other))
        unlike = labels[rows, None] != labels[others]
        nearer[rows] += ((tile.scores > best[rows, None]) & unlike).sum(1)
        if tile.start < tile.other:
            nearer[others] += ((tile.scores > best[others]) & unlike).sum(0)
    rank = 1 + nearer[counts[labels] > 1].double()
    return Retrieval(
        tuple(ks), tuple(float((rank <= k).double().mean()) for k in ks), float(rank.reciprocal().mean()), len(rank)
    )  # fmt: skip


@dataclass(frozen=True)
class Identification(Readable):
    """Of ``pairs`` of a probe and its mate, the share whose mate beats all ``distractors`` (``rank1``), and the share accepted where a share ``fars`` of all pairs of probe and distractor is.

    ``none_allowed``: rates below one such pair, at which no false accept is allowed.
    """

    rank1: float
    fars: tuple[float, ...]
    tar: tuple[float, ...]
    pairs: int
    distractors: int
    none_allowed: tuple[float, ...]


@torch.no_grad()
def identification(
    probes: Tensor, labels: Tensor, distractors: Tensor, fars: Sequence[float] = (1e-6,)
) -> Identification:
    """People among distractors: of each probe every other probe of its label is its mate once, alone among all distractors.

    Args:
        probes: [n, d]. labels: [n]. distractors: [m, d], none of whom is a probe.
        fars: false-accept rates, never exceeded; one below 1 / (n m) allows none.

    Raises:
        InputError: other shapes, no label with two probes.

    >>> found = identification(torch.eye(2).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0, 1.0]]))
    >>> found.rank1, found.pairs
    (1.0, 4)
    """
    unit, people = _checked(probes, labels)
    if not isinstance(distractors, Tensor) or distractors.ndim != 2 or distractors.shape[1] != unit.shape[1]:
        raise InputError(
            f"distractors: got {show(distractors)}, expected floats [any, {unit.shape[1]}] as the probes"
        )
    require(
        len(distractors) > 0 and bool((distractors.norm(dim=1) > 0).all()),
        "distractors: none, or a row is zero or NaN",
    )
    others = F.normalize(distractors.to(unit.dtype), dim=1)
    pairs = len(unit) * len(others)
    allowed = [int(number("fars", far, low=0, high=1) * pairs * (1 + 1e-12)) for far in fars]
    tops = Largest(min(max(allowed) + 1, pairs))
    hardest = torch.full((len(unit),), -torch.inf, dtype=unit.dtype, device=unit.device)
    for rows in torch.arange(len(unit), device=unit.device).split(TILE):
        for part in others.split(8 * TILE):
            scores = unit[rows] @ part.T
            hardest[rows] = torch.maximum(hardest[rows], scores.amax(1))
            tops.add(scores)
    mates, right = [], 0
    for person in range(int(people.max()) + 1):
        own = (people == person).nonzero()[:, 0]
        scores = unit[own] @ unit[own].T
        kept = ~torch.eye(len(own), dtype=torch.bool, device=unit.device)
        right += int(((scores > hardest[own, None]) & kept).sum())
        mates.append(scores[kept])
    genuine, largest = torch.cat(mates), tops.sorted()
    limits = [float(largest[k]) if k < pairs else -torch.inf for k in allowed]
    return Identification(
        right / len(genuine), tuple(map(float, fars)), tuple(float((genuine > limit).double().mean()) for limit in limits),
        len(genuine), len(others), tuple(float(far) for far, k in zip(fars, allowed) if k == 0),
    )  # fmt: skip
