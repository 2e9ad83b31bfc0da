"""Put one network's units in the order of another's, and see whether the two can be averaged then.

A permutation of the units of a layer, undone in the layer behind, changes nothing that a network computes; two trainings that found the same
features in another order meet in the middle once it is found (Li et al. 2015 match units; Ainsworth, Hayase, Srinivasa 2022, arXiv 2209.04836,
match weights). Which axes of which parameters must move together is traced by :mod:`lineament.core.surgery`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from lineament.core import checks, results
from lineament.core.checks import InputError, require
from lineament.core.models import called, decided, device_of, frozen, logits, moved
from lineament.core.norms import recalibrate
from lineament.core.results import Readable
from lineament.core.surgery.groups import ChannelGroup, channel_groups
from lineament.core.surgery.rewriting import permute
from lineament.measure.alignment.profile import Alignment
from lineament.train.batches import source

_ROUNDS = 20


def permuted(
    model_b: nn.Module,
    alignment: Alignment | None,
    example: Any,
    *,
    model_a: nn.Module | None = None,
    by: str = "activations",
) -> nn.Module:
    """b with its units in the order of a's: a new network that computes what b does.

    Args:
        alignment: of a with b, at the outputs of the layers that make the units (the names of ``channel_groups(model_b, example)``).
        example: inputs for one forward.
        model_a: of the same architecture; needed for ``by="weights"``, and orders the groups at which nothing was aligned.
        by: ``"activations"``: one assignment for each group of channels, on the summed correlations of its layers; ``"weights"``: on the inner
            products of their weights, group after group until nothing changes, without data.

    Raises:
        InputError: no group could be ordered, or the networks differ in their parameters.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> x = torch.randn(3, 4)
    >>> other = permute(net, {channel_groups(net, x)["0"]: [5, 3, 1, 0, 2, 4]})
    >>> again = permuted(other, None, x, model_a=net, by="weights")
    >>> torch.equal(again[0].weight, net[0].weight)
    True
    """
    checks.one_of("by", by, ("activations", "weights"))
    require(by == "weights" or alignment is not None, "alignment: got none, which by='activations' needs")
    require(by == "activations" or model_a is not None, "model_a: got none, which by='weights' needs")
    groups = list(channel_groups(model_b, example).groups.values())
    require(bool(groups), "model_b: it has no group of channels whose order could be changed")
    orders: dict[str, Tensor] = {}
    if by == "activations" and alignment is not None:
        for group in groups:
            scores = _correlations(group, alignment)
            if scores is not None:
                orders[group.name] = _assigned(scores)
    free = [group for group in groups if group.name not in orders]
    if model_a is not None and free:
        orders = _by_weights(model_a, model_b, groups, orders, free)
    require(
        bool(orders),
        f"alignment: none of its sites makes the channels of a group; align at {', '.join(repr(g.name) for g in groups[:4])} ...",
    )
    return permute(model_b, {group: orders[group.name] for group in groups if group.name in orders})


def _correlations(group: ChannelGroup, alignment: Alignment) -> Tensor | None:
    """The summed correlations (a, b) of the layers that write a group's channels."""
    makers = {
        entry.parameter.rpartition(".")[0] for entry in group.entries if entry.role in ("write", "both")
    }
    found = [
        site.correlations
        for name, site in alignment.sites.items()
        if name in makers and site.correlations.shape == (group.size, group.size) and not group.heads
    ]
    return torch.stack(found).sum(0) if found else None


def _assigned(scores: Tensor) -> Tensor:
    """For each unit of a the unit of b that takes its place."""
    _, columns = linear_sum_assignment(scores.detach().cpu().double().numpy(), maximize=True)
    return torch.from_numpy(columns)


def _by_weights(
    model_a: nn.Module,
    model_b: nn.Module,
    groups: list[ChannelGroup],
    known: Mapping[str, Tensor],
    free: list[ChannelGroup],
) -> dict[str, Tensor]:
    tensors = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (model_a, model_b)]
    differ = [
        name for name, t in tensors[1].items() if name not in tensors[0] or tensors[0][name].shape != t.shape
    ]
    require(
        not differ,
        f"model_a: its parameters differ from model_b's at {differ[:1]}, expected the same architecture",
    )
    orders = {group.name: torch.arange(group.size) for group in groups} | dict(known)
    axes: dict[str, list[tuple[ChannelGroup, Any]]] = {}
    for group in groups:
        for entry in group.entries:
            axes.setdefault(entry.parameter, []).append((group, entry))

    def moved_b(parameter: str, but: Any) -> Tensor:
        """b's parameter with every axis but one in the order found so far."""
        tensor = tensors[1][parameter].detach().double().cpu()
        for group, entry in axes[parameter]:
            if entry is not but:
                index = torch.arange(tensor.shape[entry.axis])
                index[entry.slots.reshape(-1)] = entry.slots[orders[group.name]].reshape(-1)
                tensor = tensor.index_select(entry.axis, index)
        return tensor

    def rows(tensor: Tensor, entry: Any) -> Tensor:
        slots = entry.slots
        taken = tensor.movedim(entry.axis, 0)[slots.reshape(-1)]
        return taken.reshape(len(slots), -1)

    for _ in range(_ROUNDS):
        changed = False
        for group in free:
            scores = torch.zeros(group.size, group.size, dtype=torch.float64)
            for entry in group.entries:
                if not entry.parameter.endswith(("running_mean", "running_var", "num_batches_tracked")):
                    a = tensors[0][entry.parameter].detach().double().cpu()
                    scores += rows(a, entry) @ rows(moved_b(entry.parameter, entry), entry).T
            order = _assigned(scores)
            every = torch.arange(group.size)
            gain = scores[every, order].sum() - scores[every, orders[group.name]].sum()
            if float(gain) > 1e-9:
                orders[group.name], changed = order, True
        if not changed:
            break
    return orders


@dataclass(frozen=True)
class Barrier(Readable):
    """The loss on the line between two networks.

    Attributes:
        positions: from 0 (a) to 1 (b).
        losses, accuracies: there; accuracies only of class labels.
        height: the largest loss above the straight line between the ends: 0 where the two can be averaged.
        samples: how many were measured on.
    """

    positions: tuple[float, ...]
    losses: Float[Tensor, " positions"]
    accuracies: Float[Tensor, " positions"] | None
    samples: int

    @property
    def height(self) -> float:
        places = torch.tensor(self.positions, dtype=torch.float64)
        straight = self.losses[0] + places * (self.losses[-1] - self.losses[0])
        return float((self.losses - straight).max())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, with the height."""
        return {**results.plain(self), "height": self.height}

    def plot(self, ax: Any = None) -> Any:
        """The loss from a to b."""
        ax = results.axes(ax)
        ax.plot(self.positions, self.losses.numpy(), "o-")
        ax.set(xlabel="from a to b", ylabel="loss")
        return ax


def barrier(
    model_a: nn.Module,
    model_b: nn.Module,
    data: Any,
    *,
    points: int = 11,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    renormalise: bool = True,
    batch_size: int = 128,
) -> Barrier:
    """The loss of the networks whose weights lie on the line from a's to b's; a and b stay as they were.

    Args:
        data: ``(inputs, targets)``, a ``Dataset``, or batches.
        points: places on the line, both ends included.
        loss: the mean loss of outputs and targets.
        renormalise: estimate the statistics of batch norms anew between the ends, in a pass over the data; the averages of the ends' own belong to
            neither, and matched networks look as if they were not.

    Raises:
        InputError: other parameters in the two networks, or no data.

    >>> _ = torch.manual_seed(0)
    >>> net = nn.Linear(3, 2)
    >>> round(barrier(net, net, (torch.randn(8, 3), torch.arange(8) % 2), points=3).height, 6)
    0.0
    """
    checks.number("points", points, low=2, integer=True)
    states = [model.state_dict() for model in (model_a, model_b)]
    require(
        states[0].keys() == states[1].keys()
        and all(states[1][k].shape == v.shape for k, v in states[0].items()),
        "model_b: its parameters differ from model_a's, expected the same architecture; align other ones without averaging them",
    )
    batches = source(data)
    middle = copy.deepcopy(model_a)
    places = torch.linspace(0, 1, points).tolist()
    found = []
    for place in places:
        middle.load_state_dict({k: _between(v, states[1][k], place) for k, v in states[0].items()})
        if renormalise and 0 < place < 1:
            device = device_of(middle)
            parts = (b.inputs for b in batches.in_order(batch_size) if len(b) > 1)
            recalibrate(middle.eval(), (moved(part, device) for part in parts))
        found.append(_measured(middle, batches, loss, batch_size))
    losses, rights, counts = zip(*found)
    right = None if rights[0] is None else torch.tensor(rights, dtype=torch.float64)
    return Barrier(tuple(places), torch.tensor(losses, dtype=torch.float64), right, counts[0])


def _between(a: Tensor, b: Tensor, place: float) -> Tensor:
    if not a.is_floating_point():
        return a
    return torch.lerp(a, b.to(a.device, a.dtype), place)


def _measured(model: nn.Module, batches: Any, loss: Any, batch_size: int) -> tuple[float, float | None, int]:
    total, right, count = 0.0, 0, 0
    labels = True
    with frozen(model), torch.no_grad():
        for batch in batches.in_order(batch_size):
            outputs = logits(called(model, moved(batch.inputs, device_of(model))))
            targets = batch.targets.to(outputs.device)
            total += float(loss(outputs, targets)) * len(targets)
            labels = labels and targets.ndim == 1 and not targets.is_floating_point() and outputs.ndim == 2
            right += int((decided(outputs) == targets).sum()) if labels else 0
            count += len(targets)
    if not count:
        raise InputError("data: got no batches, expected at least one")
    return total / count, right / count if labels else None, count
