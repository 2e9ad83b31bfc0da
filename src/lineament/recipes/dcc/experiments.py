"""One seed: pictures with a nuisance, sets condensed in each way at each step size, and networks trained on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.data.digits import digit_images
from lineament.data.photographs import read_photographs
from lineament.learn.condensation.condensed import Condensed
from lineament.learn.condensation.condensing import condense
from lineament.learn.condensation.diagnostics import kernel_velocity
from lineament.learn.condensation.evaluating import _sets
from lineament.learn.condensation.networks import convnet
from lineament.learn.condensation.options import Condensation
from lineament.learn.condensation.trials import Protocol, TestData, accuracies
from lineament.recipes.dcc.rivals import mean_matched, often_forgotten
from lineament.recipes.kit.image_sets import faces

OTHERS = ("faces", "mnist", "cifar10")  # data that are taken as they are
# Whether a method sums over classes, and from which share of the fresh networks on.
METHODS = {"class by class": ("dc", 0.0), "summed": ("dcc", 0.0), "summed after warm-up": ("dcc", 0.25)}


@dataclass(frozen=True)
class Trial:
    """Test accuracy of every network by what it was trained on, and the step size that was chosen for each method; the velocity of the kernel while a network
    trains on the summed set, by epoch."""

    accuracy: dict[str, Tensor]
    rate: dict[str, float]
    velocity: Tensor


def trial_of(config: Any, nuisance: str, seed: int) -> Trial:
    """Condense and judge once; step sizes are chosen on a fifth of the training pictures, which no set is condensed from."""
    config = configured(config, nuisance)
    x, y, test_x, test_y = with_nuisance(config, nuisance, seed)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    held, kept = order[: len(y) // 5], order[len(y) // 5 :]
    if nuisance == "shuffled":
        y = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(seed + 1))]
    train, choosing, test = (x[kept], y[kept]), (x[held], y[held]), (test_x, test_y)
    shape, classes = tuple(x.shape[1:]), int(y.max()) + 1
    make = partial(convnet, shape, classes, width=config.width, depth=config.depth)
    protocol = Protocol(networks=config.networks, epochs=config.training, rate=0.02, full_epochs=0)

    def judged(pictures: Tensor, labels: Tensor, on: tuple[Tensor, Tensor]) -> Tensor:
        start = made["own start"]  # its normalisation is that of the training pictures, as every set's
        how = replace(protocol, networks=config.choosing) if on is choosing else protocol
        return accuracies(start, pictures, labels, TestData(start, *on), lambda k: make(), how, seed=seed)

    def learned(name: str, rate: float) -> Condensed:
        if name == "mean features":
            steps = config.outer * config.inner
            return mean_matched(
                made["own start"], train, make, steps=steps, rate=rate, batch=config.batch, seed=seed
            )
        method, warm = METHODS[name]
        how = Condensation(
            outer=config.outer, inner=config.inner, epochs=config.epochs, outer_warmup=round(warm * config.outer), inner_warmup=config.inner,
            rate=rate, batch_real=config.batch,
        )  # fmt: skip
        return condense(
            *train, per_class=config.per_class, method=method, network=make, options=how, seed=seed
        )

    made = {"own start": condense(*train, per_class=config.per_class, method="random", seed=seed)}
    accuracy: dict[str, Tensor] = {}
    rates: dict[str, float] = {}
    for name in (*METHODS, "mean features"):
        best = -1.0
        for rate in config.rates:
            found = learned(name, rate)
            reached = float(judged(found.pictures, found.labels, choosing).mean())
            if reached > best:
                best, rates[name], made[name] = reached, rate, found
        accuracy[name] = judged(made[name].pictures, made[name].labels, test)
    beside = _sets(made["summed"], train, seed)
    for name in ("random real", "class means", "own start"):
        accuracy[name] = judged(*beside[name], test)
    for name in ("herding", "k_means"):
        chosen = condense(*train, per_class=config.per_class, method=name, network=make, seed=seed)
        accuracy[name] = judged(chosen.pictures, chosen.labels, test)
    rows = often_forgotten(
        train, made["own start"].normalised(train[0]), make, per_class=config.per_class, seed=seed
    )
    accuracy["often forgotten"] = judged(train[0][rows], train[1][rows], test)
    held_set = made["summed"]
    net = convnet(shape, classes, width=min(config.width, 16), depth=config.depth, seed=seed)
    velocity = kernel_velocity(
        net, held_set.normalised(), held_set.labels, held_set.normalised(train[0][:8]), epochs=20, rate=0.02
    )
    return Trial(accuracy, rates, velocity)


def configured(config: Any, setting: str) -> Any:
    """The configuration of a setting: other data come without a nuisance, pictures in colour in their own size; with half of the networks and of their training."""
    if setting not in OTHERS:
        return config
    size = {"side": 32, "depth": 3} if setting == "cifar10" else {}
    halved = {name: -(-getattr(config, name) // 2) for name in ("networks", "choosing", "training")}
    return replace(
        config, data=setting, amplitude=0.0, outer=config.other_outer, rates=config.other_rates, **halved, **size
    )  # fmt: skip


def check_others(config: Any) -> None:
    """Refuse, before the first step, data that are not there."""
    for setting in config.others:
        pictures(configured(config, setting), 0)


def told_of(setting: str) -> str:
    """A setting in words.

    >>> told_of("faces"), told_of("shared")
    ('faces', 'nuisance: shared')
    """
    return setting if setting in OTHERS else f"nuisance: {setting}"


def with_nuisance(config: Any, nuisance: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test pictures in [0, 1]: each with ``amplitude`` times a texture times a draw from [0.5, 1.5] added, of a few shared by all classes, or of its own."""
    x, y, test = pictures(config, seed)
    generator = np.random.default_rng([seed, 3])
    if nuisance != "none" and config.amplitude:
        x = (x - x.mean()) / x.std()
        crops = textures(len(x) if nuisance == "independent" else config.textures, config.side, generator)
        which = (
            np.arange(len(x)) if nuisance == "independent" else generator.integers(0, config.textures, len(x))
        )
        size = torch.from_numpy(generator.uniform(0.5, 1.5, len(x))).float()[:, None, None, None]
        x = x + config.amplitude * size * crops[torch.from_numpy(which)]
        x = (x - x.min()) / (x.max() - x.min())
    return x[~test], y[~test], x[test], y[test]


def textures(count: int, side: int, generator: np.random.Generator) -> Tensor:
    """Crops of a photograph that scikit-learn brings, grey, with mean 0 and deviation 1."""
    from sklearn.datasets import load_sample_image

    photograph = torch.from_numpy(load_sample_image("china.jpg").astype(np.float32)).mean(2)
    places = [[int(generator.integers(0, s - side)) for s in photograph.shape] for _ in range(count)]
    crops = torch.stack([photograph[i : i + side, j : j + side] for i, j in places])[:, None]
    flat = crops.flatten(1)
    return (crops - flat.mean(1)[:, None, None, None]) / (flat.std(1)[:, None, None, None] + 1)


def pictures(config: Any, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """All pictures in [0, 1], their classes, and which of them are for testing.

    Of MNIST and CIFAR-10 as other data, ``most`` of each class are for training, and half as many for testing.
    """
    few = config.most if config.data in config.others else 0
    if config.data == "cifar10":
        parts = [
            read_photographs("cifar10", split, data_folder=config.data_folder) for split in ("train", "test")
        ]
        rows = [_some(p.targets, few // (1 + k), seed) for k, p in enumerate(parts)]
        x = torch.cat([p.inputs[r] for p, r in zip(parts, rows)]).float() / 255
        y = torch.cat([p.targets[r] for p, r in zip(parts, rows)])
        return x, y, torch.arange(len(y)) >= len(rows[0])
    if config.data == "faces":
        held = faces(config.data_folder)
        x, y = held.inputs, held.targets
        x, share = x / x.max(), 0.3
    else:
        held = digit_images(config.data, data_folder=config.data_folder)
        rows = _some(held.targets, few + few // 2, seed)
        x, y, share = held.inputs[rows], held.targets[rows], 1 / 3 if few else 0.28
    x = F.interpolate(x, size=(config.side, config.side), mode="bilinear", antialias=True).clamp(0, 1)
    y = y - y.min()
    test = torch.zeros(len(y), dtype=torch.bool)
    for c in y.unique():
        rows = (y == c).nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        test[rows[order[: round(share * len(rows))]]] = True
    return x, y, test


def _some(labels: Tensor, most: int, seed: int) -> Tensor:
    """Rows of so many random samples of each class, or of all (0)."""
    if not most:
        return torch.arange(len(labels))
    generator = torch.Generator().manual_seed(seed)
    each = [(labels == c).nonzero()[:, 0] for c in labels.unique()]
    return torch.cat([r[torch.randperm(len(r), generator=generator)[:most]] for r in each])
