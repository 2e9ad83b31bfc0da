"""What the modhifi recipe measures of one network: pruning by every criterion with every repair, noise on what was scored high, and how few inputs do."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.sites.hooks import replace
from lineament.data.samples import Samples
from lineament.edit.layers import fidelity
from lineament.edit.pruned import Pruned, PruneOptions
from lineament.edit.pruning import prune
from lineament.edit.subsets import fidelity_curve
from lineament.recipes.kit.image_sets import accuracy
from lineament.recipes.modhifi.networks import SOURCES, anew, images

CRITERIA = ("saliency", "fidelity", "energy", "magnitude", "random")
REPAIRS = {"alone": (None, False), "compensation": ("delta", False), "norms": (None, True), "both": ("delta", True)}  # fmt: skip
# Saliency with each repair alone, every criterion with none and with both.
ARMS = [
    (criterion, repair)
    for criterion, repair in itertools.product(CRITERIA, REPAIRS)
    if criterion == "saliency" or repair in ("alone", "both") or (criterion, repair) == ("magnitude", "norms")
]
_OUTPUTS = 32  # of a layer, whose subsets are looked at


@dataclass(frozen=True)
class Trial:
    """One trained network.

    Attributes:
        accuracy: of the whole network. parameters: {share of channels kept: share of the parameters left}.
        pruned: {"share | criterion | repair": test accuracy}.
        risen: the largest rise of a layer's local error by compensation, of ``layers`` in all.
        sources: {what layers were scored on: accuracy at the first share, with both repairs}. anew: of the same sizes, trained from the start.
        noise: {standard deviation: accuracy with noise on the 20 % of inputs scored highest, and on the other 80 %}.
        sets: {layer: fidelity of the 20 % of inputs that are best alone, and of a random 20 %}, means over outputs.
    """

    accuracy: float
    parameters: dict[str, float]
    pruned: dict[str, float]
    risen: float
    layers: int
    sources: dict[str, float]
    anew: float
    noise: dict[str, list[float]]
    sets: dict[str, list[float]]


def trial_of(config: Any, data: tuple[Samples, Samples], net: nn.Module, seed: int) -> Trial:
    train, test = data
    drawn = images(config, train, "generated", seed)
    parameters, right, rises, first = {}, {}, [], None
    for share in config.shares:
        for criterion, repair in ARMS:
            found = _pruned(net, drawn, share, criterion, repair, seed)
            right[f"{share:g} | {criterion} | {repair}"] = accuracy(found.model, test)
            parameters[f"{share:g}"] = found.share
            if REPAIRS[repair][0]:
                rises += [after - before for before, after in found.errors.values()]
            if (criterion, repair) == ("saliency", "both"):
                first = first or found
    sources = {
        s: accuracy(_pruned(net, images(config, train, s, seed), config.shares[0], "saliency", "both", seed).model, test)
        for s in SOURCES
    }  # fmt: skip
    assert first is not None
    return Trial(
        accuracy(net, test), parameters, right, max(rises), len(rises), sources, accuracy(anew(config, train, first.model, seed), test),
        noise_on(net, drawn, test, config.noise, seed), subsets_of(net, drawn, seed),
    )  # fmt: skip


def _pruned(net: nn.Module, drawn: Tensor, share: float, criterion: str, repair: str, seed: int) -> Pruned:
    compensate, recalibrate = REPAIRS[repair]
    # Without repairs the mean of what went is not put into biases either.
    options = PruneOptions(seed=seed, bias=compensate is not None)
    return prune(
        net, drawn, keep=share, criterion=criterion, compensate=compensate, recalibrate=recalibrate, options=options,
    )  # fmt: skip


def noise_on(
    net: nn.Module, drawn: Tensor, test: Samples, levels: tuple[float, ...], seed: int
) -> dict[str, list[float]]:
    """Accuracy with Gaussian noise on the inputs of all layers: on the 20 % of the highest saliency, and on the other 80 %.

    The deviation is ``level`` times the root mean square of what the layer reads.
    """
    scored = {name: each for name, each in fidelity(net, drawn).items() if each.weight.shape[1] >= 5}
    noisy: dict[str, tuple[Tensor, float]] = {}
    for name, each in scored.items():
        values = (each.scores.saliency / each.scores.total.clamp_min(1e-30)[:, None]).mean(0)
        chosen = torch.zeros(len(values), dtype=torch.bool)
        chosen[values.topk(max(1, round(0.2 * len(values)))).indices.cpu()] = True
        square = each.moment.diagonal().mean() + (each.mean.square().mean() if each.centred else 0)
        noisy[name] = chosen, float(square) ** 0.5
    found: dict[str, list[float]] = {}
    for level in levels:
        found[f"{level:g}"] = []
        for best in (True, False):
            generator = torch.Generator().manual_seed(seed)

            def disturbed(x: Tensor, name: str, level: float = level, best: bool = best, generator: torch.Generator = generator) -> Tensor:  # fmt: skip
                chosen, size = noisy[name]
                mask = (chosen if best else ~chosen).float().view(-1, *[1] * (x.ndim - 2))
                return x + (level * size * mask * torch.randn(x.shape, generator=generator)).to(x)

            changes = {f"{name}:in": lambda x, name=name, f=disturbed: f(x, name) for name in noisy}
            with replace(net, changes):
                found[f"{level:g}"].append(accuracy(net, test))
    return found


def subsets_of(net: nn.Module, drawn: Tensor, seed: int) -> dict[str, list[float]]:
    """The fidelity that a fifth of each layer's inputs reach, those best alone and random ones; means over up to 32 outputs that live."""
    found = {}
    generator = torch.Generator().manual_seed(seed)
    for name, each in fidelity(net, drawn).items():
        alive = (each.scores.total > 0).nonzero()[:, 0].cpu()
        some = alive[torch.randperm(len(alive), generator=generator)[:_OUTPUTS]].tolist()
        inputs = each.weight.shape[1]
        if inputs < 5 or not some:
            continue
        Q, size = each.similarity(some).cpu(), max(1, round(0.2 * inputs))
        chance = fidelity_curve(Q, "random", draws=1, seed=seed).fidelity[:, size - 1].mean()
        naive = fidelity_curve(Q, "naive").fidelity[:, size - 1].mean()
        found[name] = [float(naive), float(chance)]
    return found
