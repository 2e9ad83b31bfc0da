"""Are two samples of one person? Ten folds, exact true-accept rates at a false-accept rate, templates, and how pairs separate.

Protocols as in InsightFace, ElasticFace (arXiv 2109.09416) and UNPG (arXiv 2203.11593).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, one_of, require, show
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
    number("step", step, low=0, open_low=True)
    number("stop", stop, low=start, open_low=True)
    n, known = len(same), same.bool().cpu().numpy()
    distance = _distances(embeddings).cpu().numpy()
    require(bool(np.isfinite(distance).all()), "embeddings: NaN or infinity in a row")
    # As many as lie below ``stop``, which rounding must not add to.
    count = math.ceil((stop - start) / step - 1e-9)
    thresholds = start + step * np.arange(count)
    sizes = np.full(folds, n // folds) + (np.arange(folds) < n % folds)
    # cells[f, kind, k]: pairs of the fold whose distance k thresholds do not exceed; accepted[f, kind, t]: those with a distance below the threshold.
    cell = (np.repeat(2 * np.arange(folds), sizes) + known) * (count + 1)
    cell += _reached(thresholds, start, step, distance.astype(np.float64, copy=False))
    cells = np.bincount(cell, minlength=2 * folds * (count + 1)).reshape(folds, 2, count + 1)
    accepted, totals = cells.cumsum(2)[..., :count], cells.sum(2)
    lacking = np.flatnonzero((totals == 0).any(1))
    require(
        not len(lacking),
        f"same: all pairs of fold {int(lacking[0]) + 1 if len(lacking) else 0} of {folds} are of one kind, expected both in each; shuffle the pairs, or take fewer folds",
    )
    right = accepted[:, 1] + totals[:, :1] - accepted[:, 0]
    whole = right.sum(0)
    # Of the others' pairs a fold's threshold gets the most right, be they as many as they may.
    best = (whole - right).argmax(1)
    accuracy = right[np.arange(folds), best] / sizes
    tpr, fpr = (torch.from_numpy((accepted[:, k] / totals[:, k, None]).mean(0)) for k in (1, 0))
    return Folds(
        torch.from_numpy(accuracy), float(accuracy.mean()), float(accuracy.std()), torch.from_numpy(thresholds), tpr, fpr,
        float(whole.max()) / n,
    )  # fmt: skip


def _distances(embeddings: Tensor) -> Tensor:
    """The squared distance of each two rows [n]; in parts that stay in the cache, for the differences are the most of the work."""
    pairs = embeddings.detach().unflatten(0, (-1, 2))
    return torch.cat([(part[:, 0] - part[:, 1]).square_().sum(1) for part in pairs.split(1024)])


def _reached(thresholds: np.ndarray, start: float, step: float, values: np.ndarray) -> np.ndarray:
    """How many of evenly spaced thresholds are at most each value: by division, and by what rounding may have moved, one up or down."""
    count = len(thresholds)
    at = np.clip((values - start) / step, 0, count - 1).astype(np.int64)
    return at + (thresholds[at] <= values) + (np.append(thresholds, np.inf)[at + 1] <= values)


def tar_at_far(scores: Tensor, same: Tensor, fars: Sequence[float] | Tensor) -> Tensor:
    """The share of genuine pairs accepted at each false-accept rate, which is never exceeded.

    With n impostors and k = ⌊FAR n⌋, scores strictly above the (k + 1)-th largest impostor are accepted. Below 1/n no impostor may be accepted.

    >>> tar_at_far(torch.tensor([0.9, 0.4, 0.6, 0.1]), torch.tensor([1, 1, 0, 0]), [0.5]).tolist()
    [1.0]
    """
    same = _known(scores, same)
    genuine, impostors = scores[same], scores[~same].sort(descending=True).values
    found = []
    for far in [float(f) for f in fars]:
        number("fars", far, low=0, high=1)
        k = int(far * len(impostors) * (1 + 1e-12))
        found.append(genuine.numel() if k >= len(impostors) else int((genuine > impostors[k]).sum()))
    return torch.tensor(found, dtype=torch.float64) / len(genuine)


def equal_error_rate(scores: Tensor, same: Tensor) -> float:
    """The error at the threshold where as large a share of impostors is accepted as of genuine pairs is refused; between two scores on the line that joins them.

    >>> equal_error_rate(torch.tensor([0.9, 0.4, 0.6, 0.1]), torch.tensor([1, 1, 0, 0]))
    0.5
    """
    fpr, tpr, _ = roc(scores, same, drop_intermediate=False)
    refused = 1 - tpr
    # The first point at which more impostors are accepted than genuine pairs refused.
    at = int((fpr >= refused).nonzero()[0])
    before = float(refused[at - 1] - fpr[at - 1]) if at else 0.0
    after = float(fpr[at] - refused[at])
    share = before / (before + after) if before + after > 0 else 0.0
    last = float(fpr[max(at - 1, 0)])
    return last + share * (float(fpr[at]) - last)


def val_at_far(
    embeddings: Tensor,
    same: Tensor,
    far: float = 1e-3,
    folds: int = 10,
    *,
    stop: float = 4.0,
    step: float = 0.001,
) -> tuple[float, float, float]:
    """LFW's VAL@FAR: on nine folds the distance at which ``far`` of the impostors are accepted, between thresholds on a line; on the tenth the share of genuine pairs below it.

    Thresholds of one false-accept rate count once, the largest of them, where the copied code fails. Where no threshold of the others reaches ``far``, none is accepted.

    Args:
        embeddings, same: as for :func:`fold_accuracy`.

    Returns:
        The folds' mean share, its population deviation, and the mean false-accept rate on the held-out folds, which may be above ``far``.

    >>> x = torch.eye(2)[[0, 0, 0, 1, 1, 1, 1, 0]]
    >>> val_at_far(x, torch.tensor([1, 0, 1, 0]), 0.0, folds=2)
    (1.0, 0.0, 0.0)
    """
    number("far", far, low=0, high=1)
    require(
        embeddings.ndim == 2 and len(embeddings) == 2 * len(same),
        f"embeddings: got {show(embeddings)} beside {len(same)} pairs, expected two rows a pair",
    )
    number("folds", folds, low=2, high=len(same), integer=True)
    distance = (embeddings[0::2] - embeddings[1::2]).detach().double().square().sum(1).cpu().numpy()
    require(bool(np.isfinite(distance).all()), "embeddings: NaN or infinity in a row")
    known, thresholds = same.bool().cpu().numpy(), np.arange(0, stop, step)
    shares, rates = [], []
    for test in np.array_split(np.arange(len(known)), folds):
        rest = np.ones(len(known), dtype=bool)
        rest[test] = False
        impostors = np.sort(distance[rest & ~known])
        own, genuine = distance[test], known[test]
        require(
            len(impostors) > 0 and 0 < int(genuine.sum()) < len(genuine),
            "same: a fold, or all but one, has pairs of one kind only, expected both; shuffle the pairs, or take fewer folds",
        )
        accepted = np.searchsorted(impostors, thresholds, side="left") / len(impostors)
        rate, first = np.unique(accepted[::-1], return_index=True)  # of each rate the largest threshold
        at = float(np.interp(far, rate, thresholds[::-1][first])) if rate[-1] >= far else 0.0
        shares.append((own[genuine] < at).mean())
        rates.append((own[~genuine] < at).mean())
    return float(np.mean(shares)), float(np.std(shares)), float(np.mean(rates))


def with_flips(
    embeddings: Tensor, flipped: Tensor, how: Literal["added", "concatenated"] = "added"
) -> Tensor:
    """Unit rows of pictures and of their mirror images: added, as InsightFace and ElasticFace do, or concatenated, as UNPG does.

    >>> round(float(with_flips(torch.eye(2), torch.eye(2).flip(0))[0, 0]), 4)
    0.7071
    """
    one_of("how", how, ("added", "concatenated"))
    require(embeddings.shape == flipped.shape, f"flipped: got {show(flipped)}, expected the shape of {show(embeddings)}")  # fmt: skip
    return F.normalize(embeddings + flipped if how == "added" else torch.cat([embeddings, flipped], 1), dim=1)


@dataclass(frozen=True)
class Verification(Readable):
    """What a protocol says of some pairs: ``accuracy``, its deviation over folds (``None`` without folds), true-accept rates and the false-accept rates that they were read at, and the equal error rate.

    ``none_allowed``: those asked for that are below one impostor pair, at which no false accept is allowed: such a rate speaks of the largest impostor alone.
    """

    protocol: str
    accuracy: float
    deviation: float | None
    tar: tuple[float, ...]
    far: tuple[float, ...]
    equal_error: float
    none_allowed: tuple[float, ...]


def verification(
    embeddings: Tensor,
    same: Tensor,
    *,
    flipped: Tensor | None = None,
    protocol: Literal["insightface", "unpg"] = "insightface",
    fars: Sequence[float] = (1e-2, 1e-3),
) -> Verification:
    """Pairs judged as one of two codes judges them, so that figures can be compared with published ones.

    ``"insightface"``: flips added, accuracy of ten folds, and true-accept rates whose false-accept rate is never exceeded. ``"unpg"``: flips concatenated, the best threshold's accuracy on all
    pairs, which is optimistic, and rates at the ROC's nearest point, whose false-accept rate may be above the one asked for.

    Args:
        embeddings: [2n, d]; pair p is rows 2p and 2p + 1. same: [n] whether a pair is one person. flipped: of the mirrored pictures.

    >>> x = torch.eye(2)[[0, 0, 0, 1, 1, 1, 1, 0]].repeat(5, 1)
    >>> verification(x, torch.tensor([1, 0] * 10), fars=[0.1]).tar
    (1.0,)
    """
    one_of("protocol", protocol, ("insightface", "unpg"))
    require(
        embeddings.ndim == 2 and len(embeddings) == 2 * len(same),
        f"embeddings: got {show(embeddings)} beside {len(same)} pairs, expected two rows a pair",
    )
    norms = embeddings.norm(dim=1)
    require(bool((norms.isfinite() & (norms > 0)).all()), "embeddings: a row is zero, NaN or infinite")
    unit = F.normalize(embeddings, dim=1)
    if flipped is not None:
        unit = with_flips(embeddings, flipped, "added" if protocol == "insightface" else "concatenated")
    scores = (unit[0::2] * unit[1::2]).sum(1)
    error = equal_error_rate(scores, same)
    none = tuple(float(far) for far in fars if int(far * int((~same.bool()).sum()) * (1 + 1e-12)) == 0)
    if protocol == "unpg":
        tar, far = nearest_tar_at_far(scores, same, fars)
        accuracy = best_threshold_accuracy(scores, same)
        return Verification(protocol, accuracy, None, tuple(tar.tolist()), tuple(far.tolist()), error, none)
    found = fold_accuracy(unit, same)
    tar = tar_at_far(scores, same, fars)
    return Verification(
        protocol, found.mean, found.std, tuple(tar.tolist()), tuple(map(float, fars)), error, none
    )


def _known(scores: Tensor, same: Tensor) -> Tensor:
    """Whether pairs are of one person, once it is clear that their scores can be judged."""
    require(
        scores.ndim == 1 and scores.shape == same.shape,
        f"same: got {show(same)} beside scores {show(scores)}, expected one number a pair of both",
    )
    require(bool(scores.isfinite().all()), "scores: NaN or infinity")
    genuine, count = int(same.bool().sum()), len(same)
    require(
        0 < genuine < count,
        f"same: got {genuine} genuine and {count - genuine} impostor pairs, expected some of both",
    )
    return same.bool()


def roc(scores: Tensor, same: Tensor, *, drop_intermediate: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """False and true positive rates and thresholds, from the strictest on, by scikit-learn.

    >>> [v.tolist() for v in roc(torch.tensor([0.9, 0.1]), torch.tensor([1, 0]))[:2]]
    [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    from sklearn.metrics import roc_curve

    same, scores = _known(scores, same), scores.detach()
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
    ordered, right = scores[order], _known(scores, same)[order]
    accepted = right.long().cumsum(0) - (~right).long().cumsum(0)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool, device=scores.device)])
    return float((accepted[last].max() + (~right).sum()) / len(right))


def template_features(features: Tensor, templates: Tensor, media: Tensor) -> tuple[Tensor, Tensor]:
    """One unit row a template: the mean of each medium's images, summed over media; and the templates' numbers, sorted.

    >>> template_features(torch.eye(2), torch.tensor([7, 7]), torch.tensor([0, 1]))[1].tolist()
    [7]
    """
    require(
        features.ndim == 2 and features.shape[:1] == templates.shape == media.shape,
        f"templates, media: got {show(templates)} and {show(media)} beside {show(features)}, expected one number a row of each",
    )
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
    robust_gap: float


def separation(positives: Tensor, negatives: Tensor, *, quantile: float = 0.01) -> Separation:
    """inf S^p, sup S^n, their difference, and the shares of pairs on the wrong side of the other's extreme.

    Args:
        quantile: ``robust_gap`` is that quantile of the positives less the negatives' quantile of one minus it, which single pairs do not decide; at 0 it is the gap.

    Raises:
        InputError: no pair of one kind.

    >>> separation(torch.tensor([0.5, 0.75]), torch.tensor([0.25])).gap
    0.25
    """
    number("quantile", quantile, low=0, high=0.5)
    for name, values in (("positives", positives), ("negatives", negatives)):
        require(len(values) > 0, f"{name}: got no similarity, expected those of one pair or more")
        require(bool(values.isfinite().all()), f"{name}: NaN or infinity")
    low, high = float(positives.min()), float(negatives.max())
    inner = [
        float(np.quantile(x.detach().double().cpu().numpy(), q))
        for x, q in ((positives, quantile), (negatives, 1 - quantile))
    ]
    return Separation(
        low,
        high,
        low - high,
        float((positives <= high).double().mean()),
        float((negatives >= low).double().mean()),
        inner[0] - inner[1],
    )
