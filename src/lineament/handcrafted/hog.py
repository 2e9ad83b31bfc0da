"""Which way do the edges of an image run, place by place? Histograms of oriented gradients.

Dalal, Triggs, "Histograms of Oriented Gradients for Human Detection", CVPR 2005; as a descriptor of digits in Wahid, Shahriar, Sobuj 2022,
arXiv 2201.10102. Two conventions are in use and their numbers differ: scikit-image votes for one bin of one cell; OpenCV shares each
vote among the two nearest bins and the four nearest cells, and weighs it by its place in the block. Orientations are compared with the
edges of the bins, not rounded to degrees, so an edge at exactly 45 degrees falls into the same bin on every machine.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.checks import number, one_of, require, show
from lineament.handcrafted.images import Room, batch_of, by_part

NORMS = ("L1", "L1-sqrt", "L2", "L2-Hys")
Pair = int | tuple[int, int]
# Pixels at a time.
_PART, _PART_OF_VOTES = 1 << 17, 1 << 16


def hog(
    images: Tensor,
    orientations: int = 9,
    cell: Pair = 8,
    block: Pair = 2,
    *,
    norm: Literal["L1", "L1-sqrt", "L2", "L2-Hys"] = "L2-Hys",
    sqrt: bool = False,
    signed: bool = False,
    binning: Literal["hard", "linear"] = "hard",
    like: Literal["skimage", "opencv"] = "skimage",
) -> Tensor:
    """Block-normalised histograms of gradient orientations.

    Differences g_r = I[r+1] - I[r-1] and g_c (zero at the border), votes of size ``hypot(g_r, g_c)`` for the orientation
    ``atan2(g_r, g_c)``, summed in cells, and overlapping blocks of cells normalised. Of several channels, the one with the largest
    gradient votes.

    Args:
        images: [n, height, width] or [n, channels, height, width]; integers are taken as they are.
        orientations: bins in 180 degrees (360 where ``signed``).
        cell: pixels of a cell; rows and columns beyond the last whole cell are left out.
        block: cells of a block, which moves by one cell.
        norm: ``v / (|v|₁ + ε)``, its square root, ``v / sqrt(|v|₂² + ε²)``, or that, clipped at 0.2 and normalised again; ε = 1e-5.
            OpenCV has L2-Hys only, with other ε.
        sqrt: square roots of the intensities first (gamma 1/2).
        binning: ``"linear"`` shares a vote between the two nearest bins, and is differentiable in the images.
        like: ``"opencv"`` equals ``HOGDescriptor.compute`` (its order of numbers, too): linear binning, bilinear cells, a Gaussian over
            the block.

    Returns:
        [n, block rows * block columns * cells of a block * orientations], in that order; zeros where an image is constant.

    Raises:
        InputError: fewer cells than a block needs, negative intensities with ``sqrt``, an unknown word, images that are none.

    >>> digit = torch.zeros(1, 32, 32)
    >>> digit[:, :, 16:] = 1
    >>> hog(digit).shape, int(hog(digit)[0].view(-1, 9).sum(0).argmax())
    (torch.Size([1, 324]), 0)
    """
    images = batch_of(images, keep_bytes=True)
    one_of("norm", norm, NORMS)
    one_of("binning", binning, ("hard", "linear"))
    one_of("like", like, ("skimage", "opencv"))
    number("orientations", orientations, low=1, integer=True)
    cells, blocks = pair("cell", cell), pair("block", block)
    require(
        like == "skimage" or norm == "L2-Hys", f"norm: OpenCV's descriptor has 'L2-Hys' only, got {norm!r}"
    )
    grid = tuple(size // side for size, side in zip(images.shape[-2:], cells))
    require(
        all(have >= need for have, need in zip(grid, blocks)),
        f"block: got {show(block)} cells of {show(cell)} pixels, but an image of {images.shape[-2]} x {images.shape[-1]} has "
        f"{grid[0]} x {grid[1]} cells; expected a smaller block or smaller cells",
    )
    require(not sqrt or bool((images >= 0).all()), "sqrt: an image has negative intensities")
    dtype = images.dtype
    if dtype == torch.uint8:
        # OpenCV's own precision; differences of bytes are exact.
        dtype = torch.float32 if like == "opencv" else torch.float64
    # A part at a time, whose buffers stay in the processor's cache.
    hard = like == "skimage" and binning == "hard"
    part = max(1, (_PART if hard else _PART_OF_VOTES) // (images.shape[-2] * images.shape[-1]))
    room = Room(images.new_empty(0, dtype=dtype), not (torch.is_grad_enabled() and images.requires_grad))
    shares = (
        None
        if hard
        else _Shares(images, dtype, part, cells, blocks if like == "opencv" else None, orientations)
    )

    def described(some: Tensor) -> Tensor:
        some = some.to(dtype).sqrt() if sqrt else some.to(dtype)
        gradient = _strongest(*_gradient(some, room), room)
        if shares is None:
            histogram = _voted(*gradient, orientations, signed, cells, room)
        else:
            histogram = _interpolated(*gradient, signed, shares, room)
        return _opencv(histogram, blocks) if like == "opencv" else _blocks(histogram, blocks, norm)

    parts = list(by_part(described, images, part, room)) or [described(images)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def hog_length(
    height: int, width: int, orientations: int = 9, cell: Pair = 8, block: Pair = 2
) -> tuple[int, int, int, int, int]:
    """Block rows, block columns, cell rows and cell columns of a block, and bins: the sizes of :func:`hog`'s numbers, in order.

    >>> hog_length(32, 32)
    (3, 3, 2, 2, 9)
    """
    cells, blocks = pair("cell", cell), pair("block", block)
    rows, columns = (size // side - b + 1 for size, side, b in zip((height, width), cells, blocks))
    return rows, columns, *blocks, orientations


def pair(what: str, value: Pair) -> tuple[int, int]:
    """One size for both sides, or one for each."""
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    require(len(sides) == 2, f"{what}: got {show(value)}, expected a whole number or a pair of them")
    for side in sides:
        number(what, side, low=1, integer=True)
    return int(sides[0]), int(sides[1])


def _gradient(images: Tensor, room: Room) -> tuple[Tensor, Tensor]:
    """Central differences along rows and columns of [n, channels, h, w], zero at the border."""
    up, right = room("vertical", images.shape), room("horizontal", images.shape)
    if up is not None and right is not None:
        torch.sub(images[:, :, 2:], images[:, :, :-2], out=up[:, :, 1:-1])
        torch.sub(images[..., 2:], images[..., :-2], out=right[..., 1:-1])
        return up, right
    rows = F.pad(images[:, :, 2:] - images[:, :, :-2], (0, 0, 1, 1)) if images.shape[2] > 2 else None
    columns = F.pad(images[..., 2:] - images[..., :-2], (1, 1)) if images.shape[3] > 2 else None
    zero = torch.zeros_like(images)
    return zero if rows is None else rows, zero if columns is None else columns


def _strongest(vertical: Tensor, horizontal: Tensor, room: Room) -> tuple[Tensor, Tensor, Tensor]:
    """The longest gradient of all channels at each pixel, and its length, [n, h, w]."""
    size = room("size", vertical.shape)
    if size is not None:
        torch.mul(vertical, vertical, out=size).addcmul_(horizontal, horizontal).sqrt_()
        if size.numel() and not bool(size.max().isfinite()):
            torch.hypot(vertical, horizontal, out=size)
    else:
        # The length of no gradient has no derivative: none is passed on.
        still = (vertical == 0) & (horizontal == 0)
        size = torch.hypot(vertical, horizontal.masked_fill(still, 1)).masked_fill(still, 0)
    if size.shape[1] > 1:
        strongest = size.argmax(1, keepdim=True)
        vertical, horizontal, size = (v.gather(1, strongest) for v in (vertical, horizontal, size))
    return vertical[:, 0], horizontal[:, 0], size[:, 0]


def _voted(
    vertical: Tensor,
    horizontal: Tensor,
    size: Tensor,
    count: int,
    signed: bool,
    cells: tuple[int, int],
    room: Room,
) -> Tensor:
    """Mean votes [n, bins, cell rows, cell columns], each for one bin of one cell."""
    grid = [side // cell for side, cell in zip(size.shape[1:], cells)]
    rows, columns = (k * cell for k, cell in zip(grid, cells))
    vertical, horizontal, size = (v[:, :rows, :columns] for v in (vertical, horizontal, size))
    slots, bins = _slots(vertical.detach(), horizontal.detach(), count, signed, room)
    n, places, length = len(size), grid[0] * grid[1], len(bins) * grid[0] * grid[1]
    device = size.device
    across = torch.arange(columns, device=device, dtype=torch.int32) // cells[1]
    place = (torch.arange(rows, device=device, dtype=torch.int32) // cells[0])[:, None] * grid[1] + across
    if room.reuse:
        # One histogram of the whole part.
        place = place + (torch.arange(n, device=device, dtype=torch.int32) * length)[:, None, None]
        flat = slots.to(torch.int32).mul_(places).add_(place).flatten()
        votes = torch.bincount(flat, size.flatten(), n * length).to(size)
    else:
        flat = (slots.long() * places + place).flatten(1)
        votes = size.new_zeros(n, length).scatter_add(1, flat, size.flatten(1))
    votes = votes.view(n, len(bins), *grid) / (cells[0] * cells[1])
    return votes.new_zeros(n, count, *grid).index_add(1, torch.tensor(bins, device=device), votes)


def _slots(
    vertical: Tensor, horizontal: Tensor, count: int, signed: bool, room: Room
) -> tuple[Tensor, list[int]]:
    """Which stretch between two edges of bins each gradient points into, as floats, and the bin of each stretch.

    A slope is compared with those of the edges: there is no angle that could be rounded to the wrong side. What has no gradient lies in any stretch.
    """
    # Upwards is upwards from -0.0, too.
    slope = torch.div(vertical, horizontal + 0.0 if signed else horizontal, out=room("slope", vertical.shape))
    reached = room("reached", vertical.shape)
    slots = room("slots", vertical.shape)
    slots = torch.zeros_like(slope) if slots is None else slots.zero_()
    edges, bins = _stretches(count, signed)
    if slope.dtype == torch.float64 and 1.0 in edges:
        _to_diagonals(slope, vertical, horizontal, room("gap", slope.shape))
    # So flat or so steep that rounding may have made it: horizontal, or vertical.
    eps = torch.finfo(slope.dtype).eps
    edges = [min(edge or -eps, 1.289 / eps) for edge in edges]
    for edge in torch.tensor(edges, dtype=slope.dtype).unbind():
        slots += slope >= edge if reached is None else torch.ge(slope, edge, out=reached)
    if signed:
        left = (horizontal < 0).to(slope.dtype)
        slots.add_(left, alpha=len(edges) + 1)
    return slots, bins


def _to_diagonals(slope: Tensor, vertical: Tensor, horizontal: Tensor, gap: Tensor | None) -> None:
    """Make slopes ±1 that are so near to it that their angle in degrees, in double precision, is 45 or 135.

    Differences of grey levels that were divided by 255 are rounded, so that many an edge of 45 degrees is off by a last place. How far below it an angle is
    still taken for it follows from the spacing of numbers in its quadrant; the difference of two near lengths is exact.
    """
    gap = torch.abs(slope, out=gap).sub_(1).abs_()
    near = (gap < 1e-15).logical_and_(gap).nonzero(as_tuple=True)
    y, x = vertical[near], horizontal[near]
    rising, up = (y > 0) == (x > 0), y > 0
    y, x = y.abs(), x.abs()
    room = torch.where(rising, torch.where(up, 0.7757659, 1.1727021), torch.where(up, 2.8272978, 2.2242340))
    reached = torch.where(rising, x - y, y - x) <= room * torch.finfo(x.dtype).eps * x
    slope[near] = torch.where(reached, torch.where(rising, 1.0, -1.0).to(x), slope[near])


@lru_cache(maxsize=32)
def _stretches(count: int, signed: bool) -> tuple[list[float], list[int]]:
    """Slopes of the edges of bins in ascending order, and the bin of each stretch between them, from straight down to straight up on the right, then on the left."""
    whole = Fraction(360 if signed else 180)
    # Angles from -90 (not itself an edge to cross) to 90.
    angles = sorted({(whole * k / count + 90) % 180 or Fraction(180) for k in range(count)})
    edges = [_slope(angle - 90) for angle in angles]
    starts = [Fraction(-90), *(angle - 90 for angle in angles)]
    turns = (0, 180) if signed else (0,)
    return edges, [int(((start + turn) % whole) * count // whole) for turn in turns for start in starts]


def _slope(degrees: Fraction) -> float:
    """The tangent, exact where binary images need it."""
    exact = {-45: -1.0, 0: 0.0, 45: 1.0, 90: math.inf}
    return exact[int(degrees)] if degrees in exact else math.tan(math.radians(degrees))


class _Shares:
    """What interpolated votes need for all parts of a batch.

    ``rows`` [cells, height] and ``columns`` [cells, width] are what each pixel gives to each cell, with ``blocks`` to each cell of each block as in OpenCV. Each
    pixel has ``slots`` of its own from ``first`` on, one for each bin of a range of angles that is wider than the bins; ``fold`` [slots, bins] makes the bins of them.
    """

    def __init__(
        self,
        images: Tensor,
        dtype: torch.dtype,
        part: int,
        cells: tuple[int, int],
        blocks: tuple[int, int] | None,
        count: int,
    ) -> None:
        n, sides, device = min(part, len(images)), images.shape[2:], images.device
        self.rows, self.columns = (_weights(images, dtype, k, cells, blocks) for k in (0, 1))
        self.half, self.slots = (count + 1) // 2, count + 3
        length = n * sides.numel() * self.slots
        self.first = torch.arange(0, length, self.slots, device=device).view(n, *sides)
        bins = (torch.arange(self.slots, device=device) - 1 - self.half) % count
        self.fold = (bins[:, None] == torch.arange(count, device=device)).to(dtype)


def _weights(
    images: Tensor, dtype: torch.dtype, k: int, cells: tuple[int, int], blocks: tuple[int, int] | None
) -> Tensor:
    """Along side k of the images: what each pixel gives to each cell, or to each cell of each block."""
    like = {"dtype": dtype, "device": images.device}
    if blocks is None:
        weights = torch.ones(1, cells[k], **like) / cells[k]
    else:
        at = torch.arange(cells[k] * blocks[k], **like)
        sigma = (cells[0] * blocks[0] + cells[1] * blocks[1]) / 8
        centre = (torch.arange(blocks[k], **like) + 0.5) * cells[k]
        weights = (1 - (at + 0.5 - centre[:, None]).abs() / cells[k]).clamp(min=0)
        weights = weights * torch.exp(-((at - len(at) / 2) ** 2) / (2 * sigma**2))
    room = images.shape[2 + k] - weights.shape[1]
    return torch.cat([F.pad(weights, (start, room - start)) for start in range(0, room + 1, cells[k])])


def _interpolated(
    vertical: Tensor, horizontal: Tensor, size: Tensor, signed: bool, shares: _Shares, room: Room
) -> Tensor:
    """Votes [n, bins, rows, columns], each for the two bins whose centres are nearest."""
    n, height, width = size.shape
    slots, count = shares.fold.shape
    if room.reuse and not signed:
        place = torch.div(vertical, horizontal, out=room("place", size.shape))
        place = place.nan_to_num_(0.0, math.inf, -math.inf).atan_()
    else:
        right = horizontal + (size == 0).to(horizontal.dtype)
        side = 1.0 if signed else 1 - 2 * (right < 0).to(right.dtype)
        place = torch.atan2(vertical * side, right * side)
    # In bins from the centre of the slot before the lowest angle's.
    turn = count / (2 * math.pi if signed else math.pi)
    place = torch.add(
        place * turn if not room.reuse else place.mul_(turn),
        shares.half + 0.5,
        out=room("turned", size.shape),
    )
    low = torch.floor(place.detach(), out=room("low", size.shape))
    place = torch.sub(place, low, out=room("place", size.shape))
    upper = torch.mul(size, place, out=room("upper", size.shape))
    lower = torch.sub(size, upper, out=room("lower", size.shape))
    at = torch.add(shares.first[:n], low.long()).flatten()
    votes = room("votes", (n * height * width * slots,))
    votes = size.new_zeros(n * height * width * slots) if votes is None else votes.zero_()
    votes.scatter_add_(0, at, lower.flatten())
    votes[1:].scatter_add_(0, at, upper.flatten())
    found = shares.rows @ votes.view(n, height, width * slots)
    found = shares.columns @ found.unflatten(2, (width, slots))
    return (found @ shares.fold).permute(0, 3, 1, 2)


def _blocks(histogram: Tensor, blocks: tuple[int, int], norm: str) -> Tensor:
    """Normalised blocks of cells [n, bins, cell rows, cell columns], which overlap."""
    # [n, bins, block rows, block columns, cell rows, cell columns]
    found = histogram.unfold(2, blocks[0], 1).unfold(3, blocks[1], 1)
    found = found.permute(0, 2, 3, 4, 5, 1).flatten(3)
    return _normalised(found, norm).flatten(1)


def _normalised(found: Tensor, norm: str, eps: float = 1e-5) -> Tensor:
    if norm in ("L1", "L1-sqrt"):
        found = found / (found.abs().sum(-1, keepdim=True) + eps)
        return found.sqrt() if norm == "L1-sqrt" else found
    found = _length_one(found, eps)
    return _length_one(found.clamp(max=0.2), eps) if norm == "L2-Hys" else found


def _length_one(found: Tensor, eps: float) -> Tensor:
    return found / (torch.linalg.vecdot(found, found)[..., None] + eps**2).sqrt()


def _opencv(found: Tensor, blocks: tuple[int, int]) -> Tensor:
    """Blocks as OpenCV normalises them, of what each pixel of a block gave to the cells around it; columns of blocks and cells come first."""
    # [n, block columns, block rows, cell columns, cell rows, bins]
    found = (
        found.unflatten(3, (-1, blocks[1])).unflatten(2, (-1, blocks[0])).permute(0, 4, 2, 5, 3, 1).flatten(3)
    )
    found = found / (torch.linalg.vector_norm(found, dim=-1, keepdim=True) + 0.1 * found.shape[-1])
    found = found.clamp(max=0.2)
    return (found / (torch.linalg.vector_norm(found, dim=-1, keepdim=True) + 1e-3)).flatten(1)
