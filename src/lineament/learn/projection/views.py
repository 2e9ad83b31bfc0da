"""What a view of a sample is: random changes that leave what it shows, as operations on whole batches.

They draw from the global random state, as dropout does, which :func:`lineament.train.fit` sets for each epoch and process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lineament.core.checks import one_of, require, show
from lineament.data.augmentation import crop, flip


def _shape(x: Tensor) -> tuple[int, ...]:
    return (len(x), *(1,) * (x.ndim - 1))


def jitter(x: Tensor) -> Tensor:
    """Each sample's contrast times a factor in 0.6 to 1.4, and a shift of up to 0.4 of its deviation."""
    dims = tuple(range(1, x.ndim))
    centre, spread = x.mean(dims, keepdim=True), x.std(dims, keepdim=True, correction=0)
    factor, shift = (0.8 * torch.rand(_shape(x), device=x.device, dtype=x.dtype) - 0.4 for _ in range(2))
    return centre + (1 + factor) * (x - centre) + shift * spread


def noise(x: Tensor) -> Tensor:
    """Gaussian noise of a tenth of the batch's deviation."""
    return x + 0.1 * x.std(correction=0) * torch.randn_like(x)


def erase(x: Tensor) -> Tensor:
    """A random window of half the sides (of features: a quarter of them) set to the batch's mean."""
    if x.ndim != 4:
        return torch.where(torch.rand(x.shape, device=x.device) < 0.25, x.mean(), x)
    height, width = x.shape[2:]
    inside = torch.ones(len(x), 1, 1, 1, dtype=torch.bool, device=x.device)
    for axis, side in ((2, height), (3, width)):
        start = torch.randint(side - side // 2 + 1, (len(x), 1), device=x.device)
        place = torch.arange(side, device=x.device)
        own = (place >= start) & (place < start + side // 2)
        inside = inside & own.view(len(x), 1, *((side, 1) if axis == 2 else (1, side)))
    return torch.where(inside, x.mean(), x)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": flip,
    "crop": lambda x: crop(x, pad=max(1, min(x.shape[2:]) // 8)),
    "jitter": jitter,
    "noise": noise,
    "erase": erase,
}


def view(x: Tensor, names: Sequence[str]) -> Tensor:
    """A view of each sample of a batch: the named changes of :data:`VIEWS`, one after the other.

    Raises:
        InputError: an unknown change, whole numbers, or a flip or crop of what is no image.

    >>> view(torch.ones(2, 1, 8, 8), ["flip", "crop"]).shape
    torch.Size([2, 1, 8, 8])
    """
    require(x.is_floating_point() or not names, f"views: samples are {show(x)}, expected real numbers")
    for name in names:
        one_of("views", name, VIEWS)
        require(
            x.ndim == 4 or name not in ("flip", "crop"),
            f"views: {name} is for images, got samples {show(x)}; expected jitter, noise or erase",
        )
        x = VIEWS[name](x)
    return x
