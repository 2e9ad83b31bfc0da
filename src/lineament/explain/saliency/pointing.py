"""The pointing game: does a map's largest value lie on the object? Zhang et al. 2016 (arXiv 1608.00507).

A point is (column, row) and a mask [row, column]. A hit is a point whose distance to some pixel of the class's mask is strictly
below the tolerance (15 pixels on the benchmarks); accuracy is taken for each class and averaged over the classes that occurred.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable, axes, plain
from lineament.explain.saliency.aggregation import resized


def point_of(map_: Float[Tensor, "height width"]) -> tuple[int, int]:
    """The (column, row) of a map's maximum, the first in reading order.

    >>> point_of(torch.tensor([[0.0, 0.0, 9.0], [0.0, 0.0, 0.0]]))
    (2, 0)
    """
    checks.tensor("map", map_, shape=("height", "width"))
    index = int(map_.argmax())
    return index % map_.shape[1], index // map_.shape[1]


def points_at(
    point: tuple[float | int, float | int], mask: Bool[Tensor, "height width"], tolerance: float | int = 15.0
) -> bool:
    """Whether a (column, row) point, which may lie outside, is nearer than ``tolerance`` pixels to the mask: strictly.

    >>> points_at((3, 0), torch.tensor([[True, False, False, False]]), tolerance=3)
    False
    """
    checks.number("tolerance", tolerance, low=0)
    checks.tensor("mask", mask, shape=("height", "width"))
    rows, columns = mask.nonzero().double().unbind(1)
    return bool(((columns - point[0]) ** 2 + (rows - point[1]) ** 2 < tolerance**2).any())


def hits(
    maps: Float[Tensor, "batch 1 h w"],
    masks: Bool[Tensor, "batch height width"] | Iterable[Bool[Tensor, "height width"]],
    *,
    tolerance: float | int = 15.0,
) -> Bool[Tensor, "batch"]:
    """Whether each map points at its mask; maps are brought to the masks' size (bilinear) first.

    Args:
        maps: one for each mask.
        masks: where the class is: one tensor, or one (height, width) for each image, of any sizes.
        tolerance: pixels of the mask's size.

    >>> hits(torch.eye(4)[None, None], torch.eye(4, dtype=torch.bool)[None], tolerance=1).tolist()
    [True]
    """
    checks.tensor("maps", maps, shape=("batch", 1, "height", "width"))
    each = list(masks)
    checks.require(
        len(each) == len(maps), f"masks: got {len(each)}, expected one for each of {len(maps)} maps"
    )
    found = []
    for map_, mask in zip(maps, each):
        size = (mask.shape[0], mask.shape[1])
        found.append(points_at(point_of(resized(map_[None], size)[0, 0]), mask, tolerance))
    return torch.tensor(found)


def difficult(mask: Bool[Tensor, "height width"], others: bool) -> bool:
    """The hard subset of the pointing game: the object covers less than a quarter and another class is in the image.

    >>> difficult(torch.tensor([[True, False, False, False, False]]), others=True)
    True
    """
    return others and float(mask.double().mean()) < 0.25


@dataclass(frozen=True)
class Pointing(Readable):
    """The game's result: for each class hits over cases (``None`` where there was none), their mean, and the counts."""

    accuracies: list[float | None]
    mean: float
    hits: list[int]
    cases: list[int]

    def to_dict(self) -> dict[str, Any]:
        return plain(self)

    def plot(self, ax: Any = None) -> Any:
        """A bar for each class that occurred."""
        ax = axes(ax)
        there = [(k, a) for k, a in enumerate(self.accuracies) if a is not None]
        ax.bar([str(k) for k, _ in there], [100 * a for _, a in there])
        ax.axhline(100 * self.mean, color="C7", linestyle="--")
        ax.set(xlabel="class", ylabel="pointing accuracy, %", ylim=(0, 100))
        return ax


class PointingGame:
    """Counts hits and misses by class, over batches and processes (games add up).

    >>> game = PointingGame(3)
    >>> for label, hit in [(0, True), (0, False), (2, True)]:
    ...     game.add(label, hit)
    >>> game.accuracies(), game.mean()
    ([0.5, None, 1.0], 0.75)
    """

    def __init__(self, classes: int):
        checks.number("classes", classes, low=1, integer=True)
        self.hits = torch.zeros(classes, dtype=torch.int64)
        self.misses = torch.zeros(classes, dtype=torch.int64)

    def add(self, label: int, hit: bool) -> None:
        """One image's outcome."""
        checks.number("label", label, low=0, high=len(self.hits) - 1, integer=True)
        (self.hits if hit else self.misses)[label] += 1

    def update(
        self,
        maps: Float[Tensor, "batch 1 h w"],
        masks: Any,
        labels: Int[Tensor, "batch"],
        *,
        tolerance: float | int = 15.0,
    ) -> None:
        """A batch's outcomes; see :func:`hits`."""
        labels = checks.labels("labels", labels, count=len(maps), classes=len(self.hits))
        for label, hit in zip(labels.tolist(), hits(maps, masks, tolerance=tolerance).tolist()):
            self.add(label, hit)

    def __add__(self, other: PointingGame) -> PointingGame:
        checks.require(
            len(self.hits) == len(other.hits),
            f"pointing game: got games of {len(self.hits)} and {len(other.hits)} classes, expected the same classes",
        )
        both = PointingGame(len(self.hits))
        both.hits, both.misses = self.hits + other.hits, self.misses + other.misses
        return both

    def accuracies(self) -> list[float | None]:
        """Hits over all, for each class; ``None`` for a class that did not occur."""
        total = self.hits + self.misses
        return [int(h) / int(n) if n else None for h, n in zip(self.hits, total)]

    def mean(self, *, unseen_as_zero: bool = False) -> float:
        """The mean over classes; ``unseen_as_zero`` counts classes without any case as 0, as the official code does."""
        values = [a for a in self.accuracies() if a is not None]
        checks.require(bool(values), "pointing game: no case was added")
        return sum(values) / (len(self.hits) if unseen_as_zero else len(values))

    def compute(self) -> Pointing:
        """The result so far."""
        cases = (self.hits + self.misses).tolist()
        return Pointing(self.accuracies(), self.mean(), self.hits.tolist(), cases)
