"""How far is a network to be pruned, in parameters, operations or time, and which sizes reach that?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import number, require
from lineament.core.models import called, device_of, frozen
from lineament.core.surgery.cost import Cost
from lineament.core.surgery.groups import ChannelGroup
from lineament.core.surgery.rewriting import remove

_TARGETS = ("params", "flops", "latency")
_WORDS = {"params": "parameters", "flops": "operations", "latency": "seconds"}


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


class Measured:
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
                taken_out(self.model, self.groups, kept, self.example), self.example
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

    def counts(self, sizes: Callable[[float], dict[str, int]], *targets: float | None) -> dict[str, int]:
        """The largest sizes of one share for all groups that reach the target, by bisection."""
        kind, target = next((k, t) for k, t in zip(_TARGETS, targets) if t is not None)

        def kept(counts: Mapping[str, int]) -> dict[str, Tensor]:
            return {n: torch.arange(g.size) < counts[n] for n, g in self.groups.items()}

        least = sizes(0.0)
        most = self.factor(kept(least), kind)
        require(
            most >= target,
            f"{kind}: got {target:g}, and with the fewest channels there are {most:.2f} times fewer {_WORDS[kind]}; the nearest is {most:.2f}",
        )
        low, high = 0.0, 1.0
        for _ in range(6 if kind == "latency" else 14):
            middle = (low + high) / 2
            reached = self.factor(kept(sizes(middle)), kind) >= target
            low, high = (middle, high) if reached else (low, middle)
        return sizes(low)


def taken_out(
    model: nn.Module, groups: Mapping[str, ChannelGroup], kept: Mapping[str, Tensor], example: Any
) -> nn.Module:
    gone = {
        group: (~kept[name]).nonzero()[:, 0].tolist()
        for name, group in groups.items()
        if not bool(kept[name].all())
    }
    return remove(model, gone, example=example)


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
