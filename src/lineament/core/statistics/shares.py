"""Shares of samples and their differences, with intervals that have a width at 0 and 1 too."""

from __future__ import annotations

import math

from torch import Tensor

Interval = tuple[float, float, float]


def wilson(hits: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays inside [0, 1].

    >>> [round(x, 3) for x in wilson(8, 10)]
    [0.49, 0.943]
    """
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    # At 0 and 1 the ends are exact; rounding must not push them past the share itself.
    return min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)


def share(values: Tensor, z: float = 1.96) -> Interval:
    """How many of some values are true, with Wilson's 95 % interval."""
    hits, total = int(values.sum()), len(values)
    return hits / max(total, 1), *wilson(hits, total, z)


def difference(ours: Tensor, theirs: Tensor, z: float = 1.96) -> Interval:
    """The difference of two shares with its 95 % interval (Newcombe 1998, from Wilson's), which has a width at 0 and 1 too.

    >>> import torch
    >>> yes, no = torch.ones(20, dtype=torch.bool), torch.zeros(20, dtype=torch.bool)
    >>> [round(x, 2) for x in difference(yes, no)]
    [1.0, 0.77, 1.0]
    """
    if not len(ours) or not len(theirs):
        return 0.0, -1.0, 1.0
    (p, p_low, p_high), (q, q_low, q_high) = share(ours, z), share(theirs, z)
    return p - q, p - q - math.hypot(p - p_low, q_high - q), p - q + math.hypot(p_high - p, q - q_low)


def paired_difference(ours: Tensor, theirs: Tensor, z: float = 1.96) -> Interval:
    """The difference of two shares of the same samples with its 95 % interval (Newcombe 1998, method 10), which has a width where no sample differs, too.

    Args:
        ours, theirs: [samples], true where each is right.

    >>> import torch
    >>> was, now = torch.ones(20, dtype=torch.bool), torch.arange(20) > 1
    >>> [round(x, 3) for x in paired_difference(now, was)]
    [-0.1, -0.301, 0.077]
    """
    if not len(ours):
        return 0.0, -1.0, 1.0
    (p, p_low, p_high), (q, q_low, q_high) = share(ours, z), share(theirs, z)
    both, neither = int((ours & theirs).sum()), int((~ours & ~theirs).sum())
    one, other, count = int((ours & ~theirs).sum()), int((~ours & theirs).sum()), len(ours)
    spread = math.sqrt((both + one) * (other + neither) * (both + other) * (one + neither))
    apart = both * neither - one * other
    # Corrected for continuity where the two agree more than chance would have it.
    along = (max(apart - count / 2, 0.0) if apart > 0 else apart) / spread if spread else 0.0

    def width(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * along * a * b + b * b, 0.0))

    return p - q, p - q - width(p - p_low, q_high - q), p - q + width(p_high - p, q - q_low)
