"""A pruning on the way: group after group is scored, silenced at its readers and compensated; what is silenced can be taken out later without a change.

Kashyap et al., NeurIPS 2025, arXiv 2511.19566.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.models import weight_of
from lineament.core.norms import batchnorms, recalibrate
from lineament.core.surgery.groups import ChannelGroup
from lineament.edit.components import union_kept
from lineament.edit.layers import Inputs, centred_layers, moments, ready, scored
from lineament.edit.patches import matrix, unmatrixed
from lineament.edit.pruned import PruneOptions
from lineament.edit.readers import Reader
from lineament.edit.repairs import compensated, left_over

_WIDE = 2048  # of linear layers wider than this all outputs are refitted at once


@dataclass(frozen=True)
class Step:
    """What became of one group: its channels, and the weights and biases of the layers that read it."""

    kept: Bool[Tensor, " channels"]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    errors: dict[str, list[float]] = field(default_factory=dict)


class Plan:
    """A pruning on the way: which channels are left, and the silenced network."""

    def __init__(
        self,
        dense: nn.Module,
        work: nn.Module,
        inputs: Inputs,
        groups: Mapping[str, ChannelGroup],
        readers: Mapping[str, list[Reader]],
        criterion: str | None,
        compensate: str | None,
        recalibrated: bool,
        one_shot: bool,
        options: PruneOptions,
    ) -> None:
        self.dense, self.work, self.inputs, self.groups, self.readers = dense, work, inputs, groups, readers
        self.criterion, self.compensate, self.options, self.one_shot = (
            criterion,
            compensate,
            options,
            one_shot,
        )
        self.recalibrated = recalibrated and bool(batchnorms(work))
        self.kept = {name: torch.ones(g.size, dtype=torch.bool) for name, g in groups.items()}
        self.errors: dict[str, list[float]] = {}
        self.generator = torch.Generator().manual_seed(checks.seed("seed", options.seed))
        layers = {r.name: r.module for each in readers.values() for r in each}
        self.normed = centred_layers(dense, inputs.first(dense), layers, None)
        center = options.center
        self.centred = self.normed if center is None else dict.fromkeys(layers, center)
        self.passes = 0

    @property
    def kept_total(self) -> int:
        return sum(int(k.sum()) for k in self.kept.values())

    def counts(self, share: float) -> dict[str, int]:
        """How many channels each group keeps at a share."""
        multiple = self.options.multiple or _multiple(self.dense, self.groups, self.options.widths)
        return {
            name: min(
                group.size, max(min(multiple, group.size), round(share * group.size / multiple) * multiple)
            )
            for name, group in self.groups.items()
        }

    def allotted(self, counts: Mapping[str, int]) -> dict[str, int]:
        """The same number of channels in all, where the scores of the dense network are highest; each group keeps at least one."""
        scores = {}
        for name in self.groups:
            found = self._scores(name, self._moments(self.dense, name), self._drawn(name))
            scores[name] = self._ranked(name, found)
        first = {name: s.argmax() for name, s in scores.items()}
        rest = torch.cat([s.index_fill(0, first[name], -torch.inf) for name, s in scores.items()])
        owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(scores.values())])
        more = rest.topk(sum(counts.values()) - len(counts)).indices
        taken = torch.bincount(owner[more], minlength=len(counts))
        return {name: 1 + int(taken[i]) for i, name in enumerate(scores)}

    def run(self, *, counts: Mapping[str, int] | None = None, removed: float = 0.0) -> None:
        """One pass over the groups, from the first to the last."""
        start = copy.deepcopy(self.work) if self.one_shot else self.work
        silenced = any(not bool(k.all()) for k in self.kept.values())
        for name in progress(list(self.groups), "pruning", len(self.groups)):
            key, checkpoint = f"pass {self.passes}, {name}", self.options.checkpoint
            drawn = self._drawn(
                name
            )  # of a stored step too, so that those after it draw what they would have drawn
            stale = self.recalibrated and silenced and not self.one_shot
            if stale and (checkpoint is None or not checkpoint.finished(key, Step)):
                measure_norms(self.work, self.inputs)
            if checkpoint is None:
                step = self._step(name, start, counts, removed, drawn)
            else:
                step = checkpoint.stage(
                    key,
                    lambda name=name, drawn=drawn: self._step(name, start, counts, removed, drawn),
                    Step,
                )
            self._apply(name, step)
            silenced = silenced or not bool(step.kept.all())
        self.passes += 1

    def _moments(self, model: nn.Module, name: str) -> dict[str, Any]:
        layers = {r.name: model.get_submodule(r.name) for r in self.readers[name]}
        return moments(model, self.inputs, layers)

    def _drawn(self, name: str) -> Tensor | None:
        """Random scores of a group's channels, where these decide."""
        return (
            torch.rand(self.groups[name].size, generator=self.generator)
            if self.criterion == "random"
            else None
        )

    def _scores(
        self, name: str, grams: Mapping[str, Any], drawn: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Of each reader: scores [outputs, channels] and the energy of each output [outputs]."""
        group, kept = self.groups[name], self.kept[name]
        criterion = self.criterion or ("energy" if group.products else "saliency")
        if drawn is not None or criterion == "magnitude":
            values = _norms(self.dense, group) if drawn is None else drawn
            return [(torch.where(kept, values.double(), -torch.inf)[None], torch.ones(1))]
        found = []
        for reader in self.readers[name]:
            weight, moment, _ = _part(self.work, reader, grams[reader.name], self.centred[reader.name])
            scores = scored(weight, moment)
            alive = scores.total > 0
            if bool(alive.any()):
                values = getattr(scores, criterion)[alive].cpu()
                found.append((torch.where(kept, values, -torch.inf), scores.total[alive].cpu()))
        values = kept.double().log()[None]  # where no output lives, any channel will do
        return found or [(values, torch.ones(1))]

    def _ranked(self, name: str, scores: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """One score a channel: the mean over readers and outputs of its share of the output's energy."""
        relative = (self.criterion or "") not in ("fidelity", "magnitude", "random")
        return torch.stack([(s / t[:, None] if relative else s).mean(0) for s, t in scores]).mean(0)

    def _step(
        self,
        name: str,
        source: nn.Module,
        counts: Mapping[str, int] | None,
        removed: float,
        drawn: Tensor | None,
    ) -> Step:
        grams = self._moments(source, name)
        scores = self._scores(name, grams, drawn)
        old = self.kept[name]
        if counts is None:
            alive = old.nonzero()[:, 0]
            some = union_kept([s[:, alive] for s, _ in scores], removed)
            kept = torch.zeros_like(old).index_put((alive,), some)
        else:
            best = self._ranked(name, scores).topk(min(counts[name], int(old.sum()))).indices
            kept = torch.zeros_like(old).index_fill(0, best, True)
        weights, biases, errors = {}, {}, {}
        for reader in self.readers[name]:
            layer: Any = self.work.get_submodule(reader.name)
            normed, gram = self.normed[reader.name], grams[reader.name]
            shifts = self.options.bias and not normed and getattr(layer, "bias", None) is not None
            weight, moment, mean = _part(source, reader, gram, normed or shifts)
            how = self.compensate
            wide = isinstance(layer, nn.Linear) and weight.shape[1] > _WIDE
            kept_there = kept.to(weight.device)
            new = compensated(
                weight, moment, kept_there, "refit" if how == "delta" and wide else how, lam=self.options.lam
            )
            zeroed = torch.where(kept_there[:, None], weight, 0)
            full = matrix(source.get_submodule(reader.name)).double().flatten(1)
            whole, _ = gram.moment(normed or shifts)
            total = float(((full @ whole) * full).sum().clamp_min(1e-300))
            errors[reader.name] = [float(left_over(weight, w, moment).sum()) / total for w in (zeroed, new)]
            weights[reader.name] = new.flatten(1).cpu()
            if shifts:
                biases[reader.name] = ((weight - new).flatten(1) @ mean).cpu()
        return Step(kept, weights, biases, errors)

    def _apply(self, name: str, step: Step) -> None:
        self.kept[name] = step.kept
        with torch.no_grad():
            for reader in self.readers[name]:
                layer: Any = self.work.get_submodule(reader.name)
                full = matrix(layer).flatten(1).clone()
                full[:, reader.columns.flatten().to(full.device)] = step.weights[reader.name].to(full)
                weight_of(layer).copy_(unmatrixed(layer, full))
                if reader.name in step.biases:
                    layer.bias.add_(step.biases[reader.name].to(layer.bias))
        self.errors.update(step.errors)


def _part(model: nn.Module, reader: Reader, gram: Any, centred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Weight [outputs, channels, columns], moment and mean of a reader's columns of one group."""
    moment, mean = gram.moment(centred)
    columns = reader.columns.to(moment.device)
    flat = columns.flatten()
    weight = matrix(model.get_submodule(reader.name)).double().flatten(1).to(moment.device)
    return weight[:, flat].view(len(weight), *columns.shape), moment[flat][:, flat], mean[flat]


def _norms(model: nn.Module, group: ChannelGroup) -> Tensor:
    """The squared norm of all weights of each channel, made and read."""
    parameters = dict(model.named_parameters())
    total = torch.zeros(group.size, dtype=torch.float64)
    for e in group.having("write", "read"):
        if e.parameter in parameters and parameters[e.parameter].ndim > 1:
            moved = parameters[e.parameter].detach().double().cpu().movedim(e.axis, 0)
            total += moved[e.slots.flatten()].reshape(group.size, -1).square().sum(1)
    return total


def is_language(model: nn.Module) -> bool:
    """Whether its configuration counts words."""
    return hasattr(getattr(model, "config", None), "vocab_size")


def _multiple(model: nn.Module, groups: Mapping[str, ChannelGroup], widths: str | None) -> int:
    one = is_language(model) and widths != "free"
    return 64 if one and min(g.size for g in groups.values()) >= 512 else 1


def measure_norms(model: nn.Module, inputs: Inputs) -> None:
    model_was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        recalibrate(model, (ready(batch, model) for batch in inputs))
    finally:
        for module, mode in model_was.items():
            module.training = mode
