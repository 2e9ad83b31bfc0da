"""Which groups of channels can be pruned, and which layers read them? Those that cannot are named with the reason."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import require, suggest
from lineament.core.surgery.groups import ChannelGroup, channel_groups
from lineament.core.surgery.rewriting import unbending
from lineament.edit.patches import matrix, reads


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
    for name in unbending(model, chosen, [[name] for name in chosen], example=example):
        whole[name] = "a module computes with this number of channels, which is written in its code"
        del chosen[name], found[name]
    require(
        bool(chosen),
        f"model: it has no group of channels that can be pruned{_first(whole)}; networks of linear layers and convolutions can be",
    )
    return chosen, found, whole


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
