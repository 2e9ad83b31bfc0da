"""A network whose repeated channels have become one, and where the curve of its merges bends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lineament.core import results
from lineament.core.results import Readable
from lineament.core.surgery.groups import ChannelGroup


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
