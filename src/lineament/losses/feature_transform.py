"""Harder positives and fresh negatives from the features there are: extrapolated pairs, an interpolated queue.

Zhu et al., "Improving Contrastive Learning by Visualizing Feature Transformation", ICCV 2021, arXiv 2108.02982. The functions take the tensors, the mixing
factor and the permutation; the classes draw them.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, one_of, require, show

Granularity = Literal["batch", "sample", "dim"]


def mixed_pair(q: Tensor, k: Tensor, lam: Tensor | float) -> tuple[Tensor, Tensor]:
    """(lam q + (1 - lam) k, lam k + (1 - lam) q): apart for lam > 1, together for lam < 1.

    >>> [v.tolist() for v in mixed_pair(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]), 2.0)]
    [[[2.0, -1.0]], [[-1.0, 2.0]]]
    """
    return lam * q + (1 - lam) * k, lam * k + (1 - lam) * q


def mixed_scores(query: Tensor, queue: Tensor, lam: Tensor, permutation: Tensor) -> Tensor:
    """Scores [B, K] of queries with the queue lam Q + (1 - lam) Q[permutation].

    One factor a row needs no mixed queue: the scores are mixed where that is the smaller matrix.

    >>> mixed_scores(torch.eye(2), torch.eye(2), torch.tensor(0.75), torch.tensor([1, 0])).tolist()
    [[0.75, 0.25], [0.25, 0.75]]
    """
    by_row = lam.ndim == 0 or lam.shape[-1] == 1
    if by_row and len(query) <= queue.shape[1]:
        found, row = query @ queue.T, lam.reshape(-1)
        return row * found + (1 - row) * found[:, permutation]
    return query @ (lam * queue + (1 - lam) * queue[permutation]).T


class PositiveExtrapolation:
    """Draws lam ~ 1 + Beta(alpha, alpha) (or uniform) and pushes the pair apart.

    Args:
        alpha: of the symmetric Beta distribution.
        granularity: one factor a ``"batch"``, a ``"sample"`` or a coordinate (``"dim"``).
        distribution: ``"beta"`` or ``"uniform"``.
        interpolate: without the 1: pairs become easier, which the paper rejects.
        normalise: unit rows again afterwards. detach: no gradient through the other end (an ablation).
        start: the epoch from which it works; see :class:`~lineament.losses.InfoNCE`.

    >>> lam = PositiveExtrapolation(2.0).draw((4, 8), torch.Generator().manual_seed(0))
    >>> bool(1 < lam < 2)
    True
    """

    kind = "positive"

    def __init__(
        self,
        alpha: float = 2.0,
        granularity: Granularity = "batch",
        *,
        distribution: Literal["beta", "uniform"] = "beta",
        interpolate: bool = False,
        normalise: bool = False,
        detach: bool = False,
        start: int = 0,
    ):
        self.alpha = number("alpha", alpha, low=0, open_low=True)
        self.granularity = one_of("granularity", granularity, ("batch", "sample", "dim"))
        self.distribution = one_of("distribution", distribution, ("beta", "uniform"))
        self.interpolate, self.normalise, self.detach = interpolate, normalise, detach
        self.start = number("start", start, low=0)

    def draw(self, shape: tuple[int, int], generator: torch.Generator, like: Tensor | None = None) -> Tensor:
        """The factor of a batch [B, d]."""
        lam = drawn(shape, self.alpha, self.granularity, self.distribution, generator, like)
        return lam if self.interpolate else lam + 1

    def __call__(self, q: Tensor, k: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
        query, key = mixed_pair(q, k, lam)
        if self.detach:
            key = mixed_pair(q.detach(), k, lam)[1]
        return (F.normalize(query, dim=1), F.normalize(key, dim=1)) if self.normalise else (query, key)


class NegativeInterpolation:
    """Draws lam ~ Beta(alpha, alpha) (or uniform) and a permutation, and mixes the queue with itself for one step; what is stored stays.

    >>> NegativeInterpolation(1.6, "sample").draw((4, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([4, 1])
    """

    kind = "negative"

    def __init__(
        self,
        alpha: float = 1.6,
        granularity: Granularity = "batch",
        *,
        distribution: Literal["beta", "uniform"] = "beta",
        start: int = 0,
    ):
        self.alpha = number("alpha", alpha, low=0, open_low=True)
        self.granularity = one_of("granularity", granularity, ("batch", "sample", "dim"))
        self.distribution = one_of("distribution", distribution, ("beta", "uniform"))
        self.start = number("start", start, low=0)

    def draw(self, shape: tuple[int, int], generator: torch.Generator, like: Tensor | None = None) -> Tensor:
        """The factor of a queue [K, d]."""
        return drawn(shape, self.alpha, self.granularity, self.distribution, generator, like)

    def __call__(self, query: Tensor, queue: Tensor, lam: Tensor, permutation: Tensor) -> Tensor:
        require(len(queue) > 1, f"queue: got {show(queue)}, expected two rows or more to mix")
        return mixed_scores(query, queue, lam, permutation)


class HardMixing:
    """MoCHi: of each query's hardest past keys, mixtures of two and mixtures with the query itself join its negatives.

    h = normalise(a n_i + (1 - a) n_j) with a ~ U(0, 1), and normalise(b q + (1 - b) n_j) with b ~ U(0, 1/2). Kalantidis et al. 2020, arXiv 2010.01028.

    Args:
        top: how many of the hardest keys are mixed. mixed, with_query: mixtures of either kind a query; each costs a row of numbers a query.
        start: the epoch from which it works.

    >>> mixing = HardMixing(2, mixed=3, with_query=1)
    >>> mixing(torch.eye(2), torch.eye(2), torch.Generator().manual_seed(0)).shape
    torch.Size([2, 4, 2])
    """

    kind = "hard"

    def __init__(self, top: int = 256, *, mixed: int = 256, with_query: int = 64, start: int = 0):
        self.top = number("top", top, low=1, integer=True)
        self.mixed = number("mixed", mixed, low=0, integer=True)
        self.with_query = number("with_query", with_query, low=0, integer=True)
        require(mixed + with_query > 0, "mixed, with_query: got 0 of both, expected some mixtures")
        self.start = number("start", start, low=0)

    @torch.no_grad()
    def __call__(self, query: Tensor, queue: Tensor, generator: torch.Generator) -> Tensor:
        """Unit negatives [B, mixed + with_query, d] of queries [B, d], without gradients."""
        hardest = (query @ queue.T).topk(min(self.top, len(queue)), 1).indices

        def one(count: int) -> Tensor:
            at = torch.randint(hardest.shape[1], (len(query), count), generator=generator)
            return queue[hardest.gather(1, at.to(hardest.device))]

        def share(count: int) -> Tensor:
            return torch.rand(len(query), count, 1, generator=generator).to(queue)

        n = one(self.mixed + self.with_query)
        a, b = share(self.mixed), 0.5 * share(self.with_query)
        pairs = torch.lerp(n[:, : self.mixed], one(self.mixed), a)
        own = torch.lerp(n[:, self.mixed :], query[:, None], b)
        return F.normalize(torch.cat([pairs, own], 1), dim=2)


def drawn(
    shape: tuple[int, int],
    alpha: float,
    granularity: str,
    distribution: str,
    generator: torch.Generator,
    like: Tensor | None = None,
) -> Tensor:
    """Factors in (0, 1): (), [n, 1] or [n, d]."""
    size = {"batch": (), "sample": (shape[0], 1), "dim": shape}[granularity]
    options = {"generator": generator, "device": generator.device}
    options |= {"dtype": torch.float32 if like is None else like.dtype}
    if distribution == "uniform":
        return torch.rand(size, **options)
    if alpha > 0.5:
        # Exactly Beta(a, a), without rejection (Ulrich 1984): 1/2 + 1/2 √(1 - U^(2 / (2a - 1))) cos(2π V).
        found = torch.empty(size, dtype=options["dtype"], device=generator.device)
        # In parts that stay in the cache.
        parts = found.view(-1).split(1 << 16 if found.is_cpu else max(found.numel(), 1))
        for part in parts:
            root = (
                torch.rand(part.shape, **options)
                .pow_(2 / (2 * alpha - 1))
                .neg_()
                .add_(1)
                .clamp_(min=0)
                .sqrt_()
            )
            torch.rand(part.shape, generator=generator, out=part)
            part.mul_(2 * math.pi).cos_().mul_(root).mul_(0.5).add_(0.5)
        return found
    seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
    found = np.random.default_rng(seed).beta(alpha, alpha, size)
    return torch.as_tensor(found, dtype=options["dtype"], device=generator.device)
