"""Bangla handwritten digits from the user's folder, ink bright and 32 x 32: CMATERdb 3.1.1, BDRW, and a cleaned part of NumtaDB."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lineament.data.formats import folder_of, read_npz
from lineament.handcrafted.ink import ink

FILES = {"cmaterdb": "cmaterdb_3_1_1.npz", "bdrw": "bdrw_32.npz", "numtadb": "numtadb_28.npz"}


@dataclass(frozen=True)
class Held:
    """Prepared images of a data set: training and test part where it has them, else one part to be split."""

    source: str
    images: Tensor
    labels: np.ndarray
    train: int  # the first so many are the stored training part; 0: none is stored


def bangla_folder(data_folder: str | None = None) -> Path | None:
    """Where the Bangla digits would be: in ``bangla-digits`` of the data folder, or in that folder itself."""
    place = folder_of(data_folder)
    inner = None if place is None else place / "bangla-digits"
    return inner if inner is not None and inner.is_dir() else place


def bangla_digits(name: str, data_folder: str | None = None) -> Held | None:
    """The images and labels of one data set of :data:`FILES`; None where its file is not there."""
    folder = bangla_folder(data_folder)
    path = None if folder is None else folder / FILES[name]
    if path is None or not path.is_file():
        return None
    if name == "cmaterdb":
        z = read_npz(path, ("train_images", "train_labels", "test_images", "test_labels"))
        x, y = (
            np.concatenate([z[f"{part}_{what}"] for part in ("train", "test")])
            for what in ("images", "labels")
        )
        # The frame is full already.
        images = ink(torch.from_numpy(x), crop=False).images
        return Held("CMATERdb 3.1.1", images, y.astype(int), len(z["train_labels"]))
    z = read_npz(path, ("images", "labels"))
    x, labels = torch.from_numpy(z["images"]), z["labels"].astype(int)
    if name == "bdrw":
        return Held("BDRW", ink(x.movedim(3, 1), crop=False, white=255).images, labels, 0)
    return Held("NumtaDB, a cleaned part, cropped to the ink", ink(x, white=20).images, labels, 0)
