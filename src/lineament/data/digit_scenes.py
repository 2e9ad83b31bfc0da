"""Scenes of two digits among clutter, with a mask of each: a small data set on which a map can be right or wrong.

Each canvas of 48 x 48 pixels holds two scikit-learn digits of different classes, enlarged to 16 x 16, six fragments of other
digits, and noise. The scanned digits of the training and of the test scenes are different ones. Two classes in one image are what a
pointing game needs: a map that ignores which class it was asked for is right half of the time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.data.digits import CLASSES, digit_images
from lineament.data.samples import Samples

_DIGIT = 16
_FRAGMENT = 7


def digit_scenes(
    count: int,
    *,
    split: str = "train",
    seed: int = 0,
    side: int = 48,
    fragments: int = 6,
    noise: float = 0.1,
) -> Samples:
    """Draw scenes; targets (scene, 10) are 1 for the two digits that are in it.

    ``extras["digits"]`` (scene, 2) says which two, ``extras["masks"]`` (scene, 2, side, side) where the pixels of each are.

    Args:
        count: how many.
        split: ``"train"`` or ``"test"``: which scanned digits they are made of.
        seed: of everything random; the two splits are different scenes for the same seed.
        side: pixels of the canvas's side, at least 47, so that two digits always fit.
        fragments: pieces of 7 x 7 pixels of other digits.
        noise: standard deviation of the Gaussian noise.

    >>> scenes = digit_scenes(4)
    >>> tuple(scenes.inputs.shape), int(scenes.targets.sum()), tuple(scenes.extras["masks"].shape)
    ((4, 1, 48, 48), 8, (4, 2, 48, 48))
    """
    checks.number("count", count, low=1, integer=True)
    checks.one_of("split", split, ("train", "test"))
    checks.number("side", side, low=3 * _DIGIT - 1, integer=True)
    checks.number("fragments", fragments, low=0, integer=True)
    checks.number("noise", noise, low=0)
    digits, labels = _digits(split)
    generator = torch.Generator().manual_seed(2 * checks.seed("seed", seed) + (split == "test"))

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    images = torch.zeros(count, 1, side, side)
    masks = torch.zeros(count, 2, side, side, dtype=torch.bool)
    classes = torch.zeros(count, 2, dtype=torch.int64)
    for n in range(count):
        first = draw(len(digits))
        second = draw(len(digits))
        while labels[second] == labels[first]:
            second = draw(len(digits))
        boxes: list[tuple[int, int]] = []
        for k, index in enumerate((first, second)):
            row, column = draw(side - _DIGIT + 1), draw(side - _DIGIT + 1)
            while any(abs(row - r) < _DIGIT and abs(column - c) < _DIGIT for r, c in boxes):
                row, column = draw(side - _DIGIT + 1), draw(side - _DIGIT + 1)
            boxes.append((row, column))
            window = (slice(row, row + _DIGIT), slice(column, column + _DIGIT))
            images[n, 0][window] = digits[index]
            masks[n, k][window] = digits[index] > 0.3
            classes[n, k] = labels[index]
        for _ in range(fragments):
            piece = digits[draw(len(digits))]
            top, left = draw(_DIGIT - _FRAGMENT + 1), draw(_DIGIT - _FRAGMENT + 1)
            row, column = draw(side - _FRAGMENT + 1), draw(side - _FRAGMENT + 1)
            # Clutter lies around the digits, never on them: the masks stay true.
            if any(-_FRAGMENT < row - r < _DIGIT and -_FRAGMENT < column - c < _DIGIT for r, c in boxes):
                continue
            patch = piece[top : top + _FRAGMENT, left : left + _FRAGMENT]
            images[n, 0, row : row + _FRAGMENT, column : column + _FRAGMENT] = patch
    images += noise * torch.randn(images.shape, generator=generator)
    targets = torch.zeros(count, len(CLASSES)).scatter_(1, classes, 1.0)
    extras = {"digits": classes, "masks": masks}
    return Samples(images, targets, CLASSES, extras=extras, source="scenes of two digits")


def _digits(split: str) -> tuple[Float[Tensor, "n 16 16"], Int[Tensor, "n"]]:
    scans = digit_images()
    large = F.interpolate(scans.inputs, (_DIGIT, _DIGIT), mode="bilinear", align_corners=False)[:, 0]
    cut = 2 * len(large) // 3
    part = slice(0, cut) if split == "train" else slice(cut, None)
    return large[part], scans.targets[part]
