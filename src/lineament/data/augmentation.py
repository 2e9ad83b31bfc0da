"""Augmentation of image batches in memory, with all randomness from one generator: flips and crops, and TrivialAugment.

Müller and Hutter, ICCV 2021, arXiv 2103.10158 (TrivialAugment, wide space): one operation an image, at a uniform strength, no parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Shaped, UInt8
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from lineament.core import checks

Op = Callable[[Any, float, float], Any]  # image, strength in [0, 1], sign


def flip_and_crop(
    images: Shaped[Tensor, "batch channels height width"], generator: torch.Generator, *, pad: int = 4
) -> Shaped[Tensor, "batch channels height width"]:
    """Each image mirrored with probability one half, then cut out at random after padding by ``pad`` zeros.

    >>> flip_and_crop(torch.ones(2, 1, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 1, 8, 8])
    """
    return crop(flip(images, generator), generator, pad=pad)


def flip(
    images: Shaped[Tensor, "batch channels height width"], generator: torch.Generator | None = None
) -> Shaped[Tensor, "batch channels height width"]:
    """Each image mirrored with probability one half; without a generator the global random state draws.

    >>> flip(torch.ones(2, 1, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
    """
    checks.tensor("images", images, shape=("batch", "channels", "height", "width"))
    flips = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(flips[:, None, None, None], images.flip(3), images)


def crop(
    images: Shaped[Tensor, "batch channels height width"],
    generator: torch.Generator | None = None,
    *,
    pad: int = 4,
) -> Shaped[Tensor, "batch channels height width"]:
    """Each image cut out at random after padding by ``pad`` zeros; without a generator the global random state draws.

    >>> crop(torch.ones(2, 1, 8, 8), pad=0).mean().item()
    1.0
    """
    checks.tensor("images", images, shape=("batch", "channels", "height", "width"))
    count, _, height, width = images.shape
    windows = F.pad(images, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    at = torch.randint(2 * pad + 1, (2, count), generator=generator).to(images.device)
    return windows[torch.arange(count, device=images.device), :, at[0], at[1]]


def trivial_augment(
    images: UInt8[Tensor, "batch channels height width"], generator: torch.Generator
) -> UInt8[Tensor, "batch channels height width"]:
    """One operation of :data:`OPERATIONS` for each image, at one of 31 strengths, with a random sign.

    Raises:
        InputError: not uint8 images with one or three channels.

    >>> trivial_augment(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.Generator().manual_seed(0)).dtype
    torch.uint8
    """
    checks.tensor("images", images, shape=("batch", "channels", "height", "width"))
    checks.require(
        images.dtype == torch.uint8 and images.shape[1] in (1, 3),
        f"images: got {checks.show(images)}, expected uint8 with 1 or 3 channels",
    )
    count = len(images)
    which = torch.randint(len(OPERATIONS), (count,), generator=generator).tolist()
    strength = (torch.randint(31, (count,), generator=generator) / 30).tolist()
    sign = (torch.randint(2, (count,), generator=generator) * 2 - 1).tolist()
    operations = list(OPERATIONS.values())
    changed = []
    for pixels, w, s, up in zip(images.permute(0, 2, 3, 1).numpy(force=True), which, strength, sign):
        image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
        found = np.asarray(operations[w](image, s, up))
        changed.append(found if found.ndim == 3 else found[:, :, None])
    return torch.from_numpy(np.stack(changed)).permute(0, 3, 1, 2).contiguous().to(images.device)


def _affine(matrix: Callable[[float, int, int], tuple[float, ...]]) -> Op:
    def apply(image: Any, strength: float, sign: float) -> Any:
        data = matrix(strength * sign, *image.size)
        return image.transform(image.size, Image.Transform.AFFINE, data, resample=Image.Resampling.NEAREST)

    return apply


def _enhanced(kind: Any) -> Op:
    return lambda image, strength, sign: kind(image).enhance(1 + 0.99 * strength * sign)


# The wide space: shears to .99, shifts to 32 pixels, turns to 135 degrees, contrasts from .01 to 1.99, 2 to 8 bits.
OPERATIONS: dict[str, Op] = {
    "identity": lambda image, strength, sign: image,
    "shear_x": _affine(lambda v, w, h: (1, 0.99 * v, 0, 0, 1, 0)),
    "shear_y": _affine(lambda v, w, h: (1, 0, 0, 0.99 * v, 1, 0)),
    "translate_x": _affine(lambda v, w, h: (1, 0, 32 * v, 0, 1, 0)),
    "translate_y": _affine(lambda v, w, h: (1, 0, 0, 0, 1, 32 * v)),
    "rotate": lambda image, strength, sign: image.rotate(135 * strength * sign),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "color": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "posterize": lambda image, strength, sign: ImageOps.posterize(image, 8 - round(6 * strength)),
    "solarize": lambda image, strength, sign: ImageOps.solarize(image, round(255 * (1 - strength))),
    "autocontrast": lambda image, strength, sign: ImageOps.autocontrast(image),
    "equalize": lambda image, strength, sign: ImageOps.equalize(image),
}
