"""How many parameters and operations does a network have while its groups narrow? Every weight is used in proportion to its sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lineament.core.models import called, frozen
from lineament.core.surgery.groups import ChannelGroup


class Cost:
    """Parameters and operations as groups narrow, without making the narrower networks."""

    def __init__(self, model: nn.Module, example: Any, groups: Sequence[ChannelGroup]) -> None:
        self.example = example
        self.sizes = {name: list(p.shape) for name, p in model.named_parameters()}
        self.full = {name: list(shape) for name, shape in self.sizes.items()}
        self.flops = by_module(model, example)
        self.total = sum(self.flops.values())
        owned = {name.rpartition(".")[0] for name in self.sizes if len(self.sizes[name]) > 1}
        self.weighted = {name: self.flops.get(name, 0) for name in owned}
        self.rest = self.total - sum(self.weighted.values())

    def narrowed(self, group: ChannelGroup, count: int = 1) -> None:
        """So many channels of a group are gone."""
        for e in group.entries:
            if e.parameter in self.sizes:
                self.sizes[e.parameter][e.axis] -= count * e.slots.shape[1]

    def of(self, parameters: bool) -> float:
        """The parameters, or the operations, that are left."""
        numel = {name: _product(shape) for name, shape in self.sizes.items()}
        if parameters:
            return sum(numel.values())
        left = float(self.rest)
        for module, flops in self.weighted.items():
            names = [n for n in numel if n.rpartition(".")[0] == module and len(self.sizes[n]) > 1]
            left += flops * sum(numel[n] for n in names) / max(sum(_product(self.full[n]) for n in names), 1)
        return left

    def count(self, model: nn.Module) -> int:
        """The parameters of a network."""
        return sum(p.numel() for p in model.parameters())

    def operations(self, model: nn.Module) -> int:
        """The operations of one forward on the example."""
        return sum(by_module(model, self.example).values())


def _product(shape: Sequence[int]) -> int:
    found = 1
    for size in shape:
        found *= size
    return found


def by_module(model: nn.Module, example: Any) -> dict[str, int]:
    """The operations of one forward by the innermost module that does them."""
    counter = FlopCounterMode(display=False)
    with frozen(model), torch.no_grad(), counter:
        called(model, example)
    root = type(model).__name__
    totals = {
        name.removeprefix(f"{root}.") if name != root else "": sum(found.values())
        for name, found in counter.get_flop_counts().items()
        if name != "Global"
    }
    inner = {}
    for name, total in totals.items():
        below = [n for n in totals if n != name and n.startswith(f"{name}." if name else "")]
        top = [n for n in below if not any(n != m and n.startswith(f"{m}.") for m in below)]
        inner[name] = total - sum(totals[n] for n in top)
    return inner
