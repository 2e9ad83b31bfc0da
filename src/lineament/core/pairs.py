"""All pairs of n rows without the matrix of all pairs: square tiles of products, each pair multiplied once, given to accumulators that can be merged.

A tile is read while it lies in the cache, and the next one takes its place. Rows that are sorted by their label have few tiles with pairs of one label: the others are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Rows of a tile: 512 x 512 float32 are a megabyte.
TILE = 512


@dataclass(frozen=True)
class Tile:
    """Products of rows ``start`` on and of rows ``other`` on, start <= other; where both are the same, pairs lie above the diagonal."""

    scores: Tensor
    start: int
    other: int

    @property
    def values(self) -> Tensor:
        """The products of this tile's pairs, each once, flat."""
        if self.start < self.other:
            return self.scores.flatten()
        return self.scores[torch.ones_like(self.scores, dtype=torch.bool).triu(1)]


def tiles(x: Tensor, size: int | None = None) -> Iterator[Tile]:
    """The tiles of x xᵀ on and above the diagonal; a tile may be written to, and its scores are there until the next one comes.

    >>> sum(len(tile.values) for tile in tiles(torch.randn(7, 3), 3))
    21
    """
    size, x = TILE if size is None else size, x.detach()
    room = x.new_empty(min(size, len(x)) ** 2)
    for start in range(0, len(x), size):
        rows = x[start : start + size]
        for other in range(start, len(x), size):
            columns = x[other : other + size]
            scores = room[: len(rows) * len(columns)].view(len(rows), len(columns))
            yield Tile(torch.mm(rows, columns.T, out=scores), start, other)


class Largest:
    """The largest of numbers that come in parts, ``count`` of them.

    Args:
        floor: only numbers above it are looked at. Where there turn out to be fewer than ``count``, ``held`` says so, and the floor was too high.

    >>> top = Largest(2)
    >>> top.add(torch.tensor([1.0, 5.0])); top.add(torch.tensor([3.0])); top.sorted().tolist()
    [5.0, 3.0]
    """

    def __init__(self, count: int, floor: float = -torch.inf):
        self.count, self.parts, self.held, self.floor = count, [], 0, floor

    def add(self, values: Tensor) -> None:
        """Numbers of any shape; -inf is none."""
        found = _above(values.flatten(), self.floor)
        self.parts.append(found)
        self.held += len(found)
        if self.held > 2 * self.count + 4096:
            kept = _top(torch.cat(self.parts), self.count)
            self.parts, self.held, self.floor = [kept], len(kept), float(kept.min())

    def __add__(self, other: Largest) -> Largest:
        found = Largest(self.count, max(self.floor, other.floor))
        for part in (*self.parts, *other.parts):
            found.add(part)
        return found

    def sorted(self) -> Tensor:
        """The largest numbers, falling."""
        found = torch.cat(self.parts) if self.parts else torch.empty(0)
        return _top(found, self.count).sort(descending=True).values

    def at(self, places: Sequence[int]) -> list[float]:
        """The numbers at places counted from 0, the largest, each below ``count``; without sorting all."""
        found = torch.cat(self.parts)
        if not _on_cpu(found):
            return found.sort(descending=True).values[torch.tensor(places, device=found.device)].tolist()
        ranks = [len(found) - 1 - place for place in places]
        return np.partition(found.numpy(), ranks)[ranks].tolist()


def _above(values: Tensor, floor: float) -> Tensor:
    """The numbers [n] above a floor. Of few, eight are asked about at once: a comparison's eight bytes are one word."""
    if not _on_cpu(values):
        return values[values > floor]
    numbers = values.numpy()
    whole = numbers[: len(numbers) // 8 * 8]
    eights = np.flatnonzero((whole > floor).view(np.uint64) != 0)
    near = np.concatenate([whole.reshape(-1, 8).take(eights, 0).ravel(), numbers[len(whole) :]])
    return torch.from_numpy(near[np.flatnonzero(near > floor)])


def chosen(values: Tensor, mask: Tensor) -> Tensor:
    """``values[mask]``; NumPy takes a sixth of the time.

    >>> chosen(torch.tensor([1.0, 2.0]), torch.tensor([False, True])).tolist()
    [2.0]
    """
    return torch.from_numpy(values.numpy()[mask.numpy()]) if _on_cpu(values) else values[mask]


def _on_cpu(values: Tensor) -> bool:
    """Whether NumPy reads these numbers where they lie."""
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


def _top(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest, in any order; NumPy's partition takes a fraction of topk's time where they are many."""
    if len(values) <= count:
        return values
    if not _on_cpu(values):
        return values.topk(count).values
    return torch.from_numpy(np.partition(values.numpy(), len(values) - count)[len(values) - count :])


class Neighbours:
    """The ``count`` rows with the largest products of each of ``rows`` rows, but for itself; ``scores`` and ``indices`` [rows, count], falling.

    >>> near = Neighbours(3, 1)
    >>> for tile in tiles(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])):
    ...     near.add(tile)
    >>> near.indices.flatten().tolist()
    [1, 0, 1]
    """

    def __init__(self, rows: int, count: int, like: Tensor | None = None):
        like = torch.empty(0) if like is None else like
        self.scores = like.new_full((rows, count), -torch.inf)
        self.indices = torch.zeros(rows, count, dtype=torch.int64, device=like.device)

    def add(self, tile: Tile) -> None:
        scores = tile.scores
        if tile.start == tile.other:
            self._merge(scores.clone().fill_diagonal_(-torch.inf), tile.start, tile.other)
            return
        self._merge(scores, tile.start, tile.other)
        self._merge(scores, tile.other, tile.start, columns=True)

    def _merge(self, scores: Tensor, rows: int, others: int, *, columns: bool = False) -> None:
        """Take what a tile says of its rows, or of its columns, whose floors it is compared with as it lies."""
        count = scores.shape[columns]
        own = slice(rows, rows + count)
        floor = self.scores[own, -1]
        if bool(floor.isneginf().any()):  # nothing to be above yet
            turned = scores.T.contiguous() if columns else scores
            best, at = _best(turned, min(self.scores.shape[1], turned.shape[1]))
            self._keep(torch.arange(rows, rows + count, device=at.device), best, at + others)
            return
        i, j = _where_above(scores, floor[None] if columns else floor[:, None])
        if not len(i):
            return
        if columns:
            order = j.argsort(stable=True)
            i, j = i[order], j[order]
        owner, mate = (j, i) if columns else (i, j)
        few, counts = owner.unique_consecutive(return_counts=True)
        row = torch.arange(len(few), device=few.device).repeat_interleave(counts)
        place = torch.arange(len(owner), device=few.device) - (counts.cumsum(0) - counts)[row]
        best = scores.new_full((len(few), int(counts.max())), -torch.inf)
        at = torch.zeros(best.shape, dtype=torch.int64, device=best.device)
        best[row, place], at[row, place] = scores[i, j], mate + others
        self._keep(few + rows, best, at)

    def _keep(self, rows: Tensor, scores: Tensor, indices: Tensor) -> None:
        both = torch.cat([self.scores[rows], scores], 1)
        self.scores[rows], at = both.topk(self.scores.shape[1], 1)
        self.indices[rows] = torch.cat([self.indices[rows], indices], 1).gather(1, at)

    def __add__(self, other: Neighbours) -> Neighbours:
        rows, count = self.scores.shape
        found = Neighbours(rows, count, self.scores)
        for each in (self, other):
            found._keep(torch.arange(rows, device=each.scores.device), each.scores, each.indices)
        return found


def _best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row, in any order, and where they are."""
    if not _on_cpu(scores) or count == scores.shape[1]:
        best, at = scores.topk(count, 1)
        return best, at
    place = np.argpartition(scores.numpy(), scores.shape[1] - count, axis=1)[:, -count:]
    at = torch.from_numpy(np.ascontiguousarray(place))
    return scores.gather(1, at), at


def _where_above(scores: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``scores`` [n, m] pass ``floor`` ([n, 1] or [1, m]), row after row; few do."""
    if not _on_cpu(scores) or scores.shape[1] % 8:
        i, j = (scores > floor).nonzero(as_tuple=True)
        return i, j
    above = scores.numpy() > floor.numpy()
    eights = np.flatnonzero(above.view(np.uint64) != 0)
    which, byte = np.nonzero(above.reshape(-1, 8).take(eights, 0))
    i, j = (torch.from_numpy(v) for v in np.divmod(eights[which] * 8 + byte, scores.shape[1]))
    return i, j


class Histogram:
    """Counts of numbers in ``bins`` equal bins from ``low`` to ``high``; what lies outside goes to the first and the last.

    >>> seen = Histogram(2)
    >>> seen.add(torch.tensor([-0.5, 0.2, 0.3])); seen.counts.tolist()
    [1, 2]
    """

    def __init__(self, bins: int = 200, low: float = -1.0, high: float = 1.0):
        self.bins, self.low, self.high = bins, low, high
        self.counts = torch.zeros(bins, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        at = ((values.flatten() - self.low) * (self.bins / (self.high - self.low))).long().clamp_(0, self.bins - 1)  # fmt: skip
        self.counts += torch.bincount(at, minlength=self.bins).cpu()

    def __add__(self, other: Histogram) -> Histogram:
        found = Histogram(self.bins, self.low, self.high)
        found.counts = self.counts + other.counts
        return found


class KernelMean:
    """The mean of exp(-t |a - b|²) over pairs of unit rows a, b, from their products.

    >>> kernel = KernelMean(2.0)
    >>> kernel.add(torch.tensor([1.0, 1.0])); kernel.mean
    1.0
    """

    def __init__(self, t: float):
        self.t, self.total, self.count = t, 0.0, 0

    def add(self, values: Tensor) -> None:
        self.total += float((2 * self.t * (values - 1)).exp().sum(dtype=torch.float64))
        self.count += values.numel()

    @property
    def mean(self) -> float:
        return self.total / max(1, self.count)

    def __add__(self, other: KernelMean) -> KernelMean:
        found = KernelMean(self.t)
        found.total, found.count = self.total + other.total, self.count + other.count
        return found
