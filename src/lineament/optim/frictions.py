"""diffGrad's friction: the factor that the change of a gradient gives the step, and what it was over a whole network.

Dubey et al., arXiv 1909.11015. Versions 0 to 2 are confirmed by several codes; 3 to 5 (the change weighted by the coordinate's own
statistics) rest on one port and are experimental. Near 1/2 everywhere means that diffGrad is Adam at half the learning rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable

VERSIONS = (0, 1, 2, 3, 4, 5)
# Their friction needs the running mean and spread of each coordinate's gradient.
STATISTICAL = (3, 4, 5)
_LEVELS = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_SAMPLE = 2**20
_kernels: Any = torch


def friction(
    change: Float[Tensor, "..."],
    version: int = 0,
    *,
    mean: Float[Tensor, "..."] | None = None,
    deviation: Float[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """The factor of each coordinate's step, from the change d = g_{t-1} - g_t of its gradient.

    | version | xi | range |
    | --- | --- | --- |
    | 0 | sigmoid(abs(d)) | [1/2, 1) |
    | 1 | sigmoid(d) | (0, 1) |
    | 2 | 9 sigmoid(abs(d) / 2) - 4 | [1/2, 5) |
    | 3, 4, 5 | sigmoid(w abs(d) - mu), w = s, s², √s | (0, 1) |

    Args:
        change: g_{t-1} - g_t, with g_0 = 0.
        version: the row of the table.
        mean, deviation: mu and s of the coordinate's gradients before this step (population; both 0 at first), for versions 3 to 5.

    Raises:
        InputError: an unknown version, or statistics missing where the version needs them.

    Source: arXiv 1909.11015, its ablation, and ports of it.

    >>> friction(torch.tensor([0.0, -2.0, 2.0]))
    tensor([0.5000, 0.8808, 0.8808])
    """
    checks.tensor("change", change, floating=True, finite=False, empty=True)
    check_version(version)
    if version not in STATISTICAL:
        return friction_([change.clone()], version)[0]
    if mean is None or deviation is None:
        raise checks.InputError(
            f"mean and deviation: friction version {version} needs both, got {checks.show(mean)} and {checks.show(deviation)}"
        )
    return statistical_(change.clone(), version, mean, deviation)


def friction_(changes: list[Tensor], version: int) -> list[Tensor]:
    """Versions 0 to 2 of :func:`friction` for a list of changes, in their own memory, unchecked."""
    if version != 1:
        _kernels._foreach_abs_(changes)
    if version == 2:
        _kernels._foreach_mul_(changes, 0.5)
    _kernels._foreach_sigmoid_(changes)
    if version == 2:
        _kernels._foreach_mul_(changes, 9.0)
        _kernels._foreach_sub_(changes, 4.0)
    return changes


def statistical_(change: Tensor, version: int, mean: Tensor, deviation: Tensor) -> Tensor:
    """Versions 3 to 5 of :func:`friction`, in the change's own memory, unchecked."""
    weight = {3: deviation, 4: deviation * deviation, 5: deviation.sqrt()}[version]
    return change.abs_().mul_(weight).sub_(mean).sigmoid_()


@dataclass(frozen=True)
class FrictionSummary(Readable):
    """The friction of one step over all coordinates: what fraction of Adam's step was taken.

    ``quantiles`` are exact up to 2^20 coordinates and of an evenly spaced sample of them beyond. ``still`` is the share of
    coordinates below 0.51, which move as under Adam at half the learning rate. ``by_parameter`` holds means.
    """

    mean: float
    minimum: float
    maximum: float
    quantiles: Mapping[float, float]
    still: float
    count: int
    by_parameter: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def plot(self, ax: Any = None) -> Any:
        """Bars of each parameter's mean friction, with lines at the steps of Adam at half and at the full learning rate."""
        if ax is None:
            from matplotlib.figure import Figure

            ax = Figure(layout="constrained").subplots()
        names = list(self.by_parameter)
        ax.barh(names[::-1], [self.by_parameter[name] for name in names[::-1]], color="C0")
        for level in (0.5, 1.0):
            ax.axvline(level, color="C7", linewidth=0.8)
        ax.set_xlabel(f"mean friction (all coordinates: {self.mean:.4f})")
        return ax


def summarise(frictions: Iterable[tuple[str, Tensor]]) -> FrictionSummary:
    """One summary of the frictions of several parameters, each named.

    >>> summarise([("w", torch.tensor([0.5, 0.75])), ("b", torch.tensor([1.0]))]).mean
    0.75
    """
    named = [(name, xi.flatten()) for name, xi in frictions if xi.numel()]
    checks.require(bool(named), "friction_summary: no coordinate has a gradient yet")
    count = sum(len(xi) for _, xi in named)
    sums = {name: float(xi.sum(dtype=torch.float64)) for name, xi in named}
    stride = -(-count // _SAMPLE)
    sample = torch.cat([xi[::stride].double().cpu() for _, xi in named])
    levels = torch.tensor(_LEVELS, dtype=torch.float64)
    return FrictionSummary(
        mean=sum(sums.values()) / count,
        minimum=min(float(xi.min()) for _, xi in named),
        maximum=max(float(xi.max()) for _, xi in named),
        quantiles=dict(zip(_LEVELS, torch.quantile(sample, levels).tolist())),
        still=sum(int((xi < 0.51).sum()) for _, xi in named) / count,
        count=count,
        by_parameter={name: sums[name] / len(xi) for name, xi in named},
    )


def check_version(version: Any) -> None:
    known = isinstance(version, int) and not isinstance(version, bool) and version in VERSIONS
    checks.require(
        known, f"version: got {checks.show(version)}, expected a friction version: one of {VERSIONS}"
    )
