"""Views of photographs as SimCLR and MoCo v2 make them, for whole batches: resized crop, colours, grey, blur, mirror.

Chen et al. 2020, arXiv 2002.05709; Chen, Fan, Girshick, He 2020, arXiv 2003.04297. Everything but the order of the four changes of colour, which is one a
batch, is drawn for each picture, from the global random state as in :mod:`~lineament.learn.projection.views`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, require, show
from lineament.data.augmentation import flip

_RATIO = math.log(4 / 3)
_BLUR = 6  # pixels on each side: three deviations of the widest


def photograph_view(
    images: Shaped[Tensor, "batch 3 height width"], size: int, *, area: tuple[float, float] = (0.2, 1.0)
) -> Float[Tensor, "batch 3 size size"]:
    """MoCo v2's view of each photograph (its "augmentation plus"), in [0, 1].

    A part of the picture (``area`` of it, sides of 3/4 to 4/3) brought to ``size``; four times in five other brightness, contrast, saturation (by up to
    .4) and hue (.1); one in five grey; one in two blurred with a deviation of .1 to 2 pixels; one in two mirrored.

    Args:
        images: bytes, or real numbers in [0, 1].

    >>> photograph_view(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), 8).shape
    torch.Size([2, 3, 8, 8])
    """
    x = resized_crop(images, size, area=area)
    x = _some(x, 0.8, jittered)
    x = _some(x, 0.2, lambda part: grey(part).expand_as(part))
    return flip(_some(x, 0.5, blurred))


def resized_crop(
    images: Shaped[Tensor, "batch channels height width"],
    size: int,
    *,
    area: tuple[float, float] = (0.08, 1.0),
) -> Float[Tensor, "batch channels size size"]:
    """A part of each picture, ``area`` of it with sides of 3/4 to 4/3, brought to ``size`` bilinearly; sides that would not fit are cut to the picture's.

    >>> resized_crop(torch.ones(2, 3, 16, 12), 8).mean().item()
    1.0
    """
    require(images.ndim == 4, f"images: got {show(images)}, expected [batch, channels, height, width]")
    number("size", size, low=1, integer=True)
    low, high = (number("area", share, low=0, high=1, open_low=True) for share in area)
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    count, channels, height, width = x.shape
    share = _drawn(x, low, high)
    ratio = _drawn(x, -_RATIO, _RATIO).exp()
    wide = (share * ratio * height / width).sqrt().clamp(max=1)
    high_ = (share / ratio * width / height).sqrt().clamp(max=1)
    right, down = ((1 - side) * _drawn(x, -1.0, 1.0) for side in (wide, high_))
    zero = torch.zeros_like(wide)
    places = torch.stack([wide, zero, right, zero, high_, down], 1).view(count, 2, 3)
    grid = F.affine_grid(places, [count, channels, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def jittered(
    x: Float[Tensor, "batch 3 height width"], strengths: tuple[float, float, float, float] = (0.4, 0.4, 0.4, 0.1)
) -> Float[Tensor, "batch 3 height width"]:  # fmt: skip
    """Brightness, contrast and saturation times a factor of 1 ± strength, and the hue turned by up to ± strength of the circle, in random order.

    >>> x = torch.rand(2, 3, 4, 4)
    >>> bool((jittered(x, (0.0, 0.0, 0.0, 0.0)) - x).abs().max() < 1e-5)
    True
    """
    for which in torch.randperm(4).tolist():
        amount = _drawn(x, -strengths[which], strengths[which])[:, None, None, None]
        if which == 3:
            x = _turned(x, amount[:, 0])
            continue
        centre = (torch.zeros_like(x[:, :1]), grey(x).mean((2, 3), keepdim=True), grey(x))[which]
        x = (centre + (1 + amount) * (x - centre)).clamp(0, 1)
    return x


def grey(x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 1 height width"]:
    """The luma of Rec. 601, which is what greyscale means to Pillow.

    >>> round(grey(torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)).item(), 3)
    0.587
    """
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def blurred(
    x: Float[Tensor, "batch channels height width"], deviations: tuple[float, float] = (0.1, 2.0)
) -> Float[Tensor, "batch channels height width"]:
    """Each picture blurred by a Gaussian of a deviation between two, in pixels.

    >>> bool((blurred(torch.ones(2, 3, 8, 8)) - 1).abs().max() < 1e-5)
    True
    """
    channels, height, width = x.shape[1:]
    reach = min(_BLUR, height - 1, width - 1)
    at = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    weights = (-(at**2) / (2 * _drawn(x, *deviations)[:, None] ** 2)).softmax(1)
    weights = weights.repeat_interleave(channels, 0)[:, None, None]
    flat = F.pad(x, (reach,) * 4, mode="reflect").reshape(1, -1, height + 2 * reach, width + 2 * reach)
    for kernel in (weights, weights.mT):
        flat = F.conv2d(flat, kernel, groups=len(kernel))
    return flat.view(x.shape)


def _turned(x: Tensor, amount: Tensor) -> Tensor:
    """The hue turned by so much of the circle, value and saturation as they were."""
    value, chroma = x.amax(1), x.amax(1) - x.amin(1)
    red, green, blue = x.unbind(1)
    whole = chroma.clamp(min=1e-12)
    sixth = torch.where(
        value == red,
        ((green - blue) / whole) % 6,
        torch.where(value == green, (blue - red) / whole + 2, (red - green) / whole + 4),
    )
    sixth = sixth + 6 * amount
    parts = [(n + sixth) % 6 for n in (5, 3, 1)]
    return torch.stack([value - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in parts], 1)


def _drawn(x: Tensor, low: float, high: float) -> Tensor:
    """A number between two for each picture."""
    return low + (high - low) * torch.rand(len(x), device=x.device, dtype=x.dtype)


def _some(x: Tensor, share: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The pictures, each changed with this probability."""
    chosen = _drawn(x, 0.0, 1.0) < share
    return torch.where(chosen[:, None, None, None], change(x), x)
