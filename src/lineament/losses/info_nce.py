"""A query against its key and many others: MoCo's loss, with feature transformations, and what its scores say of a run.

He et al. 2020; Zhu et al. 2021, arXiv 2108.02982. The loss is logaddexp(s, lse(negatives)) - s over the temperature: no logits are put together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, number, require, show
from lineament.core.results import Readable
from lineament.losses.feature_transform import NegativeInterpolation, PositiveExtrapolation
from lineament.losses.queue import Queue

Transform = PositiveExtrapolation | NegativeInterpolation


class InfoNCE(nn.Module):
    """``loss(query, key)`` of unit rows [B, d]: the key is the positive, the queue's rows are the negatives, and then the keys join the queue.

    Args:
        temperature: 0.07 for MoCo, 0.2 for its second version.
        queue: of past keys; without one, the batch's other keys are the negatives.
        transform: positive extrapolation, negative interpolation, or both; each works from its own ``start`` on (see :meth:`set_epoch`).
        seed: of their draws.

    >>> loss = InfoNCE(0.2, queue=Queue(16, 4))
    >>> rows = torch.nn.functional.normalize(torch.randn(8, 4), dim=1)
    >>> loss(rows, rows).ndim, int(loss.queue.pointer)
    (0, 8)
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        queue: Queue | None = None,
        transform: Sequence[Transform] = (),
        seed: int = 0,
    ):
        super().__init__()
        self.temperature = number("temperature", temperature, low=0, open_low=True)
        self.queue = queue
        kinds = [t.kind for t in transform]
        require(len(kinds) == len(set(kinds)), f"transform: got {kinds}, expected one of each kind at most")
        require(
            queue is not None or "negative" not in kinds,
            "transform: negative interpolation mixes a queue, but there is none",
        )
        self.transform = tuple(transform)
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is, from 0; transforms with a later ``start`` wait."""
        self.epoch = epoch

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """The mean loss; the untransformed keys are enqueued where there is a queue and the module trains."""
        positive, negatives = self.scores(query, key)
        if self.queue is not None and self.training:
            self.queue.enqueue(key.detach())
        return info_nce(positive, negatives, self.temperature)

    def scores(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the positive [B] and of the negatives [B, K], before the temperature."""
        if query.shape != key.shape or query.ndim != 2:
            raise InputError(f"key: got {show(key)}, expected the shape of the query, {show(query)}")
        active = {t.kind: t for t in self.transform if self.epoch >= t.start and self.training}
        key = key.detach() if self.queue is not None else key
        one, two = query, key
        if isinstance(positive := active.get("positive"), PositiveExtrapolation):
            shape = (query.shape[0], query.shape[1])
            lam = positive.draw(shape, self.generator, query).to(query.device)
            one, two = positive(query, key, lam)
        if self.queue is None:
            found = one @ two.T
            off = ~torch.eye(len(found), dtype=torch.bool, device=found.device)
            return found.diagonal(), found[off].view(len(found), -1)
        rows = self.queue.rows.to(query.dtype)
        if isinstance(negative := active.get("negative"), NegativeInterpolation):
            lam = negative.draw((rows.shape[0], rows.shape[1]), self.generator, rows).to(rows.device)
            order = torch.randperm(len(rows), generator=self.generator).to(rows.device)
            return (one * two).sum(1), negative(one, rows, lam, order)
        return (one * two).sum(1), one @ rows.T


def info_nce(positive: Tensor, negatives: Tensor, temperature: float) -> Tensor:
    """Mean of logaddexp(s, lse(n)) - s, scores over the temperature.

    >>> round(info_nce(torch.zeros(1), torch.zeros(1, 1), 1.0).item(), 4)
    0.6931
    """
    s = positive / temperature
    return (torch.logaddexp(s, (negatives / temperature).logsumexp(1)) - s).mean()


@dataclass(frozen=True)
class ScoreStatistics(Readable):
    """Of each sample, [B]: mean and unbiased variance of its negatives' scores, the positive's, and ln mean exp(n / T), s / T."""

    negative_mean: Tensor
    negative_variance: Tensor
    positive: Tensor
    log_negative: Tensor
    log_positive: Tensor

    def table(self) -> Tensor:
        """[B, 5] as the released code stores it: the last two are exponentials."""
        return torch.stack(
            [
                self.negative_mean,
                self.negative_variance,
                self.positive,
                self.log_negative.exp(),
                self.log_positive.exp(),
            ],
            1,
        )


@torch.no_grad()
def score_statistics(positive: Tensor, negatives: Tensor, temperature: float) -> ScoreStatistics:
    """Five numbers a sample that show how a contrastive run goes; exponentials stay logarithms, which half precision would not hold.

    >>> score_statistics(torch.ones(1), torch.tensor([[0.0, 1.0]]), 0.5).negative_mean.item()
    0.5
    """
    variance, mean = torch.var_mean(negatives, 1)
    log = (negatives / temperature).logsumexp(1) - math.log(negatives.shape[1])
    return ScoreStatistics(mean, variance, positive, log, positive / temperature)
