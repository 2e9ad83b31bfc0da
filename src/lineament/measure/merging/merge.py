"""The network without its repetition: iterative feature merging (Chen, Zhou, Yan, 2023, arXiv 2310.06756), without data and without training.

In each round every layer merges its two closest channels, until the closest two are further apart than beta times the furthest two. What makes the
channels is averaged and what reads them is summed (``"mean_sum"``), which keeps merged channels comparable and is exact for duplicates; the paper
sums and averages (``"sum_mean"``). Batch norms are folded first: a sum of two equal channels has four times their variance, not twice.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lineament.core import checks, results
from lineament.core.checks import InputError, require
from lineament.core.results import Readable
from lineament.core.surgery.cost import Cost
from lineament.core.surgery.folding import fold_norms
from lineament.core.surgery.groups import ChannelGroup, ChannelGroups, Entry, channel_groups, plain_network
from lineament.core.surgery.rewriting import remove, rewrite, runs
from lineament.measure.merging.distance import DISTANCES, RULES, Channels, Weights
from lineament.measure.merging.heads import HeadChannels, factors_of
from lineament.measure.merging.rescaling import rescaled

NORMS = ("fold", "paper", "sigma")


@dataclass(frozen=True, repr=False)
class Merged(Readable):
    """A network whose repeated channels have become one.

    Attributes:
        model: the smaller network, a plain module that is called as the original was.
        groups: {layer: for each original channel, which channel of the merged layer it is in}.
        sizes: {layer: (channels before, channels after)}.
        trace: {layer: at each merge, the squared distance of the closest two channels over that of the furthest two}.
        parameters, flops: of the network before and after; the operations of one forward on the example.
        whole: {parameter axis or layer: why it was not merged}.
        beta: the threshold, or ``None`` where a size was asked for.
        norms: {layer: (shift, scale) of each original channel}, where one batch norm was folded.
        layers: {layer: the modules that make its channels}.
        original: the network before, with its batch norms folded; channels: {layer: its group there}.
    """

    model: nn.Module
    groups: dict[str, Int[Tensor, " channels"]]
    sizes: dict[str, tuple[int, int]]
    trace: dict[str, Float[Tensor, " merges"]]
    parameters: tuple[int, int]
    flops: tuple[int, int]
    whole: dict[str, str]
    beta: float | None
    norms: dict[str, tuple[Tensor, Tensor]]
    layers: dict[str, tuple[str, ...]]
    original: nn.Module = field(repr=False)
    channels: dict[str, ChannelGroup] = field(repr=False)

    @property
    def knee(self) -> dict[str, float]:
        """{layer: the ratio at the bend of its trace}: a beta beyond it merges channels that differ."""
        return {name: bend(trace) for name, trace in self.trace.items()}

    @property
    def share(self) -> float:
        """The share of the parameters that is left."""
        return self.parameters[1] / self.parameters[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and lists, without the networks."""
        names = ("groups", "sizes", "trace", "parameters", "flops", "whole", "beta")
        return {name: results.plain(getattr(self, name)) for name in names} | {"knee": self.knee}

    def plot(self, ax: Any = None) -> Any:
        """The trace of every layer: the closest two channels over the furthest two, merge by merge."""
        ax = results.axes(ax)
        for name, trace in self.trace.items():
            if len(trace):
                ax.plot(torch.arange(1, len(trace) + 1) / self.sizes[name][0], trace, label=name)
        if self.beta is not None:
            ax.axhline(self.beta, color="grey", linestyle="--", label="beta")
        ax.set(xlabel="merges / channels", ylabel="closest / furthest squared distance")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
        return ax


def bend(values: Tensor | Sequence[float]) -> float:
    """Where a curve bends: the value that lies furthest from the chord between its ends; NaN for fewer than three.

    >>> bend([0.0, 0.1, 0.2, 0.3, 1.0, 1.7])
    0.30000001192092896
    """
    y = torch.as_tensor(values, dtype=torch.float32)
    if len(y) < 3 or not (y.max() > y.min()):
        return float("nan")
    x = torch.linspace(0, 1, len(y))
    scaled = (y - y.min()) / (y.max() - y.min())
    return float(y[(scaled - (scaled[0] + (scaled[-1] - scaled[0]) * x)).abs().argmax()])


def merge(
    model: nn.Module,
    *,
    example: Any,
    sites: str | Sequence[str] | None = None,
    beta: float | None = None,
    keep: float | Mapping[str, int] | None = None,
    params: float | None = None,
    flops: float | None = None,
    rule: str = "mean_sum",
    norms: str = "fold",
    distance: str = "all",
    rescale: bool = False,
) -> Merged:
    """The network with its closest channels merged, without data and without training.

    Args:
        model: any module; it stays as it was.
        example: inputs for one forward; only their shapes matter.
        sites: layers to merge (globs), as :func:`lineament.core.surgery.channel_groups` names them; all by default.
        beta: merge until the closest two channels of a layer are further apart than this share of its furthest two (squared); 0.1 by default.
        keep: instead: a share of the channels of every layer, or ``{layer: channels}``.
        params, flops: instead: the share of the parameters, or of the operations of a forward, that may be left; the least different channels of all layers first.
        rule: ``"mean_sum"`` averages what makes a channel and sums what reads it; ``"sum_mean"``, the paper's, the other way round.
        norms: ``"fold"`` makes batch norms part of the layer before them, which is exact; ``"sigma"`` merges standard deviations; ``"paper"`` variances.
        distance: ``"all"`` (every weight and bias that makes or reads the channels), ``"paper"`` (without biases and norms), ``"in"``, ``"out"``, ``"cosine"``.
        rescale: first bring what makes each channel to norm one, and the norm to what reads it; where the activation allows it (ReLU).

    Returns:
        The smaller network with what was merged.

    Raises:
        InputError: beta outside [0, 1), an unknown layer, several targets, weights that are not finite, a rule that a gate does not bear.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> with torch.no_grad():
    ...     for t in (net[0].weight, net[0].bias):
    ...         t[3] = t[1]
    >>> found = merge(net, example=torch.ones(1, 3), beta=0.0, distance="in")
    >>> found.groups["0"].tolist(), found.model[0]
    ([0, 2, 1, 2], Linear(in_features=3, out_features=3, bias=True))
    """
    targets = {"beta": beta, "keep": keep, "params": params, "flops": flops}
    given = [name for name, value in targets.items() if value is not None]
    require(len(given) < 2, f"{' and '.join(given)}: got several targets, expected one")
    beta = 0.1 if not given else beta
    if beta is not None:
        require(
            isinstance(beta, (int, float)) and 0 <= beta < 1,
            f"beta: got {beta!r}, expected a number of at least 0 and below 1",
        )
    for name in ("params", "flops"):
        value = targets[name]
        require(
            value is None or (isinstance(value, (int, float)) and 0 < value <= 1),
            f"{name}: got {value!r}, expected a share above 0 and up to 1",
        )
    checks.one_of("rule", rule, RULES)
    checks.one_of("norms", norms, NORMS)
    checks.one_of("distance", distance, DISTANCES)
    plan = prepare(model, example, sites, rule=rule, norms=norms, distance=distance, rescale=rescale)
    if beta is not None:
        plan.rounds(float(beta))
    else:
        plan.until(keep, params, flops)
    return plan.finished(beta)


def merge_as_published(
    model: nn.Module,
    *,
    example: Any,
    sites: str | Sequence[str] | None = None,
    beta: float = 0.1,
    max_ratio: float = 1.0,
) -> Merged:
    """Iterative feature merging as the paper's code does it: sums of what makes a channel, means of what reads it, batch norm vectors summed.

    Its variances are wrong (the variance of a sum of two equal channels is four times theirs); :func:`merge` is for use, this for comparison.

    Args:
        model, example, sites, beta: as for :func:`merge`.
        max_ratio: a layer of n channels stops after ``max_ratio * n`` rounds.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> merge_as_published(net, example=torch.ones(1, 3), max_ratio=0.0).sizes
    {'0': (4, 4)}
    """
    require(
        isinstance(beta, (int, float)) and 0 <= beta < 1,
        f"beta: got {beta!r}, expected a number of at least 0 and below 1",
    )
    require(max_ratio >= 0, f"max_ratio: got {max_ratio!r}, expected a number of at least 0")
    plan = prepare(model, example, sites, rule="sum_mean", norms="paper", distance="paper", rescale=False)
    plan.rounds(float(beta), float(max_ratio))
    return plan.finished(float(beta))


def prepare(
    model: nn.Module,
    example: Any,
    sites: str | Sequence[str] | None,
    *,
    rule: str,
    norms: str,
    distance: str,
    rescale: bool,
) -> Plan:
    """The groups of a network with their distances, ready to merge."""
    original = plain_network(model)
    for name, p in original.named_parameters():
        require(
            p.is_floating_point(),
            f"model: the weights {name!r} are {p.dtype} and not real numbers; pass the network before quantisation",
        )
        require(bool(p.isfinite().all()), f"model: the weights {name!r} are not finite")
    base, folded = fold_norms(original, example) if norms == "fold" else (original, {})
    groups = channel_groups(base, example)
    chosen, whole = _chosen(base, groups, sites, norms, rule)
    for name in _fixed(base, chosen, example):
        whole[name] = "one of the modules computes with a number of its channels that is written in its code"
        del chosen[name]
    if rescale:
        base = rescaled(base, list(chosen.values()), example)
    tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    used = {e.parameter for g in chosen.values() for e in g.entries}
    values = {name: tensors[name].detach().to("cpu", torch.float64, copy=True) for name in used}
    if norms == "sigma":
        _variances(base, values, inward=True)
    weights = Weights(values)
    channels: dict[str, Channels] = {}
    for name, group in chosen.items():
        if group.heads:
            channels[name] = HeadChannels(group, weights, rule, distance, base)
        else:
            channels[name] = Channels(group, weights, rule, distance)
    return Plan(original, base, example, channels, whole, norms, folded)


def _chosen(
    model: nn.Module, groups: ChannelGroups, sites: str | Sequence[str] | None, norms: str, rule: str
) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    whole = dict(groups.whole)
    names = list(groups)
    if sites is not None:
        patterns = [sites] if isinstance(sites, str) else list(sites)
        for pattern in patterns:
            if not fnmatch.filter(names, pattern):
                _ = groups[pattern]  # says what there is instead
        names = [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]
    chosen = {}
    for name in names:
        group = groups[name]
        norm = group.having("norm")
        if group.statistics:
            whole[name] = (
                f"{group.statistics[0]} takes a statistic over its channels, which a merge would change"
            )
        elif norms == "fold" and norm:
            whole[name] = (
                f"the batch norm of {norm[0].parameter.rpartition('.')[0]} follows no layer that it could be folded into"
            )
        elif group.having("both"):
            whole[name] = f"{group.having('both')[0].parameter} both makes and reads its channels"
        elif rule == "sum_mean" and (group.products or group.having("scale")) and not group.heads:
            raise InputError(
                f"rule: 'sum_mean' squares the channels of {name!r}, which multiply each other; use rule='mean_sum'"
            )
        elif group.heads and isinstance(why := factors_of(group, model), str):
            whole[name] = why
        else:
            chosen[name] = group
    return chosen, whole


def _fixed(model: nn.Module, chosen: Mapping[str, ChannelGroup], example: Any) -> list[str]:
    """The groups without one channel of which the network does not run."""

    def narrower(names: Sequence[str]) -> bool:
        try:
            remove(model, {chosen[name]: [0] for name in names}, example=example)
        except InputError:
            return False
        return True

    return [] if narrower(list(chosen)) else [name for name in chosen if not narrower([name])]


def _variances(model: nn.Module, values: dict[str, Tensor], inward: bool) -> None:
    """Standard deviations in the place of variances, or back."""
    for name, module in model.named_modules():
        key = f"{name}.running_var" if name else "running_var"
        if isinstance(module, _BatchNorm) and key in values:
            values[key] = (values[key] + module.eps).sqrt() if inward else values[key].square() - module.eps


class Plan:
    """Groups that merge, and what they share with each other."""

    def __init__(
        self,
        original: nn.Module,
        base: nn.Module,
        example: Any,
        channels: dict[str, Channels],
        whole: dict[str, str],
        norms: str,
        folded: dict[str, str],
    ) -> None:
        self.original, self.base, self.example, self.channels, self.whole = (
            original,
            base,
            example,
            channels,
            whole,
        )
        self.norms, self.folded = norms, folded
        self.trace: dict[str, list[float]] = {name: [] for name in channels}
        self.cost = Cost(base, example, [c.group for c in channels.values()])
        self.links = {name: self._linked(name) for name in channels}
        for links in self.links.values():
            for _, _, other, _ in links:
                channels[other].linked = True

    def _linked(self, name: str) -> list[tuple[Entry, Entry, str, str]]:
        """(entry of this group, entry of another on the same parameter, the other's name, its side) for every shared weight."""
        found = []
        for other, channels in self.channels.items():
            for side, entries in (("makes", channels.makes), ("reads", channels.reads)):
                for theirs in entries:
                    for mine in self.channels[name].group.entries:
                        if mine.parameter == theirs.parameter and mine.axis != theirs.axis:
                            found.append((mine, theirs, other, side))
        return found

    def closest(self, name: str) -> tuple[int, int, float]:
        """The closest two channels of a layer, and their squared distance over that of the furthest two."""
        i, j, distance, far = self.channels[name].closest()
        return i, j, distance / far if far > 0 else 0.0

    def merge(self, name: str, i: int, j: int, ratio: float) -> None:
        channels = self.channels[name]
        a, b = channels.coefficients(i, j)
        first, second = int(channels.first[i]), int(channels.first[j])
        own = []
        for mine, theirs, other, side in self.links[name]:
            if other == name:
                own.append(other)
                continue
            columns = self._columns(mine, theirs, first, second)
            self.channels[other].column_changed(side, columns, b if mine.role == "read" else a)
        channels.merge(i, j)
        if own:
            channels.regrouped()
        self.trace[name].append(ratio)
        self.cost.narrowed(channels.group)

    def _columns(self, mine: Entry, theirs: Entry, first: int, second: int) -> Tensor:
        """Two channels of ours in the slices of theirs: (their channels x 2 x width)."""
        tensor = self.channels[next(iter(self.channels))].weights.tensors[mine.parameter]
        slots = mine.slots[[first, second]]
        picked = tensor.index_select(mine.axis, slots.reshape(-1)).unflatten(mine.axis, tuple(slots.shape))
        axis = theirs.axis + (1 if theirs.axis > mine.axis else 0)
        picked = picked.index_select(axis, theirs.slots.reshape(-1)).unflatten(
            axis, tuple(theirs.slots.shape)
        )
        at = mine.axis + (2 if theirs.axis < mine.axis else 0) - (1 if theirs.axis < mine.axis else 0)
        order = [axis, at, *(d for d in range(picked.ndim) if d not in (axis, at))]
        return picked.permute(order).reshape(len(theirs.slots), 2, -1)

    def rounds(self, beta: float, max_ratio: float = float("inf")) -> None:
        """One merge a layer in each round, until none is close enough."""
        t = 0
        while True:
            merged = False
            for name, channels in self.channels.items():
                if len(channels) < 2 or t >= max_ratio * channels.group.size:
                    continue
                i, j, distance, far = channels.closest()
                if distance <= beta * far:
                    self.merge(name, i, j, distance / far if far > 0 else 0.0)
                    merged = True
            if not merged:
                return
            t += 1

    def until(
        self, keep: float | Mapping[str, int] | None, params: float | None, flops: float | None
    ) -> None:
        """To given sizes round by round; to a budget, the least different channels of all layers first."""
        if keep is not None:
            wanted = self._sizes(keep)
            while any(len(c) > wanted[name] for name, c in self.channels.items()):
                for name, channels in self.channels.items():
                    if len(channels) > wanted[name]:
                        self.merge(name, *self.closest(name))
            return
        target = params if params is not None else flops
        assert target is not None
        ready: dict[str, tuple[int, int, float]] = {}
        before = self.cost.of(params is not None)
        while self.cost.of(params is not None) > target * before:
            for name, channels in self.channels.items():
                if name not in ready and len(channels) > 1:
                    ready[name] = self.closest(name)
            if not ready:
                what = "params" if params is not None else "flops"
                least = self.cost.of(params is not None) / before
                raise InputError(
                    f"{what}: {target} cannot be reached, {least:.3f} is left when every layer has one channel; pass at least that"
                )
            name = min(ready, key=lambda n: ready[n][2])
            self.merge(name, *ready.pop(name))
            for _, _, other, _ in self.links[name]:
                ready.pop(other, None)

    def _sizes(self, keep: float | Mapping[str, int]) -> dict[str, int]:
        if not isinstance(keep, Mapping):
            require(
                isinstance(keep, (int, float)) and 0 < keep <= 1,
                f"keep: got {keep!r}, expected a share above 0 and up to 1, or {{layer: channels}}",
            )
            return {name: max(1, round(keep * c.group.size)) for name, c in self.channels.items()}
        for name, size in keep.items():
            require(
                name in self.channels,
                f"keep: no layer {name!r} can be merged{checks.suggest(name, self.channels)}",
            )
            n = self.channels[name].group.size
            require(1 <= size <= n, f"keep: {name!r} has {n} channels, got {size}")
        return {name: keep.get(name, c.group.size) for name, c in self.channels.items()}

    def finished(self, beta: float | None) -> Merged:
        base, through = self.base, self.norms != "fold"
        changes, groups, sizes, told, layers = {}, {}, {}, {}, {}
        for name, channels in self.channels.items():
            order = channels.order()
            n = channels.group.size
            member = torch.empty(n, dtype=torch.int64)
            for place, inside in enumerate(order):
                member[inside] = place
            groups[name], sizes[name] = member, (n, len(order))
            whole = torch.zeros(len(order), n, dtype=torch.float64)
            whole[member, torch.arange(n)] = 1
            mean = whole / whole.sum(1, keepdim=True)
            write, read = (mean, whole.T) if channels.rule == "mean_sum" else (whole, mean.T)
            if len(order) < n:
                changes[channels.group] = (write, read)
            layers[name] = tuple(
                dict.fromkeys(e.parameter.rpartition(".")[0] for e in channels.group.having("write"))
            )
            if len(layers[name]) == 1 and layers[name][0] in self.folded.values():
                told[name] = self._norm(layers[name][0])
        new = self._rewritten(base, changes, through)
        return Merged(
            new, groups, sizes, {n: torch.tensor(t, dtype=torch.float64) for n, t in self.trace.items()},
            (self.cost.count(self.original), self.cost.count(new)), (self.cost.operations(self.original), self.cost.operations(new)),
            self.whole, beta, told, layers, base, {n: c.group for n, c in self.channels.items()},
        )  # fmt: skip

    def _rewritten(self, base: nn.Module, changes: dict[Any, Any], through: bool) -> nn.Module:
        heads = {
            g: c for g, c in ((c.group, c) for c in self.channels.values()) if isinstance(c, HeadChannels)
        }
        if self.norms == "sigma":
            base = _in_sigma(base, True)
        new = base
        for group, channels in heads.items():
            if group in changes:
                new = channels.written(new)
                keep = [inside[0] for inside in channels.order()]
                write = torch.eye(group.size, dtype=torch.float64)[keep]
                changes[group] = write, write.T
        new = rewrite(new, changes, through_norms=through)
        if self.norms == "sigma":
            new = _in_sigma(new, False)
        runs(new, self.example)
        return new

    def _norm(self, layer: str) -> tuple[Tensor, Tensor]:
        """Shift and scale of the batch norm that was folded into a layer."""
        norm: Any = self.original.get_submodule(next(n for n, of in self.folded.items() if of == layer))
        zero = torch.zeros(norm.num_features, dtype=torch.float64)
        shift = zero if norm.bias is None else norm.bias.detach().double().cpu()
        return shift, zero + 1 if norm.weight is None else norm.weight.detach().double().cpu().abs()


def _in_sigma(model: nn.Module, inward: bool) -> nn.Module:
    new = copy.deepcopy(model)
    values = {n: b.double() for n, b in new.named_buffers()}
    _variances(new, values, inward)
    with torch.no_grad():
        for name, buffer in new.named_buffers():
            buffer.copy_(values[name])
    return new
