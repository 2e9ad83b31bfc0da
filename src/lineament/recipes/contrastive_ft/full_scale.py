"""MoCo v2 with and without feature transformation at the paper's scale: a ResNet-50 on the user's folder of photographs, and what its features are worth.

Every number is of the released command, but for batch norm: shuffling across eight devices is :class:`~lineament.recipes.contrastive_ft.training.MoCo`'s groups here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import number, require
from lineament.data.augmentation import flip
from lineament.learn.projection.photograph_views import photograph_view, resized_crop
from lineament.recipes.contrastive_ft.training import (
    MoCo,
    Trained,
    curves_of,
    loss_of,
    neighbours,
    pretrained,
)
from lineament.recipes.kit.picture_folders import (
    Photographs,
    ResNet,
    WholeBatches,
    features,
    folders_of,
)
from lineament.recipes.kit.stages import Stages
from lineament.train.callbacks import Augment, Rate
from lineament.train.loop import fit

_SIZE = 128


def course(epochs: int) -> Rate:
    """Half a cosine down to a thousandth, epoch by epoch; they are counted from 1.

    >>> [round(course(2).factor(done), 4) for done in (0.0, 0.49, 0.5)]
    [0.5005, 0.5005, 0.001]
    """

    def factor(done: float) -> float:
        epoch = int(done * epochs + 1e-6) + 1
        return 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * epoch / epochs)) / 2

    return Rate(factor)


def photographs_of(config: Any) -> tuple[Photographs, Photographs]:
    """The folder's pictures, once everything else can be used, too."""
    config.checked()
    number("lr", config.lr, low=0, open_low=True)
    number("probe_rate", config.probe_rate, low=0, open_low=True)
    number("temperature", config.temperature, low=0, open_low=True)
    number("momentum", config.momentum, low=0, high=1)
    number("norm_groups", config.norm_groups, low=1, integer=True)
    number("probe_epochs", config.probe_epochs, low=1, integer=True)
    require(
        config.batch_size >= 2 * config.norm_groups,
        f"norm_groups: got {config.norm_groups}, expected at most half of the batch size, {config.batch_size}",
    )
    return folders_of(config.data_folder, config.image_size)


def train(
    name: str,
    data: tuple[Photographs, Photographs],
    config: Any,
    seed: int,
    stages: Stages,
) -> Trained:
    """One training of a variant, and the accuracy of a linear probe and of neighbours on the held-out pictures."""
    (train, test), label = data, f"{name}, seed {seed}"
    device, epochs = config.checked(), config.epochs
    encoder = ResNet(config, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1000)
        width = encoder.width
        head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, _SIZE))
    steps = epochs * max(1, len(train) // config.batch_size)
    loss = loss_of(name, config, seed, epochs=epochs, steps=steps, size=_SIZE)
    net = MoCo(encoder, head, loss, config.momentum, groups=config.norm_groups).to(device)

    def views(x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.cat([photograph_view(x, config.image_size) for _ in range(2)])

    pretrained(
        net, train, config, name, seed, epochs=epochs, checkpoint=stages.checkpoint, name=f"{label}, training",
        callbacks=[WholeBatches(), Augment(views), course(epochs), net, *config.callbacks()],
    )  # fmt: skip
    encoder.requires_grad_(False).eval()
    probe = probed(encoder, train, config, seed, stages, f"{label}, linear probe")
    x, y = (features(encoder, part, config, config.batch_size) for part in data)
    with torch.no_grad():
        right = (probe.cpu()(y).argmax(1) == test.labels).double().mean()
    return Trained(float(right), neighbours(x, train.labels, y, test.labels), curves_of(loss), loss.gap)


def probed(
    encoder: ResNet, train: Photographs, config: Any, seed: int, stages: Stages, name: str
) -> nn.Linear:
    """A linear classifier of a frozen network's features of crops and mirror images; its rate falls to a tenth at 60 % and at 80 % of the epochs."""
    probe = nn.Linear(encoder.width, len(train.classes))
    nn.init.normal_(probe.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(probe.bias)

    def seen(x: Tensor, generator: torch.Generator) -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=config.bfloat16):
            return encoder(flip(resized_crop(x, config.image_size))).float()

    fit(
        probe.to(next(encoder.parameters()).device), train, epochs=config.probe_epochs, batch_size=config.batch_size, seed=seed,
        optimizer=lambda net: torch.optim.SGD(net.parameters(), config.probe_rate, momentum=0.9),
        callbacks=[Augment(seen), Rate(lambda done: 0.1 ** sum(done >= m for m in (0.6, 0.8)))],
        checkpoint=stages.checkpoint, name=name,
    )  # fmt: skip
    return probe
