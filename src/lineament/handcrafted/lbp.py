"""What texture is where? Local binary patterns: which neighbours of a pixel are at least as bright as it.

Ojala, Pietikäinen, Mäenpää 2002; as a descriptor of digits in Wahid, Shahriar, Sobuj 2022, arXiv 2201.10102. Codes and labels are numbered
as in scikit-image. A neighbour between pixels is interpolated as a + t (b - a), so that it equals its surroundings where those are equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.checks import number, one_of, require, show
from lineament.handcrafted.images import Room, by_part, cell_of, check_grid, grey_of

CODES = ("default", "ror", "uniform", "nri_uniform", "var")
# Pixels at a time.
_PART = 1 << 16
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
    grey = _asked(images, points, radius, codes)
    require(
        (edges is not None) == (codes == "var"),
        "edges: expected for codes='var', which has no labels, and for no other codes",
    )
    count = label_count(points, codes)
    if edges is not None:
        edges = torch.as_tensor(edges).to(grey.device, _precise(grey))
        require(
            edges.ndim == 1 and bool((edges.diff() >= 0).all()),
            f"edges: got {show(edges)}, expected ascending numbers",
        )
        count = len(edges) + 1
    cells = 1 if grid is None else check_grid(grid, grey)
    require(
        count * cells**2 <= 1 << 24,
        f"points: {points} have {count:,} {codes!r} codes in each of {cells**2} cells; expected fewer, or codes='uniform'",
    )
    places = [cell_of(size, cells, grey.device) for size in grey.shape[1:]]
    cell = places[0][:, None] * cells + places[1]
    pixels = torch.bincount(cell.flatten(), minlength=cells**2).to(torch.get_default_dtype())[:, None]
    histograms = pixels.new_empty(len(grey), cells**2, count)
    first = None

    def counted(found: Tensor) -> Tensor:
        nonlocal first
        if edges is not None:
            found = torch.bucketize(found.nan_to_num(0), edges, right=True)
        if first is None:
            # The largest part is the first.
            image = torch.arange(len(found), device=found.device)[:, None, None]
            first = (image * cells**2 + cell) * count
            # Codes of a part are numbered in all.
            first = first.to(found.dtype) if len(found) * cells**2 * count < 1 << 31 else first
        flat = torch.add(
            found, first[: len(found)], out=found if first.dtype == found.dtype else None
        ).flatten()
        return torch.bincount(flat, minlength=len(found) * cells**2 * count).view(-1, cells**2, count)

    done = 0
    for histogram in _by_part(grey, points, radius, codes, counted):
        torch.div(histogram, pixels, out=histograms[done : done + len(histogram)])
        done += len(histogram)
    return histograms.flatten(1)


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
    grey = _asked(images, points, radius, codes)
    made = list(_by_part(grey, points, radius, codes, lambda found: found))
    found = torch.cat(made) if made else grey
    return found if codes == "var" else found.long()


def _asked(images: Tensor, points: int, radius: float, codes: str) -> Tensor:
    """The grey images, bytes as they are, if all else is in order."""
    one_of("codes", codes, CODES)
    number("points", points, low=1, high=30, integer=True)
    number("radius", radius, low=0, open_low=True)
    return grey_of(images, keep_bytes=True)


def _by_part(
    grey: Tensor, points: int, radius: float, codes: str, use: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """What is made of the codes of a few images at a time, whose buffers stay in the processor's cache."""
    room = Room(grey, not (torch.is_grad_enabled() and grey.requires_grad))

    def used(part: Tensor) -> Tensor:
        if codes == "var":
            return use(neighbours(part, points, radius).var(0, correction=0))
        if points > 16 and codes != "default":
            return use(_labels(neighbours(part, points, radius) >= part, codes))
        code = _code(part.detach(), points, radius, room)
        if codes != "default":
            labels = _table(points, codes).to(code.device)
            code = labels.index_select(0, code.flatten()).view(code.shape)
        return use(code)

    return by_part(used, grey, max(1, _PART // (grey.shape[1] * grey.shape[2])), room)


def _precise(grey: Tensor) -> torch.dtype:
    """What values between pixels are computed in."""
    return torch.float64 if grey.dtype == torch.uint8 else grey.dtype


def _code(grey: Tensor, points: int, radius: float, room: Room) -> Tensor:
    """Σ bit 2^p of each pixel, int32. Bits are added up as floats, in which comparing is fastest; those of bytes beside bytes as bytes."""
    plane = _Plane(grey, radius, room)
    centre = plane.centre(plane.flat)
    exact = centre.dtype if points <= 24 else torch.float64
    # A bit may take the room of the value that it comes from.
    code, bit = (_spare(room, name, centre, exact) for name in ("code", "value"))
    code.zero_()
    small = None if plane.bytes is None else _spare(room, "small", centre, torch.uint8).zero_()
    for p, value in enumerate(plane.around(points)):
        if value.dtype == torch.uint8 and plane.bytes is not None and small is not None:
            reached = torch.ge(
                value, plane.centre(plane.bytes), out=room("reached", centre.shape, torch.bool)
            )
            small.add_(reached.view(torch.uint8), alpha=1 << p)
        else:
            code.add_(torch.ge(value, centre, out=bit), alpha=1 << p)
    found = plane.images(code).to(torch.int32)
    return found if small is None else found.add_(plane.images(small))


def _spare(room: Room, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A buffer, or a new tensor where there is none."""
    found = room(name, like.shape, dtype)
    return torch.empty_like(like, dtype=dtype) if found is None else found


def neighbours(grey: Tensor, points: int, radius: float) -> Tensor:
    """[points, n, height, width]: what lies on the circle around each pixel, interpolated between its four pixels, 0 outside."""
    if not grey.is_floating_point():
        grey = grey.double()
    plane = _Plane(grey, radius, Room(grey, reuse=False))
    return torch.stack([plane.images(value) for value in plane.around(points)])


class _Plane:
    """Images behind one another in one line of numbers, zeros between their rows and between them, so that a neighbour is a shift of the line."""

    def __init__(self, grey: Tensor, radius: float, room: Room) -> None:
        n, self.height, self.width = grey.shape
        self.radius, self.edge, self.room = radius, math.ceil(radius), room
        self.shape = (n, self.height + self.edge, self.width + self.edge)
        self.row = self.shape[2]
        # As many zeros before and behind as a shift reaches.
        self.margin = self.edge * (self.row + 1)
        self.length = self.shape[0] * self.shape[1] * self.row
        self.flat = self._line(grey, "flat", _precise(grey))
        self.bytes = self._line(grey, "bytes", torch.uint8) if grey.dtype == torch.uint8 else None

    def _line(self, grey: Tensor, name: str, dtype: torch.dtype) -> Tensor:
        found = self.room(name, (self.length + 2 * self.margin,), dtype)
        if found is None:
            return F.pad(F.pad(grey, (0, self.edge, 0, self.edge)).flatten(), (self.margin,) * 2).to(dtype)
        self.images(self.centre(found)).copy_(grey)
        # Behind them, a longer part may have left something.
        found[self.margin + self.length :].zero_()
        return found

    def images(self, line: Tensor) -> Tensor:
        """[n, height, width] of a line as long as all images."""
        return line.view(self.shape)[:, : self.height, : self.width]

    def centre(self, line: Tensor) -> Tensor:
        """A line without its margins."""
        return line[self.margin : self.margin + self.length]

    def around(self, points: int) -> Iterator[Tensor]:
        """Each neighbour of all places in turn, gone when the next is asked for; of bytes, the first eight as bytes where they are pixels.

        Interpolation along rows is shared by the neighbours in these columns.
        """
        columns: dict[float, tuple[Tensor, int]] = {}
        for p in range(points):
            row, column = (
                round(-self.radius * math.sin(2 * math.pi * p / points), 5),
                round(self.radius * math.cos(2 * math.pi * p / points), 5),
            )
            top, down = math.floor(row), row - math.floor(row)
            if self.bytes is not None and p < 8 and not down and column == math.floor(column):
                start = self.margin + top * self.row + math.floor(column)
                yield self.bytes[start : start + self.length]
                continue
            if column not in columns:
                columns[column] = self._column(column)
            line, first = columns[column]
            start = first + top * self.row
            above = line[start : start + self.length]
            if not down:
                yield above
                continue
            below = line[start + self.row : start + self.row + self.length]
            yield torch.lerp(above, below, down, out=self.room("value", above.shape, above.dtype))

    def _column(self, column: float) -> tuple[Tensor, int]:
        """What lies so many columns to the right of each place, also of those above and below, and where in this line the first place is."""
        left = math.floor(column)
        if column == left:
            return self.flat, self.margin + left
        reach = self.edge * self.row
        start, size = self.margin - reach + left, self.length + 2 * reach
        near, far = self.flat[start : start + size], self.flat[start + 1 : start + 1 + size]
        room = self.room(f"column {column}", (size,), self.flat.dtype)
        return torch.lerp(near, far, column - left, out=room), reach


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
    return _labels((code >> torch.arange(points)[:, None]) & 1 == 1, codes).int()


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
