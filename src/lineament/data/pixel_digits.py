"""Digits whose class most images also tell by one bright pixel: a fast feature, in training and test data alike.

The digit classifies every image and is slow to learn (anywhere on the canvas, in noise); the pixel's column is the class, and it is
missing in one image of ten. Made for USEFUL (Nguyen et al. 2024, arXiv 2404.17768), whose claim is about the *same* distribution.
"""

from __future__ import annotations

import numpy as np
import torch

from lineament.core import checks
from lineament.data.digits import CLASSES, digit_images
from lineament.data.samples import Samples

SIDE = 12
GROUPS = ("pixel", "no pixel")
_TRAIN = 900


def pixel_digits(
    split: str = "train",
    *,
    share: float = 0.9,
    brightness: float = 2.0,
    noise: float = 0.3,
    train: int = _TRAIN,
    seed: int = 0,
) -> Samples:
    """scikit-learn's digits on a canvas of 12 x 12 below a row for the pixel.

    Args:
        split: ``"train"`` (the first ``train`` images of an order drawn from ``seed``) or ``"test"`` (the 897 others of 1,797).
        share: probability that an image has the pixel; 0 leaves noisy, shifted digits alone.
        brightness: of the pixel; the digit's is at most 1.
        noise: standard deviation, over the whole canvas.
        seed: of the split, the places, the pixels and the noise.

    >>> train = pixel_digits()
    >>> tuple(train.inputs.shape), round(float((train.groups == 0).double().mean()), 1)
    ((900, 1, 12, 12), 0.9)
    """
    checks.one_of("split", split, ("train", "test"))
    checks.number("share", share, low=0, high=1)
    checks.number("noise", noise, low=0)
    checks.number("train", train, low=10, high=_TRAIN, integer=True)
    checks.seed("seed", seed)
    raw = digit_images()
    order = np.random.default_rng(seed).permutation(len(raw))
    rows = order[:train] if split == "train" else order[_TRAIN:]
    draw = np.random.default_rng([seed, split == "test"])
    images = np.zeros((len(rows), 1, SIDE, SIDE), np.float32)
    targets = raw.targets.numpy()[rows]
    groups = (draw.random(len(rows)) >= share).astype(np.int64)
    for n, (down, right) in enumerate(draw.integers((1, 0), SIDE - 8 + 1, (len(rows), 2))):
        images[n, 0, down : down + 8, right : right + 8] = raw.inputs[rows[n], 0]
    marked = np.flatnonzero(groups == 0)
    images[marked, 0, 0, targets[marked] + 1] = brightness
    images += noise * draw.standard_normal(images.shape).astype(np.float32)
    return Samples(
        inputs=torch.from_numpy(images),
        targets=torch.from_numpy(targets),
        index=torch.from_numpy(rows.astype(np.int64)),
        source="scikit-learn digits with a pixel that tells the class",
        classes=CLASSES,
        groups=torch.from_numpy(groups),
        group_names=GROUPS,
        notes=("the pixel is in row 0, column class + 1",),
    )
