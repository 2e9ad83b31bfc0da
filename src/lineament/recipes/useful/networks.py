"""The networks of the useful recipe, for images from 12 x 12 to 64 x 64 pixels; each ends in ``head``.

Perceptron and small CNN; ResNet-18 and -34, VGG-19 and DenseNet-121 in their forms for small images, ViT-S on patches of 4 x 4.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lineament.core.checks import one_of, require
from lineament.recipes.kit.networks import Block

_VGG19 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 256, 0, 512, 512, 512, 512, 0, 512, 512, 512, 512, 0)


class Network(nn.Module):
    """Features and a linear head."""

    def __init__(self, features: nn.Module, width: int, classes: int):
        super().__init__()
        self.features, self.head = features, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class _Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _conv(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def mlp(shape: torch.Size, classes: int, width: int) -> Network:
    """Three layers: two hidden ones and the head."""
    size = shape.numel()
    return Network(
        nn.Sequential(nn.Flatten(), nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        width,
        classes,
    )


def tiny_cnn(shape: torch.Size, classes: int, width: int) -> Network:
    """conv, pool, conv, pool, a hidden layer of 4 x width: 16-32-64 for width 16."""
    side = (shape[1] // 4) * (shape[2] // 4)
    layers = [
        *(nn.Conv2d(shape[0], width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(2 * width * side, 4 * width), nn.ReLU()),
    ]
    return Network(nn.Sequential(*layers), 4 * width, classes)


def cnn(shape: torch.Size, classes: int, width: int) -> Network:
    """Three blocks of convolution, batch norm and pooling, of width, 2 x width and 4 x width."""
    layers: list[nn.Module] = []
    inputs = shape[0]
    for outputs in (width, 2 * width, 4 * width):
        layers += [*_conv(inputs, outputs), nn.MaxPool2d(2)]
        inputs = outputs
    return Network(nn.Sequential(*layers, _Mean()), inputs, classes)


def _resnet(blocks: tuple[int, ...]) -> Callable[[torch.Size, int, int], Network]:
    def make(shape: torch.Size, classes: int, width: int) -> Network:
        layers = _conv(shape[0], width)
        inputs = width
        for stage, count in enumerate(blocks):
            for index in range(count):
                outputs = width * 2**stage
                layers.append(Block(inputs, outputs, 2 if stage and not index else 1))
                inputs = outputs
        return Network(nn.Sequential(*layers, _Mean()), inputs, classes)

    return make


def vgg19(shape: torch.Size, classes: int, width: int) -> Network:
    """Simonyan and Zisserman 2015, with batch norm and one linear layer."""
    layers: list[nn.Module] = []
    inputs = shape[0]
    for channels in _VGG19:
        if channels:
            layers += _conv(inputs, channels * width // 64)
            inputs = channels * width // 64
        else:
            layers.append(nn.MaxPool2d(2))
    return Network(nn.Sequential(*layers, _Mean()), inputs, classes)


class _Dense(nn.Module):
    def __init__(self, inputs: int, growth: int):
        super().__init__()
        middle = 4 * growth
        self.body = nn.Sequential(
            *(nn.BatchNorm2d(inputs), nn.ReLU(), nn.Conv2d(inputs, middle, 1, bias=False)),
            *(nn.BatchNorm2d(middle), nn.ReLU(), nn.Conv2d(middle, growth, 3, padding=1, bias=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def densenet121(shape: torch.Size, classes: int, width: int) -> Network:
    """Huang et al. 2017, growth width / 2 (32 for width 64), compression by two between blocks."""
    growth, channels = width // 2, width
    layers: list[nn.Module] = [nn.Conv2d(shape[0], channels, 3, padding=1, bias=False)]
    for stage, count in enumerate((6, 12, 24, 16)):
        for _ in range(count):
            layers.append(_Dense(channels, growth))
            channels += growth
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if stage < 3:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return Network(nn.Sequential(*layers, _Mean()), channels, classes)


class _Patches(nn.Module):
    def __init__(self, shape: torch.Size, width: int):
        super().__init__()
        self.project = nn.Conv2d(shape[0], width, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(1, (shape[1] // 4) * (shape[2] // 4), width))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x).flatten(2).mT + self.place


class _TokenMean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def vit_s(shape: torch.Size, classes: int, width: int) -> Network:
    """Dosovitskiy et al. 2021: 12 pre-norm layers of six heads; 384 wide for width 64."""
    width = 6 * width
    layer = nn.TransformerEncoderLayer(
        width, 6, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, 12, norm=nn.LayerNorm(width), enable_nested_tensor=False)
    return Network(nn.Sequential(_Patches(shape, width), encoder, _TokenMean()), width, classes)


NETWORKS: dict[str, Callable[[torch.Size, int, int], Network]] = {
    "tiny-cnn": tiny_cnn,
    "cnn": cnn,
    "mlp": mlp,
    "resnet18": _resnet((2, 2, 2, 2)),
    "resnet34": _resnet((3, 4, 6, 3)),
    "vgg19": vgg19,
    "densenet121": densenet121,
    "vit-s": vit_s,
}


def network(
    kind: str, shape: torch.Size, classes: int, width: int, seed: int, weights: str | None = None
) -> Network:
    """A network drawn from ``seed`` alone; with ``weights``, a safetensors file, all that fits is taken from it (fine-tuning)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[one_of("network", kind, NETWORKS)](shape, classes, width)
    if weights is not None:
        require(Path(weights).is_file(), f"weights: {weights!r} is no file")
        own = model.state_dict()
        stored = {k: v for k, v in load_file(weights).items() if k in own and v.shape == own[k].shape}
        require(len(stored) > 0, f"weights: nothing in {weights!r} fits the network {kind!r}")
        model.load_state_dict({**own, **stored})
    return model
