"""How much of a batch can be rebuilt from its message? GIFD and the attacks it is compared with, many messages and restarts side by side.

Fang et al. 2023, arXiv 2308.04699, sections 1.4 and 1.5. An audit reports the strongest attacker, so its rivals are presets of the same search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.core.checks import InputError, labels, one_of, require, show
from lineament.core.matching import matched_gradient
from lineament.core.models import logits
from lineament.core.results import Readable
from lineament.privacy.costs import chosen_tensors, code_divergence, index_set, matching_cost
from lineament.privacy.evolution import evolve, population
from lineament.privacy.inversion import Inversion, Stage, invert
from lineament.privacy.messages import Message, checked, dummy_gradient, fixed, same_twice
from lineament.privacy.priors import Mapped, Pixels, Prior
from lineament.privacy.rivals import closed_form, group_term, own_generators
from lineament.privacy.search import ATTACKS, ON_PIXELS, Search
from lineament.privacy.statistics import norms, statistics_gap

SEARCH = Search()


@dataclass(frozen=True)
class Reconstruction(Readable):
    """Guessed pictures [messages, batch, channels, height, width], normalised.

    ``scores``: each message's matching cost; ``stages``: pictures and scores of each layer searched, of the restart that was best, [messages, layers, ...];
    ``targets``: the labels that were used, or found by the search; ``steps``: gradients that were computed of each guess; ``restart``: which one was best;
    ``trace``: the objective at each of its steps, summed over all that was searched side by side; ``classes`` [messages, batch]: those of the generator that a first
    search found, where they are not the model's.
    """

    pictures: Tensor
    scores: Tensor
    stage: Tensor
    stage_pictures: Tensor
    stage_scores: Tensor
    targets: Tensor
    steps: int
    restart: Tensor
    trace: tuple[Tensor, ...] = ()
    classes: Tensor | None = None


def reconstruct(
    model: nn.Module,
    messages: Sequence[Message],
    targets: Tensor,
    shape: Sequence[int],
    *,
    prior: Prior | None = None,
    attack: str = "gifd",
    search: Search = SEARCH,
    bounds: tuple[Tensor, Tensor],
    seed: int = 0,
) -> Reconstruction:
    """Rebuild the pictures behind messages, independently of each other, in one search.

    Args:
        messages: of one count, one defence and one kind. targets: their labels [messages, batch].
        shape: of a picture, (channels, height, width).
        prior: what the attacker knows; None for attacks on pixels. A generator is told the labels, if it takes any; one of other classes is :class:`lineament.privacy.Mapped`.
        attack: ``"gifd"``; ``"no ball"``, the same without its balls; ``"no regulariser"``, without what keeps pictures natural; ``"one layer"``, half of the steps on the
            code and half on the features of one layer; ``"latent"``, the code alone; ``"gias"``, half of the steps on the code and half on the
            generator's weights, one copy a picture; ``"ggl"``, the code by CMA-ES, without derivatives (needs the package ``cma``); on pixels ``"ig"`` (cosine and
            total variation), ``"gi"`` (squared distance, total variation, norm, restarts as a group), ``"idlg"`` (squared distance alone) and ``"dlg"``, which does not
            take ``targets`` but searches for class probabilities beside the pixels. All of these take
            equally many steps, of which each is a round of several gradients for CMA-ES. ``"closed form"`` reads one picture off a linear first layer.
        bounds: least and greatest values of normalised pictures by channel.

    Raises:
        InputError: messages that do not fit the model or each other, layers that the prior does not have, labels outside the classes, pictures of another size
            than the prior's, an attack that suits neither model nor prior, no restart with a finite score.

    >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> x, y = torch.rand(1, 1, 4, 4), torch.tensor([1])
    >>> limits = torch.zeros(1), torch.ones(1)
    >>> found = reconstruct(net, [Message.of(net, x, y)], y[None], (1, 4, 4), attack="ig", search=Search(steps=2, restarts=1), bounds=limits)
    >>> found.pictures.shape
    torch.Size([1, 1, 1, 4, 4])
    """
    one_of("attack", attack, ATTACKS)
    require(len(messages) > 0, "messages: got none, expected at least one")
    require(
        prior is not None or attack in ON_PIXELS,
        f"attack: {attack!r} searches a generator, and prior is None; expected one, or an attack on pixels: {', '.join(map(repr, ON_PIXELS))}",
    )
    require(
        prior is None or hasattr(prior, "blocks"),
        f"prior: got {type(prior).__name__}, which has no blocks to search between; expected a prior, or Decoder(generator, code) of an nn.Sequential",
    )

    def found(attack: str, search: Search, prior: Prior | None, classes: Tensor) -> Reconstruction:
        return _reconstructed(model, messages, targets, shape, prior, attack, search, bounds, seed, classes)

    if not isinstance(prior, Mapped) or attack in ON_PIXELS:
        return found(attack, search, prior, targets)
    low, high = (bound.to(targets.device).view(1, -1, 1, 1) for bound in bounds)
    drawn = prior.drawn(*targets.shape[:2], seed=seed).to(targets.device)
    coarse = found("gifd", replace(search, steps=prior.steps), prior.prior, drawn)
    seen = (coarse.pictures.flatten(0, 1) - low) / (high - low)
    classes = prior.named(seen.clamp(0, 1)).view_as(drawn)
    fine = found(attack, search, prior.prior, classes)
    return replace(fine, steps=coarse.steps + fine.steps, classes=classes)


def _reconstructed(
    model: nn.Module,
    messages: Sequence[Message],
    targets: Tensor,
    shape: Sequence[int],
    prior: Prior | None,
    attack: str,
    search: Search,
    bounds: tuple[Tensor, Tensor],
    seed: int,
    conditions: Tensor,
) -> Reconstruction:
    """One search; ``conditions``: what the prior is told, [messages, batch]."""
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
    classes = _can_be_asked(model, targets, tuple(shape), bounds, parameters[0])
    if attack == "closed form":
        return _closed(model, messages, shape, targets, bounds)
    on_pixels = attack in ON_PIXELS
    joint = classes if attack == "dlg" else 0
    used: Prior = Pixels(shape, joint) if prior is None or on_pixels else prior  # None only on pixels
    layers = 0 if prior is None else _layers(prior, search, conditions.flatten(), parameters[0])
    search = search.preset(attack, layers)
    task = _Task(model, messages, targets, tuple(shape), used, search, bounds, conditions)
    task.fits(parameters[0])
    meet = [n for n, norm in norms(model) if norm.training]
    require(
        search.chunk is None or (first.local is None and not meet and not joint),
        f"chunk: got {search.chunk}, but {'pictures meet in the batch norm ' + repr(meet[0]) if meet else 'local steps cannot be taken chunk by chunk' if first.local else 'labels are searched, too'}; expected None",
    )
    rows = torch.arange(len(messages)).repeat_interleave(search.restarts)
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    code = torch.randn(
        len(rows), first.count, used.code, generator=generator, dtype=parameters[0].dtype, device=parameters[0].device
    )  # fmt: skip
    if on_pixels:
        code[..., : used.code - joint] *= 0.1
    if attack == "ggl":
        found = [_evolved(task.rows([int(k)]), z, seed + r) for r, (k, z) in enumerate(zip(rows, code))]
    elif search.optimizer == "lbfgs":  # it knows one objective, whose rows would share their steps
        found = [_searched(task.rows([int(k)]), attack, z, on_pixels, 1) for k, z in zip(rows, code)]
    else:
        found = [_searched(task.rows(rows.tolist()), attack, code.flatten(0, 1), on_pixels, search.restarts)]
    best = _best(found, len(messages), search.restarts, first.count, shape, targets)
    if not joint:
        return best
    labels = torch.cat([part.variables[0] for part in found]).view(
        len(messages), search.restarts, first.count, -1
    )
    return replace(best, targets=labels[torch.arange(len(messages)), best.restart][..., -joint:].argmax(-1))


@dataclass(frozen=True)
class _Task:
    """Messages that are searched side by side, a row each."""

    model: nn.Module
    messages: Sequence[Message]
    labels: Tensor
    shape: tuple[int, ...]
    prior: Prior
    search: Search
    bounds: tuple[Tensor, Tensor]
    conditions: Tensor  # what the prior is told; the labels, where its classes are the model's

    def rows(self, which: Sequence[int]) -> _Task:
        """Some of the messages, in this order and as often."""
        told = self.labels[list(which)], self.conditions[list(which)]
        return replace(self, messages=[self.messages[k] for k in which], labels=told[0], conditions=told[1])

    def fits(self, like: Tensor) -> None:
        """Whether the prior makes pictures of the shape that is looked for."""
        told = self.conditions[:1, :1].flatten()
        z = _code(self.prior, told, like)
        try:
            with torch.no_grad():
                for block in self.prior.blocks(z, told):
                    z = block(z)
                made = tuple(self.prior.render(z).shape[1:])
        except RuntimeError as error:
            raise InputError(
                f"prior: it makes no picture of codes of {self.prior.code} numbers ({str(error).splitlines()[0]}); expected the length that its first block takes, in the model's dtype"
            ) from None
        require(made == self.shape, f"prior: it makes pictures {made}, the audited ones are {self.shape}")

    def pictures(self, x: Tensor) -> Tensor:
        return x.reshape(len(self.messages), -1, *self.shape)

    @cached_property
    def _gradient(self) -> Callable[..., list[Tensor]]:
        local = self.messages[0].local
        return dummy_gradient(self.model, self.labels, local=None if local is None else local.guessed())

    def gradient(self, x: Tensor) -> list[Tensor]:
        """Messages of guesses."""
        soft = self.prior.soft_labels() if isinstance(self.prior, Pixels) else None
        rows = self.pictures(x)
        return self._gradient(rows, None if soft is None else soft.view(*rows.shape[:2], -1))

    @cached_property
    def _sent(self) -> tuple[Tensor, ...]:
        return tuple(torch.stack(each) for each in zip(*(m.tensors for m in self.messages)))

    @cached_property
    def _tensors(self) -> list[int]:
        """Which tensors count: of messages that are searched side by side, by their norms over all of them."""
        which, count = index_set(self.search.tensors)
        return chosen_tensors(self._sent, which, count)

    @cached_property
    def _weights(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters() if p.requires_grad]

    def cost(self, guess: Sequence[Tensor]) -> Tensor:
        """How far messages of guesses are from those sent, [rows]; changes of weights are read as gradients."""
        if len(self.messages) == 1:  # also what vmap cannot run
            return self._match([g[0] for g in guess], [t[0] for t in self._sent])[None]
        return vmap(self._match)(tuple(guess), self._sent)

    @cached_property
    def _still(self) -> tuple[nn.Module, dict[str, Tensor]]:
        still, named = fixed(self.model)
        return still, {name: p.requires_grad_() for name, p in named.items()}

    def chunked_cost(self, guess: Sequence[Tensor]) -> Tensor:
        """The same from pictures, [rows], with a derivative that was made chunk by chunk."""
        still, named = self._still
        size, found = self.search.chunk or 1, []
        for k, row in enumerate(self.pictures(guess[0])):
            labels, sent = self.labels[k].split(size), [t[k] for t in self._sent]

            def risk(j: int, x: Tensor, labels: Any = labels, count: int = len(row)) -> Tensor:
                return (
                    F.cross_entropy(logits(functional_call(still, named, (x,))), labels[j], reduction="sum")
                    / count
                )

            with sdpa_kernel(SDPBackend.MATH):
                value, slopes = matched_gradient(
                    risk, list(named.values()), row.split(size), lambda g, sent=sent: self._match(g, sent)
                )
            found.append(value + ((row - row.detach()) * torch.cat(slopes)).sum())
        return torch.stack(found)

    def _match(self, guess: Sequence[Tensor], sent: Sequence[Tensor]) -> Tensor:
        first, how, kind = self.messages[0], self.search, self.search.cost
        one, two = first.defence.mirror(guess, sent), sent
        if first.local is not None:
            local, count = first.local, first.count
            one, two = (
                [local.gradient_of(t, w, count) for t, w in zip(m, self._weights)] for m in (one, two)
            )
        return matching_cost(one, two, kind, ratio=how.ratio, weights=how.weights, tensors=self._tensors)  # pyright: ignore[reportArgumentType]

    def penalty(self, restarts: int, steps: int) -> Callable[[Tensor, int], Tensor] | None:
        """What guesses are held to beside the message: the statistics of batch norms, and the mean of the restarts."""
        terms: list[Callable[[Tensor, int], Tensor]] = []
        told = self.messages[0].statistics
        if told and self.search.statistics:
            sent = {n: tuple(torch.stack([m.statistics[n][k] for m in self.messages]) for k in (0, 1)) for n in told}  # fmt: skip
            gap = statistics_gap(*fixed(self.model), sent)  # pyright: ignore[reportArgumentType]
            terms.append(lambda x, _: self.search.statistics * gap(x).sum())
        if self.search.group and restarts > 1:
            group = group_term(restarts, steps, side=self.shape[-1])
            terms.append(lambda x, step: self.search.group * group(x, step))
        if not terms:
            return None
        return lambda x, step: torch.stack([term(self.pictures(x), step) for term in terms]).sum()


def _can_be_asked(
    model: nn.Module, targets: Tensor, shape: tuple[int, ...], bounds: tuple[Tensor, Tensor], like: Tensor
) -> int:
    """Whether the model takes pictures of that shape, and has the labels; and whether the bounds are of their channels. The number of classes."""
    still, parameters = fixed(model)
    try:
        with torch.no_grad():
            answers = logits(functional_call(still, parameters, (like.new_zeros(2, *shape),)))
    except (RuntimeError, ValueError, IndexError) as error:
        raise InputError(
            f"shape: the model takes no pictures {shape} ({str(error).splitlines()[0]}); expected (channels, height, width) of those behind the messages"
        ) from None
    same_twice(model, like.new_full((2, *shape), 0.5))
    if targets.ndim == 2:
        labels("targets", targets.flatten(), count=targets.numel(), classes=answers.shape[-1])
    require(
        all(b.numel() in (1, shape[0]) for b in bounds),
        f"bounds: got {bounds[0].numel()} and {bounds[1].numel()} values, expected one for each of {shape[0]} channels",
    )
    require(
        bool((bounds[0] < bounds[1]).all()),
        f"bounds: got {bounds[0].tolist()} and {bounds[1].tolist()}, expected the first below the second",
    )
    return answers.shape[-1]


def _searched(task: _Task, attack: str, start: Tensor, on_pixels: bool, restarts: int) -> Inversion:
    """Rows searched by their slopes."""
    search, flat = task.search, task.conditions.flatten()
    stages = _stages(task.prior, search, flat, start, on_pixels)
    how: dict[str, Any] = {
        "bounds": (task.bounds[0].to(start), task.bounds[1].to(start)), "variation": search.variation, "norm": search.norm,
        "side": int(task.shape[-1]), "penalty": task.penalty(restarts, sum(stage.steps for stage in stages)), "patience": search.patience,
    }  # fmt: skip
    render, blocks = task.prior.render, task.prior.blocks
    gradient, cost = (
        (task.gradient, task.cost) if search.chunk is None else (lambda x: [x], task.chunked_cost)
    )
    found = invert(lambda z: blocks(z, flat), render, gradient, cost, start, stages, **how)
    if attack != "gias":
        return found
    weights, made = own_generators(task.prior, found.variables[0])
    stage = Stage(search.steps, search.weight_rate, sphere=False, optimizer=search.optimizer)
    further = invert(lambda w: [made], render, gradient, cost, weights, [stage], **how)
    scores = torch.stack([found.score, further.score]).nan_to_num(nan=torch.inf)
    better = scores.argmin(0)
    chosen = better.repeat_interleave(task.labels.shape[1])
    return Inversion(
        torch.where((chosen == 1)[:, None, None, None], further.best, found.best), scores.amin(0), (*found.pictures, *further.pictures),
        found.variables, (*found.scores, *further.scores), torch.cat([found.objective, further.objective]), better,
    )  # fmt: skip


def _evolved(task: _Task, start: Tensor, seed: int) -> Inversion:
    """One row searched by CMA-ES: tanh of a code, with the divergence of its entries from a standard normal."""
    size = population(start.numel())
    many = task.rows([0] * size)
    flat = many.conditions.flatten()

    def made(z: Tensor, labels: Tensor) -> Tensor:
        value = z.tanh().view(-1, task.prior.code)
        for block in task.prior.blocks(value, labels):
            value = block(value)
        return task.prior.render(value)

    def objective(z: Tensor) -> Tensor:
        apart = torch.stack([code_divergence(v.tanh().view(-1, task.prior.code)) for v in z])
        return many.cost(many.gradient(made(z, flat))) + task.search.divergence * apart

    z, trace = evolve(
        objective,
        torch.zeros_like(start.flatten()),
        rounds=task.search.steps,
        seed=seed,
        deviation=task.search.deviation,
    )
    low, high = (bound.to(z).view(1, -1, 1, 1) for bound in task.bounds)
    with torch.no_grad():
        picture = made(z, task.conditions.flatten()).clamp(low, high)
        score = task.cost(task.gradient(picture))
    return Inversion(
        picture, score, (picture,), (z.tanh().view(-1, task.prior.code),), (score,), torch.tensor(trace, dtype=torch.float64).repeat_interleave(size), torch.zeros_like(score, dtype=torch.long),
    )  # fmt: skip


def _closed(
    model: nn.Module, messages: Sequence[Message], shape: Sequence[int], targets: Tensor, bounds: tuple[Tensor, Tensor]
) -> Reconstruction:  # fmt: skip
    """Pictures read off a linear first layer."""
    read = [closed_form(model, message) for message in messages]
    size = math.prod(shape)
    if any(x is None or x.numel() != size for x in read):
        raise InputError(
            "attack: 'closed form' reads messages of one picture whose pixels meet a linear first layer with a bias, and this is none; try 'gifd' or 'ig'"
        )
    x = torch.stack([v.view(1, *shape) for v in read if v is not None])
    low, high = (bound.to(x).view(1, 1, -1, 1, 1) for bound in bounds)
    x = x.clamp(low, high)
    pixels = Search(restarts=1).preset("closed form", 0)
    task = _Task(model, messages, targets, tuple(shape), Pixels(shape), pixels, bounds, targets)
    scores = task.cost(task.gradient(x.flatten(0, 1))).detach()
    none = torch.zeros_like(scores, dtype=torch.long)
    return Reconstruction(x, scores, none, x[:, None], scores[:, None], targets, 0, none)  # fmt: skip


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
    # A line search finds its own lengths; the published L-BFGS begins with 1.
    first, later = (1.0, 1.0) if search.optimizer == "lbfgs" else (search.rate, search.feature_rate)
    parts = getattr(prior, "parts", lambda stage: [])
    stages = [Stage(search.steps, first, sphere=not on_pixels, optimizer=search.optimizer, parts=tuple(parts(0)))]  # fmt: skip
    if layers == 0:
        return stages
    blocks = prior.blocks(value, targets)
    with torch.no_grad():
        for k in range(1, layers + 1):
            value = blocks[k - 1](value)
            if search.layer not in (None, k):
                continue
            radius = -1.0 if search.radius is None else search.radius * value[0].numel()
            if search.radii:
                radius = search.radii[min(k, len(search.radii)) - 1]
            stages.append(
                Stage(search.steps, later, radius, optimizer=search.optimizer, parts=tuple(parts(k)), layer=k)
            )
    return stages


def _code(prior: Prior, targets: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(len(targets), prior.code, dtype=like.dtype, device=like.device)


def _best(
    parts: Sequence[Inversion], messages: int, restarts: int, count: int, shape: Sequence[int], targets: Tensor
) -> Reconstruction:  # fmt: skip
    """The best restart of each message; rows that were searched apart end after the same stages or fewer."""
    depth = min(len(found.pictures) for found in parts)
    scores = torch.cat([found.score for found in parts]).view(messages, restarts)
    require(
        bool(scores.isfinite().any(1).all()),
        "messages: no restart has a finite score; a lower rate, or float64, may help",
    )
    best = scores.argmin(1)
    rows = torch.arange(messages, device=best.device) * restarts + best
    by_stage = torch.stack([torch.cat([found.pictures[k] for found in parts]) for k in range(depth)])
    by_stage = by_stage.view(depth, messages * restarts, count, *shape)
    told = torch.stack([torch.cat([found.scores[k] for found in parts]) for k in range(depth)])
    return Reconstruction(
        torch.cat([found.best for found in parts]).view(messages * restarts, count, *shape)[rows],
        scores.amin(1),
        torch.cat([torch.as_tensor(found.stage) for found in parts])[rows],
        by_stage[:, rows].transpose(0, 1),
        told[:, rows].T,
        targets,
        max(len(found.objective) for found in parts),
        best,
        tuple(found.objective for found in parts),
    )
