"""Axes that training has left behind: an optimizer's moments, the path of its checkpoints, the way to another network.

Moment axes are Gabdullin's (2024, arXiv 2412.10146), trajectory planes Li et al.'s (2018, arXiv 1712.09913). What is not obvious: between
two networks with batch norm the running statistics move too, or the far end would not be the other network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.curvature.risk import chosen_parameters
from lineament.core.models import plain_name, unwrapped
from lineament.core.results import Readable
from lineament.measure.landscape.axes import Axis, Weights, flat_weights, normalised, signed

MOMENTS = ("exp_avg", "exp_avg_sq")


def optimizer_axes(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    moments: Sequence[str] = MOMENTS,
    normalise: str | None = None,
    params: str | Sequence[str] | None = None,
    **options: Any,
) -> list[Axis]:
    """An optimizer's running averages as axes: Adam's ``exp_avg`` and ``exp_avg_sq``, or SGD's ``momentum_buffer``.

    Args:
        moments: which entries of the optimizer's state. A parameter that was never stepped counts as zero.
        normalise: as for :func:`~lineament.measure.landscape.axes.normalised`, whose other options pass through.

    Raises:
        InputError: an optimizer of other parameters, one that has made no step, or that has no such moment.

    >>> net = nn.Linear(1, 1, bias=False); adam = torch.optim.Adam(net.parameters())
    >>> net(torch.ones(1, 1)).sum().backward(); adam.step()
    >>> [round(axis.vector.item(), 4) for axis in optimizer_axes(net, adam)]
    [0.1, 0.001]
    """
    checks.require(
        isinstance(optimizer, torch.optim.Optimizer),
        f"optimizer: got {checks.show(optimizer)}, expected a torch.optim.Optimizer",
    )
    known = dict(unwrapped(model).named_parameters())
    names = chosen_parameters(model, params)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    checks.require(
        any(id(known[name]) in held for name in names),
        "optimizer: it holds none of this model's parameters, but others; give the one that trained this very model",
    )
    states = {name: optimizer.state.get(known[name], {}) for name in names}
    checks.require(
        any(states.values()),
        "optimizer: its state is empty; it must have made a step before its moments are axes",
    )
    there = {
        key
        for state in states.values()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.ndim
    }
    axes = []
    for moment in moments:
        checks.require(
            moment in there,
            f"moments: {type(optimizer).__name__} keeps no {moment!r}{checks.suggest(moment, sorted(there))}",
        )
        parts = {name: states[name].get(moment, torch.zeros_like(known[name])) for name in names}
        vector = flat_weights(parts, names).to(flat_weights(model, names))
        axis = Axis(
            vector,
            tuple(names),
            "optimizer",
            f"{type(optimizer).__name__}'s {moment}",
            info={"moment": moment},
        )
        axes.append(normalised(model, axis, normalise, **options))
    return axes


@dataclass(frozen=True)
class Trajectory(Readable):
    """The plane in which a training moved most.

    Attributes:
        axes: unit principal directions, largest first.
        coordinates: (checkpoints, axes), where each checkpoint lies, the model itself at the origin.
        shares: of the trajectory's squared length that each axis holds.

    >>> net = nn.Linear(1, 1, bias=False); _ = net.weight.data.fill_(1.0)
    >>> found = trajectory_axes(net, [{"weight": torch.tensor([[3.0]])}, {"weight": torch.tensor([[2.0]])}], count=1)
    >>> found.shares.tolist()
    [1.0]
    """

    axes: list[Axis]
    coordinates: Float[Tensor, "checkpoints axes"]
    shares: Float[Tensor, "axes"]

    def to_dict(self) -> dict[str, Any]:
        return {"coordinates": self.coordinates.tolist(), "shares": self.shares.tolist()}

    def plot(self, ax: Any = None) -> Any:
        """The path in its first two axes, the model at the origin."""
        ax = results.axes(ax)
        x = self.coordinates[:, 0].tolist()
        y = self.coordinates[:, 1].tolist() if self.coordinates.shape[1] > 1 else [0.0] * len(x)
        ax.plot(x, y, "o-", color="C1", markersize=3, linewidth=1.2)
        ax.plot([0], [0], marker="x", color="C1", linestyle="none")
        return ax


def trajectory_axes(
    model: nn.Module,
    checkpoints: Sequence[Weights],
    count: int = 2,
    *,
    centred: bool = False,
    params: str | Sequence[str] | None = None,
) -> Trajectory:
    """Principal directions of the steps θ_t - θ from the model's weights θ to its checkpoints.

    Args:
        checkpoints: models or state dicts of the same architecture, at least ``count`` that differ.
        centred: subtract the mean of the steps first, as scikit-learn's PCA does.

    >>> net = nn.Linear(2, 1, bias=False); _ = net.weight.data.zero_()
    >>> path = [{"weight": torch.tensor([[t, 0.1 * t * t]])} for t in (3.0, 2.0, 1.0)]
    >>> [round(s, 3) for s in trajectory_axes(net, path).shares.tolist()]
    [0.997, 0.003]
    """
    checks.number("count", count, low=1, integer=True)
    names = chosen_parameters(model, params)
    checks.require(
        len(checkpoints) >= count,
        f"checkpoints: got {len(checkpoints)}, expected at least {count}, one for each axis",
    )
    origin = flat_weights(model, names)
    steps = torch.stack(
        [_like(model, c, names, f"checkpoints[{i}]") - origin for i, c in enumerate(checkpoints)]
    )
    spread = steps - steps.mean(0) if centred else steps
    # Through the small matrix of inner products: a decomposition of (checkpoints x parameters) would not fit.
    values, left = torch.linalg.eigh((spread @ spread.T).double())
    order = values.argsort(descending=True)[:count]
    total = float(values.clamp_min(0).sum())
    checks.require(
        float(values[order[-1]]) > 1e-12 * max(total, 1e-300),
        f"checkpoints: they span fewer than {count} directions, so that there is no such plane",
    )
    shares = values[order] / total
    axes = []
    for number, index in enumerate(order.tolist()):
        v = spread.T @ left[:, index].to(spread)
        label = f"trajectory's principal direction {number + 1} ({100 * float(shares[number]):.0f} %)"
        info = {"share": float(shares[number])}
        axes.append(Axis(signed(v / v.norm()), tuple(names), "trajectory", label, info=info))
    coordinates = steps @ torch.stack([axis.vector for axis in axes], 1)
    return Trajectory(axes, coordinates, shares.to(origin.dtype))


def between(
    model: nn.Module,
    other: Weights,
    *,
    params: str | Sequence[str] | None = None,
    label: str = "towards the other network",
) -> Axis:
    """The way from a model (at 0) to another of the same architecture (at 1), running statistics included.

    Raises:
        InputError: another architecture: names or shapes that do not fit.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> a.weight.data.fill_(1.0), b.weight.data.fill_(3.0)
    (tensor([[1.]]), tensor([[3.]]))
    >>> between(a, b).vector.item()
    2.0
    """
    names = chosen_parameters(model, params)
    vector = _like(model, other, names, "other") - flat_weights(model, names)
    theirs = dict(other.named_buffers()) if isinstance(other, nn.Module) else other
    buffers = {
        name: theirs[name].detach().to(b) - b.detach()
        for name, b in model.named_buffers()
        if b.is_floating_point() and name in theirs
    }
    return Axis(vector, tuple(names), "between", label, buffers=buffers)


def spanned_by(
    model: nn.Module, first: Weights, second: Weights, *, params: str | Sequence[str] | None = None
) -> list[Axis]:
    """The plane through three networks: the model at (0, 0), the others at (1, 0) and (0, 1)."""
    return [
        between(model, first, params=params, label="towards the first network"),
        between(model, second, params=params, label="towards the second network"),
    ]


def _like(model: nn.Module, other: Any, names: Sequence[str], what: str) -> Tensor:
    """The other network's weights as a vector of the model's."""
    checks.require(
        isinstance(other, (nn.Module, Mapping)),
        f"{what}: got {checks.show(other)}, expected a model or a state dict",
    )
    theirs = dict(unwrapped(other).named_parameters()) if isinstance(other, nn.Module) else other
    theirs = {plain_name(name, names): value for name, value in theirs.items()}
    ours = dict(unwrapped(model).named_parameters())
    for name in names:
        checks.require(
            name in theirs, f"{what}: it has no parameter {name!r}{checks.suggest(name, list(theirs))}"
        )
        checks.tensor(f"{what}: {name}", theirs[name].detach(), shape=tuple(ours[name].shape))
    return flat_weights(theirs, names).to(flat_weights(model, names))
