"""All pairs of n rows without the matrix of all pairs: square tiles of products, each pair multiplied once, given to accumulators that can be merged.

A tile is read while it lies in the cache, along its rows and along its columns. Rows that are sorted by their label have few tiles with pairs of one label: the others are passed on as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    """The tiles of x xᵀ on and above the diagonal; a tile may be written to.

    >>> sum(len(tile.values) for tile in tiles(torch.randn(7, 3), 3))
    21
    """
    size = TILE if size is None else size
    for start in range(0, len(x), size):
        for other in range(start, len(x), size):
            yield Tile(x[start : start + size] @ x[other : other + size].T, start, other)


class Largest:
    """The largest of numbers that come in parts, ``count`` of them.

    >>> top = Largest(2)
    >>> top.add(torch.tensor([1.0, 5.0])); top.add(torch.tensor([3.0])); top.sorted().tolist()
    [5.0, 3.0]
    """

    def __init__(self, count: int):
        self.count, self.parts, self.held, self.floor = count, [], 0, -torch.inf

    def add(self, values: Tensor) -> None:
        """Numbers of any shape; -inf is none. Runs of 64 whose largest is below the floor are passed over."""
        flat = values.flatten()
        if self.floor > -torch.inf and len(flat) >= 64:
            whole = flat[: len(flat) // 64 * 64].view(-1, 64)
            flat = torch.cat([whole[whole.amax(1) > self.floor].flatten(), flat[whole.numel() :]])
        found = flat[flat > self.floor]
        self.parts.append(found)
        self.held += len(found)
        if self.held > 2 * self.count + 4096:
            kept = _top(torch.cat(self.parts), self.count)
            self.parts, self.held, self.floor = [kept], len(kept), float(kept.min())

    def __add__(self, other: Largest) -> Largest:
        found = Largest(self.count)
        for part in (*self.parts, *other.parts):
            found.add(part)
        return found

    def sorted(self) -> Tensor:
        """The largest numbers, falling."""
        found = torch.cat(self.parts) if self.parts else torch.empty(0)
        return _top(found, self.count).sort(descending=True).values


def _top(values: Tensor, count: int) -> Tensor:
    """The ``count`` largest, in any order; NumPy's partition takes a fraction of topk's time where they are many."""
    if len(values) <= count:
        return values
    if values.device.type != "cpu" or values.dtype not in (torch.float32, torch.float64):
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
        self._merge(scores.T, tile.other, tile.start)

    def _merge(self, scores: Tensor, rows: int, others: int) -> None:
        own = slice(rows, rows + len(scores))
        floor = self.scores[own, -1:]
        if bool(floor.isneginf().any()):  # nothing to be above yet
            best, at = scores.contiguous().topk(min(self.scores.shape[1], scores.shape[1]), 1)
            self._keep(own, best, at + others)
            return
        # Few products are above what is held: these are found, and read, whichever way the tile lies.
        i, j = _above(scores, floor)
        if not len(i):
            return
        counts = torch.bincount(i, minlength=len(scores))
        place = torch.arange(len(i), device=i.device) - (counts.cumsum(0) - counts)[i]
        best = scores.new_full((len(scores), int(counts.max())), -torch.inf)
        at = torch.zeros(best.shape, dtype=torch.int64, device=best.device)
        best[i, place], at[i, place] = scores[i, j], j + others
        self._keep(own, best, at)

    def _keep(self, rows: slice, scores: Tensor, indices: Tensor) -> None:
        both = torch.cat([self.scores[rows], scores], 1)
        self.scores[rows], at = both.topk(self.scores.shape[1], 1)
        self.indices[rows] = torch.cat([self.indices[rows], indices], 1).gather(1, at)

    def __add__(self, other: Neighbours) -> Neighbours:
        rows, count = self.scores.shape
        found = Neighbours(rows, count, self.scores)
        for each in (self, other):
            found._keep(slice(0, len(found.scores)), each.scores, each.indices)
        return found


def _above(scores: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``scores`` [n, m] pass their row's ``floor`` [n, 1], row after row. Runs of 64 whose largest does not are passed over, along whichever axis the memory lies."""
    m = scores.shape[1]
    if m % 64:
        i, j = (scores > floor).nonzero(as_tuple=True)
        return i, j
    runs = scores.unflatten(1, (m // 64, 64))
    i, run = (runs.amax(2) > floor).nonzero(as_tuple=True)
    at, place = (runs[i, run] > floor[i]).nonzero(as_tuple=True)
    return i[at], run[at] * 64 + place


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
