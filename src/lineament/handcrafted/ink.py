"""Digits as descriptors like them: bright ink on dark paper, cut out, centred and of one size.

Each step is a switch, and the result says what was done to how many images. Cropping matters most where digits float in the frame.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core.checks import number, require
from lineament.core.results import Readable
from lineament.handcrafted.images import batch_of, by_part, grey_of

# Pixels at a time.
_PART = 1 << 18


@dataclass(frozen=True)
class Ink(Readable):
    """``images`` [n, size, size] in [0, 1]; ``notes`` say what was done."""

    images: Tensor
    notes: tuple[str, ...]


def ink(
    images: Tensor,
    *,
    size: int | None = 32,
    white: float | None = None,
    polarity: bool = True,
    otsu: bool = False,
    crop: bool = True,
    margin: int = 2,
) -> Ink:
    """Grey, scaled to [0, 1], ink bright, cropped to the ink with its aspect kept, centred and resized with anti-aliasing.

    Args:
        images: [n, height, width], or with channels.
        size: sides of the result; ``None`` leaves the images' size (and does not crop).
        white: the brightest grey level there can be. By default 1 for floats in [0, 1]; 255 for other numbers, or their largest where that
            is below 128: such data (NumtaDB's common copy ends at 20) would be almost black if divided by 255. The notes say so.
        polarity: invert an image whose border is bright (median above 1/2).
        otsu: make each image binary by Otsu's threshold.
        crop: cut the rectangle of the ink out (brighter than 1/2 of the image's maximum).
        margin: empty pixels around the cropped ink.

    Raises:
        InputError: images that are none, negative grey levels, levels above ``white``, a margin that leaves no room.

    >>> page = torch.full((1, 20, 30), 255, dtype=torch.uint8)
    >>> page[0, 5:9, 3:7] = 0
    >>> made = ink(page)
    >>> made.images.shape, made.images[0, 2:30, 2:30].min().item()
    (torch.Size([1, 32, 32]), 1.0)
    """
    batch = batch_of(images, keep_bytes=True)
    least, most = grey_levels(batch)
    require(least >= 0, f"images: the darkest grey level is {least:g}, expected levels from 0")
    notes = []
    if white is None:
        white, notes = white_of(images, most)
    number("white", white, low=0, open_low=True)
    require(
        most <= white * 1.0001, f"white: got {white:g}, but there is a grey level of {most:g} in the images"
    )
    found = drawn(batch, white, size=size, polarity=polarity, otsu=otsu, crop=crop, margin=margin)
    return Ink(found.images, (*notes, *found.notes))


def grey_levels(images: Tensor) -> tuple[float, float]:
    """The darkest and the brightest grey level of [n, channels, height, width]; 0 and 0 where there are no images."""

    def ends(part: Tensor) -> tuple[float, float]:
        # Bytes stay bytes: their ends need no other numbers.
        low, high = grey_of(part, keep_bytes=True).aminmax()
        return float(low), float(high)

    found = list(by_part(ends, images, _part(images)))
    return (min(low for low, _ in found), max(high for _, high in found)) if found else (0.0, 0.0)


def white_of(images: Tensor, most: float) -> tuple[float, list[str]]:
    """The brightest grey level that there can be, by what kind of numbers ``images`` are and the brightest there is, and what is to be told of it."""
    if images.is_floating_point() and most <= 1:
        return 1.0, []
    if 0 < most < 128:
        return most, [f"grey levels end at {most:g}, not 255: divided by {most:g}"]
    return 255.0, []


def drawn(
    batch: Tensor, white: float, *, size: int | None, polarity: bool, otsu: bool, crop: bool, margin: int
) -> Ink:
    """:func:`ink` of [n, channels, height, width] whose grey levels are cut to [0, ``white``], a part at a time, so that memory beside the result does not grow with their number."""
    if size is not None:
        number("size", size, low=1, integer=True)
        number("margin", margin, low=0, high=(size - 1) // 2, integer=True)
    count, _, height, width = batch.shape
    like = batch.new_empty(0, dtype=torch.float64) if batch.dtype == torch.uint8 else batch
    made = like.new_empty(count, size or height, size or width)
    inverted = done = 0

    def of(part: Tensor) -> tuple[Tensor, int]:
        grey = (grey_of(part) / white).clamp(0, 1)
        dark = torch.zeros(len(grey), dtype=torch.bool, device=grey.device)
        if polarity:
            border = torch.cat([grey[:, 0], grey[:, -1], grey[:, :, 0], grey[:, :, -1]], 1)
            dark = border.median(1).values > 0.5
            grey = torch.where(dark[:, None, None], 1 - grey, grey)
        if otsu:
            grey = (grey > _otsu(grey)[:, None, None]).to(grey.dtype)
        return (grey if size is None else _sized(grey, size, crop, margin)), int(dark.sum())

    for some, dark in by_part(of, batch, _part(batch)):
        made[done : done + len(some)] = some
        done, inverted = done + len(some), inverted + dark
    if not count:
        return Ink(made, ())
    notes = []
    if polarity:
        notes.append(f"inverted {inverted:,} of {count:,} images with a bright border")
    if otsu:
        notes.append("binary by Otsu's threshold")
    if size is not None and crop:
        notes.append(f"cropped to the ink and centred in {size - 2 * margin} of {size} pixels")
    elif size is not None:
        notes.append(f"resized from {height} x {width} to {size} x {size}")
    return Ink(made, tuple(notes))


def _part(images: Tensor) -> int:
    """How many images are worked on at a time."""
    return max(1, _PART // (images.shape[-2] * images.shape[-1]))


def _sized(grey: Tensor, size: int, crop: bool, margin: int) -> Tensor:
    """[n, size, size]: each image, or the ink in it, in the middle of ``size - 2 margin`` pixels."""
    if crop:
        bright = grey > grey.amax((1, 2), keepdim=True) / 2
        spans = [_span(bright.any(axis)) for axis in (2, 1)]
    else:
        whole = torch.tensor([[0, side] for side in grey.shape[1:]], device=grey.device)
        spans = [side.expand(len(grey), 2) for side in whole]
        margin = 0
    longest = torch.maximum(*(span[:, 1] - span[:, 0] for span in spans)).double()
    scale = longest / (size - 2 * margin)
    rows, columns = (
        _resize(span, scale, size, side, crop).to(grey) for span, side in zip(spans, grey.shape[1:])
    )
    return rows @ grey @ columns.mT


def _span(there: Tensor) -> Tensor:
    """First and one past the last true entry of each row, [n, 2]; all of it where none is."""
    side = there.shape[1]
    first = there.int().argmax(1)
    last = side - there.flip(1).int().argmax(1)
    none = ~there.any(1)
    return torch.stack([torch.where(none, 0, first), torch.where(none, side, last)], 1)


def _resize(span: Tensor, scale: Tensor, size: int, side: int, aspect: bool) -> Tensor:
    """[n, size, side]: bilinear resizing, anti-aliased, of each image's own span to the middle of ``size`` pixels.

    One scale (source pixels a pixel) for rows and columns keeps the aspect.
    """
    start, stop = (v.double()[:, None, None] for v in span.unbind(1))
    step = scale[:, None, None] if aspect else (stop - start) / size
    out = torch.arange(size, device=span.device, dtype=torch.float64)[:, None] + 0.5
    at = torch.arange(side, device=span.device, dtype=torch.float64) + 0.5
    source = (start + stop) / 2 + (out - size / 2) * step
    inside = (at > start) & (at < stop)
    weights = (1 - (at - source).abs() / step.clamp(min=1)).clamp(min=0) * inside
    total = weights.sum(2, keepdim=True)
    # What lies outside the span is paper.
    covered = (source >= start) & (source <= stop)
    return torch.where(covered & (total > 0), weights / total.clamp(min=1e-12), 0)


def _otsu(grey: Tensor, levels: int = 256) -> Tensor:
    """The threshold that separates each image into the two classes of largest between-class variance, [n]."""
    index = (grey.flatten(1) * (levels - 1)).round().long()
    counts = torch.zeros(len(grey), levels, dtype=torch.float64, device=grey.device)
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float64))
    level = torch.arange(levels, device=grey.device, dtype=torch.float64) / (levels - 1)
    below = counts.cumsum(1)
    weighted = (counts * level).cumsum(1)
    above = below[:, -1:] - below
    gap = weighted / below.clamp(min=1) - (weighted[:, -1:] - weighted) / above.clamp(min=1)
    between = below * above * gap**2
    return (level[between.argmax(1)] + 0.5 / (levels - 1)).to(grey.dtype)
