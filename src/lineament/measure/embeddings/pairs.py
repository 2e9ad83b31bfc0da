"""How well are people recognised who were never seen in training? Every pair of embeddings, without the matrix of all pairs.

Each pair is multiplied once, in blocks: genuine pairs (few) are kept, of impostors only the largest scores that a false-accept rate needs. Neighbours are found in
the same way. The borda count ranks methods over several numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, show
from lineament.core.pairs import TILE, Largest, Neighbours, chosen, tiles
from lineament.core.results import Readable, plain

# Similarities that lie in memory at once.
_ENTRIES = 1 << 22
# Up to so many neighbours are kept while tiles go by; of more, whole rows are multiplied again.
_DEEP = 64
# So many rows' pairs say where the largest of all impostors begin.
_PILOT = 512


@dataclass(frozen=True)
class Recognition(Readable):
    """What an embedding is worth on people it was not trained on.

    Attributes:
        tar: true-accept rates at the false-accept rates ``fars``, which are never exceeded. thresholds: scores strictly above accept.
        none_allowed: rates below one impostor pair, at which no false accept is allowed: their TAR speaks of the largest impostor alone.
        recall: R@1, the share of samples whose nearest neighbour is of their label. precision: mAP@R, over as many neighbours as there are others of the label.
        gap: the smallest genuine score less the largest impostor's.
        genuine, impostors: pairs of each kind. people: labels; those with one sample have no genuine pair.
    """

    fars: tuple[float, ...]
    tar: tuple[float, ...]
    thresholds: tuple[float, ...]
    none_allowed: tuple[float, ...]
    recall: float
    precision: float
    gap: float
    genuine: int
    impostors: int
    people: int

    def to_dict(self) -> dict[str, Any]:
        return plain(self)


@dataclass(frozen=True)
class PairRates(Readable):
    """Verification over all pairs of samples; the attributes are those of :class:`Recognition`."""

    fars: tuple[float, ...]
    tar: tuple[float, ...]
    thresholds: tuple[float, ...]
    none_allowed: tuple[float, ...]
    gap: float
    genuine: int
    impostors: int


@torch.no_grad()
def pair_rates(embeddings: Tensor, labels: Tensor, fars: Sequence[float] = (1e-2, 1e-3)) -> PairRates:
    """Exact true-accept rates at false-accept rates over all pairs of samples, by cosine: what :func:`recognition` says of verification, in a fraction of its time.

    Args:
        embeddings: [n, d], of any length but zero. labels: [n], whole numbers.

    Raises:
        InputError: as :func:`recognition`.

    >>> pair_rates(torch.eye(3).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1, 2, 2]), fars=[0.1]).tar
    (1.0,)
    """
    return _rates(*_ordered(embeddings, labels), fars)


@torch.no_grad()
def recognition(embeddings: Tensor, labels: Tensor, fars: Sequence[float] = (1e-2, 1e-3)) -> Recognition:
    """Verification and retrieval over all pairs of samples, by cosine.

    Args:
        embeddings: [n, d], of any length but zero. labels: [n], whole numbers.

    Raises:
        InputError: other shapes, a zero row, fewer than two labels, no label with two samples.

    >>> found = recognition(torch.eye(3).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1, 2, 2]), fars=[0.1])
    >>> found.tar, found.recall, found.gap
    ((1.0,), 1.0, 1.0)
    """
    unit, labels, counts = _ordered(embeddings, labels)
    n, depth = len(unit), int(counts.max()) - 1
    near = Neighbours(n, depth, unit) if depth <= _DEEP else None
    rates = _rates(unit, labels, counts, fars, near)
    hits, precision = 0, 0.0
    for start in range(0, n, size := max(1, _ENTRIES // n)):
        rows = slice(start, min(start + size, n))
        if near is not None:
            found = near.indices[rows]
        else:
            scores = unit[rows] @ unit.T
            own = torch.arange(rows.stop - start)
            scores[own, start + own] = -torch.inf
            found = scores.topk(depth, 1).indices
        right = labels[found] == labels[rows, None]
        hits += int(right[:, 0].sum())
        same = counts[labels[rows]] - 1
        rank = torch.arange(1, depth + 1, device=right.device)
        right = right & (rank <= same[:, None])
        each = (right * (right.cumsum(1) / rank)).sum(1) / same.clamp(min=1)
        precision += float(each[same > 0].sum())
    lone = int((counts == 1).sum())
    return Recognition(
        rates.fars, rates.tar, rates.thresholds, rates.none_allowed, hits / n, precision / (n - lone), rates.gap, rates.genuine,
        rates.impostors, len(counts),
    )  # fmt: skip


def _rates(
    unit: Tensor,
    labels: Tensor,
    counts: Tensor,
    fars: Sequence[float],
    near: Neighbours | None = None,
) -> PairRates:
    """One pass over all pairs of rows in the order of their labels, which also fills ``near``."""
    require(len(fars) > 0, "fars: got none, expected one false-accept rate or more")
    pairs = len(unit) * (len(unit) - 1) // 2
    genuine = int((counts * (counts - 1) // 2).sum())
    impostors = pairs - genuine
    allowed = [int(number("fars", far, low=0, high=1) * impostors * (1 + 1e-12)) for far in fars]
    keep = min(max(allowed) + 1, impostors)
    like, tops = _scored(unit, labels, Largest(keep, _floor(unit, labels, keep / impostors)), near)
    if tops.held < keep:  # the rows that the floor was guessed from were unlike the others
        like, tops = _scored(unit, labels, Largest(keep))
    largest, *limits = tops.at([0, *(min(k, keep - 1) for k in allowed)])
    limits = [limit if k < impostors else -torch.inf for limit, k in zip(limits, allowed)]
    return PairRates(
        fars=tuple(float(f) for f in fars),
        tar=tuple(float((like > limit).double().mean()) for limit in limits),
        thresholds=tuple(limits),
        none_allowed=tuple(float(f) for f, k in zip(fars, allowed) if k == 0),
        gap=float(like.min()) - largest,
        genuine=genuine,
        impostors=impostors,
    )


def _scored(
    unit: Tensor, labels: Tensor, tops: Largest, near: Neighbours | None = None
) -> tuple[Tensor, Largest]:
    """The scores of all genuine pairs, and the largest of the impostors."""
    like, below = [], torch.ones(TILE, TILE, dtype=torch.bool, device=unit.device).tril()
    labels = labels.int()
    firsts, lasts = labels[::TILE].tolist(), [*labels[TILE - 1 :: TILE].tolist(), int(labels[-1])]
    for tile in tiles(unit):
        if near is not None:
            near.add(tile)
        scores, last, first = tile.scores, lasts[tile.start // TILE], firsts[tile.other // TILE]
        if tile.start < tile.other and last < first:  # of two labels all
            tops.add(scores)
            continue
        own, other = (labels[at : at + TILE] for at in (tile.start, tile.other))
        if tile.start == tile.other:
            lower = below[: len(own), : len(own)]
            same = (own[:, None] == other).logical_and_(~lower)
            like.append(chosen(scores, same))
            scores.masked_fill_(same.logical_or_(lower), -torch.inf)
        else:  # the one label that both have lies at the end of the one and at the beginning of the other
            corner = scores[int((own < last).sum()) :, : int((other == first).sum())]
            like.append(corner.clone().flatten())
            corner.fill_(-torch.inf)
        tops.add(scores)
    return torch.cat(like), tops


def _floor(unit: Tensor, labels: Tensor, share: float) -> float:
    """A score that more than a share of the impostors' pass, as the pairs of some evenly spaced rows let expect."""
    if len(unit) < 8 * _PILOT:
        return -torch.inf
    some = torch.arange(_PILOT, device=unit.device) * len(unit) // _PILOT
    unlike = (labels[some, None] != labels[some]).triu_(1)
    scores = (unit[some] @ unit[some].T)[unlike]
    expected = share * len(scores)
    rank = int(1.2 * expected + 4 * expected**0.5 + 16)
    return -torch.inf if rank >= len(scores) else float(scores.kthvalue(len(scores) - rank).values)


def borda_count(table: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Points of each method, the best first: on every column a method gets as many points as it beats others, half for a tie.

    >>> borda_count({"a": (0.9, 0.5), "b": (0.8, 0.5), "c": (0.7, 0.6)})
    {'a': 2.5, 'c': 2.0, 'b': 1.5}
    """
    lengths = {name: len(values) for name, values in table.items()}
    require(len(set(lengths.values())) < 2, f"table: got rows of {lengths} numbers, expected as many of each")
    points = {
        name: sum(
            float(value > other[k]) + 0.5 * float(value == other[k])
            for k, value in enumerate(values)
            for rival, other in table.items()
            if rival != name
        )
        for name, values in table.items()
    }
    return dict(sorted(points.items(), key=lambda item: -item[1]))


def _ordered(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows in the order of their labels, these from 0 on, and how many there are of each."""
    unit, labels = _checked(embeddings, labels)
    order = labels.argsort(stable=True)
    return unit[order], labels[order], torch.bincount(labels)


def _checked(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    embeddings, labels = (
        torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in (embeddings, labels)
    )
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise InputError(f"embeddings: got {show(embeddings)}, expected floats [samples, dimension]")
    whole = isinstance(labels, Tensor) and not labels.is_floating_point()
    require(
        whole and labels.shape == embeddings.shape[:1],
        f"labels: got {show(labels)} beside {show(embeddings)}, expected one whole number a row",
    )
    norms = embeddings.norm(dim=1)
    require(
        bool((norms.isfinite() & (norms > 0)).all()),
        "embeddings: a row is zero or NaN, or infinite, so that its cosine is not defined",
    )
    classes = labels.unique(return_inverse=True)[1]
    counts = torch.bincount(classes)
    require(len(counts) > 1, "labels: all alike, expected two people or more")
    require(bool((counts > 1).any()), "labels: no label has two samples, so that there is no genuine pair")
    wide = embeddings.float() if embeddings.dtype in (torch.float16, torch.bfloat16) else embeddings
    return F.normalize(wide, dim=1), classes
