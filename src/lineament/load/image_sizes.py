"""Stored images brought to another size: bilinear, smoothed first where they become smaller."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from lineament.core.checks import require, show
from lineament.data.samples import Samples

# Grey, colour, and colour with transparency.
_CHANNELS = (1, 3, 4)


def brought_to(held: Samples, size: tuple[int, int]) -> Samples:
    """Samples whose images have ``size`` (height, width), which is noted; those that have it already are left as they are.

    Raises:
        InputError: samples that are no images, targets that belong to their pixels.

    >>> import torch
    >>> digits = Samples(torch.zeros(5, 1, 8, 8), torch.zeros(5, dtype=torch.long))
    >>> brought_to(digits, (32, 32)).inputs.shape
    torch.Size([5, 1, 32, 32])
    """
    x = held.inputs
    images = isinstance(x, Tensor) and (
        x.ndim == 3 or (x.ndim == 4 and (x.shape[1] in _CHANNELS or x.shape[3] in _CHANNELS))
    )
    require(images, f"image_size: got {size[0]} x {size[1]}, but the samples are {show(x)}, expected images")
    last = x.ndim == 4 and x.shape[1] not in _CHANNELS
    planes = x.movedim(3, 1) if last else x
    before = tuple(planes.shape[-2:])
    # A reader of files may have brought them there already.
    if size in (before, tuple(x.shape[1:3])):
        return held
    targets = held.targets
    require(
        not (isinstance(targets, Tensor) and tuple(targets.shape[-2:]) == before and targets.ndim > 2),
        f"image_size: got {size[0]} x {size[1]}, but the targets {show(targets)} belong to the images' pixels; expected images of their size",
    )
    floats = planes if planes.is_floating_point() else planes.float()
    made = F.interpolate(floats.reshape(-1, 1, *before), size, mode="bilinear", antialias=True)
    made = made.reshape(*planes.shape[:-2], *size)
    if not planes.is_floating_point():
        made = made.round_().to(planes.dtype)
    note = f"images of {before[0]} x {before[1]} pixels are brought to {size[0]} x {size[1]}"
    return replace(held, inputs=made.movedim(1, 3) if last else made, notes=(*held.notes, note))
