"""Learn pictures whose gradients are those of the data: class by class, or summed over classes so that what all share cancels.

Lee et al., ICML 2022, arXiv 2202.02916, sections 1.3 and 1.4. The summed form keeps what tells classes apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, show, suggest
from lineament.core.results import Readable
from lineament.learn.condensation.distances import gradient_distance

# Pictures a class: matching steps of an inner loop, and the network's epochs after each.
LOOPS = {1: (10, 5), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}

Kind = Literal["rows", "squares", "cosine"]


def loops(per_class: int) -> tuple[int, int]:
    """Inner steps and network epochs for so many pictures a class; the published table has no others.

    >>> loops(10)
    (10, 50)
    """
    if per_class not in LOOPS:
        raise InputError(
            f"per_class: got {show(per_class)}{suggest(str(per_class), map(str, LOOPS))}; for other numbers give inner steps and epochs"
        )
    return LOOPS[per_class]


def gradients(model: nn.Module, inputs: Tensor, labels: Tensor, *, graph: bool = False) -> list[Tensor]:
    """Gradients of the mean cross-entropy with respect to every parameter, differentiable where ``graph``."""
    loss = F.cross_entropy(model(inputs), labels)
    found = torch.autograd.grad(loss, list(model.parameters()), create_graph=graph)
    return [g if graph else g.detach() for g in found]


def matching_loss(
    model: nn.Module,
    synthetic: Tensor,
    labels: Tensor,
    real: Sequence[Tensor],
    *,
    summed: bool = True,
    kind: Kind = "rows",
    eps: float = 1e-6,
) -> Tensor:
    """How unlike the gradients of synthetic and real pictures are; differentiable in ``synthetic``.

    Args:
        synthetic: [pictures, ...] with labels [pictures]. real: the pictures of each class, in the order of the classes.
        summed: match the mean over classes (contrastive); else the sum of each class's own distance.
        kind, eps: see :func:`gradient_distance`.

    >>> net = nn.Linear(2, 2)
    >>> x = torch.eye(2)
    >>> matching_loss(net, x, torch.arange(2), [x[:1], x[1:]]).item() < 1e-4
    True
    """
    require(
        len(synthetic) == len(labels) and len(real) > 0,
        f"labels: got {show(labels)} beside {show(synthetic)}, expected one a picture, and real pictures of each class",
    )
    goals = [
        gradients(model, batch, torch.full((len(batch),), c, device=labels.device))
        for c, batch in enumerate(real)
    ]
    if summed:
        mean = [torch.stack(each).mean(0) for each in zip(*goals)]
        return gradient_distance(gradients(model, synthetic, labels, graph=True), mean, kind, eps=eps)
    total = synthetic.new_zeros(())
    for c, goal in enumerate(goals):
        mine = labels == c
        if bool(mine.any()):
            found = gradients(model, synthetic[mine], labels[mine], graph=True)
            total = total + gradient_distance(found, goal, kind, eps=eps)
    return total


@dataclass(frozen=True)
class Condensed(Readable):
    """Learned pictures, and of every step its outer and inner number, whether it was summed, and the loss before it, [steps, 4]."""

    pictures: Tensor
    labels: Tensor
    trace: Tensor


@dataclass(frozen=True)
class Schedule:
    """How pictures are learned.

    Attributes:
        outer, inner: fresh networks, and matching steps with each; epochs: of the network between them.
        outer_warmup, inner_warmup: steps are class by class while both numbers are below these, and summed from then on.
        picture_rate, picture_momentum, network_rate: of the two optimizers.
    """

    outer: int = 1000
    inner: int = 10
    epochs: int = 50
    outer_warmup: int = 250
    inner_warmup: int = 10
    picture_rate: float = 0.1
    picture_momentum: float = 0.5
    network_rate: float = 0.01

    def summed(self, outer: int, inner: int) -> bool:
        """Whether a step matches the sum over classes."""
        return outer >= self.outer_warmup or inner >= self.inner_warmup


def condense(
    networks: Callable[[int], nn.Module],
    pictures: Tensor,
    labels: Tensor,
    batches: Callable[[int, int], Sequence[Tensor]],
    schedule: Schedule,
    *,
    kind: Kind = "rows",
) -> Condensed:
    """Learn pictures by matching gradients on networks that train on them.

    Args:
        networks: the network of an outer step. batches: the real pictures of each class, for an outer and inner step.
        pictures, labels: the start, such as real pictures.

    >>> x = torch.randn(2, 4)
    >>> found = condense(lambda k: nn.Linear(4, 2), x, torch.arange(2), lambda i, j: [x[:1] + 1, x[1:] + 1], Schedule(2, 2, 1))
    >>> found.trace.shape
    torch.Size([4, 4])
    """
    for name in ("outer", "inner"):
        number(name, getattr(schedule, name), low=1, integer=True)
    number("epochs", schedule.epochs, low=0, integer=True)
    pictures = pictures.detach().clone().requires_grad_()
    optimizer = torch.optim.SGD([pictures], lr=schedule.picture_rate, momentum=schedule.picture_momentum)
    trace = []
    for outer in range(schedule.outer):
        model = networks(outer)
        steps = torch.optim.SGD(model.parameters(), lr=schedule.network_rate)
        for inner in range(schedule.inner):
            summed = schedule.summed(outer, inner)
            loss = matching_loss(model, pictures, labels, batches(outer, inner), summed=summed, kind=kind)
            (gradient,) = torch.autograd.grad(loss, pictures)
            pictures.grad = gradient
            optimizer.step()
            trace.append([float(outer), float(inner), float(summed), float(loss.detach())])
            if inner < schedule.inner - 1:
                for _ in range(schedule.epochs):
                    steps.zero_grad()
                    F.cross_entropy(model(pictures.detach()), labels).backward()
                    steps.step()
    return Condensed(pictures.detach(), labels, torch.tensor(trace, dtype=torch.float64))
