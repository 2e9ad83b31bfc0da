"""How far apart are two channels? Squared distances of their weights, kept up to date while channels merge.

D_ij sums, over the weights that make or read the channels, the squared distance of the slices of i and j. It follows from two Gram matrices, of what
makes the channels and of what reads them, and these are linear in sums and means: a merge of two channels costs O(n), not O(n P). A merge in a
neighbouring layer changes a few columns of the slices, an update of rank two for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lineament.core.surgery.groups import ChannelGroup, Entry

DISTANCES = ("all", "paper", "in", "out", "cosine")
RULES = ("mean_sum", "sum_mean")
_ROWS = 64  # rows of a block that stays in the cache


@dataclass
class Weights:
    """Parameters in float64, as the merges so far have made them; a merged channel lies where its first member lay."""

    tensors: dict[str, Tensor]

    def rows(self, entry: Entry, channels: Sequence[int] | Tensor) -> Tensor:
        """The slices of these channels (channels x everything else)."""
        channels = torch.as_tensor(channels)
        tensor = self.tensors[entry.parameter]
        slots = entry.slots[channels]
        picked = tensor.index_select(entry.axis, slots.reshape(-1)).movedim(entry.axis, 0)
        return picked.reshape(len(channels), -1)

    def merge(self, entry: Entry, i: int, j: int, a: float, b: float) -> None:
        """Channel i becomes a times i and b times j; j becomes zero."""
        moved = self.tensors[entry.parameter].movedim(entry.axis, 0)
        first, second = entry.slots[i], entry.slots[j]
        moved[first] = a * moved[first] + b * moved[second]
        moved[second] = 0


def counted(
    entries: Sequence[Entry], tensors: dict[str, Tensor], distance: str
) -> tuple[list[Entry], list[Entry]]:
    """The entries whose slices count: those that make the channels, and those that read them."""
    wide = [e for e in entries if tensors[e.parameter].ndim >= 2]
    makes = [
        e
        for e in (entries if distance in ("all", "cosine", "in") else wide)
        if e.role in ("write", "scale", "norm", "both")
    ]
    reads = [e for e in wide if e.role == "read"]
    return [] if distance == "out" else makes, [] if distance == "in" else reads


@dataclass
class Channels:
    """The channels of one group while they merge. Position p holds one merged channel, whose slices lie in the slots of ``first[p]``."""

    group: ChannelGroup
    weights: Weights
    rule: str
    distance: str
    first: np.ndarray = field(init=False)
    count: np.ndarray = field(init=False)
    stamp: np.ndarray = field(init=False)
    members: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        n = self.group.size
        self.first, self.stamp, self.count = np.arange(n), np.arange(n), np.ones(n)
        self.members = [[i] for i in range(n)]
        self.makes, self.reads = counted(self.group.entries, self.weights.tensors, self.distance)
        self.inside = self._gram(self.makes)
        self.outside = self._gram(self.reads)
        self.squares = self._squares()
        self.stale, self.linked = True, False
        # Of each position: the distance to the nearest other, which that is, and the same for the furthest.
        self.near = np.zeros(n)
        self.near_at = np.zeros(n, dtype=np.int64)
        self.far = np.zeros(n)
        self.far_at = np.zeros(n, dtype=np.int64)
        # Positions whose nearest (first row) or furthest (second) has merged: their distance is a bound of what it would be now.
        self.gone = np.zeros((2, n), dtype=bool)

    def __len__(self) -> int:
        return len(self.members)

    def _gram(self, entries: Sequence[Entry]) -> np.ndarray | None:
        gram = None
        for e in entries:
            rows = self.weights.rows(e, torch.from_numpy(self.first[: len(self)]))
            gram = rows @ rows.T if gram is None else gram.addmm_(rows, rows.T)
        return None if gram is None else gram.cpu().numpy()

    def _squares(self) -> np.ndarray:
        """The squared norms of the slices: the diagonals, which lie far apart in memory."""
        return np.sum([g.diagonal() for g in (self.inside, self.outside) if g is not None], 0)

    def regrouped(self) -> None:
        """Compute the Gram matrices anew, where the group reads what it makes itself."""
        self.inside, self.outside, self.stale = self._gram(self.makes), self._gram(self.reads), True
        self.squares = self._squares()

    def matrix(self) -> np.ndarray:
        """All squared distances (channels x channels), zero on the diagonal."""
        found = self._rows(np.arange(len(self)))
        np.fill_diagonal(found, 0)
        return found

    def _rows(self, rows: np.ndarray | slice) -> np.ndarray:
        n = len(self)
        first, *others = [g[:n, :n] for g in (self.inside, self.outside) if g is not None]
        squares = self.squares[:n]
        found = first[rows] + others[0][rows] if others else first[rows].copy()
        if self.distance == "cosine":
            norms = np.sqrt(np.maximum(squares, 1e-300))
            return 2 - 2 * found / norms[rows, None] / norms[None]
        found *= -2
        found += squares
        found += squares[rows, None]
        return found

    def _survey(self) -> tuple[np.ndarray, float]:
        """The positions with a nearest neighbour as near as any, and the largest distance; where neighbours change everything between two merges."""
        n = len(self)
        far, half, room = 0.0, self.squares[:n] / 2, np.empty((_ROWS, n))
        grams = [g[:n, :n] for g in (self.inside, self.outside) if g is not None]
        for start in range(0, n, _ROWS):
            rows = slice(start, min(start + _ROWS, n))
            found, places = room[: rows.stop - start], np.arange(rows.stop - start)
            if self.distance == "cosine":
                found[:] = self._rows(rows) / 2
            else:  # half of it, in as few passes as there can be
                np.subtract(
                    half,
                    grams[0][rows] if len(grams) == 1 else np.add(*(g[rows] for g in grams), out=found),
                    out=found,
                )
                found += half[rows, None]
            far = max(far, 2 * float(found.max()))
            found[places, places + start] = np.inf
            self.near[rows] = 2 * found.min(1)
        there = np.flatnonzero(self.near[:n] <= self.near[:n].min() + self._noise())[:256]
        found = self._rows(there)
        found[np.arange(len(there)), there] = np.inf
        self.near_at[there] = found.argmin(1)
        return there, far

    def _noise(self) -> float:
        """What rounding may add to a distance that comes from Gram entries."""
        return 1e-12 * (1.0 if self.distance == "cosine" else float(self.squares[: len(self)].max()))

    def _look(self, rows: np.ndarray) -> None:
        """Find the nearest and the furthest of these positions."""
        n = len(self)
        for start in range(0, len(rows), _ROWS):
            part = rows[start : start + _ROWS]
            block = part if len(part) < n else slice(None)
            if len(rows) == n:
                block = slice(start, min(start + _ROWS, n))
            found = self._rows(block)
            places = np.arange(len(part))
            self.far_at[part] = found.argmax(1)
            self.far[part] = found[places, self.far_at[part]]
            found[places, part] = np.inf
            self.near_at[part] = found.argmin(1)
            self.near[part] = found[places, self.near_at[part]]
        self.gone[:, rows] = False

    def exactly(self, i: int, j: int) -> float:
        """The squared distance of two positions from their slices: a difference of Gram entries loses its last digits."""
        both = [int(self.first[i]), int(self.first[j])]
        pairs = [self.weights.rows(e, both) for e in (*self.makes, *self.reads)]
        if self.distance == "cosine":
            a, b = (torch.cat([p[k] for p in pairs]) for k in (0, 1))
            norms = a.norm() * b.norm()
            return (
                float((a / a.norm() - b / b.norm()).square().sum())
                if norms > 0
                else 0.0
                if torch.equal(a, b)
                else 2.0
            )
        return float(sum((p[0] - p[1]).square().sum() for p in pairs))

    def closest(self) -> tuple[int, int, float, float]:
        """The closest two positions (in the order of the channels), their squared distance and the furthest two's."""
        n = len(self)
        if self.linked and self.stale:
            there, far = self._survey()
        else:
            if self.stale:
                self._look(np.arange(n))
                self.stale = False
            far, there = self._brought_up_to_date()
        pairs = {tuple(sorted((int(p), int(self.near_at[p])), key=lambda q: self.stamp[q])) for p in there}
        order = sorted((self.exactly(i, j), int(self.stamp[i]), int(self.stamp[j]), i, j) for i, j in pairs)
        distance, _, _, i, j = order[0]
        return i, j, distance, far

    def _brought_up_to_date(self) -> tuple[float, np.ndarray]:
        """The largest distance, and the positions with a nearest neighbour as near as any, looking again only where a bound could be one of them."""
        n = len(self)
        while self.gone[1, at := int(self.far[:n].argmax())]:
            self._look(np.array([at]))
        while True:
            there = np.flatnonzero(self.near[:n] <= self.near[:n].min() + self._noise())
            again = there[self.gone[0, there]]
            if not len(again):
                return float(self.far[at]), there[:256]
            self._look(again)

    def coefficients(self, i: int, j: int) -> tuple[tuple[float, float], tuple[float, float]]:
        """What the merged channel takes of both: in what makes it, and in what reads it."""
        total = self.count[i] + self.count[j]
        mean, whole = (float(self.count[i] / total), float(self.count[j] / total)), (1.0, 1.0)
        return (mean, whole) if self.rule == "mean_sum" else (whole, mean)

    def merge(self, i: int, j: int) -> None:
        """Position i becomes both, and the last channel in order; the last position moves to j."""
        n, last = len(self), len(self) - 1
        made, read = self.coefficients(i, j)
        for gram, (a, b) in ((self.inside, made), (self.outside, read)):
            if gram is None:
                continue
            row = a * gram[i, :n] + b * gram[j, :n]
            row[i] = a * row[i] + b * row[j]
            gram[i, :n] = gram[:n, i] = row
            gram[j, :n] = gram[last, :n]
            gram[:n, j] = gram[:n, last]
            gram[j, j] = gram[last, last]
        self.squares[i] = sum(float(g[i, i]) for g in (self.inside, self.outside) if g is not None)
        first, second = int(self.first[i]), int(self.first[j])
        for e in self.group.entries:
            a, b = read if e.role == "read" else made
            self.weights.merge(e, first, second, a, b)
        self.count[i] += self.count[j]
        self.members[i] = self.members[i] + self.members[j]
        self.stamp[i] = self.stamp[:n].max() + 1
        for array in (
            self.first,
            self.count,
            self.stamp,
            self.squares,
            self.near,
            self.near_at,
            self.far,
            self.far_at,
        ):
            array[j] = array[last]
        self.gone[:, j] = self.gone[:, last]
        self.members[j] = self.members[last]
        self.members.pop()
        if not self.stale and len(self) > 1:
            self._after(i, j, last)

    def _after(self, i: int, j: int, last: int) -> None:
        """Bring the nearest and furthest in line with a merge of i and j."""
        n = len(self)
        gone = self.gone[:, :n]
        for k, at in enumerate((self.near_at[:n], self.far_at[:n])):
            gone[k] |= (at == i) | (at == j)
            at[at == last] = j
        i = j if i == last else i
        mine = self._rows(np.array([i]))[0]
        mine[i] = np.inf
        closer = mine <= self.near[:n]
        self.near[:n][closer], self.near_at[:n][closer] = mine[closer], i
        mine[i] = -np.inf
        wider = mine >= self.far[:n]
        self.far[:n][wider], self.far_at[:n][wider] = mine[wider], i
        gone[0, closer] = gone[1, wider] = False
        self._look(np.array([i]))

    def column_changed(self, side: str, columns: Tensor, coefficients: tuple[float, float]) -> None:
        """A neighbour has merged: two columns of the slices, (channels x 2 x width), have become one."""
        gram = self.inside if side == "makes" else self.outside
        if gram is None:
            return
        n = len(self)
        a, b = coefficients
        c = columns[torch.from_numpy(self.first[:n])].numpy()
        x, y = c[:, 0], c[:, 1]
        left = np.concatenate([(a * a - 1) * x + a * b * y, a * b * x + (b * b - 1) * y], 1)
        both = np.concatenate([x, y], 1)
        torch.from_numpy(gram)[:n, :n].addmm_(torch.from_numpy(left), torch.from_numpy(both).T)
        self.squares[:n] += np.einsum("ik,ik->i", left, both)
        self.stale = True

    def order(self) -> list[list[int]]:
        """The members of each channel, in the order of the merged network: untouched ones, then merged ones as they were made."""
        return [sorted(self.members[p]) for p in np.argsort(self.stamp[: len(self)])]
