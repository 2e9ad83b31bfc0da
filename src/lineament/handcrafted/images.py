"""What the descriptors take: a batch of images of one size, grey or with channels, and cells over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lineament.core.batching import auto_batch
from lineament.core.checks import InputError, require, show

T = TypeVar("T")


class Room:
    """Buffers by name that one part of a batch leaves to the next: memory that was not used before costs more than the arithmetic on it.

    Without ``reuse``, which gradients forbid, it has none, and ``out=None`` makes a new tensor.
    """

    def __init__(self, like: Tensor, reuse: bool = True) -> None:
        self.like, self.reuse = like, reuse
        self.kept: dict[tuple[str, torch.dtype | None], Tensor] = {}

    def __call__(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor | None:
        """A contiguous buffer, zeros when it is first given."""
        if not self.reuse:
            return None
        found = self.kept.get((name, dtype))
        if found is None or found.shape[1:] != torch.Size(shape[1:]) or len(found) < shape[0]:
            found = self.kept[name, dtype] = self.like.new_zeros(tuple(shape), dtype=dtype)
        return found[: shape[0]]


def by_part(work: Callable[[Tensor], T], images: Tensor, most: int, room: Room | None = None) -> Iterator[T]:
    """``work(some images)`` of ``most`` at a time, in order; where memory runs out the buffers are given back and a part is begun anew with half as many.

    >>> list(by_part(len, torch.zeros(5, 2, 2), 2))
    [2, 2, 1]
    """

    def run(start: int, stop: int) -> T:
        try:
            return work(images[start:stop])
        except Exception:
            if room is not None:
                room.kept.clear()
            raise

    like = (images.shape[1:], images.dtype, images.device)
    return auto_batch(run, len(images), most=most, memory=(work, like))


def batch_of(images: Tensor, *, keep_bytes: bool = False) -> Tensor:
    """Images as [n, channels, height, width] numbers: [n, h, w] are grey, integers (bytes only where they are not kept) and booleans become float64.

    Raises:
        InputError: not 3 or 4 dimensions, an empty image, NaN or infinity.
    """
    if not isinstance(images, Tensor):
        raise InputError(f"images: got {show(images)}, expected a tensor [n, height, width]")
    require(
        images.ndim in (3, 4) and 0 not in images.shape[1:],
        f"images: got {show(images)}, expected [n, height, width] or [n, channels, height, width]"
        + (", so one image is images[None]" if images.ndim == 2 else ""),
    )
    require(not images.is_complex(), f"images: got {show(images)}, expected real numbers")
    if not images.is_floating_point():
        images = images if keep_bytes and images.dtype == torch.uint8 else images.double()
    else:
        if images.dtype in (torch.float16, torch.bfloat16):
            images = images.float()
        # A sum of finite numbers may overflow; one of others is never finite.
        if not bool(images.detach().sum().isfinite()):
            bad = ~images.isfinite().flatten(1).all(1)
            if bool(bad.any()):
                raise InputError(f"images: number {int(bad.int().argmax())} has NaN or infinity")
    return images if images.ndim == 4 else images[:, None]


def grey_of(images: Tensor, *, keep_bytes: bool = False) -> Tensor:
    """Images as [n, height, width]: three channels by their luma (0.299, 0.587, 0.114), other numbers of channels by their mean."""
    images = batch_of(images, keep_bytes=keep_bytes)
    if images.shape[1] == 1:
        return images[:, 0]
    images = images.double() if images.dtype == torch.uint8 else images
    if images.shape[1] == 3:
        return torch.einsum("nchw,c->nhw", images, images.new_tensor([0.299, 0.587, 0.114]))
    return images.mean(1)


def check_grid(grid: int, images: Tensor) -> int:
    """Return ``grid`` if an image [..., height, width] has so many cells along each side."""
    smaller = min(images.shape[-2:])
    require(
        isinstance(grid, (int, np.integer)) and not isinstance(grid, bool) and 1 <= grid <= smaller,
        f"grid: got {show(grid)}, expected a whole number from 1 to {smaller} (the image's smaller side), or None for the whole image",
    )
    return int(grid)


def cell_of(size: int, grid: int, device: torch.device) -> Tensor:
    """Which of ``grid`` cells of (nearly) equal size each of ``size`` pixels lies in."""
    return torch.arange(size, device=device) * grid // size


def cell_weights(size: int, grid: int, like: Tensor) -> Tensor:
    """[grid, size]: row i averages the pixels of cell i."""
    inside = cell_of(size, grid, like.device) == torch.arange(grid, device=like.device)[:, None]
    return inside.to(like.dtype) / inside.sum(1, keepdim=True)
