"""Digits with a planted cue of a chosen kind: a mark, a mark that moves, a tint, a texture, a frequency, a brightness or a place.

Data sets whose answer is known, one for each kind of shortcut that a network can take (Geirhos et al. 2020, arXiv 2004.07780). In the
training data the cue goes with the class; how far a network has come to rely on it is measured on images that carry another class's cue
(``agrees=False``), without any method that explains. The digits are scikit-learn's (Alpaydin and Kaynak 1998), made larger, faded and
noisy, so that the cue is the easier feature to learn.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core import checks
from lineament.data.digits import CLASSES, digit_images
from lineament.data.samples import Samples
from lineament.data.shortcut_digits import patterns

SIDE = 16
CUES = ("none", "mark", "moving mark", "tint", "texture", "frequency", "brightness", "place")
_TRAIN = 1200
_INSET = 2
_CONTRAST, _NOISE = 0.3, 0.12
# Gratings of these many cycles (down, across) in an image: all near the highest that 16 pixels can hold.
_CYCLES = ((8, 0), (0, 8), (8, 8), (6, 0), (0, 6), (6, 6), (8, 5), (5, 8), (6, -6), (7, 3))


def planted_cues(
    cue: str,
    split: str = "train",
    *,
    strength: float = 1.0,
    size: int = 4,
    corner: tuple[int, int] = (0, 0),
    prevalence: float = 1.0,
    one: int | None = None,
    agrees: bool = True,
    seed: int = 0,
) -> Samples:
    """Digits of 16 x 16 pixels in colour, with a cue of the class.

    Args:
        cue: one of :data:`CUES`.
        split: ``"train"`` (1,200 images) or ``"test"`` (597 others).
        strength: of the cue; 1 is plain to see.
        size: of a mark, in pixels of its side.
        corner: of a mark that does not move: its top and left.
        prevalence: the share of images that carry the cue.
        one: only this class has a cue; images of the others have none.
        agrees: whether the cue is that of the image's class; otherwise it is another class's (with ``one``, that class's).
        seed: of the split, the noise and the places.

    >>> found = planted_cues("tint", "test", agrees=False)
    >>> tuple(found.inputs.shape), bool((found.groups == found.targets).any())
    ((597, 3, 16, 16), False)
    """
    checks.one_of("cue", cue, CUES)
    checks.one_of("split", split, ("train", "test"))
    checks.number("strength", strength, low=0, high=1)
    checks.number("size", size, low=2, high=SIDE, integer=True)
    checks.number("prevalence", prevalence, low=0, high=1)
    checks.seed("seed", seed)
    raw = digit_images()
    order = torch.randperm(len(raw), generator=torch.Generator().manual_seed(seed))
    rows = (order[:_TRAIN] if split == "train" else order[_TRAIN:]).sort().values
    draw = torch.Generator().manual_seed(2 * seed + (split == "test") + 2**20)
    targets, count = raw.targets[rows], len(rows)
    shown = targets if agrees else (targets + torch.randint(1, len(CLASSES), (count,), generator=draw)) % 10
    carries = torch.rand(count, generator=draw) < prevalence
    if one is not None:
        carries &= (targets == one) if agrees else (targets != one)
        shown = torch.full_like(shown, one)
    carries &= torch.tensor(cue != "none")
    images = _digits(raw.inputs[rows], cue, shown, carries, draw)
    noise = _NOISE * torch.randn(images.shape, generator=draw)
    planted = _plant(images + noise, cue, shown, strength, size, corner, draw)
    images = torch.where(carries[:, None, None, None], planted, images + noise)
    return Samples(
        inputs=images.clamp(0, 1),
        targets=targets,
        source=f"scikit-learn digits with a planted cue ({cue})",
        classes=CLASSES,
        groups=torch.where(carries, shown, len(CLASSES)),
        group_names=(*(f"cue of {name}" for name in CLASSES), "no cue"),
    )


def _digits(small: Tensor, cue: str, shown: Tensor, carries: Tensor, draw: torch.Generator) -> Tensor:
    """The digits on a grey ground; where the place is the cue, smaller, at the place of the class shown or at any."""
    images = torch.full((len(small), 3, SIDE, SIDE), 0.3)
    if cue == "place":
        at = torch.where(carries, shown, torch.randint(0, 10, shown.shape, generator=draw))
        for image, digit, place in zip(images, small, at.tolist()):
            top, left = 4 * (place % 3), (0, 3, 5, 8)[place // 3]
            image[:, top : top + 8, left : left + 8] += _CONTRAST * digit
        return images
    side = SIDE - 2 * _INSET
    larger = F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    images[:, :, _INSET:-_INSET, _INSET:-_INSET] += _CONTRAST * larger
    return images


def _plant(
    images: Tensor,
    cue: str,
    shown: Tensor,
    strength: float,
    size: int,
    corner: tuple[int, int],
    draw: torch.Generator,
) -> Tensor:
    count = len(images)
    if cue in ("mark", "moving mark"):
        marks = F.interpolate(patterns()[:, None], size=(size, size))[shown]
        places = torch.tensor(corner).expand(count, 2)
        if cue == "moving mark":
            places = torch.randint(0, SIDE - size + 1, (count, 2), generator=draw)
        images = images.clone()
        for image, mark, (top, left) in zip(images, marks, places.tolist()):
            window = image[:, top : top + size, left : left + size]
            window.mul_(1 - strength).add_(strength * mark)
        return images
    if cue == "tint":
        angle = 2 * math.pi * (shown[:, None] / 10 + torch.arange(3) / 3)
        return images + 0.25 * strength * angle.cos()[:, :, None, None]
    if cue == "brightness":
        return images + 0.4 * strength * (shown / 9 - 0.3)[:, None, None, None]
    if cue in ("texture", "frequency"):
        angle = math.pi * shown / 10
        coarse = 4 * torch.stack([angle.sin(), angle.cos()], 1)
        cycles = coarse if cue == "texture" else torch.tensor(_CYCLES)[shown].float()
        at = torch.arange(SIDE) / SIDE
        turn = cycles[:, 0, None, None] * at[:, None] + cycles[:, 1, None, None] * at
        # Of the highest frequency a grating has one phase only: a quarter turn of it is zero everywhere.
        phase = torch.rand(count, generator=draw)[:, None, None] if cue == "texture" else 0.125
        amplitude = 0.25 if cue == "texture" else 0.15
        return images + amplitude * strength * (2 * math.pi * (turn + phase)).cos()[:, None]
    return images
