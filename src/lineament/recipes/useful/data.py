"""Data of the useful recipe: digits with a planted pixel, CIFAR, or arrays of the user's; label noise and long tails."""

from __future__ import annotations

import io
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lineament.core.checks import InputError, number, require
from lineament.data.pixel_digits import pixel_digits
from lineament.recipes.kit.images import read_images


@dataclass(frozen=True)
class Split:
    """Images as they are stored, labels, and groups where they are known (0: holds the fast feature)."""

    x: Tensor
    y: Tensor
    groups: Tensor | None = None


@dataclass(frozen=True)
class Data:
    train: Split
    test: Split
    classes: int
    noisy: Tensor | None = None

    def prepared(self, x: Tensor) -> Tensor:
        """What the network sees: standardised by the training images' channels where they are uint8, as they are otherwise."""
        if x.dtype != torch.uint8:
            return x
        center, scale = self._moments()
        return (x.float() - center) / scale

    def _moments(self) -> tuple[Tensor, Tensor]:
        if "moments" not in self.__dict__:
            some = self.train.x[:5000].float()
            object.__setattr__(
                self, "moments", (some.mean((0, 2, 3), keepdim=True), some.std((0, 2, 3), keepdim=True))
            )
        return self.__dict__["moments"]


def load_data(name: str, folder: str | None, *, train: int, seed: int) -> Data:
    """``"pixel-digits"``; ``"digits"`` (the same without pixels); ``"cifar10"``, ``"cifar100"`` or ``"npz"`` from a folder.

    The folder holds the binary version of CIFAR, or ``train.npz`` and ``test.npz`` with ``x`` (uint8 images) and ``y`` (and ``groups``:
    how Waterbirds, STL-10, CINIC-10 or Tiny-ImageNet are brought), or ``cifar10_train_jpeg.npz`` and ``cifar10_test_jpeg.npz`` with the bytes of
    JPEG files, their ``offsets`` and ``y``.

    Args:
        train: training examples, of a random order; 0 for all.
    """
    if name in ("pixel-digits", "digits"):
        splits = []
        for split in ("train", "test"):
            options = {"share": 0.9 if name == "pixel-digits" else 0.0}
            found = pixel_digits(split, train=train or 900, seed=seed, **options)
            splits.append(Split(found.inputs, found.targets, found.groups))
        return Data(splits[0], splits[1], 10)
    folder = folder or os.environ.get("LINEAMENT_DATA")
    if not folder:
        raise InputError(
            f"data_folder: {name} needs a folder with its binary version or train.npz and test.npz; give --data-folder or "
            "set LINEAMENT_DATA, or use --data pixel-digits"
        )
    first, second = (_split(name, Path(folder), split) for split in ("train", "test"))
    if train and train < len(first.y):
        rows = torch.randperm(len(first.y), generator=torch.Generator().manual_seed(seed))[:train]
        first = Split(first.x[rows], first.y[rows], None if first.groups is None else first.groups[rows])
    return Data(first, second, int(max(first.y.max(), second.y.max())) + 1)


def _split(name: str, folder: Path, split: str) -> Split:
    jpeg = folder / f"{name}_{split}_jpeg.npz"
    if jpeg.is_file():
        with np.load(jpeg, allow_pickle=False) as stored:
            raw, offsets, y = stored["bytes"], stored["offsets"], stored["y"].astype(np.int64)
        images = [
            np.asarray(Image.open(io.BytesIO(raw[a:b].tobytes())).convert("RGB"))
            for a, b in itertools.pairwise(offsets)
        ]
        return Split(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(y))
    path = folder / f"{split}.npz"
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            require(
                {"x", "y"} <= set(stored.files), f"{path.name}: holds {stored.files}, expected 'x' and 'y'"
            )
            x, y = stored["x"], stored["y"].astype(np.int64)
            groups = torch.from_numpy(stored["groups"].astype(np.int64)) if "groups" in stored.files else None
        require(
            x.dtype == np.uint8
            and x.ndim == 4
            and len(x) == len(y)
            and bool({1, 3} & {x.shape[1], x.shape[3]}),
            f"{path.name}: x is {x.dtype} of shape {x.shape}, expected uint8 images with 1 or 3 channels and as many y",
        )
        x = x if x.shape[1] in (1, 3) else x.transpose(0, 3, 1, 2)
        return Split(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y), groups)
    require(name in ("cifar10", "cifar100"), f"data_folder: {str(folder)!r} holds no {split}.npz")
    if split == "train":
        x, y = read_images(name, folder)
    else:
        head, file, inner = (
            (1, "test_batch.bin", "cifar-10-batches-bin")
            if name == "cifar10"
            else (2, "test.bin", "cifar-100-binary")
        )
        there = [p for p in (folder / file, folder / inner / file) if p.is_file()]
        require(len(there) > 0, f"data_folder: {str(folder)!r} holds neither {file} nor test.npz")
        raw = np.fromfile(there[0], dtype=np.uint8)
        require(raw.size % (head + 3072) == 0, f"data_folder: {there[0].name} is no binary file of {name}")
        rows = raw.reshape(-1, head + 3072)
        x, y = rows[:, head:].reshape(-1, 3, 32, 32), rows[:, head - 1].astype(np.int64)
    return Split(torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(y))


def long_tailed(data: Data, imbalance: float, seed: int) -> Data:
    """Class c keeps n · imbalance^(-c/(C-1)) training examples: exponentially fewer, down to 1 : imbalance."""
    number("imbalance", imbalance, low=1)
    if imbalance == 1:
        return data
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for c in range(data.classes):
        own = (data.train.y == c).nonzero()[:, 0]
        keep = max(2, round(len(own) * imbalance ** (-c / (data.classes - 1))))
        rows.append(own[torch.randperm(len(own), generator=generator)[:keep]])
    kept = torch.cat(rows).sort().values
    groups = None if data.train.groups is None else data.train.groups[kept]
    return replace(data, train=Split(data.train.x[kept], data.train.y[kept], groups))


def mislabelled(data: Data, share: float, seed: int) -> Data:
    """A share of the training labels replaced by another class's; ``noisy`` says which."""
    number("label_noise", share, low=0, high=1)
    if share == 0:
        return data
    generator = torch.Generator().manual_seed(seed + 1)
    noisy = torch.rand(len(data.train.y), generator=generator) < share
    shift = torch.randint(1, data.classes, (len(noisy),), generator=generator)
    y = torch.where(noisy, (data.train.y + shift) % data.classes, data.train.y)
    return replace(data, train=Split(data.train.x, y, data.train.groups), noisy=noisy)
