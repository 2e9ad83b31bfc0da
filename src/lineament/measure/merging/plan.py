"""The groups of a network while they merge: which may, their distances, the weights that they share, and the network at the end."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lineament.core import checks
from lineament.core.checks import InputError, require
from lineament.core.surgery.cost import Cost
from lineament.core.surgery.folding import fold_norms
from lineament.core.surgery.groups import ChannelGroup, ChannelGroups, Entry, channel_groups, plain_network
from lineament.core.surgery.rewriting import rewrite, runs, unbending
from lineament.measure.merging.distance import Channels, Weights
from lineament.measure.merging.heads import HeadChannels, factors_of, read_by
from lineament.measure.merging.merged import Merged
from lineament.measure.merging.rescaling import rescaled


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
    for name in unbending(base, chosen, _blocks(chosen).values(), example=example):
        whole[name] = "one of the modules computes with a number of its channels that is written in its code"
        del chosen[name]
    if rescale:
        base = rescaled(base, list(chosen.values()), example)
    tensors = {**dict(base.named_parameters()), **dict(base.named_buffers())}
    used = {e.parameter for g in chosen.values() for e in g.entries}
    for group in chosen.values():  # query heads read the keys that they share
        used |= read_by(group, base) if group.heads else set()
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
        else:
            parts = group.within or (group,)
            reasons = [factors_of(part, model) if group.heads else {} for part in parts]
            why = next((reason for reason in reasons if isinstance(reason, str)), None)
            if why is None:
                chosen |= {part.name: part for part in parts}
            else:
                whole[name] = why
    return chosen, whole


def _blocks(groups: Mapping[str, ChannelGroup]) -> dict[str, list[str]]:
    """The groups that narrow together: the query heads of all keys of a block; any other alone."""
    found: dict[str, list[str]] = {}
    for name, group in groups.items():
        found.setdefault(name.rpartition("[")[0] if group.keys else name, []).append(name)
    return found


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
        self.blocks = _blocks({name: c.group for name, c in channels.items()})
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

    def nearest(self, block: str) -> tuple[list[tuple[int, int]], float, float]:
        """The closest two channels of each group of a block, the largest of their squared distances, and that of the furthest two."""
        found = [self.channels[name].closest() for name in self.blocks[block]]
        return [each[:2] for each in found], max(each[2] for each in found), max(each[3] for each in found)

    def merge_block(self, block: str, pairs: Sequence[tuple[int, int]], ratio: float) -> None:
        """One merge in each group of a block."""
        for name, pair in zip(self.blocks[block], pairs):
            self.merge(name, *pair, ratio)

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
            for block in self.blocks:
                channels = self._first(block)
                if len(channels) < 2 or t >= max_ratio * channels.group.size:
                    continue
                pairs, distance, far = self.nearest(block)
                if distance <= beta * far:
                    self.merge_block(block, pairs, _ratio(distance, far))
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
            while wide := [block for block in self.blocks if len(self._first(block)) > wanted[block]]:
                for block in wide:
                    pairs, distance, far = self.nearest(block)
                    self.merge_block(block, pairs, _ratio(distance, far))
            return
        target = params if params is not None else flops
        assert target is not None
        ready: dict[str, tuple[list[tuple[int, int]], float]] = {}
        holds = {name: block for block, names in self.blocks.items() for name in names}
        before = self.cost.of(params is not None)
        while self.cost.of(params is not None) > target * before:
            for block in self.blocks:
                if block not in ready and len(self._first(block)) > 1:
                    pairs, distance, far = self.nearest(block)
                    ready[block] = pairs, _ratio(distance, far)
            if not ready:
                what = "params" if params is not None else "flops"
                least = self.cost.of(params is not None) / before
                raise InputError(
                    f"{what}: {target} cannot be reached, {least:.3f} is left when every layer has one channel; pass at least that"
                )
            block = min(ready, key=lambda n: ready[n][1])
            self.merge_block(block, *ready.pop(block))
            for name in self.blocks[block]:
                for _, _, other, _ in self.links[name]:
                    ready.pop(holds[other], None)

    def _first(self, block: str) -> Channels:
        """One group of a block; the others are as large."""
        return self.channels[self.blocks[block][0]]

    def _sizes(self, keep: float | Mapping[str, int]) -> dict[str, int]:
        full = {block: self._first(block).group.size for block in self.blocks}
        if not isinstance(keep, Mapping):
            require(
                isinstance(keep, (int, float)) and 0 < keep <= 1,
                f"keep: got {keep!r}, expected a share above 0 and up to 1, or {{layer: channels}}",
            )
            return {block: max(1, round(keep * n)) for block, n in full.items()}
        for name, size in keep.items():
            require(name in full, f"keep: no layer {name!r} can be merged{checks.suggest(name, full)}")
            what = "query heads for each key" if len(self.blocks[name]) > 1 else "channels"
            require(1 <= size <= full[name], f"keep: {name!r} has {full[name]} {what}, got {size}")
        return {block: keep.get(block, n) for block, n in full.items()}

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


def _ratio(distance: float, far: float) -> float:
    return distance / far if far > 0 else 0.0


def _in_sigma(model: nn.Module, inward: bool) -> nn.Module:
    new = copy.deepcopy(model)
    values = {n: b.double() for n, b in new.named_buffers()}
    _variances(new, values, inward)
    with torch.no_grad():
        for name, buffer in new.named_buffers():
            buffer.copy_(values[name])
    return new
