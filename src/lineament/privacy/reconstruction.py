"""How much of a batch can be rebuilt from its message? GIFD and the attacks it is compared with, many messages and restarts side by side.

Fang et al. 2023, arXiv 2308.04699, sections 1.4 and 1.5. An audit reports the strongest attacker, so its rivals are presets of the same search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vmap

from lineament.core.checks import number, one_of, require, show
from lineament.core.models import logits
from lineament.core.results import Readable
from lineament.privacy.costs import COSTS, matching_cost
from lineament.privacy.inversion import Stage, invert
from lineament.privacy.labels import inferred_labels, label_rule
from lineament.privacy.messages import Message, checked, dummy_gradient, head_of
from lineament.privacy.priors import Pixels, Prior

ATTACKS = ("gifd", "no ball", "latent", "ig", "gi", "dlg")


@dataclass(frozen=True)
class Search:
    """How an attacker looks.

    Attributes:
        steps: of each layer. Attacks without layers take as many in all.
        rate, feature_rate: peak learning rates of codes (or pixels) and of features.
        layers: features that are searched behind the code; by default all inputs of later blocks.
        radius: of each layer's l1 ball for each entry, None for no ball.
        restarts: from other codes; the best score is kept.
        cost, ratio: see :func:`lineament.privacy.matching_cost`. variation, norm: weights of what keeps pictures natural.
        patience: end when the score of every row rose over so many layers in a row.

    >>> Search().restarts
    2
    """

    steps: int = 150
    rate: float = 0.1
    feature_rate: float = 0.03
    layers: int | None = None
    radius: float | None = 0.04
    restarts: int = 2
    cost: str = "sim"
    ratio: float = 0.0
    variation: float = 1e-3
    norm: float = 0.0
    patience: int | None = 2

    def __post_init__(self) -> None:
        for name in ("steps", "restarts"):
            number(name, getattr(self, name), low=1, integer=True)
        one_of("cost", self.cost, COSTS)
        if self.layers is not None:
            number("layers", self.layers, low=0, integer=True)
        if self.radius is not None:
            number("radius", self.radius, low=0, open_low=True)


@dataclass(frozen=True)
class Reconstruction(Readable):
    """Guessed pictures [messages, batch, channels, height, width], normalised.

    ``scores``: each message's matching cost; ``stages``: pictures and scores of each layer searched, of the restart that was best, [messages, layers, ...];
    ``targets``: the labels that were used; ``steps``: gradients that were computed of each guess.
    """

    pictures: Tensor
    scores: Tensor
    stage: Tensor
    stage_pictures: Tensor
    stage_scores: Tensor
    targets: Tensor
    steps: int


def reconstruct(
    model: nn.Module,
    messages: Sequence[Message],
    targets: Tensor,
    shape: Sequence[int],
    *,
    prior: Prior | None = None,
    attack: str = "gifd",
    search: Search = Search(),
    bounds: tuple[Tensor, Tensor],
    seed: int = 0,
) -> Reconstruction:
    """Rebuild the pictures behind messages, independently of each other, in one search.

    Args:
        messages: of one count, one defence and one kind. targets: their labels [messages, batch].
        shape: of a picture, (channels, height, width).
        prior: what the attacker knows; None for attacks on pixels.
        attack: ``"gifd"``; ``"no ball"``, the same without its balls; ``"latent"``, the code alone; or on pixels ``"ig"`` (cosine and total variation),
            ``"gi"`` (squared distance, total variation, norm) and ``"dlg"`` (squared distance alone). All take equally many steps.
        bounds: least and greatest values of normalised pictures by channel.

    Raises:
        InputError: messages that do not fit the model or each other, layers that the prior does not have.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> x, y = torch.rand(1, 1, 4, 4), torch.tensor([1])
    >>> limits = torch.zeros(1), torch.ones(1)
    >>> found = reconstruct(net, [Message.of(net, x, y)], y[None], (1, 4, 4), attack="ig", search=Search(steps=2, restarts=1), bounds=limits)
    >>> found.pictures.shape
    torch.Size([1, 1, 1, 4, 4])
    """
    one_of("attack", attack, ATTACKS)
    require(len(messages) > 0, "messages: got none, expected at least one")
    first = messages[0]
    parameters = [p for p in model.parameters() if p.requires_grad]
    for message in messages:
        checked(message, parameters)
        require(
            message.count == first.count and message.local == first.local,
            "messages: they stand for different numbers of pictures or local steps; search them apart",
        )
    require(
        targets.shape[:2] == (len(messages), first.count),
        f"targets: got {show(targets)}, expected labels [{len(messages)}, {first.count}]",
    )
    on_pixels = attack in ("ig", "gi", "dlg") or prior is None
    used: Prior = Pixels(shape) if prior is None or on_pixels else prior
    search = _preset(
        attack, search, 0 if prior is None else _layers(prior, search, targets.flatten(), parameters[0])
    )
    rows = len(messages) * search.restarts
    labels = targets.repeat_interleave(search.restarts, 0)
    flat = labels.flatten()
    sent = [
        torch.stack(each).repeat_interleave(search.restarts, 0)
        for each in zip(*(m.tensors for m in messages))
    ]
    stages = _stages(used, search, flat, parameters[0], on_pixels)
    compute = dummy_gradient(model, labels, local=first.local)
    at_once = vmap(lambda guess, known: _match(first, guess, known, search))
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    start = torch.randn(
        rows * first.count,
        used.code,
        generator=generator,
        dtype=parameters[0].dtype,
        device=parameters[0].device,
    )
    if on_pixels:
        start = start * 0.1
    low, high = (bound.to(start) for bound in bounds)
    found = invert(
        lambda z: used.blocks(z, flat),
        used.render,
        lambda x: compute(x.view(rows, first.count, *shape)),
        lambda g: at_once(tuple(g), tuple(sent)),
        start,
        stages,
        bounds=(low, high),
        variation=search.variation,
        norm=search.norm,
        side=int(shape[-1]),
        patience=search.patience,
    )
    return _best(found, len(messages), search.restarts, first.count, shape, targets)


def _preset(attack: str, search: Search, layers: int) -> Search:
    """The search of one attack; what has no layers takes the steps of all."""
    whole = replace(search, layers=0, steps=search.steps * (1 + layers))
    return {
        "gifd": search,
        "no ball": replace(search, radius=None),
        "latent": whole,
        "ig": replace(whole, cost="sim", variation=1e-4, norm=0.0),
        "gi": replace(whole, cost="l2", variation=1e-4, norm=1e-6),
        "dlg": replace(whole, cost="l2", variation=0.0, norm=0.0),
    }[attack]


def _layers(prior: Prior, search: Search, targets: Tensor, like: Tensor) -> int:
    """How many features of a prior are searched behind its code."""
    most = len(prior.blocks(_code(prior, targets, like), targets)) - 1
    layers = most if search.layers is None else search.layers
    require(
        layers <= most, f"layers: got {layers}, but this prior has {most} whose features could be searched"
    )
    return layers


def _stages(prior: Prior, search: Search, targets: Tensor, like: Tensor, on_pixels: bool) -> list[Stage]:
    """The code's stage and those of the features; the radius of each grows with its entries."""
    value, layers = _code(prior, targets, like), 0 if on_pixels else _layers(prior, search, targets, like)
    if layers == 0:
        return [Stage(search.steps, search.rate, sphere=not on_pixels)]
    stages, blocks = [Stage(search.steps, search.rate)], prior.blocks(value, targets)
    with torch.no_grad():
        for k in range(1, layers + 1):
            value = blocks[k - 1](value)
            radius = -1.0 if search.radius is None else search.radius * value[0].numel()
            stages.append(Stage(search.steps, search.feature_rate, radius))
    return stages


def _code(prior: Prior, targets: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(len(targets), prior.code, dtype=like.dtype, device=like.device)


def _match(message: Message, guess: Sequence[Tensor], sent: Sequence[Tensor], search: Search) -> Tensor:
    how: Any = search.cost
    return matching_cost(message.defence.mirror(guess, sent), sent, how, ratio=search.ratio)


def _best(
    found: Any, messages: int, restarts: int, count: int, shape: Sequence[int], targets: Tensor
) -> Reconstruction:
    """The best restart of each message."""
    scores = found.score.view(messages, restarts)
    best = scores.argmin(1)
    rows = torch.arange(messages, device=best.device) * restarts + best
    by_stage = torch.stack(found.pictures).view(len(found.pictures), messages * restarts, count, *shape)
    return Reconstruction(
        found.best.view(messages * restarts, count, *shape)[rows],
        scores.amin(1),
        found.stage[rows],
        by_stage[:, rows].transpose(0, 1),
        torch.stack(found.scores)[:, rows].T,
        targets,
        len(found.objective),
    )


def guessed_targets(
    model: nn.Module, message: Message, example: Tensor, public: Tensor | None = None
) -> tuple[Tensor, str]:
    """The labels that an attacker reads off a message [batch], and by which rule.

    Args:
        example: any picture as the model takes it [1, ...]; the last linear layer is found by running the model. public: pictures of the same kind.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x = torch.rand(1, 1, 2, 2)
    >>> guessed_targets(net, Message.of(net, x, torch.tensor([2])), x)
    (tensor([2]), 'bias')
    """
    name, _ = head_of(model, example)
    named = {
        n: t
        for (n, _), t in zip(
            ((n, p) for n, p in model.named_parameters() if p.requires_grad), message.tensors
        )
    }
    weight, bias = named[f"{name}.weight"], named.get(f"{name}.bias")
    expected = None
    if public is not None:
        with torch.no_grad():
            expected = logits(model(public)).softmax(-1).mean(0)
    rule = label_rule(bias, message.count, expected)
    found = inferred_labels(weight, message.count, rule=rule, bias=bias, expected=expected)
    return torch.tensor(found, device=weight.device), rule


def closed_form(model: nn.Module, message: Message) -> Tensor | None:
    """The picture itself where one picture met a linear first layer with a bias: each row of its gradient is the input times the bias's; else None.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)); x = torch.rand(1, 1, 2, 2)
    >>> torch.allclose(closed_form(net, Message.of(net, x, torch.tensor([2]))), x.flatten(), atol=1e-5)
    True
    """
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    layers = dict(model.named_modules())
    layer = layers.get(names[0].rpartition(".")[0])
    if (
        message.count != 1
        or not isinstance(layer, nn.Linear)
        or len(names) < 2
        or not names[1].endswith("bias")
    ):
        return None
    weight, bias = message.tensors[0], message.tensors[1]
    row = int(bias.abs().argmax())
    return weight[row] / bias[row] if bias[row] != 0 else None
