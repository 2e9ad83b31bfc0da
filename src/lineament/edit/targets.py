"""How far is a network to be pruned, in parameters, operations or time, and which sizes reach that?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

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
        f"keep: got {' and '.join([*share, *given]) or 'no target'}, expected one of keep, remove, params, flops and latency; of two, only remove goes with one of the last three",
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

    def factor(self, kept: Mapping[str, Tensor], kind: str) -> float:
        """How many times less there is now."""
        if kind == "latency":
            smaller = taken_out(self.model, self.groups, kept, self.example)
            found = next((each for each in self._timings(smaller) if each.steady), None)
            require(
                found is not None,
                "latency: other work on this machine changes how long a forward takes by more than a quarter; expected a machine that does nothing else, or flops= in its place",
            )
            return cast(Timing, found).factor
        cost = Cost(self.model, self.example, list(self.groups.values()))
        for name, group in self.groups.items():
            cost.narrowed(group, group.size - int(kept[name].sum()))
        return self.before[kind == "flops"] / max(cost.of(kind == "params"), 1)

    def _timings(self, smaller: nn.Module) -> Iterator[Timing]:
        """The comparison, and where other work disturbs it, over four and sixteen times as long."""
        for budget in (0.5, 2.0, 8.0):
            yield timed(self.model, smaller, self.example, budget)

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


@dataclass(frozen=True)
class Timing:
    """Forwards of two networks, one after the other in turns: the shortest of each in seconds, and in each third of the turns how many times as fast the second was.

    >>> Timing((0.02, 0.01), (1.9, 2.0, 2.1)).sentence
    'A forward takes 10.0 ms where it took 20.0 ms.'
    >>> Timing((0.02, 0.01), (0.7, 2.0, 5.0)).sentence
    'How long a forward takes could not be told: other work on this machine made it 0.70 to 5.00 times as fast as it was.'
    """

    seconds: tuple[float, float]
    parts: tuple[float, ...]

    @property
    def factor(self) -> float:
        """How many times as fast the second is."""
        return self.seconds[0] / self.seconds[1]

    @property
    def steady(self) -> bool:
        """Whether the thirds agree to a quarter."""
        return max(self.parts) <= 1.25 * min(self.parts)

    @property
    def sentence(self) -> str:
        return self.said("A forward")

    def said(self, what: str) -> str:
        """How long it takes, as a sentence about ``what``."""
        if not self.steady:
            return f"How long {what[0].lower()}{what[1:]} takes could not be told: other work on this machine made it {min(self.parts):.2f} to {max(self.parts):.2f} times as fast as it was."
        digits = 1 if min(self.seconds) >= 0.001 else 3
        before, after = (f"{1000 * each:.{digits}f} ms" for each in self.seconds)
        if min(self.parts) <= 1 <= max(self.parts):
            return f"{what} takes as long as it did, as far as can be told ({after} and {before})."
        return f"{what} takes {after} where it took {before}."


def timed(first: nn.Module, second: nn.Module, example: Any, budget: float = 2.0) -> Timing:
    """Times two networks on one example in turns, for ``budget`` seconds; 9 turns at least, and at most 90."""
    times: tuple[list[float], list[float]] = [], []
    began = time.perf_counter()
    with frozen(first), frozen(second), torch.no_grad():
        for model in (first, second):
            called(model, example)  # what is only done once
        while len(times[0]) < 9 or (len(times[0]) < 90 and time.perf_counter() - began < budget):
            for model, seconds in zip((first, second), times):
                start = time.perf_counter()
                called(model, example)
                if device_of(model).type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
    parts = tuple(min(times[0][k::3]) / min(times[1][k::3]) for k in range(3))
    return Timing((min(times[0]), min(times[1])), parts)
