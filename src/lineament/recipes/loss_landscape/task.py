"""The networks, the data and the shifted data of the loss-landscape recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.data.digits import digit_images
from lineament.data.photographs import Standardise, read_photographs
from lineament.recipes.kit import networks
from lineament.train.stacked import Training

NETWORKS = ("plain", "batch norm")
# Gaussian noise of a standard deviation (images span 1), rotation by degrees, translation by pixels of an image of side 8.
SHIFTS = (
    ("noise", 0.0), ("noise", 0.1), ("noise", 0.2), ("noise", 0.3), ("noise", 0.5),
    ("rotation", 10.0), ("rotation", 20.0), ("rotation", 30.0), ("rotation", 45.0),
    ("translation", 0.5), ("translation", 1.0), ("translation", 1.5), ("translation", 2.0),
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """Training and test images, (samples, channels, height, width), with their labels."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: int


def task(data: str, folder: str | None, held: int) -> Task:
    """Digits split 1,000 to 797, or CIFAR-10's training images but the last ``held``, and these."""
    if data == "digits":
        digits = digit_images()
        order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
        return Task(digits[order[:1000]].pair, digits[order[1000:]].pair, 10)
    found = read_photographs(data, data_folder=folder)
    x, y = Standardise(found.inputs)(found.inputs), found.targets
    return Task((x[:-held], y[:-held]), (x[-held:], y[-held:]), len(found.classes))


def training(kind: str, network: str, task: Task, *, epochs: int, lr: float, batch_size: int) -> Training:
    """How a network of a kind is made and trained: Adam, the last epoch's weights."""
    channels, height, width = task.train[0].shape[1:]

    def perceptron() -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        inputs = channels * height * width
        for _ in range(2):
            layers += [
                nn.Linear(inputs, 32),
                *([nn.BatchNorm1d(32)] if kind == "batch norm" else []),
                nn.ReLU(),
            ]
            inputs = 32
        return nn.Sequential(*layers, nn.Linear(inputs, task.classes))

    def residual() -> nn.Module:
        return networks.network(
            "resnet18", (channels, height, width), task.classes, seed=None, norm=kind == "batch norm"
        )

    factory = perceptron if network == "mlp" else residual
    return Training(factory, epochs=epochs, batch_size=batch_size, lr=lr, select="last")


def shifted(images: Tensor, kind: str, size: float, seed: int) -> Tensor:
    """The images with noise, turned, or moved; what comes in from outside is zero."""
    if kind == "noise":
        generator = torch.Generator().manual_seed(seed)
        return images + size * torch.randn(images.shape, generator=generator).to(images)
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    angle = math.radians(size) if kind == "rotation" else 0.0
    theta[:, 0, 0] = theta[:, 1, 1] = math.cos(angle)
    theta[:, 0, 1], theta[:, 1, 0] = -math.sin(angle), math.sin(angle)
    if kind == "translation":
        theta[:, 0, 2] = -2 * size / 8
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
