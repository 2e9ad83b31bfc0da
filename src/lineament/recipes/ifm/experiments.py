"""What is measured of one network: its complexity, what it is worth merged, and beside every rival at the same sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.models import device_of
from lineament.data.augmentation import flip_and_crop
from lineament.data.samples import Samples
from lineament.measure.merging.equivalence import feature_complexity, swap_test
from lineament.measure.merging.merge import merge
from lineament.measure.merging.merged import Merged
from lineament.measure.merging.repair import repair
from lineament.recipes.ifm.rivals import MERGERS, REMOVALS, grouped, removed, sizes_of
from lineament.recipes.kit.image_sets import accuracy
from lineament.recipes.kit.networks import network
from lineament.recipes.kit.threads import few_threads
from lineament.train.callbacks import Augment, Schedule
from lineament.train.loop import fit


@dataclass(frozen=True)
class Net:
    """One trained network: test accuracy; the share of channels and of parameters left at beta, and the accuracy then, by means and by the paper's rule;
    the share of channels of the untrained network; at each beta the mean share of channels."""

    accuracy: float
    channels: float
    parameters: float
    merged: float
    published: float
    untrained: float
    curve: list[float]


@dataclass(frozen=True)
class Trial:
    """Every way to the same sizes: test accuracies as they are and repaired, the share of parameters, and answers kept by swaps."""

    parameters: float
    sizes: dict[str, list[int]]
    accuracy: dict[str, float]
    repaired: dict[str, float]
    swapped: float
    random: float
    trace: list[float]


@dataclass(frozen=True)
class Depth:
    """A deep network: test accuracy, and the share of channels left by layer."""

    accuracy: float
    shares: list[float]


def trained(
    config: Any, data: tuple[Samples, Samples], widths: tuple[int, ...], decay: float, seed: int
) -> nn.Module:
    """A network after its training, in eval mode."""
    samples, _ = data
    net = _network(config, samples, widths, seed)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    schedule = Schedule(lambda o, _: torch.optim.lr_scheduler.MultiStepLR(o, list(config.milestones)))
    augment = [Augment(flip_and_crop)] if config.data == "cifar10" else []
    with few_threads(samples.inputs, device):
        fit(
            net.to(device), samples, epochs=config.epochs, batch_size=64 if config.data == "digits" else 128, seed=seed, callbacks=[*augment, schedule],
            optimizer=lambda net: torch.optim.SGD(net.parameters(), config.lr, momentum=0.9, weight_decay=decay),
        )  # fmt: skip
    return net.eval()


def _network(config: Any, samples: Samples, widths: tuple[int, ...], seed: int) -> nn.Module:
    classes = int(samples.targets.max()) + 1
    widths = widths if config.network == "mlp" else widths[:1]
    return network(config.network, tuple(samples.inputs.shape[1:]), classes, seed=seed, widths=widths)


def net_of(config: Any, data: tuple[Samples, Samples], width: int, decay: float, seed: int) -> Net:
    net, test, example = (
        trained(config, data, (width,) * config.layers, decay, seed),
        data[1],
        _example(config, data),
    )
    found = merge(net, example=example, beta=config.beta)
    published = merge(net, example=example, beta=config.beta, rule="sum_mean", norms="fold", distance="paper")
    fresh = _network(config, data[0], (width,) * config.layers, seed).to(device_of(net)).eval()
    curve = feature_complexity(net, config.betas, example=example)
    return Net(
        accuracy(net, test), _share(found), found.share, accuracy(found.model, test), accuracy(published.model, test),
        _share(merge(fresh, example=example, beta=config.beta)),
        torch.stack(list(curve.shares.values())).mean(0).tolist(),
    )  # fmt: skip


def trial_of(config: Any, data: tuple[Samples, Samples], width: int, decay: float, seed: int) -> Trial:
    net, test, example = (
        trained(config, data, (width,) * config.layers, decay, seed),
        data[1],
        _example(config, data),
    )
    inputs = data[0].inputs[:1000].to(device_of(net))
    found = merge(net, example=example, params=config.share)
    other = merge(net, example=example, keep=sizes_of(found), rule="sum_mean")
    right = {
        "whole network": accuracy(net, test),
        "merging": accuracy(found.model, test),
        "merging, sum and mean": accuracy(other.model, test),
    }
    repaired = {"merging": accuracy(repair(found, inputs).model, test)}
    for how in MERGERS:
        rival = grouped(found, how, inputs, seed)
        right[how], repaired[how] = accuracy(rival.model, test), accuracy(repair(rival, inputs).model, test)
    for how in REMOVALS:
        right[how] = accuracy(removed(found, how, seed), test)
    if config.network == "mlp":
        widths = tuple(after for _, after in found.sizes.values())
        right["the size trained anew"] = accuracy(trained(config, data, widths, decay, seed), test)
    swaps = swap_test(found, (test.inputs, test.targets), draws=config.draws, seed=seed)
    trace = torch.cat(list(found.trace.values()))
    return Trial(
        found.share,
        {k: list(v) for k, v in found.sizes.items()},
        right,
        repaired,
        swaps.agreement,
        swaps.random_agreement,
        trace.tolist(),
    )


def depth_of(config: Any, data: tuple[Samples, Samples], seed: int) -> Depth:
    widths = (config.depth_width,) * (config.depth if config.network == "mlp" else 1)
    net = trained(config, data, widths, min(config.decays), seed)
    found = merge(net, example=_example(config, data), beta=config.beta)
    return Depth(accuracy(net, data[1]), [after / before for before, after in found.sizes.values()])


def _share(found: Merged) -> float:
    return sum(after for _, after in found.sizes.values()) / sum(before for before, _ in found.sizes.values())


def _example(config: Any, data: tuple[Samples, Samples]) -> Tensor:
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    return data[0].inputs[:2].to(device)
