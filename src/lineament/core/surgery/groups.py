"""Which channels, heads and units of a network must change together? Traced on one example, and proved.

A group is a set of channels that can be reordered, removed or merged without touching anything else: every parameter that makes them, scales them
or reads them is in it. A forgotten reader would make another network in silence, so a group has to prove itself: a random permutation of it must
leave the outputs of a float64 copy as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lineament.core.checks import InputError, require, suggest
from lineament.core.models import called, frozen, quantised_layer, unwrapped
from lineament.core.results import Readable
from lineament.core.surgery.tracing import KeepsDouble, Trace, traced


@dataclass(frozen=True, eq=False)
class Entry:
    """One axis of one parameter of a group.

    Attributes:
        parameter: its name, as ``named_parameters`` or ``named_buffers`` gives it.
        axis: which of its axes.
        slots: the indices along the axis that each channel owns (channels x indices of one channel).
        role: ``"write"`` where it makes the channels, ``"scale"`` where it multiplies them, ``"norm"`` in a batch norm, ``"read"`` where it
            takes them in; ``"both"`` for a tied weight.
    """

    parameter: str
    axis: int
    slots: Int[Tensor, "channels indices"]
    role: str


@dataclass(frozen=True, eq=False, repr=False)
class ChannelGroup(Readable):
    """Channels that change together.

    Attributes:
        name: the module that makes them (the first one of a stream).
        size: how many there are; of attention heads, those with a key and value of their own.
        entries: every axis of every parameter that has them.
        heads: whether these are attention heads.
        statistics: operators that take a statistic over the channels (layer norm, softmax, mean), which another number of them would change.
        products: operators that multiply two tensors of these channels, as a gate does.
        within: of heads that share a key and a value, the query heads of each, as groups of their own. They can change in any order among
            themselves, and as many must stay for each key.
        keys: of such a group, how many there are beside it, itself included.
    """

    name: str
    size: int
    entries: tuple[Entry, ...]
    heads: bool = False
    statistics: tuple[str, ...] = ()
    products: tuple[str, ...] = ()
    within: tuple[ChannelGroup, ...] = ()
    keys: int = 0

    def having(self, *roles: str) -> tuple[Entry, ...]:
        """The entries of these roles."""
        return tuple(e for e in self.entries if e.role in roles)


@dataclass(frozen=True, repr=False)
class ChannelGroups(Readable, Mapping[str, ChannelGroup]):
    """The groups of a network by name; a mapping.

    Attributes:
        groups: those that can change, in the order of the network's parameters.
        whole: {axis of a parameter: why it is left as it is}, the operator that stopped it.
    """

    groups: dict[str, ChannelGroup]
    whole: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ChannelGroup:
        if name not in self.groups:
            reason = next((why for axis, why in self.whole.items() if axis.startswith(name)), "")
            raise InputError(
                f"sites: no group {name!r}{f' ({reason})' if reason else ''}{suggest(name, self.groups)}"
            )
        return self.groups[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)


def channel_groups(
    model: nn.Module,
    example: Any,
    *,
    given: Mapping[str, Sequence[tuple[str, int, int]]] | None = None,
    prove: bool = True,
    seed: int = 0,
) -> ChannelGroups:
    """The groups of channels of a network that must change together, found by following one example through it.

    Args:
        model: any module; it stays as it was.
        example: inputs for one forward, as loaders give them (a tensor, a tuple of arguments, a dict of keyword arguments).
        given: groups to use instead, ``{group: [(parameter, axis, block)]}``: a channel owns ``block`` consecutive indices of the axis.
        prove: permute every group at random in a float64 copy with other weights, and leave out those that change its outputs.
        seed: of those permutations and weights.

    Raises:
        InputError: quantised or scripted networks, an unknown parameter, sizes that do not agree.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> groups = channel_groups(net, torch.ones(1, 4))
    >>> {name: group.size for name, group in groups.items()}
    {'0': 8, '2': 6}
    >>> [(e.parameter, e.axis, e.role) for e in groups["0"].entries]
    [('0.weight', 0, 'write'), ('0.bias', 0, 'write'), ('2.weight', 1, 'read')]
    """
    model = plain_network(model)
    if given is not None:
        found, whole = {name: _from_user(model, name, entries) for name, entries in given.items()}, {}
    else:
        trace, _ = traced(model, example)
        found, whole = _collected(trace)
    if prove and found:
        found = {name: replace(group, within=_query_heads(group)) for name, group in found.items()}
        every = [part for group in found.values() for part in (group, *group.within)]
        refuted = _refuted(model, example, every, seed)
        for name, group in found.items():
            if any(part.name in refuted for part in group.within):
                found[name] = replace(group, within=())
        for name in [name for name in refuted if name in found]:
            require(
                given is None,
                f"groups: permuting {name!r} as given changes the outputs: a parameter that makes or reads its channels is missing",
            )
            whole[name] = (
                "permuting it changes the outputs: an operator that was not followed depends on the order"
            )
            del found[name]
    return ChannelGroups(found, whole)


def plain_network(model: nn.Module) -> nn.Module:
    inner = unwrapped(model)
    require(
        isinstance(inner, nn.Module) and not isinstance(inner, torch.jit.ScriptModule),
        f"model: a {type(model).__name__} cannot be operated on; pass the nn.Module that it was made from",
    )
    layer = quantised_layer(inner)
    require(
        layer is None,
        f"model: its layer {layer} has quantised weights, which cannot be added or merged; pass the network before quantisation",
    )
    return inner


def _from_user(model: nn.Module, name: str, told: Sequence[tuple[str, int, int]]) -> ChannelGroup:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    entries = []
    for parameter, axis, block in told:
        require(
            parameter in tensors,
            f"groups: {name!r} names the parameter {parameter!r}, which the model has not{suggest(parameter, tensors)}",
        )
        shape = tuple(tensors[parameter].shape)
        require(
            0 <= axis < len(shape) and block >= 1 and shape[axis] % block == 0,
            f"groups: {name!r}: axis {axis} of {parameter!r} of shape {shape} is not made of blocks of {block}",
        )
        slots = torch.arange(shape[axis]).view(-1, block)
        entries.append(Entry(parameter, axis, slots, "read" if axis else "write"))
    sizes = {e.parameter: len(e.slots) for e in entries}
    require(len(set(sizes.values())) == 1, f"groups: {name!r} has channels in different numbers: {sizes}")
    return ChannelGroup(name, len(entries[0].slots), tuple(entries))


def _collected(trace: Trace) -> tuple[dict[str, ChannelGroup], dict[str, str]]:
    """Groups of sets that were treated alike, and why the other axes stay."""
    total = len(trace.atoms.parent)
    roots = trace.atoms.roots(np.arange(total))
    marks = np.random.default_rng(0).integers(1, 2**63, len(trace.axes) + len(trace.calls), dtype=np.uint64)
    treated = np.zeros(total, dtype=np.uint64)  # by set: which axes it has how often, which operators met it
    for mark, (start, size) in zip(marks, trace.axes.values()):
        np.add.at(treated, roots[start : start + size], mark)
    touched = np.zeros(total, dtype=bool)

    def met(labels: Tensor) -> np.ndarray:
        flat = labels.numpy()
        return np.unique(roots[flat[flat >= 0]])

    for mark, call in zip(marks[len(trace.axes) :], trace.calls):
        touched[seen := met(call)] = True
        treated[seen] += mark

    def flagged(lists: Sequence[Tensor]) -> np.ndarray:
        flags = np.zeros(total, dtype=bool)
        for labels in lists:
            flat = labels.numpy()
            flags[flat[flat >= 0]] = True
        return flags

    def words(pairs: Sequence[tuple[str, Tensor]]) -> dict[int, list[str]]:
        found: dict[int, list[str]] = {}
        for word, labels in pairs:
            for root in met(labels):
                there = found.setdefault(int(root), [])
                if word not in there:
                    there.append(word)
        return found

    read, scale, norm, looked_up = map(flagged, (trace.read, trace.scales, trace.norms, trace.looked_up))
    heads = np.zeros(total, dtype=bool)
    for labels in trace.heads:
        heads[met(labels)] = True
    statistics, products, stopped = words(trace.statistics), words(trace.products), words(trace.stopped)
    members: dict[int, list[int]] = {}
    for root in np.unique(roots[touched[roots]]):
        members.setdefault(int(treated[root]), []).append(int(root))
    entries: dict[int, list[Entry]] = {}
    place = np.full(total, -1)
    owner = np.zeros(total, dtype=np.uint64)
    for mark, sets in members.items():
        if len(sets) > 1:
            place[sets], owner[sets] = np.arange(len(sets)), mark
    for (parameter, axis), (start, size) in trace.axes.items():
        there = roots[start : start + size]
        for mark in np.unique(owner[there[place[there] >= 0]]):
            mine = np.flatnonzero((owner[there] == mark) & (place[there] >= 0))
            order = mine[np.argsort(place[there[mine]], kind="stable")]
            slots = torch.from_numpy(order.reshape(len(members[int(mark)]), -1).copy())
            atoms = np.arange(start, start + size)[mine]
            is_read = bool(read[atoms].any())
            role = "norm" if norm[atoms].any() else "scale" if scale[atoms].any() else "write"
            role = ("both" if looked_up[atoms].any() else "read") if is_read else role
            entries.setdefault(int(mark), []).append(Entry(parameter, axis, slots, role))
    groups: dict[str, ChannelGroup] = {}
    whole: dict[str, str] = {}
    for mark, found in entries.items():
        makes = next((e for e in found if e.role in ("write", "both")), None)
        reads = any(e.role in ("read", "both") for e in found)
        if makes is None or not reads:
            for e in found:
                whole[f"{e.parameter}[{e.axis}]"] = (
                    "reads constants" if makes is None else "no weight reads it"
                )
            continue
        sets = members[mark]
        name = base = makes.parameter.rpartition(".")[0] or makes.parameter
        count = 2
        while name in groups:
            name, count = f"{base}#{count}", count + 1
        groups[name] = ChannelGroup(
            name,
            len(sets),
            tuple(found),
            bool(heads[sets].any()),
            tuple(dict.fromkeys(w for s in sets for w in statistics.get(s, ()))),
            tuple(dict.fromkeys(w for s in sets for w in products.get(s, ()))),
        )
    for (parameter, axis), (start, size) in trace.axes.items():
        there = roots[start : start + size]
        if (place[there] < 0).any():
            why = next((w for r in there.tolist() for w in stopped.get(r, ())), "")
            if not why and not touched[there].any():
                why = "not used on this example"
            if why == "convolution":
                continue  # the rows and columns of a kernel
            whole.setdefault(f"{parameter}[{axis}]", why or "its indices cannot be told apart")
    return groups, whole


def _query_heads(group: ChannelGroup) -> tuple[ChannelGroup, ...]:
    """For each key of a group of heads the query heads that share it: the axes of which a key has a multiple of what it has of the others."""
    owned = {e.slots.shape[1] for e in group.entries}
    times, rest = divmod(max(owned), min(owned))
    if not group.heads or times < 2 or rest:
        return ()
    wide = [e for e in group.entries if e.slots.shape[1] == max(owned)]
    return tuple(
        ChannelGroup(
            f"{group.name}[{key}]",
            times,
            tuple(replace(e, slots=e.slots[key].view(times, -1)) for e in wide),
            heads=True,
            keys=group.size,
        )
        for key in range(group.size)
    )


def permuted_in_place(model: nn.Module, group: ChannelGroup, order: Tensor) -> None:
    """Channel ``i`` becomes what ``order[i]`` was."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for e in group.entries:
            tensor = tensors[e.parameter]
            index = torch.arange(tensor.shape[e.axis])
            index[e.slots.reshape(-1)] = e.slots[order].reshape(-1)
            tensor.copy_(tensor.index_select(e.axis, index.to(tensor.device)))


def _refuted(model: nn.Module, example: Any, groups: list[ChannelGroup], seed: int) -> list[str]:
    """The names of groups whose random permutation changes the outputs of a float64 copy, found by bisection."""
    generator = torch.Generator().manual_seed(seed)
    double = copy.deepcopy(model).double()
    example = tree_map(lambda t: _varied(t, generator) if isinstance(t, Tensor) else t, example)
    with torch.no_grad():
        for name, tensor in (*double.named_parameters(), *double.named_buffers()):
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
                spread = tensor.std() if tensor.numel() > 1 else tensor.abs().sum()
                if "running_var" in name or name.endswith("original0"):  # positive numbers
                    tensor.mul_((0.2 * noise.clamp(-2, 2)).exp())
                else:
                    tensor.add_((0.2 * spread + 0.01) * noise)
    orders = {g.name: _reordered(g.size, generator) for g in groups}
    kept = {name: t.detach().clone() for name, t in (*double.named_parameters(), *double.named_buffers())}

    def outputs(permuted: Sequence[ChannelGroup]) -> list[Tensor]:
        with torch.no_grad():
            for name, tensor in (*double.named_parameters(), *double.named_buffers()):
                tensor.copy_(kept[name])
        for group in permuted:
            permuted_in_place(double, group, orders[group.name])
        with frozen(double), torch.no_grad(), KeepsDouble(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            found = [t for t in tree_leaves(called(double, example)) if isinstance(t, Tensor)]
        return [t.double() for t in found if t.is_floating_point()]

    straight = outputs([])
    if not all(t.isfinite().all() for t in straight):
        raise InputError(
            "example: the network does not answer it with finite numbers; pass inputs as it was made for"
        )

    def holds(some: Sequence[ChannelGroup]) -> bool:
        return all(
            a.shape == b.shape and bool((a - b).abs().max() <= 1e-9 * b.abs().max().clamp(min=1e-30))
            for a, b in zip(outputs(some), straight)
            if b.numel()
        )

    def failing(some: list[ChannelGroup]) -> list[str]:
        if holds(some):
            return []
        if len(some) == 1:
            return [some[0].name]
        half = len(some) // 2
        return failing(some[:half]) + failing(some[half:])

    return failing(groups)


def _reordered(size: int, generator: torch.Generator) -> Tensor:
    order = torch.randperm(size, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(size)) else order  # which would prove nothing


def _varied(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Inputs in float64; constant ones would hide what reads them."""
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.double()
    if tensor.numel() > 1 and not tensor.std() > 0:
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor = tensor + noise.to(tensor.device)
    return tensor
