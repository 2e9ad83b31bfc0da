"""Are two samples of one person? Ten folds, exact true-accept rates at a false-accept rate, templates, and how pairs separate.

Protocols as in InsightFace, ElasticFace (arXiv 2109.09416) and UNPG (arXiv 2203.11593).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, require, show
from lineament.core.results import Readable, plain


@dataclass(frozen=True)
class Folds(Readable):
    """Accuracy of each held-out fold, their mean and population deviation, and mean true and false positive rates on the thresholds."""

    accuracies: Tensor
    mean: float
    std: float
    thresholds: Tensor
    tpr: Tensor
    fpr: Tensor
    optimistic: float

    def to_dict(self) -> dict[str, Any]:
        return plain(self)


def fold_accuracy(
    embeddings: Tensor,
    same: Tensor,
    folds: int = 10,
    *,
    start: float = 0.0,
    stop: float = 4.0,
    step: float = 0.01,
) -> Folds:
    """Accuracy on pairs, each fold judged by the threshold that is best on the others.

    Args:
        embeddings: [2n, d] unit rows; pair p is rows 2p and 2p + 1. same: [n] whether a pair is one person.
        folds: contiguous, not shuffled.
        start, stop, step: the thresholds of the squared Euclidean distance; the first of the best is taken.

    Returns:
        ``optimistic`` is the best single threshold's accuracy on all pairs, which must not be reported as the folds' mean.

    Raises:
        InputError: not two rows a pair, a fold with pairs of one kind only.

    >>> x = torch.eye(2)[[0, 0, 0, 1, 1, 1, 1, 0]]
    >>> fold_accuracy(x, torch.tensor([1, 0, 1, 0]), folds=2).mean
    1.0
    """
    require(
        embeddings.ndim == 2 and len(embeddings) == 2 * len(same),
        f"embeddings: got {show(embeddings)} beside {len(same)} pairs, expected two rows a pair",
    )
    number("folds", folds, low=2, high=len(same), integer=True)
    same, n = same.bool(), len(same)
    # In parts that stay in the cache: the differences are the most of the work.
    parts = zip(embeddings[0::2].split(512), embeddings[1::2].split(512))
    distance = torch.cat([(a - b).square_().sum(1) for a, b in parts])
    require(bool(distance.isfinite().all()), "embeddings: NaN or infinity in a row")
    # As many as lie below ``stop``, which rounding must not add to.
    count = math.ceil((stop - start) / step - 1e-9)
    thresholds = start + step * torch.arange(count, dtype=torch.float64, device=distance.device)
    sizes = torch.tensor([n // folds + (k < n % folds) for k in range(folds)], device=distance.device)
    # accepted[f, t, kind]: pairs of the fold with a distance below the threshold
    first = torch.searchsorted(thresholds, distance.double(), right=True)
    fold = torch.arange(folds, device=distance.device).repeat_interleave(sizes, output_size=n)
    cells = torch.zeros(folds, 2, count + 1, dtype=torch.int64, device=distance.device)
    cells.view(-1).index_add_(0, (fold * 2 + same.long()) * (count + 1) + first, torch.ones_like(first))
    accepted = cells.cumsum(2)[..., :count]
    totals = cells.sum(2)
    lacking = (totals == 0).any(1).nonzero()[:, 0].tolist()
    require(
        not lacking,
        f"same: all pairs of fold {lacking[0] + 1 if lacking else 0} of {folds} are of one kind, expected both in each; shuffle the pairs, or take fewer folds",
    )
    right = accepted[:, 1] + totals[:, :1] - accepted[:, 0]
    others = (right.sum(0) - right).double() / (n - sizes)[:, None]
    best = others.argmax(1)
    accuracy = right.gather(1, best[:, None])[:, 0].double() / sizes
    share = accepted.double() / totals[..., None].clamp(min=1)
    return Folds(
        accuracy, float(accuracy.mean()), float(accuracy.std(correction=0)), thresholds,
        share[:, 1].mean(0), share[:, 0].mean(0), float(right.sum(0).max()) / n,
    )  # fmt: skip


def tar_at_far(scores: Tensor, same: Tensor, fars: Sequence[float] | Tensor) -> Tensor:
    """The share of genuine pairs accepted at each false-accept rate, which is never exceeded.

    With n impostors and k = ⌊FAR n⌋, scores strictly above the (k + 1)-th largest impostor are accepted. Below 1/n no impostor may be accepted.

    >>> tar_at_far(torch.tensor([0.9, 0.4, 0.6, 0.1]), torch.tensor([1, 1, 0, 0]), [0.5]).tolist()
    [1.0]
    """
    same = same.bool()
    genuine, impostors = scores[same], scores[~same].sort(descending=True).values
    require(
        len(genuine) > 0 and len(impostors) > 0,
        f"same: got {len(genuine)} genuine and {len(impostors)} impostor pairs, expected some of both",
    )
    found = []
    for far in [float(f) for f in fars]:
        number("fars", far, low=0, high=1)
        k = int(far * len(impostors) * (1 + 1e-12))
        found.append(genuine.numel() if k >= len(impostors) else int((genuine > impostors[k]).sum()))
    return torch.tensor(found, dtype=torch.float64) / len(genuine)


def roc(scores: Tensor, same: Tensor, *, drop_intermediate: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """False and true positive rates and thresholds, from the strictest on, by scikit-learn.

    >>> [v.tolist() for v in roc(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]))[:2]]
    [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    from sklearn.metrics import roc_curve

    found = roc_curve(same.cpu().numpy(), scores.cpu().numpy(), drop_intermediate=drop_intermediate)
    fpr, tpr, thresholds = (torch.from_numpy(v.copy()) for v in found)
    return fpr, tpr, thresholds


def nearest_tar_at_far(
    scores: Tensor, same: Tensor, fars: Sequence[float] | Tensor, *, drop_intermediate: bool = True
) -> tuple[Tensor, Tensor]:
    """UNPG's rule: the true-accept rate at the ROC vertex nearest to each false-accept rate, and the rate used, which may be larger.

    >>> nearest_tar_at_far(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]), [0.1])[1].tolist()
    [0.0]
    """
    fpr, tpr, _ = (v.flip(0) for v in roc(scores, same, drop_intermediate=drop_intermediate))
    at = [int((fpr - float(far)).abs().argmin()) for far in fars]
    return tpr[at], fpr[at]


def best_threshold_accuracy(scores: Tensor, same: Tensor) -> float:
    """The accuracy of ``score >= threshold`` at the best threshold that is a score: optimistic.

    >>> best_threshold_accuracy(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]))
    1.0
    """
    order = scores.argsort(descending=True, stable=True)
    ordered, right = scores[order], same.bool()[order]
    accepted = right.long().cumsum(0) - (~right).long().cumsum(0)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool, device=scores.device)])
    return float((accepted[last].max() + (~right).sum()) / len(right))


def template_features(features: Tensor, templates: Tensor, media: Tensor) -> tuple[Tensor, Tensor]:
    """One unit row a template: the mean of each medium's images, summed over media; and the templates' numbers, sorted.

    >>> template_features(torch.eye(2), torch.tensor([7, 7]), torch.tensor([0, 1]))[1].tolist()
    [7]
    """
    numbers, which = templates.unique(return_inverse=True)
    pairs, medium = torch.stack([which, media]).unique(dim=1, return_inverse=True)
    sums = features.new_zeros(pairs.shape[1], features.shape[1]).index_add_(0, medium, features)
    means = sums / torch.bincount(medium, minlength=pairs.shape[1])[:, None]
    found = features.new_zeros(len(numbers), features.shape[1]).index_add_(0, pairs[0], means)
    return F.normalize(found, dim=1), numbers


@dataclass(frozen=True)
class Separation(Readable):
    """How similarities of like pairs (positives) and unlike ones (negatives) separate; a gap above 0 is a well-discriminative space."""

    lowest_positive: float
    highest_negative: float
    gap: float
    overlap_positive: float
    overlap_negative: float


def separation(positives: Tensor, negatives: Tensor) -> Separation:
    """inf S^p, sup S^n, their difference, and the shares of pairs on the wrong side of the other's extreme.

    Raises:
        InputError: no pair of one kind.

    >>> separation(torch.tensor([0.5, 0.75]), torch.tensor([0.25])).gap
    0.25
    """
    for name, values in (("positives", positives), ("negatives", negatives)):
        require(len(values) > 0, f"{name}: got no similarity, expected those of one pair or more")
    low, high = float(positives.min()), float(negatives.max())
    return Separation(
        low,
        high,
        low - high,
        float((positives <= high).double().mean()),
        float((negatives >= low).double().mean()),
    )
