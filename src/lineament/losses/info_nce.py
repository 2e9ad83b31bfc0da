"""A query against its key and many others: MoCo's loss, with feature transformations, and what its scores say of a run.

He et al. 2020; Zhu et al. 2021, arXiv 2108.02982. The loss is logaddexp(s, lse(negatives)) - s over the temperature: no logits are put together.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, number, require, show
from lineament.core.results import Readable
from lineament.losses.contrastive import exact, wide
from lineament.losses.feature_transform import HardMixing, NegativeInterpolation, PositiveExtrapolation
from lineament.losses.queue import Queue

Transform = PositiveExtrapolation | NegativeInterpolation | HardMixing
# Scores that lie in memory at once: on a GPU, and where they should stay in the cache.
_ENTRIES, _CACHED = 11_000_000, 1 << 19


class InfoNCE(nn.Module):
    """``loss(query, key)`` of unit rows [B, d]: the key is the positive, the queue's rows are the negatives, and then the keys join the queue.

    Args:
        temperature: 0.07 for MoCo, 0.2 for its second version.
        queue: of past keys; without one, the batch's other keys are the negatives.
        transform: positive extrapolation, negative interpolation, mixtures of hard negatives, or several; each works from its own ``start`` on (see :meth:`set_epoch`).
        log: keeps five numbers of the scores of some steps.
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
        log: ScoreLog | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.temperature = number("temperature", temperature, low=0, open_low=True)
        self.queue = queue
        kinds = [t.kind for t in transform]
        require(len(kinds) == len(set(kinds)), f"transform: got {kinds}, expected one of each kind at most")
        require(
            queue is not None or not {"negative", "hard"} & set(kinds),
            "transform: negative interpolation and hard mixing mix a queue, but there is none",
        )
        self.transform = tuple(transform)
        self.generator = torch.Generator().manual_seed(seed)
        self.epoch, self.log = 0, log

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch it is, from 0; transforms with a later ``start`` wait."""
        self.epoch = epoch

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """The mean loss; the untransformed keys are enqueued where there is a queue and the module trains."""
        with exact(query):
            return self._loss(query, key)

    def _loss(self, query: Tensor, key: Tensor) -> Tensor:
        positive, others, rows = self.compared(query, key)
        watch = self.training and self.log is not None and self.log.due()
        if rows is None:
            negatives = self._in_batch(others)
            count, lse = negatives.shape[1], (negatives / self.temperature).logsumexp(1)
            watch = watch and count > 0  # a batch of one has no negatives
            variance, mean = torch.var_mean(negatives.detach(), 1) if watch else (negatives, negatives)
        else:
            count = len(rows)
            lse, (variance, mean) = negatives_logsumexp(others, rows, self.temperature, watch=watch)
        hard = self._mixed(others, rows)
        if hard is not None:
            lse = torch.logaddexp(lse, (hard / self.temperature).logsumexp(1))
        s = positive / self.temperature
        if watch and self.log is not None:
            log = lse.detach() - math.log(count + (0 if hard is None else hard.shape[1]))
            found = ScoreStatistics(mean, variance, positive.detach(), log, s.detach())
            self.log.add(found, raw=(query * key).sum(1).detach())
        if self.queue is not None and self.training:
            self.queue.enqueue(key.detach())
        return (torch.logaddexp(s, lse) - s).mean()

    def scores(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of the positive [B] and of the negatives [B, K], before the temperature."""
        positive, others, rows = self.compared(query, key)
        if rows is None:
            return positive, self._in_batch(others)
        found, hard = others @ rows[:].clone().T, self._mixed(others, rows)
        return positive, found if hard is None else torch.cat([found, hard], 1)

    def compared(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor | MixedRows | None]:
        """The positives' scores [B], what meets the negatives [B, d], and the negatives [K, d].

        Without a queue the second are the scores [B, B] of queries and keys, and there is no third.
        """
        if query.shape != key.shape or query.ndim != 2:
            raise InputError(f"key: got {show(key)}, expected the shape of the query, {show(query)}")
        require(
            self.queue is None or query.shape[1] == self.queue.rows.shape[1],
            f"query: got {show(query)}, expected rows of {0 if self.queue is None else self.queue.rows.shape[1]} numbers as the queue's",
        )
        room = 1e-2 if key.dtype in (torch.float16, torch.bfloat16) else 1e-4
        for name, each in (("query", query), ("key", key)):
            off = (each.detach().norm(dim=1) - 1).abs()
            require(
                bool((off <= room).all()),
                f"{name}: expected rows of length 1; normalise them first (NaN has none)",
            )
        query, key = wide(query), wide(key)
        active = {t.kind: t for t in self.transform if self.epoch >= t.start and self.training}
        key = key.detach() if self.queue is not None else key
        one, two = query, key
        if isinstance(positive := active.get("positive"), PositiveExtrapolation):
            shape = (query.shape[0], query.shape[1])
            lam = positive.draw(shape, self.generator, query).to(query.device)
            one, two = positive(query, key, lam)
        if self.queue is None:
            found = one @ two.T
            return found.diagonal(), found, None
        rows = self.queue.rows.to(query.dtype)
        if isinstance(negative := active.get("negative"), NegativeInterpolation):
            lam = negative.draw((rows.shape[0], rows.shape[1]), self.generator, rows).to(rows.device)
            order = torch.randperm(len(rows), generator=self.generator).to(rows.device)
            return (one * two).sum(1), one, MixedRows(rows, order, lam)
        return (one * two).sum(1), one, rows

    def _mixed(self, query: Tensor, rows: Tensor | MixedRows | None) -> Tensor | None:
        """Scores of the queries with mixtures of their hardest negatives, where there are any."""
        for each in self.transform:
            if (
                isinstance(each, HardMixing)
                and rows is not None
                and self.training
                and self.epoch >= each.start
            ):
                return torch.einsum("bd,bkd->bk", query, each(query, rows[:], self.generator))
        return None

    def get_extra_state(self) -> dict[str, Any]:
        """What a resumed training needs besides the queue: the state of the draws, and the scores so far."""
        return {
            "generator": self.generator.get_state(),
            "log": None if self.log is None else self.log.state_dict(),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.generator.set_state(state["generator"].cpu())
        if self.log is not None and state["log"] is not None:
            self.log.load_state_dict(state["log"])

    def _in_batch(self, found: Tensor) -> Tensor:
        off = ~torch.eye(len(found), dtype=torch.bool, device=found.device)
        return found[off].view(len(found), -1)


def negatives_logsumexp(
    query: Tensor, rows: Tensor | MixedRows, temperature: float, *, watch: bool = True
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """ln Σ_n exp(query · n / T) of each query, [B], and the unbiased variance and mean of its scores, [B] each (NaN without ``watch``).

    The gradient to the query is made with it, so that the rows may change before the backward pass; they get none.

    >>> round(negatives_logsumexp(torch.zeros(1, 2), torch.ones(4, 2), 1.0)[0].item(), 4) == round(math.log(4), 4)
    True
    """
    found: Any = _NegativesLogSumExp.apply(query, rows, temperature, watch, torch.is_grad_enabled())
    return found[0], (found[1], found[2])


class _NegativesLogSumExp(torch.autograd.Function):
    """Some rows at a time for all queries, so that rows, mixtures and scores stay in the cache; sums are rescaled when a larger score comes."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        query, rows, temperature, watch, grad = arguments
        total, mean, squares = (query.new_zeros(len(query)) for _ in range(3))
        top = query.new_full((len(query),), -math.inf)
        wanted = grad and ctx.needs_input_grad[0]
        gradient, scaled = torch.zeros_like(query) if wanted else None, query / temperature
        size = max(1, (_ENTRIES if query.is_cuda else _CACHED) // max(1, len(query)))
        for start in range(0, len(rows), size):
            part = rows[start : start + size].detach()
            scores = scaled @ part.T
            if watch:
                variance, at = torch.var_mean(scores, 1, correction=0)
                ahead = at - mean
                seen = start + len(part)
                mean = mean + ahead * (len(part) / seen)
                squares += variance * len(part) + ahead.square_() * (start * len(part) / seen)
            higher = torch.maximum(top, scores.amax(1))
            shrink, top = (top - higher).exp_(), higher
            scores = scores.sub_(top[:, None]).exp_()
            total.mul_(shrink).add_(scores.sum(1))
            if gradient is not None:
                gradient.mul_(shrink[:, None]).addmm_(scores, part)
        mean, variance = mean * temperature, squares * (temperature**2 / max(1, len(rows) - 1))
        if not watch:
            mean, variance = mean.fill_(math.nan), variance.fill_(math.nan)
        ctx.gradient = None if gradient is None else gradient.div_((temperature * total)[:, None])
        ctx.mark_non_differentiable(mean, variance)
        return total.log() + top, variance, mean

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None if ctx.gradient is None else ctx.gradient * grads[0][:, None]), None, None, None, None


@dataclass(frozen=True)
class MixedRows:
    """lam Q + (1 - lam) Q[order] of a queue Q [K, d], of which any slice is made when it is asked for."""

    rows: Tensor
    order: Tensor
    lam: Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: slice) -> Tensor:
        lam = self.lam if self.lam.ndim == 0 else self.lam[at]
        return self.rows.index_select(0, self.order[at]).lerp_(self.rows[at], lam)


class ScoreLog:
    """Every n-th step's scores: the means and variances that the paper draws, and the positive's before any transformation.

    Args:
        every: steps from one entry to the next.

    A warning says once when the mean negative passes 0.5: the embedding crowds.

    >>> log = ScoreLog()
    >>> log.add(score_statistics(torch.ones(2), torch.zeros(2, 3), 0.5))
    >>> log.curves["positive_mean"], log.curves["negative_mean"]
    ([1.0], [0.0])
    """

    def __init__(self, every: int = 1):
        self.every, self.step, self.warned = number("every", every, low=1, integer=True), 0, False
        names = (
            "step",
            "negative_mean",
            "negative_variance",
            "positive_mean",
            "positive_variance",
            "raw_positive",
            "log_negative",
        )
        self.curves: dict[str, list[float]] = {name: [] for name in names}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "warned": self.warned,
            "curves": {k: list(v) for k, v in self.curves.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.warned = state["step"], state["warned"]
        self.curves = {name: list(state["curves"][name]) for name in self.curves}

    def due(self) -> bool:
        """Whether this step's scores are kept; counts the steps."""
        self.step += 1
        return (self.step - 1) % self.every == 0

    @torch.no_grad()
    def add(self, found: ScoreStatistics, *, raw: Tensor | None = None) -> None:
        """The scores of one step; ``raw``: the positives' before the transformation."""
        positive = found.positive
        numbers = (
            max(self.step - 1, 0), found.negative_mean.mean(), found.negative_variance.mean(), positive.mean(), positive.var(correction=0),
            (positive if raw is None else raw).mean(), found.log_negative.mean(),
        )  # fmt: skip
        for each, value in zip(self.curves.values(), numbers):
            each.append(float(value))
        mean = self.curves["negative_mean"][-1]
        if mean > 0.5 and not self.warned:
            self.warned = True
            warnings.warn(
                f"the mean negative score is {mean:.2f} at step {max(self.step - 1, 0)}: the embedding crowds; positives that are extrapolated should start later",
                stacklevel=3,
            )

    def plot(self, ax: Any = None) -> Any:
        """Mean positive and mean negative against the steps."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        for name in ("positive_mean", "negative_mean"):
            ax.plot(self.curves["step"], self.curves[name], label=name.replace("_mean", ""))
        ax.set(xlabel="step", ylabel="mean score")
        ax.legend()
        return ax


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
