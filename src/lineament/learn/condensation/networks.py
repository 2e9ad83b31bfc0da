"""The networks of dataset condensation: ConvNet-3 and its variants, and the pool on which a condensed set is tried.

arXiv 2202.02916, section 1.6, after Zhao, Mopuri, Bilen 2021. Any size of at least 4 x 4 and any number of channels: where a pooling would leave nothing for a norm
to compare, it is left out. Each is drawn from a seed alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from lineament.core.checks import InputError, number, one_of, require
from lineament.learn.condensation.halving import Halving

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
}
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda width: nn.Identity(),
    "batch": nn.BatchNorm2d,
    "layer": lambda width: nn.GroupNorm(1, width),
    "instance": lambda width: nn.GroupNorm(width, width),
    "group": lambda width: nn.GroupNorm(4, width),
}
POOLINGS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "max": lambda: nn.MaxPool2d(2),
    "avg": Halving,
}
SMALLEST = 4


def convnet(
    shape: tuple[int, ...],
    classes: int,
    *,
    width: int = 128,
    depth: int = 3,
    activation: str = "relu",
    norm: str = "instance",
    pooling: str = "avg",
    first_padding: int = 1,
    seed: int | None = None,
) -> nn.Module:
    """ConvNet: ``depth`` times convolution 3 x 3, norm, activation, pooling; then a linear layer.

    Args:
        shape: of one picture, (channels, height, width).
        activation, norm, pooling: of :data:`ACTIVATIONS`, :data:`NORMS`, :data:`POOLINGS`.
        first_padding: 3 makes 28 x 28 pictures 32 x 32, as the published code does for any picture of one channel.
        seed: of its weights; ``None`` draws them from the global random state, as a factory for :func:`condense` must.

    >>> net = convnet((3, 32, 32), 10)
    >>> sum(p.numel() for p in net.parameters())
    320010
    """
    for name, value in (("width", width), ("depth", depth)):
        number(name, value, low=1, integer=True)
    make, act = NORMS[one_of("norm", norm, NORMS)], ACTIVATIONS[one_of("activation", activation, ACTIVATIONS)]
    require(
        norm != "group" or width % 4 == 0, f"width: got {width}, expected a multiple of 4 for norm 'group'"
    )
    pool = POOLINGS[one_of("pooling", pooling, POOLINGS)]
    _sized(shape)
    sides = [side + 2 * (first_padding - 1) for side in shape[1:]]
    require(
        pooling == "none" or min(sides) >= 2**depth,
        f"depth: got {depth} for pictures of {shape[1]} x {shape[2]}, expected at most {min(sides).bit_length() - 1}",
    )
    with _drawn(seed):
        layers: list[nn.Module] = []
        channels = shape[0]
        for level in range(depth):
            conv = nn.Conv2d(channels, width, 3, padding=first_padding if level == 0 else 1)
            layers += [conv, make(width), act(), pool()]
            channels = width
        return _classifier(layers, shape, classes)


def network(
    name: str, shape: tuple[int, ...], classes: int, *, norm: str = "instance", seed: int | None = None
) -> nn.Module:
    """A network of the cross-architecture pool by name.

    Args:
        name: one of :data:`POOL`: ``convnet``, ``mlp`` (128, 128), ``lenet``, ``alexnet`` (5 convolutions), ``vgg11``, ``resnet18``.
        seed: as for :func:`convnet`.

    >>> [sum(p.numel() for p in network(name, (1, 16, 16), 10).parameters()) > 0 for name in POOL]
    [True, True, True, True, True, True]
    """
    one_of("network", name, POOL)
    one_of("norm", norm, NORMS)
    _sized(shape)
    if name == "convnet":
        return convnet(shape, classes, depth=min(3, min(shape[1:]).bit_length() - 1), norm=norm, seed=seed)
    with _drawn(seed):
        return POOL[name](shape, classes, norm=NORMS[norm])


def _mlp(shape: tuple[int, ...], classes: int, *, norm: Any) -> nn.Module:
    size = torch.Size(shape).numel()
    return nn.Sequential(
        nn.Flatten(), nn.Linear(size, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, classes)
    )


def _lenet(shape: tuple[int, ...], classes: int, *, norm: Any) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    size = _flat(layers, shape)
    dense = (size, 120, nn.ReLU), (120, 84, nn.ReLU)
    head = [part for a, b, act in dense for part in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers, nn.Flatten(), *head, nn.Linear(84, classes)).train()


# Widths of convolutions; 0 is a pooling.
_PLANS = {
    "alexnet": (128, 0, 192, 0, 256, 192, 192, 0),
    "vgg11": (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0),
}


def _plan(shape: tuple[int, ...], classes: int, *, norm: Any, plan: str) -> nn.Module:
    layers: list[nn.Module] = []
    channels, side, widths = shape[0], min(shape[1:]), _PLANS[plan]
    for place, width in enumerate(widths):
        if width:
            layers += [nn.Conv2d(channels, width, 3, padding=1), norm(width), nn.ReLU()]
            channels = width
        elif side >= 4 or (side >= 2 and place == len(widths) - 1):
            layers.append(nn.MaxPool2d(2))
            side //= 2
    return _classifier(layers, shape, classes)


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, norm: Any):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 3, stride, 1, bias=False), norm(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, 1, 1, bias=False), norm(width)),
        )
        same = stride == 1 and inputs == width
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), norm(width))
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def _resnet18(shape: tuple[int, ...], classes: int, *, norm: Any) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(shape[0], 64, 3, padding=1, bias=False), norm(64), nn.ReLU()]
    channels, side = 64, min(shape[1:])
    for stage, width in enumerate((64, 128, 256, 512)):
        stride = 2 if stage and side >= 4 else 1
        layers += [_Block(channels, width, stride, norm), _Block(width, width, 1, norm)]
        channels, side = width, side // stride
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


POOL: dict[str, Callable[..., nn.Module]] = {
    "convnet": convnet,
    "mlp": _mlp,
    "lenet": _lenet,
    "alexnet": partial(_plan, plan="alexnet"),
    "vgg11": partial(_plan, plan="vgg11"),
    "resnet18": _resnet18,
}


def _classifier(layers: list[nn.Module], shape: tuple[int, ...], classes: int) -> nn.Module:
    size = _flat(layers, shape)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, classes)).train()


def _flat(layers: list[nn.Module], shape: tuple[int, ...]) -> int:
    """How many features layers make of one picture; in training mode batch norms would remember the zeros."""
    with torch.no_grad():
        return nn.Sequential(*layers).eval()(torch.zeros(1, *shape)).numel()


def _sized(shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or min(shape[1:]) < SMALLEST:
        raise InputError(
            f"shape: got {tuple(shape)}, expected (channels, height, width) of at least {SMALLEST} x {SMALLEST}"
        )


@contextmanager
def _drawn(seed: int | None) -> Iterator[None]:
    """Draws come from a seed, and the global random state stays as it was; without one they come from there."""
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        yield
