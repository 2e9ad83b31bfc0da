"""A class taken out of a network: by its pairs of the highest saliency, at random, at the head alone, and a network trained without it."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lineament.data.samples import Samples
from lineament.edit.forgetting import forgotten
from lineament.edit.membership import u_lira
from lineament.edit.unlearning import mute, unlearn
from lineament.recipes.kit.image_sets import accuracy
from lineament.recipes.modhifi.networks import of_class, trained


@dataclass(frozen=True)
class Unlearned:
    """One class taken out of one network; pairs are accuracies on the class and on the others.

    Attributes:
        before: of the whole network. shares: {share of the pairs: on the test images}.
        share: the smallest at which at most a tenth of the class's training images is answered, else the largest.
        random: random pairs of that share. head: the class's logit at minus infinity. retrained: a network trained without the class.
        lira: how often U-LiRA tells edited networks from those that never saw the class on its training images, and the standard error; empty without shadow networks.
        verdict: ``forgotten``'s. probe, samples: of the edited network, of the muted one and of the retrained one; ``None`` where it was not learned again.
    """

    before: list[float]
    shares: dict[str, list[float]]
    share: float
    random: list[float]
    head: list[float]
    retrained: list[float]
    verdict: str
    probe: list[float]
    samples: list[int | None]
    lira: list[float]


def unlearned(config: Any, data: tuple[Samples, Samples], net: nn.Module, name: str, label: int) -> Unlearned:
    train, test = data
    seed = config.seeds[0]
    drawn = of_class(train, label, max(64, config.calibration // 10), seed)
    parts = [test[(test.targets == label) == inside] for inside in (True, False)]
    shown = train[train.targets == label]

    def both(model: Any) -> list[float]:
        return [accuracy(model, part) for part in parts]

    tried, chosen = {}, None
    for share in sorted(config.forget_shares):
        model = unlearn(net, drawn, share=share, seed=seed).model
        tried[f"{share:g}"] = both(model)
        if chosen is None and accuracy(model, shown) <= 0.1:
            chosen = share, model
    if chosen is None:
        share = max(config.forget_shares)
        chosen = share, unlearn(net, drawn, share=share, seed=seed).model
    chance = unlearn(net, drawn, share=chosen[0], criterion="random", seed=seed).model
    head = mute(net, label, test.inputs[:2])
    rest = train[train.targets != label]
    other = trained(config, rest, name, seed)
    if rest.targets.max() < label:  # the last class: the head has no answer for it
        other = _widened(other, label)
    x, y = (torch.cat([getattr(p, what) for p in parts]) for what in ("inputs", "targets"))
    forget, retain = ((x[m], y[m]) for m in (y == label, y != label))
    told = [
        forgotten(net, model, forget, retain, retrained=other, seed=seed, steps=config.relearning)
        for model in (chosen[1], head)
    ]
    reference = told[0].retrained
    assert reference is not None
    knowledge = [told[0].after, told[1].after, reference]
    return Unlearned(
        both(net), tried, chosen[0], both(chance), both(head), both(other), told[0].verdict,
        [max(k.probe.values()) for k in knowledge], [k.samples for k in knowledge],
        _told_apart(config, train, name, label, chosen[0]) if config.shadows else [],
    )  # fmt: skip


def _told_apart(config: Any, train: Samples, name: str, label: int, share: float) -> list[float]:
    """U-LiRA between networks that lost the class and networks trained without it, each from a seed of its own."""
    rest, shown = train[train.targets != label], train[train.targets == label]
    edited, never = [], []
    for number in range(config.shadows):
        seed = max(config.seeds) + 1 + number
        drawn = of_class(train, label, max(64, config.calibration // 10), seed)
        edited.append(unlearn(trained(config, train, name, seed), drawn, share=share, seed=seed).model)
        other = trained(config, rest, name, seed)
        never.append(_widened(other, label) if rest.targets.max() < label else other)
    found = u_lira(edited, never, (shown.inputs, shown.targets))
    return [found.accuracy, found.error]


def _widened(model: Any, label: int) -> Any:
    head = model.head
    wider = torch.nn.Linear(head.in_features, label + 1).to(head.weight)
    with torch.no_grad():
        wider.weight.zero_()[: len(head.weight)] = head.weight
        wider.bias.fill_(-10.0)[: len(head.weight)] = head.bias
    model.head = wider
    return model


def mean(rows: list[list[float]]) -> list[float]:
    """The means of accuracies on the class and on the others."""
    return [statistics.mean(r[k] for r in rows) for k in (0, 1)]
