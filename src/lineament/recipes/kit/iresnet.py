"""The improved ResNet that papers on faces train: a stem of stride 1, four stages that each halve the picture, batch norm before every convolution.

Duta et al. 2020, arXiv 2004.04989, as it is used for ArcFace and what came after. A block is BN - 3 x 3 - BN - PReLU - 3 x 3 (strided in a stage's first block) - BN
and is added to its input, or to a strided 1 x 1 convolution of it. At the end stand BN, dropout, a linear layer and a BN whose scale stays at one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 14, 3), 100: (3, 13, 30, 3)}


class IBlock(nn.Module):
    """One block of an iResNet."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.BatchNorm2d(inputs), nn.Conv2d(inputs, width, 3, 1, 1, bias=False)),
            *(nn.BatchNorm2d(width), nn.PReLU(width), nn.Conv2d(width, width, 3, stride, 1, bias=False)),
            nn.BatchNorm2d(width),
        )
        convolution = nn.Conv2d(inputs, width, 1, stride, bias=False)
        same = stride == 1 and inputs == width
        self.skip = nn.Identity() if same else nn.Sequential(convolution, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.skip(x)


class Bytes(nn.Module):
    """Pictures of bytes from -1 to 1; others as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x


def iresnet(
    depth: int,
    image_size: int,
    *,
    seed: int,
    channels: int = 64,
    size: int = 512,
    dropout: float = 0.0,
    init: Literal["normal", "fan-out"] = "normal",
) -> nn.Sequential:
    """An iResNet for pictures [n, 3, image_size, image_size], bytes or in [-1, 1], drawn from ``seed`` alone.

    Args:
        depth: 18, 34, 50 or 100.
        channels: of the stem and the first stage; each later stage has twice as many.
        size: of the embedding. dropout: before the last layer (.4 for ElasticFace's trainings on CASIA).
        init: of the convolutions: deviation .1, as ElasticFace has it, or Kaiming's by the outputs, as UNPG.

    Raises:
        InputError: an unknown depth, an image size that four halvings do not divide.

    >>> net = iresnet(100, 112, seed=0)
    >>> sum(p.numel() for p in net.parameters() if p.requires_grad)
    65155648
    """
    require(depth in BLOCKS, f"depth: got {depth}, expected 18, 34, 50 or 100")
    number("image_size", image_size, low=16, integer=True)
    require(image_size % 16 == 0, f"image_size: got {image_size}, expected a multiple of 16; nearest: {max(1, round(image_size / 16)) * 16}")  # fmt: skip
    number("channels", channels, low=1, integer=True)
    number("dropout", dropout, low=0, high=1)
    one_of("init", init, ("normal", "fan-out"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stem = (nn.Conv2d(3, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels), nn.PReLU(channels))
        layers: list[nn.Module] = [Bytes(), *stem]
        inputs = channels
        for stage, count in enumerate(BLOCKS[depth]):
            for block in range(count):
                layers.append(IBlock(inputs, channels * 2**stage, 1 if block else 2))
                inputs = channels * 2**stage
        last = nn.BatchNorm1d(size)
        last.weight.requires_grad_(False)
        flat = inputs * (image_size // 16) ** 2
        layers += [nn.BatchNorm2d(inputs), nn.Dropout(dropout), nn.Flatten(), nn.Linear(flat, size), last]
        net = nn.Sequential(*layers)
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and init == "normal":
                nn.init.normal_(module.weight, std=0.1)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
