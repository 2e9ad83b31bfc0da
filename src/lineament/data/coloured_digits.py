"""Digits in four colours on dim random backgrounds: of the class (digit and colour), one part is read off a single pixel, the other is not.

Made for questions about which features are simple (Fel et al. 2024, arXiv 2407.06076).
"""

from __future__ import annotations

import numpy as np
import torch

from lineament.core import checks
from lineament.data.digits import CLASSES, digit_images
from lineament.data.samples import Samples

SIDE = 16
COLOURS = {
    "red": (1.0, 0.25, 0.25),
    "green": (0.25, 1.0, 0.25),
    "blue": (0.3, 0.3, 1.0),
    "yellow": (1.0, 1.0, 0.2),
}
_TRAIN = 1198


def coloured_digits(split: str = "train", *, copies: int = 3, noise: float = 0.05, seed: int = 0) -> Samples:
    """scikit-learn's digits at 16 x 16 pixels, moved by up to 2, each ``copies`` times in random colours; the class is 4 x digit + colour.

    Args:
        split: ``"train"`` (1,198 digits of a fixed order) or ``"test"`` (the 599 others); no digit is in both.
        noise: standard deviation, clipped to [0, 1] after it. seed: of places, colours, backgrounds and noise.

    >>> test = coloured_digits("test", copies=1)
    >>> tuple(test.inputs.shape), len(test.classes), test.group_names
    ((599, 3, 16, 16), 40, ('red', 'green', 'blue', 'yellow'))
    """
    checks.one_of("split", split, ("train", "test"))
    checks.number("copies", copies, low=1, integer=True)
    checks.number("noise", noise, low=0)
    checks.seed("seed", seed)
    raw = digit_images()
    order = np.random.default_rng(0).permutation(len(raw))
    rows = np.tile(order[:_TRAIN] if split == "train" else order[_TRAIN:], copies)
    draw = np.random.default_rng([seed, split == "test"])
    larger = torch.nn.functional.interpolate(
        raw.inputs[rows], size=(12, 12), mode="bilinear", align_corners=False
    )
    ink = np.zeros((len(rows), SIDE, SIDE), np.float32)
    for n, (down, right) in enumerate(draw.integers(0, 5, (len(rows), 2))):
        ink[n, down : down + 12, right : right + 12] = larger[n, 0]
    colours = draw.integers(0, 4, len(rows))
    paint = np.array(list(COLOURS.values()), np.float32)[colours][:, :, None, None]
    ground = draw.uniform(0, 0.35, (len(rows), 3, 1, 1)).astype(np.float32)
    images = ground * (1 - ink[:, None]) + paint * ink[:, None]
    images += noise * draw.standard_normal(images.shape).astype(np.float32)
    return Samples(
        inputs=torch.from_numpy(images.clip(0, 1)),
        targets=torch.from_numpy(4 * raw.targets.numpy()[rows] + colours),
        classes=tuple(f"{colour} {digit}" for digit in CLASSES for colour in COLOURS),
        groups=torch.from_numpy(colours),
        group_names=tuple(COLOURS),
        index=torch.from_numpy(rows.astype(np.int64)),
        source="scikit-learn digits in colours",
    )
