"""Training and test images by name, and the accuracy of a network on them."""

from __future__ import annotations

import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.core.models import device_of, frozen
from lineament.data.digits import digit_images
from lineament.data.identities import orl_photographs
from lineament.data.photographs import read_photographs
from lineament.data.samples import Samples


def image_sets(name: str, data_folder: str | None = None) -> tuple[Samples, Samples]:
    """Training and test images: scikit-learn's ``"digits"`` (60 % for training), or ``"mnist"`` or ``"cifar10"`` from the user's folder.

    >>> [len(part) for part in image_sets("digits")]
    [1078, 719]
    """
    if name == "digits":
        found = digit_images()
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        return found[order[: len(found) * 6 // 10]], found[order[len(found) * 6 // 10 :]]
    if name == "mnist":
        train, test = (digit_images("mnist", split, data_folder=data_folder) for split in ("train", "test"))
        return train, test
    train, test = (read_photographs(name, split, data_folder=data_folder) for split in ("train", "test"))
    return train, test


def faces(data_folder: str | None = None) -> Samples:
    """The photographs of ORL from the user's folder.

    Raises:
        InputError: they are not there.
    """
    found = orl_photographs(data_folder)
    if found is None:
        raise InputError(
            "data_folder: no orl_faces.npz there; give its folder, or set LINEAMENT_DATA, or take data digits"
        )
    return found


def accuracy(model: nn.Module, test: Samples) -> float:
    """The share of right answers."""
    right = 0
    with frozen(model), torch.no_grad():
        for x, y in zip(test.inputs.split(500), test.targets.split(500)):
            right += int((model(x.to(device_of(model))).argmax(1).cpu() == y).sum())
    return right / len(test)
