"""Handwritten digits: scikit-learn's, which are always there, or MNIST, where the user has it.

MNIST is read from ``mnist_train.npz`` / ``mnist_test.npz`` (arrays ``x``, ``y``), from ``mnist.npz`` (``x_train``, ...), or from the IDX files
of its source, plain or gzipped, in the folder itself or in torchvision's ``MNIST/raw`` below it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lineament.core import checks
from lineament.core.checks import InputError
from lineament.data.formats import folder_of, read_idx, read_images
from lineament.data.samples import Samples

Source = Literal["auto", "mnist", "digits"]
CLASSES = tuple(str(digit) for digit in range(10))


def digit_images(
    source: Source = "digits",
    split: str = "all",
    *,
    count: int | None = None,
    data_folder: str | Path | None = None,
    seed: int = 0,
) -> Samples:
    """Digits as images (sample, 1, height, width) with values in [0, 1].

    Args:
        source: ``"digits"`` (scikit-learn's 1,797 of 8 x 8 pixels), ``"mnist"``, or ``"auto"``: MNIST where it is found.
        split: ``"all"`` in the order in which they are stored; ``"train"`` or ``"test"`` in random order. Of scikit-learn's, two
            thirds and one third of a fixed random order.
        count: at most so many, chosen at random.
        data_folder: where MNIST is; default: the environment's ``LINEAMENT_DATA``.
        seed: of that choice and order.

    Raises:
        InputError: MNIST is asked for and not there, or its file is damaged.

    >>> found = digit_images(count=100)
    >>> tuple(found.inputs.shape), float(found.inputs.max()), found.source
    ((100, 1, 8, 8), 1.0, 'scikit-learn digits')
    """
    checks.one_of("source", source, ("auto", "mnist", "digits"))
    checks.one_of("split", split, ("train", "test", "all"))
    checks.seed("seed", seed)
    if count is not None:
        checks.number("count", count, low=1, integer=True)
    place = folder_of(data_folder)
    found = None if source == "digits" or place is None else _mnist(place, split)
    if source == "mnist" and found is None:
        raise InputError(
            f"data_folder: MNIST is not in {str(place) if place else 'any folder'}; give the folder of mnist_train.npz and mnist_test.npz or of "
            "its IDX files, or set LINEAMENT_DATA, or take source 'digits'"
        )
    images, labels, index = _sklearn(split) if found is None else (*found, np.arange(len(found[1])))
    order = np.arange(len(labels))
    if split != "all" or count is not None:
        # Stored arrays can be sorted by class, so that what is taken of them is a random choice.
        order = np.random.default_rng([seed, split == "test"]).permutation(len(labels))[:count]
    # Bytes become floats after the choice: all of MNIST as floats would be four times as large.
    x = torch.from_numpy(images[order].astype(np.float32) / (16 if found is None else 255))
    return Samples(
        inputs=x[:, None],
        targets=torch.from_numpy(labels[order].astype(np.int64)),
        classes=CLASSES,
        index=torch.from_numpy(index[order]),
        total=len(labels) if found is not None else 1797,
        source="scikit-learn digits" if found is None else "MNIST",
    )


def _sklearn(split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    cut = 2 * len(order) // 3
    rows = {"train": order[:cut], "test": order[cut:], "all": np.arange(len(order))}[split]
    return data.images[rows], data.target[rows], rows


def _mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    if split == "all":
        parts = [_mnist(folder, part) for part in ("train", "test")]
        whole = [part for part in parts if part is not None]
        return (
            (np.concatenate([p[0] for p in whole]), np.concatenate([p[1] for p in whole])) if whole else None
        )
    own, shared = folder / f"mnist_{split}.npz", folder / "mnist.npz"
    for path, names in ((own, ("x", "y")), (shared, (f"x_{split}", f"y_{split}"))):
        if path.is_file():
            stored = read_images(path, *names)
            return stored["x"][:, 0], stored["y"]
    stem = "train" if split == "train" else "t10k"
    for place in (folder, folder / "raw", folder / "MNIST" / "raw", folder / "mnist"):
        pair = [_named(place, f"{stem}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if pair[0] is not None and pair[1] is not None:
            images, labels = read_idx(pair[0]), read_idx(pair[1])
            checks.require(
                images.ndim == 3 and labels.shape == images.shape[:1],
                f"{pair[0]}: images {images.shape} and labels {labels.shape}, expected as many of each",
            )
            return images, labels
    return None


def _named(folder: Path, name: str) -> Path | None:
    spellings = (f"{spelled}{end}" for end in ("", ".gz") for spelled in (name, name.replace("-idx", ".idx")))
    return next((folder / spelled for spelled in spellings if (folder / spelled).is_file()), None)
