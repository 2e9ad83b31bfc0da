"""Digits with a planted shortcut: a small mark in the corner that goes with the class while the network learns.

A data set whose answer is known: a method that says what a network relies on must find the mark. The digits are
scikit-learn's (Alpaydin and Kaynak 1998), made larger, faded and noisy, so that the mark is the easier feature to learn. The mark is one of
ten patterns of 3 x 3 pixels, always in the same place. In the training data it agrees with the class (in all but a few images); the
test data come in three groups: it agrees, it misleads (another class's mark), and there is no mark.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lineament.core import checks
from lineament.data.digits import CLASSES, digit_images
from lineament.data.samples import Samples

SIDE = 20
MARK = (slice(1, 4), slice(1, 4))
GROUPS = ("mark agrees", "mark misleads", "no mark")
# Ten patterns of the nine pixels, four to six of them bright, with at least three differences between any two.
_PATTERNS = (344, 211, 397, 294, 177, 71, 442, 123, 496, 341)
_TRAIN = 1200


def shortcut_digits(
    split: str = "train",
    *,
    agreement: float = 0.98,
    contrast: float = 0.4,
    noise: float = 0.15,
    seed: int = 0,
) -> Samples:
    """Digits of 20 x 20 pixels with a mark.

    Args:
        split: ``"train"`` (1,200 images, where the mark agrees with the class in a share ``agreement`` of them) or
            ``"test"`` (597 others, a third in each group of :data:`GROUPS`).
        agreement: share of training images with their own class's mark; the others have another class's.
        contrast: brightness of the digit; the mark's is 1.
        noise: standard deviation of the noise, clipped to [0, 1] after it.

    >>> test = shortcut_digits("test")
    >>> tuple(test.inputs.shape), test.groups.bincount().tolist()
    ((597, 1, 20, 20), [199, 199, 199])
    """
    checks.one_of("split", split, ("train", "test"))
    checks.number("agreement", agreement, low=0, high=1)
    checks.number("contrast", contrast, low=0, high=1)
    checks.number("noise", noise, low=0)
    checks.seed("seed", seed)
    raw = digit_images()
    draw = np.random.default_rng([seed, split == "test"])
    order = np.random.default_rng(seed).permutation(len(raw))
    rows = np.sort(order[:_TRAIN] if split == "train" else order[_TRAIN:])
    small = raw.inputs[rows]
    images = np.zeros((len(rows), SIDE, SIDE), np.float32)
    larger = torch.nn.functional.interpolate(small, size=(12, 12), mode="bilinear", align_corners=False)
    images[:, 5:17, 5:17] = contrast * larger[:, 0].numpy()
    images += noise * draw.standard_normal(images.shape).astype(np.float32)
    targets = raw.targets.numpy()[rows]
    other = (targets + draw.integers(1, 10, len(rows))) % 10
    if split == "train":
        groups = (draw.random(len(rows)) >= agreement).astype(np.int64)
    else:
        groups = draw.permutation(np.arange(len(rows)) % 3)
    marks = patterns().numpy()[np.where(groups == 1, other, targets)]
    marked = groups < 2
    images[(marked, *MARK)] = marks[marked]
    return Samples(
        inputs=torch.from_numpy(images.clip(0, 1))[:, None],
        targets=torch.from_numpy(targets),
        source="scikit-learn digits with a planted mark",
        classes=CLASSES,
        groups=torch.from_numpy(groups.astype(np.int64)),
        group_names=GROUPS,
        notes=("the mark is 3 x 3 pixels at rows and columns 1 to 3",),
    )


def patterns() -> Tensor:
    """The ten marks, (class, 3, 3), of zeros and ones; any two differ in at least three pixels.

    >>> marks = patterns().flatten(1)
    >>> int(torch.cdist(marks, marks, p=1).add(9 * torch.eye(10)).min())
    3
    """
    bits = torch.tensor(_PATTERNS)[:, None] >> torch.arange(9) & 1
    return bits.float().unflatten(1, (3, 3))
