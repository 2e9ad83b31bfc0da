"""How unlike are the gradients that synthetic and real pictures cause: class by class, or summed over classes so that what all share cancels?

Lee et al., ICML 2022, arXiv 2202.02916, section 1.3. The summed form keeps what tells classes apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import require, show
from lineament.core.matching import matched_gradient, summed_gradient
from lineament.learn.condensation.distances import gradient_distance
from lineament.learn.condensation.options import Kind

# Real pixels at a time: on a processor, activations of 16 pictures of 32 x 32 stay in its caches. On other devices, pictures.
_CACHED, _REAL = 16 * 32 * 32, 256


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


def real_gradient(
    model: nn.Module,
    weights: Sequence[Tensor],
    batches: Sequence[Tensor],
    classes: Sequence[int],
    *,
    bfloat16: bool = False,
) -> list[Tensor]:
    """The mean over classes of each class's mean gradient, without a graph; few pictures at a time."""
    x = torch.cat(list(batches))
    y = torch.cat([torch.full((len(b),), c) for b, c in zip(batches, classes)]).to(x.device)
    share = torch.cat(
        [torch.full((len(b),), 1 / (len(b) * len(batches)), dtype=x.dtype) for b in batches]
    ).to(x.device)
    size = max(1, _CACHED // x[0, :1].numel()) if x.device.type == "cpu" else _REAL
    parts, labels, shares = x.split(size), y.split(size), share.split(size)

    def loss(k: int, part: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(part)
        return (F.cross_entropy(logits.to(x.dtype), labels[k], reduction="none") * shares[k]).sum()

    return summed_gradient(loss, weights, parts)


def matched(
    model: nn.Module,
    weights: Sequence[Tensor],
    synthetic: Tensor,
    labels: Tensor,
    goal: Sequence[Tensor],
    *,
    kind: Kind = "rows",
    eps: float = 1e-6,
    chunk: int = 256,
) -> tuple[Tensor, Tensor, Tensor]:
    """The distance of the mean gradient of some pictures from a goal, its derivative by them, and the share of rows that are all but zero.

    Exact, with second derivatives of one chunk of pictures at a time.
    """
    told = labels.split(chunk)
    small: list[Tensor] = []

    def distance(found: list[Tensor]) -> Tensor:
        with torch.no_grad():
            pairs = [(a.flatten(1), b.flatten(1)) for a, b in zip(found, goal) if a.ndim > 1]
            size = torch.cat([a.norm(dim=1) * b.norm(dim=1) for a, b in pairs])
            # From here on ``eps`` changes the cosine by a tenth or more.
            small.append((size < 10 * eps).double().mean())
        return gradient_distance(found, goal, kind, eps=eps)

    def loss(k: int, part: Tensor) -> Tensor:
        return F.cross_entropy(model(part), told[k], reduction="sum") / len(labels)

    value, slopes = matched_gradient(loss, weights, synthetic.split(chunk), distance)
    return value, torch.cat(slopes), small[-1]
