"""Pictures that are chosen, not learned: herding, k-centre, k-means; and how fast a network's kernel moves.

The rivals and the diagnostic of arXiv 2202.02916.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lineament.core.checks import number, require, show


def herding(features: Tensor, count: int) -> list[int]:
    """Numbers of the samples whose running mean stays nearest to the mean, each chosen greedily and once.

    >>> herding(torch.tensor([[0.0], [1.0], [5.0]]), 1)
    [1]
    """
    _checked(features, count)
    goal, total = features.mean(0), torch.zeros_like(features[0])
    left = torch.ones(len(features), dtype=torch.bool)
    chosen: list[int] = []
    for k in range(1, count + 1):
        distance = ((total + features) / k - goal).square().sum(1).masked_fill(~left, torch.inf)
        best = int(distance.argmin())
        chosen.append(best)
        left[best] = False
        total = total + features[best]
    return chosen


def k_centers(features: Tensor, count: int) -> list[int]:
    """The sample nearest to the mean, then each time the one farthest from all chosen.

    >>> k_centers(torch.tensor([[0.0], [1.0], [5.0]]), 2)
    [1, 2]
    """
    _checked(features, count)
    chosen = [int((features - features.mean(0)).square().sum(1).argmin())]
    nearest = (features - features[chosen[0]]).square().sum(1)
    while len(chosen) < count:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, (features - features[chosen[-1]]).square().sum(1))
    return chosen


def k_means(features: Tensor, count: int, *, seed: int = 0) -> list[int]:
    """The sample nearest to each of so many centres of k-means, each chosen once.

    >>> sorted(k_means(torch.tensor([[0.0], [0.2], [0.1], [5.0]]), 2))
    [2, 3]
    """
    from sklearn.cluster import KMeans

    _checked(features, count)
    found = KMeans(count, n_init="auto", random_state=seed).fit(features.double().cpu().numpy())
    distances = torch.cdist(torch.from_numpy(found.cluster_centers_), features.double().cpu())
    chosen: list[int] = []
    for row in distances:
        row[chosen] = torch.inf
        chosen.append(int(row.argmin()))
    return chosen


def kernel_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 - the cosine of the tangent kernels J Jᵀ of two Jacobians [outputs, parameters]; over a time it is the kernel's velocity.

    >>> abs(kernel_distance(torch.eye(2), torch.eye(2)).item()) < 1e-6
    True
    """
    one, two = first @ first.T, second @ second.T
    return 1 - (one * two).sum() / (one.norm() * two.norm())


def _checked(features: Tensor, count: int) -> None:
    require(
        features.ndim == 2 and len(features) > 0,
        f"features: got {show(features)}, expected [samples, features]",
    )
    number("count", count, low=1, high=len(features), integer=True)
