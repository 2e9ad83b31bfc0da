"""Networks that several recipes train: a ResNet-18 for small images, a perceptron."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inside + self.skip(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3 x 3 stem of stride 1, no pooling before the blocks (He et al. 2016)."""

    def __init__(self, channels: int, classes: int, *, bias: bool, width: int = 64):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        widths = [width * m for m in (1, 2, 4, 8)]
        stages = []
        inputs = width
        for index, outputs in enumerate(widths):
            stages.append(
                nn.Sequential(Block(inputs, outputs, 1 if index == 0 else 2), Block(outputs, outputs, 1))
            )
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class MLP(nn.Module):
    """Fully connected ReLU layers and a linear head."""

    def __init__(self, inputs: int, widths: tuple[int, ...], classes: int, *, bias: bool):
        super().__init__()
        parts: list[nn.Module] = [nn.Flatten()]
        for width in widths:
            parts += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(inputs, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))
