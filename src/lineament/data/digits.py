"""Digits to build data sets from: MNIST in the forms that users have it in, or scikit-learn's, which are always there.

MNIST is read from ``mnist_train.npz`` / ``mnist_test.npz`` (arrays ``x``, ``y``), from ``mnist.npz`` (``x_train`` ...), or from the IDX files
of its source, plain or gzipped, in the folder itself or in torchvision's ``MNIST/raw`` below it. Stored arrays can be sorted by class, so what is
taken of them is a random choice.
"""

from __future__ import annotations

import gzip
import os
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks

Source = Literal["auto", "mnist", "digits"]
SOURCES = ("auto", "mnist", "digits")


def digit_images(
    source: Source = "auto",
    split: str = "train",
    *,
    count: int | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
) -> tuple[Float[Tensor, "n side side"], Int[Tensor, "n"], str]:
    """Images in [0, 1], their digits, and the name of what they are.

    Args:
        source: ``"mnist"``, ``"digits"`` (scikit-learn's 1,797 of 8 x 8 pixels), or ``"auto"``: MNIST where it is found.
        split: ``"train"`` or ``"test"``; of scikit-learn's, two thirds and one third of a fixed random order.
        count: at most so many, chosen at random.
        folder: where MNIST is; default: the environment's ``LINEAMENT_DATA``.

    Raises:
        InputError: MNIST is asked for and not there, or its file is damaged.

    >>> images, labels, name = digit_images("digits", count=100)
    >>> tuple(images.shape), float(images.max()), name
    ((100, 8, 8), 1.0, 'scikit-learn digits')
    """
    checks.one_of("source", source, SOURCES)
    checks.one_of("split", split, ("train", "test"))
    if count is not None:
        checks.number("count", count, low=1, integer=True)
    place = folder or os.environ.get("LINEAMENT_DATA")
    found = None if source == "digits" or place is None else _mnist(Path(place), split)
    if source == "mnist" and found is None:
        raise checks.InputError(
            f"source: MNIST is not in {str(place) if place else 'any folder'}; give the folder of mnist_{split}.npz or of its IDX "
            "files, or set LINEAMENT_DATA, or take 'digits'"
        )
    images, labels = _sklearn(split) if found is None else found
    name = "scikit-learn digits" if found is None else "MNIST"
    order = np.random.default_rng([seed, split == "test"]).permutation(len(labels))[:count]
    # Bytes become floats after the choice: all of MNIST as floats would be four times as large.
    x = torch.from_numpy(images[order].astype(np.float32) / (16 if found is None else 255))
    return x, torch.from_numpy(labels[order].astype(np.int64)), name


def _sklearn(split: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    cut = 2 * len(order) // 3
    rows = order[:cut] if split == "train" else order[cut:]
    return data.images[rows], data.target[rows]


def _mnist(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray] | None:
    own, shared = folder / f"mnist_{split}.npz", folder / "mnist.npz"
    if own.is_file():
        return _arrays(own, "x", "y")
    if shared.is_file():
        return _arrays(shared, f"x_{split}", f"y_{split}")
    stem = "train" if split == "train" else "t10k"
    for place in (folder, folder / "raw", folder / "MNIST" / "raw", folder / "mnist"):
        pair = [_named(place, f"{stem}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        if pair[0] is not None and pair[1] is not None:
            images, labels = read_idx(pair[0]), read_idx(pair[1])
            checks.require(
                images.ndim == 3 and labels.shape == images.shape[:1],
                f"{pair[0]}: images {images.shape} and labels {labels.shape}, expected as many",
            )
            return images, labels
    return None


def _named(folder: Path, name: str) -> Path | None:
    for end in ("", ".gz"):
        for spelled in (name, name.replace("-idx", ".idx")):
            if (folder / f"{spelled}{end}").is_file():
                return folder / f"{spelled}{end}"
    return None


def _arrays(path: Path, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            missing = {x, y} - set(stored.files)
            checks.require(not missing, f"{path}: holds {stored.files}, expected {x!r} and {y!r}")
            images, labels = stored[x], stored[y]
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        if isinstance(error, checks.InputError):
            raise
        raise checks.InputError(f"{path}: damaged, or no .npz file ({error})") from error
    good = images.dtype == np.uint8 and images.ndim == 3 and labels.shape == images.shape[:1]
    checks.require(
        good, f"{path}: {x} is {images.dtype} of shape {images.shape}, expected uint8 (n, height, width)"
    )
    return images, labels


def read_idx(path: str | Path) -> np.ndarray:
    """The array of bytes in an IDX file, gzipped or not.

    Raises:
        InputError: another magic number, or not as many bytes as the header says.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise checks.InputError(f"{path}: cannot be read ({error})") from error
    checks.require(
        len(raw) >= 4 and raw[:3] == b"\0\0\x08",
        f"{path}: starts with {raw[:4]!r}, expected an IDX file of bytes",
    )
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], ">u4").tolist())
    values = np.frombuffer(raw, np.uint8, offset=min(start, len(raw)))
    checks.require(
        len(shape) == raw[3] and values.size == int(np.prod(shape, dtype=np.int64)),
        f"{path}: holds {values.size} bytes, expected {shape} by its header; is the download whole?",
    )
    return values.reshape(shape)
