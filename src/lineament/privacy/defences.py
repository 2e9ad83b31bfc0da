"""What a client may do to a gradient before it is sent: clip, prune, or hide the features of its last layer.

Fang et al. 2023, arXiv 2308.04699, section 1.6; Soteria: Sun et al., CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lineament.core.checks import number, require


def clip(gradient: Sequence[Tensor], bound: float, *, eps: float = 1e-6) -> list[Tensor]:
    """All tensors times min(1, bound / (norm + eps)), the norm over everything.

    >>> clip([torch.tensor([3.0, 4.0])], 10.0)[0].tolist()
    [3.0, 4.0]
    """
    number("bound", bound, low=0, open_low=True)
    norm = torch.stack([g.square().sum() for g in gradient]).sum().sqrt()
    factor = torch.clamp(bound / (norm + eps), max=1.0)
    return [g * factor for g in gradient]


def prune(gradient: Sequence[Tensor], percentile: float) -> list[Tensor]:
    """Entries whose size is below a percentile of their tensor (linear interpolation) become 0.

    >>> prune([torch.tensor([1.0, 2.0, 3.0])], 50)[0].tolist()
    [0.0, 2.0, 3.0]
    """
    number("percentile", percentile, low=0, high=100)
    return [g * (g.abs() >= percentile_of(g.abs(), percentile)) for g in gradient]


def percentile_of(values: Tensor, percentile: float) -> Tensor:
    """The percentile of all entries by linear interpolation; no limit on their number."""
    ordered = values.detach().flatten().sort().values
    place = (len(ordered) - 1) * percentile / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)


def soteria(
    features: nn.Module, inputs: Tensor, gradient: Tensor, rate: float, *, eps: float = 1e-10
) -> Tensor:
    """The gradient [classes, features] of the last weights without the columns of the least sensitive features.

    q = Σ over the batch of |∂r/∂x| / (r + eps) for each feature r >= 0; columns whose q is below the ``rate``-th percentile lose their gradient.

    Args:
        features: the network up to the last layer's input.

    >>> net = nn.Linear(2, 3)
    >>> soteria(net, torch.ones(1, 2), torch.ones(2, 3), 0.0).shape
    torch.Size([2, 3])
    """
    number("rate", rate, low=0, high=100)
    x = inputs.detach().requires_grad_()
    found = features(x)
    require(
        found.ndim == 2 and found.shape[1] == gradient.shape[1],
        "features: do not give the last layer's input",
    )
    told = []
    for k in range(found.shape[1]):
        (slope,) = torch.autograd.grad(found[:, k].sum(), x, retain_graph=True)
        told.append(slope.detach().flatten(1).norm(dim=1) / (found[:, k].detach() + eps))
    score = torch.stack(told, 1).sum(0)
    return gradient * (score >= percentile_of(score, rate))
