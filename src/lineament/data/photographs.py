"""Small photographs with labels, in the forms that people have: CIFAR-10 and CIFAR-100, or any images in two `.npz` files.

Looked for in this order, in the folder itself: ``NAME_train_jpeg.npz`` (JPEG files in one array, see
:func:`lineament.data.formats.read_jpegs`), ``train.npz`` (``x`` uint8 images, ``y``, and ``groups`` where they are known), CIFAR's binary
version; with ``test`` for the test images.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import InputError
from lineament.data.formats import folder_of, read_cifar, read_images, read_jpegs
from lineament.data.samples import Samples

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Bytes of labels a record, the folder that the archive unpacks to, and its files.
_BINARY = {
    "cifar10": (1, "cifar-10-batches-bin", {"train": "data_batch_*.bin", "test": "test_batch.bin"}),
    "cifar100": (2, "cifar-100-binary", {"train": "train.bin", "test": "test.bin"}),
}


def read_photographs(
    name: str,
    split: str = "train",
    *,
    data_folder: str | Path | None = None,
    count: int = 0,
    seed: int = 0,
) -> Samples:
    """Photographs as they are stored: uint8, (sample, channel, height, width), with labels.

    Args:
        name: ``"cifar10"``, ``"cifar100"``, or ``"npz"`` for a user's ``train.npz`` and ``test.npz`` (how Waterbirds, STL-10 or
            Tiny-ImageNet are brought).
        split: ``"train"`` or ``"test"``.
        data_folder: where they are; default: the environment's ``LINEAMENT_DATA``.
        count: so many, chosen at random; 0 for all, in the order in which they are stored.
        seed: of that choice.

    Raises:
        InputError: no folder, none of the files in it, or a damaged one.

    >>> import tempfile, numpy as np; folder = Path(tempfile.mkdtemp())
    >>> np.savez(folder / "train.npz", x=np.zeros((5, 32, 32, 3), np.uint8), y=np.arange(5))
    >>> tuple(read_photographs("npz", data_folder=folder).inputs.shape)
    (5, 3, 32, 32)
    """
    checks.one_of("name", name, (*_BINARY, "npz"))
    checks.one_of("split", split, ("train", "test"))
    checks.number("count", count, low=0, integer=True)
    checks.seed("seed", seed)
    place = folder_of(data_folder)
    if place is None:
        raise InputError(
            f"data_folder: {name} needs a folder with its binary version or train.npz and test.npz; give it or set LINEAMENT_DATA"
        )
    stored = _stored(name, split, place)
    labels = torch.from_numpy(stored["y"])
    numbered = tuple(str(n) for n in range(100 if name == "cifar100" else int(labels.max()) + 1))
    groups = torch.from_numpy(stored["groups"].astype(np.int64)) if "groups" in stored else None
    found = Samples(
        inputs=torch.from_numpy(np.ascontiguousarray(stored["x"])),
        targets=labels,
        classes=CIFAR10 if name == "cifar10" else numbered,
        groups=groups,
        group_names=() if groups is None else tuple(str(n) for n in range(int(groups.max()) + 1)),
        source=f"{name}, {split}",
    )
    if not 0 < count < len(found):
        return found
    return found[torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))[:count]]


class Standardise:
    """Bytes as floats with mean 0 and standard deviation 1 in each channel of the training images; floating-point images as they are.

    >>> images = torch.tensor([0, 2], dtype=torch.uint8).view(2, 1, 1, 1)
    >>> [round(value, 4) for value in Standardise(images)(images).flatten().tolist()]
    [-0.7071, 0.7071]
    """

    def __init__(self, train: Tensor):
        # Of at most 5,000 images, spread over all, as stored arrays can be sorted by class.
        some = train[:: max(1, len(train) // 5000)][:5000].float()
        self.mean = some.mean((0, 2, 3), keepdim=True)
        self.deviation = some.std((0, 2, 3), keepdim=True)

    def __call__(self, images: Tensor) -> Tensor:
        if images.is_floating_point():
            return images
        return (images.float() - self.mean) / self.deviation


def _stored(name: str, split: str, folder: Path) -> dict[str, np.ndarray]:
    jpeg, arrays = folder / f"{name}_{split}_jpeg.npz", folder / f"{split}.npz"
    if jpeg.is_file():
        return read_jpegs(jpeg)
    if arrays.is_file():
        return read_images(arrays, "x", "y")
    if name not in _BINARY:
        raise InputError(f"data_folder: {str(folder)!r} holds no {split}.npz")
    label_bytes, inner, files = _BINARY[name]
    there = sorted(folder.glob(files[split])) or sorted((folder / inner).glob(files[split]))
    if not there:
        raise InputError(f"data_folder: {str(folder)!r} holds neither {files[split]} nor {split}.npz")
    return read_cifar(there, label_bytes)
