"""Several networks look at the same samples, a batch at a time: what their units hold at the same places.

A unit is a channel of a map, a feature of a token, or an entry of a vector; a place is a position of the map, a token, or the whole sample.
Every batch passes each network once. A few places of each image are enough, for neighbours say the same; all images of a batch are read at the
same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import reduce
from itertools import accumulate
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import shards
from lineament.core.batching import auto_batch, progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import NotFiniteError, require, show
from lineament.core.models import called, device_of, frozen, logits, moved, unwrapped
from lineament.core.sites.activations import Activations, capture
from lineament.core.sites.depth import tokens_of
from lineament.measure.alignment.joint import JointMoments
from lineament.measure.alignment.similarity import KernelSums
from lineament.measure.alignment.steps import Parts, Step

Transform = Callable[[Tensor], Tensor]
_TOP = 6
_KERNEL_BYTES = 2**28  # the blocks of the sums for CKA together


@dataclass
class Collected:
    """What is kept of a pass: moments of each group of sites, sums for CKA between all of them, and the samples that move a unit most."""

    moments: list[JointMoments] = field(default_factory=list)
    kernels: list[KernelSums] = field(default_factory=list)  # by blocks of images
    top_values: list[Tensor] = field(default_factory=list)  # of each site of each network (k, units)
    top_samples: list[Tensor] = field(default_factory=list)
    answers: list[Tensor] = field(default_factory=list)  # of each network, in the order of ``order``
    order: list[Tensor] = field(default_factory=list)
    samples: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "moments": [each.state_dict() for each in self.moments],
            "kernels": [each.state_dict() for each in self.kernels],
            "top_values": self.top_values,
            "top_samples": self.top_samples,
            "answers": self.answers,
            "order": self.order,
            "samples": self.samples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments = [JointMoments.from_state_dict(each) for each in state["moments"]]
        self.kernels = [KernelSums.from_state_dict(each) for each in state["kernels"]]
        self.top_values, self.top_samples = list(state["top_values"]), list(state["top_samples"])
        self.answers, self.order = list(state["answers"]), list(state["order"])
        self.samples = state["samples"]

    def __add__(self, other: Collected) -> Collected:
        """What two parts of the data leave together."""
        if not (self.samples and other.samples):
            return self if self.samples else other
        values, names = [], []
        for own in zip(self.top_values, other.top_values, self.top_samples, other.top_samples):
            best = _best(torch.cat(own[:2]), torch.cat(own[2:]))
            values.append(best[0])
            names.append(best[1])
        return Collected(
            list(map(add, self.moments, other.moments)),
            list(map(add, self.kernels, other.kernels)),
            values,
            names,
            [torch.cat(pair) for pair in zip(self.answers, other.answers)],
            self.order + other.order,
            self.samples + other.samples,
        )

    def answered(self, net: int) -> Float[Tensor, "samples outputs"]:
        """What a network answered, by the samples' numbers."""
        order = torch.cat(self.order)
        return self.answers[net][order.argsort()]


@dataclass(frozen=True)
class Reading:
    """How the pass reads its networks; see :func:`lineament.measure.alignment.profile.alignment`."""

    positions: int = 64
    blocks: int = 10
    nulls: tuple[str, ...] = ("shuffled",)
    resize: str | None = None
    seed: int = 0
    keep: int = 4096
    answers: bool = False  # keep what the networks answer, too


def gather(
    models: Sequence[nn.Module],
    groups: Sequence[Sequence[str]],
    steps: Sequence[Step] | Iterable[Step],
    reading: Reading,
    *,
    transforms: Sequence[Transform | None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> Collected:
    """One pass of all networks over the steps; with a checkpoint, one that goes on where it was cut off.

    Inside :func:`lineament.core.shards.shared` each process takes every n-th step, and all have what all found.

    Args:
        groups: sites that are aligned with each other, one of each network.
    """
    changes = [None] * len(models) if transforms is None else list(transforms)
    found = shards.together(
        "moments of units", lambda: _share(models, groups, steps, reading, changes, checkpoint)
    )
    collected = reduce(add, found)
    require(collected.samples > 0, "data: got no batches, expected at least one")
    return collected


def _share(
    models: Sequence[nn.Module],
    groups: Sequence[Sequence[str]],
    steps: Sequence[Step] | Iterable[Step],
    reading: Reading,
    transforms: Sequence[Transform | None],
    checkpoint: Checkpoint | None,
) -> Collected:
    """What this process's share of the steps leaves."""
    collected = Collected()
    with ExitStack() as stack:
        acts = []
        for number, model in enumerate(models):
            stack.enter_context(frozen(model, requires_grad=None))
            sites = list(dict.fromkeys(group[number] for group in groups))
            acts.append(stack.enter_context(capture(model, sites, stop_early=not reading.answers)))
        stack.enter_context(torch.no_grad())
        for before, step in _walked(steps, collected, checkpoint):
            for part, units, answers in _read(models, groups, step, acts, transforms, reading):
                _take(collected, part, units, reading, before)
                before += len(part.samples)
                if reading.answers:
                    held = collected.answers or [answer[:0] for answer in answers]
                    collected.answers = [torch.cat(pair) for pair in zip(held, answers)]
                    collected.order.append(part.samples)
    return collected


def _walked(steps: Any, collected: Collected, checkpoint: Checkpoint | None) -> Iterator[tuple[int, Step]]:
    """This process's share of the steps, each with the number of samples before it."""
    if not isinstance(steps, Sequence):
        yield from progress(shards.mine(_counted(steps)), "alignment")
        return
    sizes = map(len, steps.parts) if isinstance(steps, Parts) else (len(step.samples) for step in steps)
    before = [0, *accumulate(sizes)]
    own = list(shards.mine(range(len(steps))))
    state = {"collected": collected}
    walk = range(len(own)) if checkpoint is None else checkpoint.loop("moments", len(own), state)
    for number in progress(walk, "alignment", len(own)):
        yield before[own[number]], steps[own[number]]


def _counted(steps: Iterable[Step]) -> Iterator[tuple[int, Step]]:
    before = 0
    for step in steps:
        yield before, step
        before += len(step.samples)


def _read(
    models: Sequence[nn.Module],
    groups: Sequence[Sequence[str]],
    step: Step,
    acts: Sequence[Activations],
    transforms: Sequence[Transform | None],
    reading: Reading,
) -> Iterator[tuple[Step, list[list[Tensor]], list[Tensor]]]:
    """What the units of each group hold, (sample, place, unit) of each network, and what the networks answer; fewer samples at a time where memory runs out."""

    def forward(start: int, stop: int) -> tuple[Step, list[list[Tensor]], list[Tensor]]:
        part = Step(
            [_rows(inputs, start, stop) for inputs in step.inputs],
            step.samples[start:stop],
            None if step.places is None else [p[start:stop] for p in step.places],
            None if step.present is None else step.present[start:stop],
        )
        answers = [
            called(model, moved(inputs, device_of(model))) for model, inputs in zip(models, part.inputs)
        ]
        answers = (
            [logits(a).reshape(stop - start, -1).float().cpu() for a in answers] if reading.answers else []
        )
        found = []
        for group in groups:
            held = [
                _held(models[n], site, acts[n][site], None if part.places is None else part.places[n])
                for n, site in enumerate(group)
            ]
            found.append(_fitted(group, held, transforms, reading))
        return part, found, answers

    yield from auto_batch(forward, len(step.samples), memory=(gather, tuple(map(id, models))))


def _rows(inputs: Any, start: int, stop: int) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _rows(value, start, stop) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(_rows(value, start, stop) for value in inputs)
    return inputs[start:stop] if isinstance(inputs, Tensor) else inputs


def _held(model: nn.Module, site: str, tensor: Tensor, places: Tensor | None) -> Tensor:
    """(sample, *places, unit)."""
    require(
        tensor.ndim >= 2 and tensor.is_floating_point(),
        f"site {site!r}: got {show(tensor)}, expected (batch, units), tokens or a map",
    )
    if site.split("[")[0].endswith((":q", ":k", ":v", ":z")):
        tensor = tensor.flatten(2)
    elif tensor.ndim == 3:
        tensor = tokens_of(unwrapped(model), site, tensor)
    elif tensor.ndim >= 4 and not (tensor.shape[1] == tensor.shape[2] != tensor.shape[-1]):
        tensor = tensor.movedim(1, -1)
    if places is None:
        return tensor
    require(tensor.ndim == 3, f"site {site!r}: got {show(tensor)}, expected (batch, tokens, units)")
    at = places.to(tensor.device)[..., None].expand(-1, -1, tensor.shape[-1])
    return tensor.gather(1, at)


def _fitted(
    group: Sequence[str], held: list[Tensor], transforms: Sequence[Transform | None], reading: Reading
) -> list[Tensor]:
    """The same places of every network, (sample, place, unit)."""
    spaces = [tuple(each.shape[1:-1]) for each in held]
    if len(set(spaces)) > 1:
        named = " and ".join(
            f"{site!r} of {' x '.join(map(str, s)) or 'no'} positions" for site, s in zip(group, spaces)
        )
        require(
            reading.resize == "pool" and len({len(s) for s in spaces if s}) <= 1,
            f"sites: {named} do not meet; choose sites of one size, or resize='pool' to average the larger map down to the smaller",
        )
        least = tuple(map(min, zip(*spaces))) if all(spaces) else ()
        held = [_pooled(each, least) for each in held]
    flat = [each.flatten(1, -2) if each.ndim > 2 else each[:, None] for each in held]
    return [
        each if change is None else _transformed(change, each, site)
        for each, change, site in zip(flat, transforms, group)
    ]


def _pooled(each: Tensor, space: tuple[int, ...]) -> Tensor:
    if each.shape[1:-1] == space:
        return each
    if not space:
        return each.flatten(1, -2).mean(1)
    pool = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[len(space)]
    return pool(each.movedim(-1, 1), space).movedim(1, -1)  # pyright: ignore[reportArgumentType]


def _transformed(change: Transform, each: Tensor, site: str) -> Tensor:
    found = change(each.flatten(0, 1))
    require(
        isinstance(found, Tensor) and found.ndim == 2 and len(found) == each.shape[0] * each.shape[1],
        f"transform: it returned {show(found)} for {show(each.flatten(0, 1))} of site {site!r}, expected one row of features a row",
    )
    return found.unflatten(0, each.shape[:2]).to_dense()


def _take(collected: Collected, step: Step, units: list[list[Tensor]], reading: Reading, before: int) -> None:
    if not collected.moments:
        for group in units:
            sizes = [each.shape[2] for each in group]
            collected.moments.append(
                JointMoments(
                    sizes, blocks=reading.blocks, nulls=reading.nulls, keep=reading.keep, seed=reading.seed
                )
            )
        flat = [each for group in units for each in group]
        widths = [each.shape[2] for each in flat]
        # One point near the data for all blocks, so that their sums add up as they are.
        centre = torch.cat([_mean(each, step.present).double().cpu().mean(0) for each in flat])
        number = min(reading.blocks, max(_KERNEL_BYTES // (8 * sum(widths) ** 2), 1))
        collected.kernels = [KernelSums(widths, centre) for _ in range(number)]
        collected.top_values = [torch.zeros(0, each.shape[2]) for each in flat]
        collected.top_samples = [torch.zeros(0, each.shape[2], dtype=torch.long) for each in flat]
    dealt = collected.moments[0].dealt(len(step.samples), before)
    chosen = _chosen(units, step, before, reading)
    for moments, group in zip(collected.moments, chosen):
        try:
            present = None if step.present is None else step.present.to(group[0].device)
            moments.update(group, present, before=before)
        except NotFiniteError as error:
            raise NotFiniteError(f"sites: {error}") from error
    flat = [each for group in units for each in group]
    means = [_mean(each, step.present) for each in flat]
    for number, kernel in enumerate(collected.kernels):
        inside = dealt % len(collected.kernels) == number
        if bool(inside.any()):
            kernel.update([each[inside.to(each.device)] for each in means])
    for number, each in enumerate(flat):
        if step.present is not None:
            each = each.masked_fill(~step.present.to(each.device)[..., None], -torch.inf)
        values = torch.cat([collected.top_values[number], each.amax(1).float().cpu()])
        names = step.samples[:, None].expand(-1, each.shape[2])
        names = torch.cat([collected.top_samples[number], names])
        collected.top_values[number], collected.top_samples[number] = _best(values, names)
    collected.samples += len(step.samples)


def _best(values: Tensor, names: Tensor) -> tuple[Tensor, Tensor]:
    """The samples with the largest values of each unit."""
    best = values.topk(min(_TOP, len(values)), dim=0)
    return best.values, names.gather(0, best.indices)


def _chosen(units: list[list[Tensor]], step: Step, seen: int, reading: Reading) -> list[list[Tensor]]:
    """A few places, the same for all samples of a batch and all networks; other ones in the next batch."""
    if step.present is not None:
        return units
    found = []
    for group in units:
        there = group[0].shape[1]
        if there > reading.positions:
            generator = torch.Generator().manual_seed((reading.seed * 1_000_003 + seen) % 2**63)
            at = torch.randperm(there, generator=generator)[: reading.positions].sort().values
            group = [each[:, at.to(each.device)] for each in group]
        found.append(group)
    return found


def _mean(each: Tensor, present: Tensor | None) -> Float[Tensor, "samples units"]:
    if present is None:
        return each.mean(1)
    there = present.to(each.device, each.dtype)[..., None]
    return (each * there).sum(1) / there.sum(1).clamp_min(1)
