"""A network without the channels that its layers need least, from forward passes on unlabelled inputs alone: no loss, no gradients, no training.

Kashyap et al., "ModHiFi: Identifying High Fidelity predictive components for Model Modification", NeurIPS 2025, arXiv 2511.19566. An input channel goes when
no output of any layer that reads it wants it; the weights of those that stay are compensated, batch norms are measured anew. Until the end channels
are only silenced at their readers, which is the same function; then all are taken out at once, so that the result is a plain, really smaller network.
"""

from __future__ import annotations

import copy
import fnmatch
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError, number, one_of, require, suggest
from lineament.core.models import called, device_of, frozen, weight_of
from lineament.core.norms import batchnorms, recalibrate
from lineament.core.results import Readable
from lineament.core.surgery.cost import Cost
from lineament.core.surgery.groups import ChannelGroup, channel_groups, plain_network
from lineament.core.surgery.rewriting import remove
from lineament.edit.components import union_kept
from lineament.edit.layers import Inputs, centred_layers, moments, ready, scored
from lineament.edit.patches import matrix, reads, unmatrixed
from lineament.edit.repairs import WAYS, compensated, left_over
from lineament.edit.saved import save

CRITERIA = ("saliency", "fidelity", "energy", "magnitude", "random")
ORDERS = ("sequential", "one-shot")
_WIDE = 2048  # of linear layers wider than this all outputs are refitted at once
_PASSES = 200


@dataclass(frozen=True)
class PruneOptions:
    """What a pruning rarely needs to be told.

    Attributes:
        sites: names or globs of the groups of channels to prune, as :func:`lineament.core.surgery.channel_groups` names them; all that can be scored by default.
        allot: of an exact budget: ``"group"``: every group keeps the same share; ``"global"``: all channels are ranked together, each score as a share of
            its output's energy.
        center: take means out of the contributions when scoring; by default where a batch norm follows.
        bias: put the mean of what went into the bias of layers that have one and no batch norm after them (not in the paper).
        lam: added to the diagonal in the compensation, relative to its mean.
        multiple: group sizes are brought to a multiple of this; by default 64 for language models with layers of at least 512, else 1.
        batch_size, seed: of the calibration and of ``criterion="random"``.
        checkpoint: store each group's step there, and go on after those that are stored.

    >>> PruneOptions().allot
    'group'
    """

    sites: str | Sequence[str] | None = None
    allot: str = "group"
    center: bool | None = None
    bias: bool = True
    lam: float = 1e-4
    multiple: int | None = None
    batch_size: int = 64
    seed: int = 0
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, repr=False)
class Pruned(Readable):
    """A network with fewer channels.

    Attributes:
        model: a plain module of the same class, called as the original was.
        kept: {group: the channels that are left}; sizes: {group: (before, after)}.
        parameters, flops: (before, after); the operations of one forward on two samples.
        errors: {layer: (E |Y - Y'|² / E |Y|² when channels go, and after compensation)}, each beside the inputs that it had then.
        whole: {group or parameter axis: why it was left as it was}.
        criterion, compensate, recalibrated: how it was made.
    """

    model: nn.Module
    kept: dict[str, Int[Tensor, " kept"]]
    sizes: dict[str, tuple[int, int]]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    errors: dict[str, tuple[float, float]]
    whole: dict[str, str]
    criterion: str
    compensate: str | None
    recalibrated: bool

    @property
    def share(self) -> float:
        """The share of the parameters that is left."""
        return self.parameters[1] / self.parameters[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, without the network."""
        return {
            name: results.plain(getattr(self, name)) for name in self.__dataclass_fields__ if name != "model"
        }

    def plot(self, ax: Any = None) -> Any:
        """Channels before and after, by group."""
        ax = results.axes(ax)
        names = list(self.sizes)
        for at, label in enumerate(("before", "after")):
            ax.bar(
                [i + 0.4 * at for i in range(len(names))],
                [s[at] for s in self.sizes.values()],
                0.4,
                label=label,
            )
        ax.set_xticks([i + 0.2 for i in range(len(names))], names, rotation=45, ha="right", parse_math=False)
        ax.set_ylabel("channels")
        ax.legend()
        return ax

    def save(self, folder: str | Path) -> Path:
        """Write the network, see :func:`lineament.edit.save`."""
        return save(self.model, folder)


@dataclass(frozen=True)
class Step:
    """What became of one group: its channels, and the weights and biases of the layers that read it."""

    kept: Bool[Tensor, " channels"]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    errors: dict[str, list[float]] = field(default_factory=dict)


def prune(
    model: nn.Module,
    calibration: Any,
    *,
    remove: float | None = None,
    keep: float | None = None,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    criterion: str | None = None,
    compensate: str | None = "delta",
    recalibrate: bool = True,
    order: str = "sequential",
    options: PruneOptions = PruneOptions(),
) -> Pruned:
    """The network with fewer channels, from forwards on unlabelled inputs. The model that is passed stays as it was.

    Args:
        model: any module whose channels :func:`lineament.core.surgery.channel_groups` can follow.
        calibration: inputs, as for :func:`lineament.edit.fidelity`; labels are not used. About 2,000 images or 128 texts.
        remove: the paper's rule: each output gives up this share of its inputs, and a channel goes that no output of any reader wants. Alone: one pass;
            with ``params``, ``flops`` or ``latency``: passes until that is reached.
        keep: the share of channels that every group keeps.
        params, flops, latency: how many times fewer parameters or operations, or how many times faster; the share that is kept follows.
        criterion: ``"saliency"``, ``"fidelity"``, ``"energy"``, or to compare with ``"magnitude"`` (grouped L2 norms) and ``"random"``. By default saliency,
            and energy for gated perceptrons, as in the paper.
        compensate: ``"delta"``, ``"refit"``, ``"taps"`` or ``None``, see :func:`lineament.edit.compensated`. Linear layers of more than 2,048 inputs are
            refitted with ``"delta"``, too: one factorisation instead of one for each output.
        recalibrate: measure the statistics of batch norms anew on the calibration inputs.
        order: ``"sequential"``: each group is scored on what the network already became; ``"one-shot"``: all on the network as it was.

    Returns:
        :class:`Pruned`.

    Raises:
        InputError: no target or several, one that cannot be reached (with the nearest), a network without groups that can be pruned; NotFiniteError:
            activations that are not finite.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = prune(net, torch.randn(100, 4), keep=0.5)
    >>> found.model
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): ReLU()
      (2): Linear(in_features=4, out_features=2, bias=True)
    )
    """
    check_target(remove=remove, keep=keep, params=params, flops=flops, latency=latency)
    _check(criterion, compensate, order, options)
    model = plain_network(model)
    inputs = Inputs(calibration, options.batch_size)
    example = inputs.first(model)
    groups, readers, whole = prunable(model, example, options.sites)
    cost = Cost(model, example, list(groups.values()))
    before = cost.count(model), cost.operations(model)
    work = copy.deepcopy(model)
    plan = _Plan(
        model, work, inputs, groups, readers, criterion, compensate, recalibrate, order == "one-shot", options
    )
    measured = _Measured(model, example, groups, before)
    if remove is None:
        counts = plan.counts(keep) if keep is not None else measured.counts(plan, params, flops, latency)
        if options.allot == "global":
            counts = plan.allotted(counts)
        plan.run(counts=counts)
    else:
        for _ in range(_PASSES):
            left = plan.kept_total
            plan.run(removed=remove)
            if measured.reached(plan.kept, params, flops, latency):
                break
            require(
                plan.kept_total < left,
                f"remove: at {remove:g} some output wants every channel that is left, at {measured.said(plan.kept, params, flops, latency)}; pass a larger "
                "share, or no `remove` for an exact budget",
            )
    final = _taken_out(work, groups, plan.kept, example)
    if recalibrate and batchnorms(final):
        _measure_norms(final, inputs)
    after = cost.count(final), sum(_operations(final, example).values())
    return Pruned(
        final,
        {name: kept.nonzero()[:, 0] for name, kept in plan.kept.items()},
        {name: (group.size, int(plan.kept[name].sum())) for name, group in groups.items()},
        (before[0], after[0]),
        (before[1], after[1]),
        {name: (float(e[0]), float(e[1])) for name, e in plan.errors.items()},
        whole,
        criterion or ("energy" if all(g.products for g in groups.values()) else "saliency"),
        compensate,
        bool(recalibrate and batchnorms(model)),
    )


@dataclass(frozen=True, eq=False)
class Reader:
    """A layer that reads a group: which columns of its weight each channel has, [channels, columns]."""

    name: str
    module: nn.Module
    columns: Tensor


def prunable(
    model: nn.Module, example: Any, sites: str | Sequence[str] | None = None
) -> tuple[dict[str, ChannelGroup], dict[str, list[Reader]], dict[str, str]]:
    """The groups whose channels can be scored and silenced at their readers, those readers, and why other groups are left whole."""
    traced = channel_groups(model, example)
    whole = dict(traced.whole)
    chosen: dict[str, ChannelGroup] = {}
    found: dict[str, list[Reader]] = {}
    wanted = None if sites is None else [sites] if isinstance(sites, str) else list(sites)
    for pattern in wanted or ():
        require(
            any(fnmatch.fnmatchcase(name, pattern) for name in traced),
            f"sites: no group {pattern!r}{suggest(pattern, traced)}",
        )
    for name, group in traced.items():
        if wanted is not None and not any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            continue
        readers, why = _readers(model, group)
        if why:
            whole[name] = why
        else:
            chosen[name], found[name] = group, readers
    for name in _fixed(model, chosen, example):
        whole[name] = "a module computes with this number of channels, which is written in its code"
        del chosen[name], found[name]
    require(
        bool(chosen),
        f"model: it has no group of channels that can be pruned{_first(whole)}; networks of linear layers and convolutions can be",
    )
    return chosen, found, whole


def _fixed(model: nn.Module, chosen: Mapping[str, ChannelGroup], example: Any) -> list[str]:
    """The groups without one channel of which the network does not run."""

    def narrower(names: Sequence[str]) -> bool:
        try:
            remove(model, {chosen[name]: [0] for name in names}, example=example)
        except InputError:
            return False
        return True

    return [] if narrower(list(chosen)) else [name for name in chosen if not narrower([name])]


def _first(whole: Mapping[str, str]) -> str:
    return next((f" ({name}: {why})" for name, why in whole.items()), "")


def _readers(model: nn.Module, group: ChannelGroup) -> tuple[list[Reader], str]:
    if group.heads:
        return [], "attention heads are not scored, only what linear layers and convolutions read"
    if group.statistics:
        return [], f"{group.statistics[0]} takes a statistic over its channels"
    if tied := group.having("both"):
        return [], f"{tied[0].parameter} both makes and reads its channels"
    found = []
    for e in group.having("read"):
        name, _, kind = e.parameter.rpartition(".")
        module = model.get_submodule(name)
        if kind != "weight" or not reads(module) or "weight" not in module._parameters:
            return [], f"{e.parameter} reads its channels in a form that is not scored"
        taps = matrix(module).shape[2]
        columns = (e.slots[:, :, None] * taps + torch.arange(taps)).flatten(1)
        found.append(Reader(name, module, columns))
    return found, "" if found else "no layer reads its channels"


class _Plan:
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
        multiple = self.options.multiple or _multiple(self.dense, self.groups)
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
            scores[name] = self._ranked(name, self._scores(name, self._moments(self.dense, name)))
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
            stale = self.recalibrated and silenced and not self.one_shot
            if stale and (checkpoint is None or not checkpoint.finished(key, Step)):
                _measure_norms(self.work, self.inputs)
            if checkpoint is None:
                step = self._step(name, start, counts, removed)
            else:
                step = checkpoint.stage(key, lambda name=name: self._step(name, start, counts, removed), Step)
            self._apply(name, step)
            silenced = silenced or not bool(step.kept.all())
        self.passes += 1

    def _moments(self, model: nn.Module, name: str) -> dict[str, Any]:
        layers = {r.name: model.get_submodule(r.name) for r in self.readers[name]}
        return moments(model, self.inputs, layers)

    def _scores(self, name: str, grams: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Of each reader: scores [outputs, channels] and the energy of each output [outputs]."""
        group, kept = self.groups[name], self.kept[name]
        criterion = self.criterion or ("energy" if group.products else "saliency")
        if criterion in ("magnitude", "random"):
            values = (
                torch.rand(group.size, generator=self.generator)
                if criterion == "random"
                else _norms(self.dense, group)
            )
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

    def _step(self, name: str, source: nn.Module, counts: Mapping[str, int] | None, removed: float) -> Step:
        grams = self._moments(source, name)
        scores = self._scores(name, grams)
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


def _multiple(model: nn.Module, groups: Mapping[str, ChannelGroup]) -> int:
    language = hasattr(getattr(model, "config", None), "vocab_size")
    return 64 if language and min(g.size for g in groups.values()) >= 512 else 1


def _measure_norms(model: nn.Module, inputs: Inputs) -> None:
    model_was = {module: module.training for module in model.modules()}
    model.eval()
    try:
        recalibrate(model, (ready(batch, model) for batch in inputs))
    finally:
        for module, mode in model_was.items():
            module.training = mode


def _taken_out(
    model: nn.Module, groups: Mapping[str, ChannelGroup], kept: Mapping[str, Tensor], example: Any
) -> nn.Module:
    gone = {
        group: (~kept[name]).nonzero()[:, 0].tolist()
        for name, group in groups.items()
        if not bool(kept[name].all())
    }
    return remove(model, gone, example=example)


class _Measured:
    """What a target asks of the kept channels: parameters, operations or time."""

    def __init__(
        self, model: nn.Module, example: Any, groups: Mapping[str, ChannelGroup], before: tuple[int, int]
    ):
        self.model, self.example, self.groups, self.before = model, example, groups, before
        self.seconds: float | None = None

    def factor(self, kept: Mapping[str, Tensor], kind: str) -> float:
        """How many times less there is now."""
        if kind == "latency":
            if self.seconds is None:
                self.seconds = seconds_of(self.model, self.example)
            return self.seconds / seconds_of(
                _taken_out(self.model, self.groups, kept, self.example), self.example
            )
        cost = Cost(self.model, self.example, list(self.groups.values()))
        for name, group in self.groups.items():
            cost.narrowed(group, group.size - int(kept[name].sum()))
        return self.before[kind == "flops"] / max(cost.of(kind == "params"), 1)

    def reached(self, kept: Mapping[str, Tensor], *targets: float | None) -> bool:
        """Whether the target is reached; without one a single pass is all."""
        return all(
            target is None or self.factor(kept, kind) >= target for kind, target in zip(_TARGETS, targets)
        )

    def said(self, kept: Mapping[str, Tensor], *targets: float | None) -> str:
        kind = next(k for k, t in zip(_TARGETS, targets) if t is not None)
        return f"{self.factor(kept, kind):.2f} times fewer {_WORDS[kind]}"

    def counts(self, plan: _Plan, *targets: float | None) -> dict[str, int]:
        """The largest sizes of one share for all groups that reach the target, by bisection."""
        kind, target = next((k, t) for k, t in zip(_TARGETS, targets) if t is not None)

        def kept(counts: Mapping[str, int]) -> dict[str, Tensor]:
            return {n: torch.arange(g.size) < counts[n] for n, g in self.groups.items()}

        least = plan.counts(0.0)
        most = self.factor(kept(least), kind)
        require(
            most >= target,
            f"{kind}: got {target:g}, and with one channel a group there are {most:.2f} times fewer {_WORDS[kind]}; the nearest is {most:.2f}",
        )
        low, high = 0.0, 1.0
        for _ in range(6 if kind == "latency" else 14):
            middle = (low + high) / 2
            reached = self.factor(kept(plan.counts(middle)), kind) >= target
            low, high = (middle, high) if reached else (low, middle)
        return plan.counts(low)


_TARGETS = ("params", "flops", "latency")
_WORDS = {"params": "parameters", "flops": "operations", "latency": "seconds"}


def seconds_of(model: nn.Module, example: Any, repeats: int = 7) -> float:
    """The shortest of several forwards."""
    times = []
    with frozen(model), torch.no_grad():
        for _ in range(repeats):
            start = time.perf_counter()
            called(model, example)
            if device_of(model).type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(times)


def _operations(model: nn.Module, example: Any) -> dict[str, int]:
    from lineament.core.surgery.cost import by_module

    return by_module(model, example)


def check_target(
    *,
    remove: float | None = None,
    keep: float | None = None,
    params: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
) -> None:
    """Raise :class:`~lineament.core.checks.InputError` unless these say how far to prune, as :func:`prune` takes them."""
    given = [name for name, value in zip(_TARGETS, (params, flops, latency)) if value is not None]
    share = [name for name, value in (("remove", remove), ("keep", keep)) if value is not None]
    require(
        bool(given or share) and len(given) <= 1 and len(share) <= 1 and not (share == ["keep"] and given),
        f"keep: got {' and '.join([*share, *given]) or 'no target'}, expected one of keep, params, flops and latency, or remove alone or with one of the last three",
    )
    if remove is not None:
        number("remove", remove, low=0, high=1, open_low=True, open_high=True)
    if keep is not None:
        number("keep", keep, low=0, high=1, open_low=True)
    for name, value in zip(_TARGETS, (params, flops, latency)):
        if value is not None:
            number(name, value, low=1)


def _check(criterion: Any, compensate: Any, order: Any, options: PruneOptions) -> None:
    if criterion is not None:
        one_of("criterion", criterion, CRITERIA)
    if compensate is not None:
        one_of("compensate", compensate, WAYS)
    one_of("order", order, ORDERS)
    one_of("allot", options.allot, ("group", "global"))
    number("lam", options.lam, low=0)
    number("batch_size", options.batch_size, low=1, integer=True)
