"""Keep a share of each input and replace the rest: the order of the coordinates, kept once, makes every level on the fly.

What DiffROAR, ROAR and KAR train on (Shah, Jain, Netrapalli 2021, arXiv 2102.12781; Hooker et al. 2019, arXiv 1806.10758). Both ends come from one
stable permutation: the descending order of a stable sort is not the reverse of its ascending order where scores tie, and
then the best and the worst half would overlap.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable

Group = str | int | tuple[int, int]
TIES = ("stable", "random")


@dataclass(frozen=True)
class Ranking(Readable):
    """The place of each group of coordinates in each input's order, 0 for the most important.

    ``ranks`` is (batch, groups) in the smallest integer type that holds it, ``group_of`` (*shape) says to which group each coordinate
    belongs, ``zero_share`` is the share of scores that are exactly zero: their order is that of ties.
    """

    ranks: Int[Tensor, "batch groups"]
    group_of: Int[Tensor, "*shape"]
    zero_share: float

    def __len__(self) -> int:
        return len(self.ranks)

    @property
    def groups(self) -> int:
        return self.ranks.shape[1]

    def to(self, device: Any) -> Ranking:
        return Ranking(self.ranks.to(device), self.group_of.to(device), self.zero_share)

    def removed(self, masked: float) -> int:
        """How many groups a masked fraction is: int(round(f · groups)), halves to even, as the official code counts."""
        return round(checks.number("masked", masked, low=0, high=1) * self.groups)

    def keeps(self, rows: Any, kept: float, end: str) -> Bool[Tensor, "rows *shape"]:
        """Which coordinates stay when the share ``kept`` of the groups does, the ``"top"`` or the ``"bottom"`` of the order.

        >>> rank([[3.0, 1.0, 2.0, 0.0]]).keeps([0], 0.5, "bottom").tolist()
        [[False, True, False, True]]
        """
        checks.one_of("end", end, ("top", "bottom"))
        # 1 - 0.7 is a hair above 0.3; the count must not hang on that hair.
        count = self.removed(round(1 - checks.number("kept", kept, low=0, high=1), 12))
        ranks = self.ranks[rows]
        stays = ranks < self.groups - count if end == "top" else ranks >= count
        if self.groups < self.group_of.numel():
            stays = stays.index_select(1, self.group_of.flatten())
        return stays.reshape(len(stays), *self.group_of.shape)


def rank(
    scores: Any,
    *,
    group: Group = "coordinate",
    shape: Sequence[int] | None = None,
    magnitude: bool = True,
    ties: str = "stable",
    seed: int = 0,
) -> Ranking:
    """Order the coordinates of each input by falling score.

    Args:
        scores: (batch, *shape); a map (batch, 1, height, width) for images of several channels orders whole pixels.
        group: what is kept or replaced as one: each ``"coordinate"``, whole ``"pixel"``s (all channels), or blocks of ``size`` or (height,
            width) pixels; a group's score is the sum over its coordinates.
        shape: of one input, where the scores' own is another (the map of an image with channels).
        magnitude: order by \\|score\\|, as DiffROAR does; ``False`` keeps the sign.
        ties: ``"stable"``: in reading order, as specified; ``"random"`` favours no place of the image.

    Raises:
        InputError: scores that are empty, not finite or do not fit ``shape``; a group that the shape does not have.

    >>> rank(torch.tensor([[0.0, -2.0, 1.0, 0.0]])).ranks.tolist()
    [[2, 0, 1, 3]]
    """
    scores = torch.as_tensor(scores)
    checks.tensor("scores", scores, floating=True)
    checks.require(
        scores.ndim >= 2, f"scores: got {checks.show(scores)}, expected shape (batch, ...), as the inputs"
    )
    checks.one_of("ties", ties, TIES)
    shape = tuple(scores.shape[1:]) if shape is None else tuple(shape)
    fits = tuple(scores.shape[1:]) == shape
    one_map = len(shape) == 3 and tuple(scores.shape[1:]) == (1, *shape[1:])
    checks.require(
        fits or one_map,
        f"scores: got {checks.show(scores)} for inputs of shape {shape}, expected (batch, {', '.join(map(str, shape))})"
        + (f" or one map (batch, 1, {shape[1]}, {shape[2]})" if len(shape) == 3 and shape[0] > 1 else ""),
    )
    if not fits:
        checks.require(
            group != "coordinate",
            f"group: the scores are one map for {shape[0]} channels, which cannot order single coordinates; "
            "pass group='pixel' or a block's size",
        )
    group_of = groups_of(shape, group).to(scores.device)
    values = scores.detach().abs() if magnitude else scores.detach()
    place = group_of if fits else group_of[:1]
    count = int(group_of.max()) + 1
    if fits and count == place.numel():
        merged = values.flatten(1)
    else:
        merged = torch.zeros(len(values), count, dtype=values.dtype, device=values.device)
        merged.index_add_(1, place.flatten(), values.flatten(1))
    if ties == "random":
        generator = torch.Generator().manual_seed(seed)
        shuffle = torch.stack([torch.randperm(count, generator=generator) for _ in range(len(merged))])
        shuffle = shuffle.to(merged.device)
        order = shuffle.gather(1, merged.gather(1, shuffle).argsort(dim=1, descending=True, stable=True))
    else:
        order = merged.argsort(dim=1, descending=True, stable=True)
    # Advanced indexing later reads these once a level: the smallest type is the least to read.
    small = torch.int16 if count <= 2**15 - 1 else torch.int32
    ranks = torch.empty_like(order, dtype=small)
    ranks.scatter_(1, order, torch.arange(count, dtype=small, device=order.device).expand_as(order))
    return Ranking(ranks, group_of, float((merged == 0).double().mean()))


def groups_of(shape: Sequence[int], group: Group) -> Int[Tensor, "*shape"]:
    """The number of the group of each coordinate; blocks at the lower and right edge may be smaller.

    >>> groups_of((2, 2, 4), (2, 2))[0].tolist()
    [[0, 0, 1, 1], [0, 0, 1, 1]]
    """
    if group == "coordinate":
        total = 1
        for n in shape:
            total *= n
        return torch.arange(total).reshape(tuple(shape))
    if isinstance(group, str):
        checks.one_of("group", group, ("coordinate", "pixel"))
    checks.require(
        len(shape) >= 2, f"group: inputs of shape {tuple(shape)} have no pixels; pass 'coordinate'"
    )
    block = (1, 1) if group == "pixel" else (group, group) if isinstance(group, int) else group
    checks.require(
        isinstance(block, (tuple, list)) and len(block) == 2,
        f"group: got {checks.show(group)}, expected 'coordinate', 'pixel', a size or (height, width)",
    )
    for side, most in zip(block, shape[-2:]):
        checks.number("group", side, low=1, high=most, integer=True)
    rows = torch.arange(shape[-2]) // int(block[0])
    columns = torch.arange(shape[-1]) // int(block[1])
    plane = rows[:, None] * (int(columns[-1]) + 1) + columns
    return plane.expand(tuple(shape)).contiguous()


def fill_value(fill: Any, inputs: Tensor) -> Float[Tensor, "*shape"]:
    """What stands where a coordinate was replaced: ``"zero"``, the training inputs' ``"mean"`` (of each channel), a number or a tensor.

    Warns of a value outside the range of the inputs: it marks what was replaced.

    >>> fill_value("mean", torch.tensor([[1.0, 2.0], [3.0, 2.0]])).tolist()
    [2.0, 2.0]
    """
    if isinstance(fill, str):
        checks.one_of("fill", fill, ("zero", "mean"))
        if fill == "zero":
            value = inputs.new_zeros(())
        else:
            over = [0, *list(range(2, inputs.ndim))]
            value = inputs.mean(over, keepdim=True)[0]
    else:
        checks.require(
            isinstance(fill, (int, float, Tensor)) and not isinstance(fill, bool),
            f"fill: got {checks.show(fill)}, expected 'zero', 'mean', a number or a tensor",
        )
        value = torch.as_tensor(fill).to(inputs)
        checks.tensor("fill", value)
    shape = tuple(inputs.shape[1:])
    fits = value.ndim <= len(shape) and all(a in (1, b) for a, b in zip(value.shape[::-1], shape[::-1]))
    checks.require(fits, f"fill: got {checks.show(value)}, expected one that broadcasts to {shape}")
    low, high = float(inputs.min()), float(inputs.max())
    if float(value.min()) < low or float(value.max()) > high:
        warnings.warn(
            f"fill: {float(value.min()):.3g} to {float(value.max()):.3g} lies outside the inputs' range "
            f"[{low:.3g}, {high:.3g}], so that what is replaced is marked as such",
            stacklevel=3,
        )
    return value


@dataclass(frozen=True)
class Unmasked(Readable):
    """Inputs of which only a share is kept, made when rows of it are asked for: ``view[rows]`` is (rows, *shape)."""

    inputs: Float[Tensor, "batch *shape"]
    ranking: Ranking
    kept: float
    end: str
    fill: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, rows: Any) -> Float[Tensor, "rows *shape"]:
        keeps = self.ranking.keeps(rows, self.kept, self.end)
        return torch.where(keeps, self.inputs[rows], self.fill)

    def whole(self) -> Float[Tensor, "batch *shape"]:
        return self[slice(None)]
