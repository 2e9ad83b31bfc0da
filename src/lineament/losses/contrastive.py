"""Pull like samples together, push the others apart: supervised contrastive, NT-Xent and spectral losses, without an n x n matrix.

SupCon: Khosla et al. 2020, as in Xue et al., "Investigating the Benefits of Projection Head for Representation Learning", ICLR 2024, arXiv
2403.11391. Spectral: HaoChen et al. 2021. Positives enter through the sums of their classes; log-sum-exps are made by rows in chunks and again in
the backward pass.
"""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.core.shards import joined, place_in_training

# Entries of the similarity matrix that lie in memory at once.
_ENTRIES = 1 << 20
# From here on exp(-2 / temperature), the smallest exponential there may be, is far from what float32 cannot hold.
_COLD = 0.03


class SupCon(nn.Module):
    """Mean over anchors i of -(1/|P(i)|) Σ_{p in P(i)} s_ip + ln Σ_{a ≠ i} exp(s_ia), s the cosine over the temperature.

    Args:
        temperature: of the cosines.
        on_missing: what an anchor without another sample of its label gets: ``"raise"``, or ``"skip"`` with a warning.

    Called with embeddings [n, d] and labels [n], or [n / views] where the views lie one after the other; rows of label -1 are left out. In a process group the samples of all processes are
    compared in training: the loss is that of the whole batch in each, and its gradients are right as DistributedDataParallel averages them.

    >>> round(SupCon(0.5)(torch.ones(4, 3), torch.zeros(4, dtype=torch.long)).item(), 4) == round(math.log(3), 4)
    True
    """

    def __init__(self, temperature: float = 0.1, on_missing: Literal["raise", "skip"] = "raise"):
        super().__init__()
        self.temperature = number("temperature", temperature, low=0, open_low=True)
        self.on_missing = one_of("on_missing", on_missing, ("raise", "skip"))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss.

        Raises:
            InputError: other lengths, an embedding without direction, an anchor without positive.
        """
        unit = directions(embeddings)
        require(not labels.is_floating_point(), f"labels: got {show(labels)}, expected whole numbers")
        require(
            labels.ndim == 1 and len(labels) > 0 and len(unit) % len(labels) == 0,
            f"labels: got {show(labels)} beside {show(embeddings)}, expected one a row, or one a sample whose views lie one after the other",
        )
        labels = labels.repeat(len(unit) // len(labels))
        unit, labels = unit[labels >= 0], labels[labels >= 0]
        if self.training:
            unit, labels = joined(unit), joined(labels)
        if not len(unit):
            return embeddings.sum() * 0
        classes = labels.unique(return_inverse=True)[1]
        counts = torch.bincount(classes)[classes] - 1
        some = counts > 0
        if not bool(some.all()):
            missing = f"{int((~some).sum())} of {len(some)} samples have no other sample of their label"
            if self.on_missing == "raise":
                raise InputError(f"labels: {missing}; expected two or more of each, or on_missing='skip'")
            warnings.warn(f"{missing} and are left out", stacklevel=2)
        sums = torch.zeros_like(unit[: int(classes.max()) + 1]).index_add(0, classes, unit)
        like = (unit * (sums[classes] - unit)).sum(1) / counts.clamp(min=1) / self.temperature
        with exact(unit):
            each = others_logsumexp(unit, self.temperature) - like
        return each[some].mean() if bool(some.any()) else each.sum() * 0


class NTXent(nn.Module):
    """SupCon with every sample its own class: the loss of SimCLR. Rows are view after view.

    >>> NTXent(0.5)(torch.randn(8, 4)).ndim
    0
    """

    def __init__(self, temperature: float = 0.5, views: int = 2):
        super().__init__()
        self.loss = SupCon(temperature)
        self.views = number("views", views, low=2, integer=True)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The loss of embeddings [views * n, d]."""
        require(
            len(embeddings) % self.views == 0,
            f"embeddings: got {len(embeddings)} rows, expected {self.views} views of each sample",
        )
        rank, count = place_in_training()
        samples = torch.arange(len(embeddings) // self.views, device=embeddings.device)
        return self.loss(embeddings, samples * count + rank)


class Spectral(nn.Module):
    """-2 E z·z' + E (z·z'')², z and z' views of one sample, z'' of another: by second moments.

    Args:
        unbiased: leave a sample's own pair out of the second mean.

    >>> round(Spectral()(torch.eye(2), torch.eye(2)).item(), 4)
    -1.5
    """

    def __init__(self, unbiased: bool = False):
        super().__init__()
        self.unbiased = unbiased

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """The loss of two views' embeddings [n, d], not normalised."""
        require(
            first.shape == second.shape and first.ndim == 2,
            f"second: got {show(second)}, expected the shape of the first view, {show(first)}",
        )
        require(
            bool(first.isfinite().all() & second.isfinite().all()), "first, second: NaN or infinity in a row"
        )
        n, first, second = len(first), wide(first), wide(second)
        own = (first * second).sum(1)
        with exact(first):
            spread = ((first.T @ first) * (second.T @ second)).sum() / n**2
        if self.unbiased:
            require(n > 1, "first: one sample, expected two or more for the unbiased form")
            spread = (spread * n**2 - own.square().sum()) / (n * (n - 1))
        return spread - 2 * own.mean()


def directions(embeddings: Tensor) -> Tensor:
    """Unit rows in float32 or more; an error for a row without direction."""
    if not isinstance(embeddings, Tensor) or embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise InputError(f"embeddings: got {show(embeddings)}, expected floats [samples, dimension]")
    rows = wide(embeddings)
    norms = rows.detach().norm(dim=1)
    require(bool(norms.isfinite().all()), "embeddings: NaN or infinity in a row")
    require(bool((norms > 0).all()), "embeddings: a row is zero, so that its cosine is not defined")
    return F.normalize(rows, dim=1)


def wide(x: Tensor) -> Tensor:
    """In float32 where it is in half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def exact(x: Tensor) -> torch.autocast:
    """A block whose products keep the numbers' own type also under autocast: exponentials of scores over a temperature need them."""
    return torch.autocast(x.device.type, enabled=False)


def others_logsumexp(unit: Tensor, temperature: float) -> Tensor:
    """ln Σ_{a ≠ i} exp(z_i · z_a / temperature) of each row, [n]."""
    found: Any = _OthersLogSumExp.apply(unit, temperature)
    return found


class _OthersLogSumExp(torch.autograd.Function):
    """Rows in chunks; the backward makes the exponentials anew.

    The matrix of similarities is symmetric: of each chunk only what lies right of it is computed, and serves its rows and its columns. Exponentials are taken of the
    difference to 1 / temperature, the largest there may be; below ``_COLD`` they may underflow, and each row has its own maximum and all its entries.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, temperature: float) -> Tensor:
        found = unit.new_zeros(len(unit))
        if temperature < _COLD:
            for rows in _chunks(len(unit)):
                found[rows] = _similarities(unit, rows, temperature).logsumexp(1)
        else:
            for rows in _chunks(len(unit)):
                each = _exponentials(unit, rows, temperature)
                found[rows] += each.sum(1)
                found[rows.stop :] += each[:, rows.stop - rows.start :].sum(0)
            found = found.log_().add_(1 / temperature)
        ctx.save_for_backward(unit, found)
        ctx.temperature = temperature
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        unit, lse = ctx.saved_tensors
        (upstream,) = grads
        gradient = torch.zeros_like(unit)
        if ctx.temperature < _COLD:
            for rows in _chunks(len(unit)):
                share = _similarities(unit, rows, ctx.temperature).sub_(lse[rows, None]).exp_()
                share *= upstream[rows, None]
                gradient[rows] += share @ unit
                gradient.addmm_(share.T, unit[rows])
            return gradient / ctx.temperature, None
        # What a row's and a column's sum say of an entry, at once.
        share = upstream * (1 / ctx.temperature - lse).exp_()
        for rows in _chunks(len(unit)):
            each = _exponentials(unit, rows, ctx.temperature)
            each *= share[rows, None] + share[rows.start :]
            gradient[rows].addmm_(each, unit[rows.start :])
            gradient[rows.stop :].addmm_(each[:, rows.stop - rows.start :].T, unit[rows])
        return gradient / ctx.temperature, None


def _chunks(n: int) -> list[slice]:
    size = max(1, _ENTRIES // n)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _similarities(unit: Tensor, rows: slice, temperature: float) -> Tensor:
    found = (unit[rows] @ unit.T).div_(temperature)
    found[:, rows].fill_diagonal_(-math.inf)
    return found


def _exponentials(unit: Tensor, rows: slice, temperature: float) -> Tensor:
    """exp((z_i · z_j - 1) / temperature) of some rows with themselves and all after them, 0 of each with itself."""
    found = (unit[rows] @ unit[rows.start :].T).sub_(1).div_(temperature).exp_()
    found.fill_diagonal_(0)
    return found
