"""Data of the useful recipe: digits with a planted pixel, CIFAR, or arrays of the user's; label noise and long tails."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from lineament.core.checks import number
from lineament.data.photographs import Standardise, read_photographs
from lineament.data.pixel_digits import pixel_digits
from lineament.data.samples import Samples


@dataclass(frozen=True)
class Data:
    """Training and test images as they are stored; group 0 holds the fast feature, where groups are known."""

    train: Samples
    test: Samples

    @property
    def classes(self) -> int:
        return max(len(self.train.classes), len(self.test.classes))

    @cached_property
    def prepared(self) -> Standardise:
        """What the network sees."""
        return Standardise(self.train.inputs)

    @cached_property
    def prepared_train(self) -> tuple[Tensor, Tensor]:
        """The training data as the network sees them, without augmentation."""
        return self.prepared(self.train.inputs), self.train.targets


def load_data(name: str, data_folder: str | None, *, train: int, seed: int) -> Data:
    """``"pixel-digits"``; ``"digits"`` (the same without pixels); or what :func:`~lineament.data.photographs.read_photographs` takes.

    Args:
        train: training examples, of a random order; 0 for all.
    """
    if name in ("pixel-digits", "digits"):
        share = 0.9 if name == "pixel-digits" else 0.0
        first, second = (
            pixel_digits(split, train=train or 900, seed=seed, share=share) for split in ("train", "test")
        )
        return Data(first, second)
    return Data(
        read_photographs(name, "train", data_folder=data_folder, count=train, seed=seed),
        read_photographs(name, "test", data_folder=data_folder),
    )


def long_tailed(data: Data, imbalance: float, seed: int) -> Data:
    """Class c keeps n · imbalance^(-c/(C-1)) training examples: exponentially fewer, down to 1 : imbalance."""
    number("imbalance", imbalance, low=1)
    if imbalance == 1:
        return data
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for c in range(data.classes):
        own = (data.train.targets == c).nonzero()[:, 0]
        keep = max(2, round(len(own) * imbalance ** (-c / (data.classes - 1))))
        rows.append(own[torch.randperm(len(own), generator=generator)[:keep]])
    kept = torch.cat(rows).sort().values
    return replace(data, train=data.train[kept])


def mislabelled(data: Data, share: float, seed: int) -> Data:
    """A share of the training labels replaced by another class's; ``extras["noisy"]`` says which."""
    number("label_noise", share, low=0, high=1)
    if share == 0:
        return data
    generator = torch.Generator().manual_seed(seed + 1)
    noisy = torch.rand(len(data.train.targets), generator=generator) < share
    shift = torch.randint(1, data.classes, (len(noisy),), generator=generator)
    y = torch.where(noisy, (data.train.targets + shift) % data.classes, data.train.targets)
    return replace(data, train=replace(data.train, targets=y, extras={**data.train.extras, "noisy": noisy}))
