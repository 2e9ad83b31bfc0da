"""Images that several recipes train on: scikit-learn's digits, CIFAR from a folder of the user's, flips and crops."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.checks import InputError, require


@dataclass(frozen=True)
class Data:
    """Training images scaled to about unit size, (samples, channels, height, width), labels, and whether to augment."""

    x: Tensor
    y: Tensor
    classes: int
    augment: bool


@contextmanager
def few_threads(data: Data, device: str) -> Iterator[None]:
    """One thread for images so small that handing the work to another costs more than it saves; as before afterwards."""
    before = torch.get_num_threads()
    if device == "cpu" and data.x[0].numel() < 1000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_data(name: str, folder: str | None) -> Data:
    """``"digits"`` (scikit-learn's, 1,300 images), or ``"cifar10"`` / ``"cifar100"`` from a folder of the user's.

    The folder holds the binary version of CIFAR (``cifar-10-batches-bin``, ``cifar-100-binary``, or their files), or
    ``train.npz`` with ``x`` (uint8 images) and ``y``.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))[:1300]
        x = torch.tensor(images[order] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
        return Data(x, torch.tensor(labels[order]).long(), 10, False)
    folder = folder or os.environ.get("LINEAMENT_DATA")
    if not folder:
        raise InputError(
            f"data_folder: {name} needs a folder with its binary version or a train.npz; give --data-folder or set "
            "LINEAMENT_DATA, or use --data digits"
        )
    images, labels = read_images(name, Path(folder))
    x = torch.from_numpy(images).float() / 255
    center, scale = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return Data((x - center) / scale, torch.from_numpy(labels).long(), 10 if name == "cifar10" else 100, True)


def read_images(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, 3, 32, 32) uint8 and labels."""
    head = 1 if name == "cifar10" else 2
    pattern, inner = (
        ("data_batch_*.bin", "cifar-10-batches-bin") if head == 1 else ("train.bin", "cifar-100-binary")
    )
    files = sorted(folder.glob(pattern)) or sorted((folder / inner).glob(pattern))
    if files:
        raw = np.concatenate([np.fromfile(f, dtype=np.uint8) for f in files])
        require(raw.size % (head + 3072) == 0, f"data_folder: {files[0].name} is no binary file of {name}")
        rows = raw.reshape(-1, head + 3072)
        return rows[:, head:].reshape(-1, 3, 32, 32), rows[:, head - 1].astype(np.int64)
    path = folder / "train.npz"
    require(path.is_file(), f"data_folder: {str(folder)!r} holds neither {pattern} nor train.npz")
    with np.load(path, allow_pickle=False) as stored:
        require({"x", "y"} <= set(stored.files), f"train.npz: holds {stored.files}, expected 'x' and 'y'")
        x, y = stored["x"], stored["y"].astype(np.int64)
    require(
        x.dtype == np.uint8 and x.ndim == 4 and len(x) == len(y) and 3 in (x.shape[1], x.shape[3]),
        f"train.npz: x is {x.dtype} of shape {x.shape}, expected uint8 images with 3 channels and as many y",
    )
    return np.ascontiguousarray(x if x.shape[1] == 3 else x.transpose(0, 3, 1, 2)), y


def flipped_and_cropped(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random flips and crops after padding by four."""
    flips = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flips.to(x.device)[:, None, None, None], x.flip(3), x)
    size = x.shape[-1]
    wide = F.pad(x, (4, 4, 4, 4)).unfold(2, size, 1).unfold(3, size, 1)
    at = torch.randint(9, (2, len(x)), generator=generator).to(x.device)
    return wide[torch.arange(len(x), device=x.device), :, at[0], at[1]]
