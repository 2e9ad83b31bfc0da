"""Losses over a batch's own pairs: triplet, contrastive, circle, multi-similarity, SN-pair. Rivals of unified pairs, and terms beside a class head.

Each is called with embeddings [B, d] and labels [B]; label -1 forms no pairs. All but SN-pair equal pytorch-metric-learning's (with its reducers): triplet
(Schroff 2015), contrastive (Hadsell 2006), circle (Sun 2020), multi-similarity (Wang 2019). SN-pair is the metric half of MixFace (Jung 2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import number, one_of, require, show
from lineament.losses.contrastive import directions, exact


class PairLoss(nn.Module):
    """Base of all: unit rows of what is labelled, and which pairs are alike and unlike."""

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        unit = directions(embeddings)
        whole = isinstance(labels, Tensor) and not labels.is_floating_point()
        require(
            whole and labels.shape == embeddings.shape[:1],
            f"labels: got {show(labels)} beside {show(embeddings)}, expected one whole number a row",
        )
        rows = labels >= 0
        unit, labels = unit[rows], labels[rows]
        like = labels[:, None] == labels
        own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
        with exact(unit):
            return self.of(unit, like & ~own, ~like) if len(labels) else embeddings.sum() * 0

    def of(self, unit: Tensor, like: Tensor, unlike: Tensor) -> Tensor:
        """The loss of unit rows [B, d], with masks [B, B] of pairs."""
        raise NotImplementedError


class TripletLoss(PairLoss):
    """Mean over violated triplets of |a - p| - |a - n| + margin.

    >>> TripletLoss(0.5)(torch.eye(3), torch.tensor([0, 0, 1])).item()
    0.5
    """

    def __init__(self, margin: float = 0.5):
        super().__init__()
        self.margin = number("margin", margin, low=0)

    def of(self, unit: Tensor, like: Tensor, unlike: Tensor) -> Tensor:
        distance = _distances(unit)
        total, count = unit.sum() * 0, torch.zeros((), device=unit.device)
        for d, p, n in zip(distance, like, unlike):  # anchor after anchor: no cube of the batch
            violated = F.relu(d[p][:, None] - d[n] + self.margin)
            total, count = total + violated.sum(), count + (violated > 0).sum()
        return total / count.clamp(min=1)


class ContrastiveLoss(PairLoss):
    """Mean of |a - p| - positive over like pairs farther than that, plus mean of negative - |a - n| over unlike ones nearer than that.

    >>> ContrastiveLoss()(torch.eye(2), torch.tensor([0, 1])).item()
    0.0
    """

    def __init__(self, positive: float = 0.0, negative: float = 1.0):
        super().__init__()
        self.positive, self.negative = (
            number("positive", positive, low=0),
            number("negative", negative, low=0),
        )

    def of(self, unit: Tensor, like: Tensor, unlike: Tensor) -> Tensor:
        distance = _distances(unit)
        return _mean_of_positive(F.relu(distance - self.positive) * like) + _mean_of_positive(
            F.relu(self.negative - distance) * unlike
        )


class CircleLoss(PairLoss):
    """softplus(lse_n(γ [s_n + m]₊ (s_n - m)) + lse_p(-γ [1 + m - s_p]₊ (s_p - 1 + m))), mean over anchors with pairs of both kinds.

    >>> CircleLoss()(torch.eye(3), torch.tensor([0, 0, 1])).item() > 0
    True
    """

    def __init__(self, m: float = 0.4, gamma: float = 80.0):
        super().__init__()
        self.m, self.gamma = number("m", m), number("gamma", gamma, low=0, open_low=True)

    def of(self, unit: Tensor, like: Tensor, unlike: Tensor) -> Tensor:
        s = unit @ unit.T
        p = -self.gamma * F.relu(1 + self.m - s.detach()) * (s - 1 + self.m)
        n = self.gamma * F.relu(s.detach() + self.m) * (s - self.m)
        both = like.any(1) & unlike.any(1)
        each = F.softplus(_lse(p[both], like[both]) + _lse(n[both], unlike[both]))
        return _mean_of_positive(each)


class MultiSimilarityLoss(PairLoss):
    """ln(1 + Σ_p e^(-α (s - λ))) / α + ln(1 + Σ_n e^(β (s - λ))) / β, mean over anchors.

    >>> MultiSimilarityLoss()(torch.eye(2), torch.tensor([0, 1])).item() < 1e-6
    True
    """

    def __init__(self, alpha: float = 2.0, beta: float = 50.0, base: float = 0.5):
        super().__init__()
        self.alpha, self.beta = (
            number(k, v, low=0, open_low=True) for k, v in (("alpha", alpha), ("beta", beta))
        )
        self.base = number("base", base)

    def of(self, unit: Tensor, like: Tensor, unlike: Tensor) -> Tensor:
        s = unit @ unit.T - self.base
        p = F.softplus(_lse(-self.alpha * s, like)) / self.alpha
        return (p + F.softplus(_lse(self.beta * s, unlike)) / self.beta).mean()


class SNPairLoss(PairLoss):
    """Mean over like pairs of ln(1 + Σ_n e^(scale (s_n - s_p))), n all unlike pairs of the batch.

    >>> round(SNPairLoss(1.0)(torch.eye(3), torch.tensor([0, 0, 1])).item(), 4) == round(torch.tensor(3.0).log().item(), 4)
    True
    """

    def __init__(self, scale: float = 64.0):
        super().__init__()
        self.scale = number("scale", scale, low=0, open_low=True)

    def of(self, unit: Tensor, like: Tensor, unlike: Tensor) -> Tensor:
        s = self.scale * (unit @ unit.T)
        negatives = _lse(s.flatten()[None], unlike.triu(1).flatten()[None])
        positives = s[like.triu(1)]
        return F.softplus(negatives - positives).mean() if len(positives) else unit.sum() * 0


PAIR_LOSSES: dict[str, type[PairLoss]] = {
    "triplet": TripletLoss,
    "contrastive": ContrastiveLoss,
    "circle": CircleLoss,
    "multi-similarity": MultiSimilarityLoss,
    "sn-pair": SNPairLoss,
}


def pair_loss(name: str) -> PairLoss:
    """A loss over pairs by its name, with its usual numbers.

    >>> pair_loss("triplet").margin
    0.5
    """
    return PAIR_LOSSES[one_of("name", name, PAIR_LOSSES)]()


def _lse(x: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp over what the mask keeps of each row; a row without any is far below all else, with gradient 0."""
    return x.masked_fill(~mask, -1e9).logsumexp(1)


def _distances(unit: Tensor) -> Tensor:
    """Euclidean distances of unit rows; the gradient of a distance 0 is 0."""
    square = (2 - 2 * (unit @ unit.T)).clamp(min=0)
    apart = square > 1e-12
    return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)


def _mean_of_positive(losses: Tensor) -> Tensor:
    return losses.sum() / (losses > 0).sum().clamp(min=1)
