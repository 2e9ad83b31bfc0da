"""A network's weights among what a checkpoint holds: in which container, behind which prefixes, and whether they fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.load.checkpoints import listed, tensors_by_path

# Where weights lie in a checkpoint when several networks of the same form do: what was trained before its running average.
_FIRST = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "module",
    "weights",
    "params",
)
_AVERAGED = re.compile(r"ema|averag|shadow|teacher|target", re.I)


def weights_for(
    own: Mapping[str, Tensor], content: Any, source: str, network: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of a checkpoint that are these weights, by their names in the network, and what was unwrapped.

    Containers (``state_dict``, ``model``, ``ema``, ...) and the prefixes of wrappers (``module.``, ``_orig_mod.``, ``backbone.``, ...) are both the beginning
    of a name: taken is what fits exactly, in names and shapes, once one beginning is left out. ``num_batches_tracked``, which only training reads, may be missing.

    Args:
        own: the network's ``state_dict()``.
        source, network: how an error calls the file and the network.

    Raises:
        InputError: nothing fits (says what of the nearest does not), or several do and none is the usual one.

    >>> own = torch.nn.Linear(1, 1).state_dict()
    >>> content = {"state_dict": {"module.weight": torch.ones(1, 1), "module.bias": torch.ones(1)}, "best_prec1": torch.ones(())}
    >>> weights_for(own, content, "best.pth", "Linear")[1]
    ["weights are 'state_dict' of best.pth, without the prefix 'module.'"]
    """
    held = {_plain(name): value for name, value in tensors_by_path(content)}
    names = {_plain(name): name for name in own}
    if not held:
        keys = (
            ", ".join(map(repr, list(content)[:6]))
            if isinstance(content, Mapping)
            else type(content).__name__
        )
        raise InputError(
            f"weights: {source!r} holds no tensors (it holds {keys or 'nothing'}), expected the weights of a network"
        )
    heads = Counter(
        name[:cut]
        for name in held
        for cut in (0, *(dot.end() for dot in re.finditer(r"\.", name)))
        if name[cut:] in names
    )
    found = {head: _Fit(head, held, names, own) for head in heads or [""]}
    fitting = [head for head, fit in found.items() if not fit.problems]
    if not fitting:
        nearest = max(found, key=lambda head: (heads[head], -len(found[head].unexpected)))
        raise InputError(f"weights: {source!r} does not fit {network}: {found[nearest].problems}")
    fitting.sort(key=_rank)
    head = fitting[0]
    others = [other for other in fitting[1:] if not _alike(found[head].state, found[other].state)]
    require(
        not others or _rank(head) < _rank(others[0]),
        f"weights: {source!r} holds {1 + len(others)} networks that fit {network}: {listed([repr(h.rstrip('.')) for h in (head, *others)])}; save the one you mean alone",
    )
    return found[head].state, _told(found[head], content, source, others)


class _Fit:
    """The tensors under one beginning of their names, beside a network's own."""

    def __init__(
        self, head: str, held: Mapping[str, Tensor], names: Mapping[str, str], own: Mapping[str, Tensor]
    ):
        inside = {name[len(head) :]: value for name, value in held.items() if name.startswith(head)}
        self.head = head
        self.state = {names[name]: value for name, value in inside.items() if name in names}
        self.beside = [name for name in held if not name.startswith(head)]
        # A file holds a shared tensor once; the module's other names for it are not missing.
        shared = {own[name].data_ptr() for name in self.state if own[name].numel()}
        absent = [name for name in own if name not in self.state]
        self.counters = [name for name in absent if name.endswith("num_batches_tracked")]
        self.cast = sorted(
            {
                (str(value.dtype).removeprefix("torch."), str(own[name].dtype).removeprefix("torch."))
                for name, value in self.state.items()
                if value.dtype != own[name].dtype and own[name].is_floating_point()
            }
        )
        self.unexpected = [name for name in inside if name not in names]
        missing = [n for n in absent if n not in self.counters and own[n].data_ptr() not in shared]
        # What a module says of itself beside its weights it judges itself.
        told = "_extra_state"
        other = [n for n, value in self.state.items() if value.shape != own[n].shape and not n.endswith(told)]
        shapes = [
            f"{n} is {tuple(self.state[n].shape)} in the file and {tuple(own[n].shape)} in the model"
            for n in other
        ]
        self.problems = mismatches(missing, self.unexpected, shapes)
        layers = {name.rpartition(".")[0] for name in other}
        if len(layers) == 1 and not missing and not self.unexpected and all(own[n].ndim for n in other):
            there, here = self.state[other[0]].shape[:1], own[other[0]].shape[:1]
            if there != here:
                self.problems += f"; only its layer {layers.pop()!r} is of another size, so make the network with {there.numel()} instead of {here.numel()} there"


def _told(fit: _Fit, content: Any, source: str, others: Sequence[str]) -> list[str]:
    """What was unwrapped, in one line; nothing where the file holds the weights and no more."""
    where, prefix, inside = "", fit.head, content
    while prefix and isinstance(inside, (Mapping, list, tuple)):
        members = {
            str(k): v for k, v in (inside.items() if isinstance(inside, Mapping) else enumerate(inside))
        }
        key = next((k for k in members if prefix.startswith(f"{k}.")), None)
        if key is None:
            break
        where, prefix, inside = f"{where}{key}.", prefix[len(key) + 1 :], members[key]
    parts = [f"weights are {where[:-1]!r} of {source}"] if where else []
    gone = [
        *([prefix] if prefix else []),
        *(["_orig_mod."] if any("_orig_mod" in n for n, _ in tensors_by_path(inside)) else []),
    ]
    if gone:
        plural = "es" if len(gone) > 1 else ""
        parts.append(
            f"{'' if parts else f'weights of {source} are read '}without the prefix{plural} {' and '.join(map(repr, gone))}"
        )
    left = [name for name in fit.beside if name.startswith(where)] if prefix else []
    if left:
        parts.append(f"{len(left)} tensor{'s' * (len(left) > 1)} beside them left out: {listed(left)}")
    if others:
        parts.append(f"{listed([repr(other.rstrip('.')) for other in others])} would fit too")
    if fit.counters:
        parts.append(
            f"num_batches_tracked is missing in {len(fit.counters)} layers, which only training reads"
        )
    parts += [f"read as {here}, saved as {there}" for there, here in fit.cast]
    if parts and not parts[0].startswith("weights"):
        parts[0] = f"weights of {source}: {parts[0]}"
    return [", ".join(parts)] if parts else []


def mismatches(missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]) -> str:
    """What of a file's weights does not fit a network; empty where everything does."""
    found = {"missing in the file": missing, "unexpected in the file": unexpected, "of another shape": shapes}
    return "; ".join(f"{what}: {listed(names)}" for what, names in found.items() if names)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _rank(head: str) -> tuple[bool, int]:
    parts = head.rstrip(".").split(".")
    places = [_FIRST.index(part) for part in parts if part in _FIRST]
    return any(_AVERAGED.search(part) for part in parts), min(places, default=len(_FIRST) if head else -1)


def _alike(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(name in b and torch.equal(value, b[name]) for name, value in a.items())
