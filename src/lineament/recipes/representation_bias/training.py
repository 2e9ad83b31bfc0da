"""What the representation-bias recipe trains: all seeds of a condition as one program, on fresh samples at every step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.models import frozen
from lineament.core.sites.activations import capture
from lineament.data.bit_features import bit_features
from lineament.measure.bias.consequences import pca_decoding, readout_reliance
from lineament.measure.bias.variance import representation_variance
from lineament.recipes.kit.networks import network
from lineament.train.loop import fit
from lineament.train.stacked import Stack, Training


@dataclass(frozen=True)
class Condition:
    """The features; the share of steps in which only the last one is trained, or the one that is ever trained; how often each target is given; the optimizer."""

    features: tuple[str, ...]
    hard_first: float = 0.0
    only: int | None = None
    prevalence: tuple[float, ...] = ()
    trained: bool = True
    sgd: bool = False


CONDITIONS = {
    "easy and parity-3": Condition(("linear", "parity3")),
    "easy and parity-4": Condition(("linear", "parity4")),
    "easy and xor": Condition(("linear", "xor")),
    "parity-4 first": Condition(("linear", "parity4"), hard_first=0.5),
    "two easy": Condition(("linear", "linear")),
    "two hard": Condition(("parity4", "parity4")),
    "frequent and rare": Condition(("linear", "linear"), prevalence=(1.0, 0.1)),
    "parity-3, easy alone": Condition(("linear", "parity3"), only=0),
    "parity-3, hard alone": Condition(("linear", "parity3"), only=1),
    "parity-4, easy alone": Condition(("linear", "parity4"), only=0),
    "parity-4, hard alone": Condition(("linear", "parity4"), only=1),
    "SGD, easy and parity-3": Condition(("linear", "parity3"), sgd=True),
    "untrained": Condition(("linear", "parity4"), trained=False),
}
_EPOCH = 100  # steps
_COMPONENTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Measured:
    """One network: of each feature its test accuracy, variance explained, density, decodability and principal components for 95 %.

    ``reliance``: how far a new read-out follows the first of two features; ``shuffled``: variance explained by a shuffled feature; ``patterns``: the representation of a few samples.
    """

    seed: int
    features: tuple[str, ...]
    accuracy: tuple[float, ...]
    r2: tuple[float, ...]
    density: tuple[float, ...]
    decodable: tuple[float, ...]
    components: tuple[int, ...]
    reliance: float
    shuffled: float
    patterns: Tensor


class Fresh:
    """An epoch of batches (network, sample, bit), drawn anew each time; targets that are not given are -1."""

    def __init__(self, config: Any, told: Condition):
        self.config, self.told, self.epoch = config, told, 0

    def __len__(self) -> int:
        return min(_EPOCH, self.config.steps)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        config, steps = self.config, len(self)
        epochs = math.ceil(config.steps / steps)
        alone = self.epoch < self.told.hard_first * epochs
        each = steps * config.batch_size
        # Samples of an epoch are drawn in one go, by seeds that nothing else uses.
        drawn = [
            bit_features(
                each,
                self.told.features,
                block=config.block,
                noise=config.noise,
                prevalence=self.told.prevalence,
                seed=2**40 + 10_000 * seed + self.epoch,
            )
            for seed in range(config.seeds)
        ]
        x = torch.stack([d.inputs for d in drawn])
        y = torch.stack([torch.where(d.extras["given"], d.targets, -1.0) for d in drawn])
        if alone:
            y[..., :-1] = -1
        if self.told.only is not None:
            y[..., torch.arange(y.shape[-1]) != self.told.only] = -1
        self.epoch += 1
        yield from zip(x.split(config.batch_size, 1), y.split(config.batch_size, 1))


def loss(z: Tensor, y: Tensor) -> Tensor:
    """Binary cross-entropy of the targets that are given, summed over features and networks, a mean over samples."""
    each = F.binary_cross_entropy_with_logits(z, y.clamp_min(0), reduction="none") * (y >= 0)
    return each.sum((0, 2)).mean()


def condition(config: Any, name: str) -> list[Measured]:
    told = CONDITIONS[name]
    bits = len(told.features) * config.block + config.noise
    factory = partial(network, "mlp", (bits,), len(told.features), seed=None, widths=config.widths)
    models = [Training(factory).fresh(seed) for seed in range(config.seeds)]
    if told.trained:
        stack, data = Stack(models), Fresh(config, told)

        def optimizer(net: nn.Module) -> torch.optim.Optimizer:
            if told.sgd:
                return torch.optim.SGD(net.parameters(), lr=0.05)
            return torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)

        fit(
            stack, data, optimizer=optimizer, epochs=math.ceil(config.steps / len(data)), loss=loss, name=name
        )
        stack.unstack(models)
    return [measured(config, told, seed, model) for seed, model in enumerate(models)]


def measured(config: Any, told: Condition, seed: int, model: nn.Module) -> Measured:
    data = bit_features(
        config.samples, told.features, block=config.block, noise=config.noise, seed=2**50 + seed
    )
    test = torch.arange(config.samples) % 2 == 1
    with frozen(model), torch.no_grad(), capture(model, "head:in") as acts:
        scores = model(data.inputs)
        phi = acts["head:in"].double()
    columns = {f"{number} {name}": data.targets[:, number] for number, name in enumerate(told.features)}
    site = representation_variance(phi, columns, test=test)["representation"]
    order = torch.randperm(config.samples, generator=torch.Generator().manual_seed(seed))
    control = representation_variance(phi, {"f": data.targets[order, 0]}, test=test)["representation"]["f"].r2
    goals = [column.long() for column in columns.values()]
    ks = [k for k in _COMPONENTS if k <= phi.shape[1]]
    needed = pca_decoding(phi, goals, ks, test=test).components_for(0.95)
    reliance = readout_reliance(phi, goals[0], goals[1]).value if len(goals) == 2 else math.nan
    right = ((scores > 0) == (data.targets > 0.5)).double().mean(0)
    return Measured(
        seed, told.features, tuple(right.tolist()), tuple(f.r2 for f in site.features),
        tuple(f.density for f in site.features), tuple(float(f.decodable or math.nan) for f in site.features),
        tuple(k if k is not None else phi.shape[1] + 1 for k in needed), reliance, control, phi[: config.patterns],
    )  # fmt: skip


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def gap(each: Sequence[Measured]) -> tuple[float, float]:
    """The mean over seeds of the first feature's variance explained less the second's, and its standard error."""
    values = [m.r2[0] - m.r2[1] for m in each]
    middle = mean(values)
    spread = (sum((v - middle) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5
    return middle, spread / len(values) ** 0.5
