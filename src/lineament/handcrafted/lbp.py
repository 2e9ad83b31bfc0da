"""What texture is where? Local binary patterns: which neighbours of a pixel are at least as bright as it.

Ojala, Pietikäinen, Mäenpää 2002; as a descriptor of digits in Wahid, Shahriar, Sobuj 2022, arXiv 2201.10102. Codes and labels are numbered
as in scikit-image. A neighbour between pixels is interpolated as a + t (b - a), so that it equals its surroundings where those are equal.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.checks import number, one_of, require
from lineament.handcrafted.images import cell_of, check_grid, grey_of

CODES = ("default", "ror", "uniform", "nri_uniform", "var")
Codes = Literal["default", "ror", "uniform", "nri_uniform", "var"]


def lbp(
    images: Tensor,
    points: int = 8,
    radius: float = 1,
    *,
    codes: Codes = "nri_uniform",
    grid: int | None = 4,
    edges: Tensor | None = None,
) -> Tensor:
    """Normalised histograms of local binary patterns, one a cell of a grid.

    Args:
        images: [n, height, width], or with channels, which become grey. Integers make ties certain; floats leave them to rounding.
        points, radius: neighbours and their distance in pixels.
        codes: see :func:`lbp_codes`.
        grid: cells along a side; ``None`` takes the whole image, which is far too coarse for digits.
        edges: for ``codes="var"`` only: the edges of its bins, such as quantiles of training images.

    Returns:
        [n, cells * labels]; each cell's histogram sums to 1.

    >>> lbp(torch.zeros(2, 32, 32, dtype=torch.uint8)).shape
    torch.Size([2, 944])
    """
    found = lbp_codes(images, points, radius, codes=codes)
    require(
        (edges is not None) == (codes == "var"),
        "edges: expected for codes='var', which has no labels, and for no other codes",
    )
    count = label_count(points, codes)
    if edges is not None:
        edges = edges.to(found)
        count = len(edges) + 1
        found = torch.bucketize(found.nan_to_num(0), edges, right=True)
    cells = 1 if grid is None else check_grid(grid, found)
    places = [cell_of(size, cells, found.device) for size in found.shape[1:]]
    cell = places[0][:, None] * cells + places[1]
    image = torch.arange(len(found), device=found.device)[:, None, None]
    flat = (image * cells**2 + cell) * count + found.long()
    histogram = torch.bincount(flat.flatten(), minlength=len(found) * cells**2 * count)
    pixels = torch.bincount(cell.flatten(), minlength=cells**2)
    return (histogram.view(len(found), cells**2, count) / pixels[:, None]).flatten(1)


def lbp_codes(images: Tensor, points: int = 8, radius: float = 1, *, codes: Codes = "default") -> Tensor:
    """The pattern of every pixel.

    Neighbour p lies at (-R sin(2πp/P), R cos(2πp/P)); its bit is 1 where it is at least as bright as the centre; outside the image it is 0.

    Args:
        codes: ``"default"``: Σ bit 2^p; ``"ror"``: the smallest of its rotations; ``"uniform"``: the number of ones where the bits change
            at most twice around the circle, else P + 1; ``"nri_uniform"``: each uniform pattern apart, P (P - 1) + 3 labels; ``"var"``: the
            variance of the neighbours (no bits).

    Returns:
        [n, height, width] int64; floats for ``"var"``.

    >>> lbp_codes(torch.tensor([[[0, 0, 0], [0, 1, 2], [0, 0, 0]]]))[0, 1, 1].item()
    1
    """
    one_of("codes", codes, CODES)
    number("points", points, low=1, high=30, integer=True)
    number("radius", radius, low=0, open_low=True)
    grey = grey_of(images)
    made = []
    for part in grey.split(max(1, (1 << 21) // ((grey.shape[1] * grey.shape[2]) * points))):
        if codes == "var":
            made.append(neighbours(part, points, radius).var(0, correction=0))
            continue
        if points > 16 and codes != "default":
            made.append(_labels(neighbours(part, points, radius) >= part, codes))
            continue
        code = torch.zeros(part.shape, dtype=torch.int32, device=part.device)
        for p, value in enumerate(_around(part, points, radius)):
            code |= (value >= part).int() << p
        made.append(code.long() if codes == "default" else _table(points, codes).to(code.device)[code])
    return torch.cat(made) if made else grey.long()


def neighbours(grey: Tensor, points: int, radius: float) -> Tensor:
    """[points, n, height, width]: what lies on the circle around each pixel, interpolated between its four pixels, 0 outside."""
    return torch.stack(list(_around(grey, points, radius)))


def _around(grey: Tensor, points: int, radius: float) -> Iterator[Tensor]:
    height, width = grey.shape[1:]
    edge = math.ceil(radius) + 1
    padded = F.pad(grey, (edge,) * 4)
    for p in range(points):
        row, column = (
            round(-radius * math.sin(2 * math.pi * p / points), 5),
            round(radius * math.cos(2 * math.pi * p / points), 5),
        )
        top, left = math.floor(row), math.floor(column)
        down, across = row - top, column - left
        at = lambda r, c: padded[:, edge + r : edge + r + height, edge + c : edge + c + width]  # noqa: E731
        value = at(top, left)
        if across:
            value = torch.lerp(value, at(top, left + 1), across)
        if down:
            below = at(top + 1, left)
            if across:
                below = torch.lerp(below, at(top + 1, left + 1), across)
            value = torch.lerp(value, below, down)
        yield value


def label_count(points: int, codes: str) -> int:
    """How many labels there are.

    >>> label_count(8, "nri_uniform"), label_count(8, "uniform"), label_count(8, "default")
    (59, 10, 256)
    """
    return {"uniform": points + 2, "nri_uniform": points * (points - 1) + 3}.get(codes, 1 << points)


@lru_cache(maxsize=16)
def _table(points: int, codes: str) -> Tensor:
    """The label of every code."""
    code = torch.arange(1 << points)
    return _labels((code >> torch.arange(points)[:, None]) & 1 == 1, codes)


def _labels(bits: Tensor, codes: str) -> Tensor:
    """The labels of bits [points, ...]."""
    points = len(bits)
    if codes == "ror":
        weights = 1 << torch.arange(points, device=bits.device)
        turned = [torch.tensordot(weights, bits.roll(-k, 0).long(), 1) for k in range(points)]
        return torch.stack(turned).min(0).values
    ones = bits.sum(0)
    uniform = (bits != bits.roll(-1, 0)).sum(0) <= 2
    if codes == "uniform":
        return torch.where(uniform, ones, points + 1)
    # Where the run of ones starts, read the way scikit-image numbers the rotations.
    first_one, first_zero = bits.int().argmax(0), (~bits).int().argmax(0)
    turn = torch.where(first_one == 0, ones - first_zero, points - first_one)
    label = torch.where(ones == 0, 0, 1 + (ones - 1) * points + turn)
    label = torch.where(ones == points, points * (points - 1) + 1, label)
    return torch.where(uniform, label, points * (points - 1) + 2)
