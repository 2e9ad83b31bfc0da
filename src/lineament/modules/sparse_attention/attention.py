"""Full attention, attention over chosen blocks, and how far apart they are.

Shen et al. 2026, arXiv 2511.20102, sections 1.1, 1.3 and 1.6. This is the reference form, which builds the weights; use it to check faster ones, and for
sequences whose weights fit in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, one_of
from lineament.core.results import Readable
from lineament.modules.sparse_attention.selection import check_heads


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Tensor | None = None,
    *,
    block_size: int = 16,
    scale: float | None = None,
) -> Tensor:
    """Causal soft-max attention over all tokens, or over the tokens of the chosen blocks.

    Args:
        q: [batch, tokens, query heads, size]. k, v: [batch, tokens, key heads, size].
        blocks: from :func:`select_blocks`; all by default.

    Returns:
        [batch, tokens, query heads, size].

    >>> x = torch.randn(1, 5, 2, 4)
    >>> bool(torch.allclose(attention(x, x, x)[:, 0], x[:, 0]))
    True
    """
    return mixed(weights(q, k, blocks, block_size=block_size, scale=scale), v)


def weights(
    q: Tensor, k: Tensor, blocks: Tensor | None = None, *, block_size: int = 16, scale: float | None = None
) -> Tensor:
    """The attention weights, [batch, tokens, query heads, tokens]."""
    groups = check_heads(q, k)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    logits = torch.einsum("bthd,bjhd->bthj", q, k.repeat_interleave(groups, 2)) * factor
    allowed = visible(q.shape[1], q.device)[:, None]
    if blocks is not None:
        allowed = allowed & token_mask(blocks, q, block_size)
    return logits.masked_fill(~allowed, -torch.inf).softmax(-1)


def mixed(weights: Tensor, v: Tensor) -> Tensor:
    """Values by their weights."""
    return torch.einsum("bthj,bjhd->bthd", weights, v.repeat_interleave(weights.shape[2] // v.shape[2], 2))


def visible(tokens: int, device: torch.device) -> Tensor:
    """j <= t, [tokens, tokens]."""
    return torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()


def token_mask(blocks: Tensor, q: Tensor, block_size: int) -> Tensor:
    """Chosen blocks as tokens, [batch, tokens, query heads, tokens]."""
    chosen = blocks.repeat_interleave(q.shape[2] // blocks.shape[2], 2)
    return chosen.repeat_interleave(block_size, 3)[..., : q.shape[1]]


@dataclass(frozen=True)
class Alignment(Readable):
    """``full_to_sparse``: the loss that moves full attention's outputs; ``sparse_to_full``: the one that moves the sparse ones; their weighted sum."""

    full_to_sparse: Tensor
    sparse_to_full: Tensor
    total: Tensor


def alignment_loss(
    full: Tensor,
    sparse: Tensor,
    *,
    full_weight: float = 1.0,
    sparse_weight: float = 1.0,
    form: Literal["smooth_l1", "l2"] = "smooth_l1",
    beta: float = 1.0,
) -> Alignment:
    """Distance of the two outputs, each once with the other held still; means over all elements.

    With equal weights the gradient is that of one distance without stop-gradients.

    >>> alignment_loss(torch.zeros(2), torch.ones(2)).total.item()
    1.0
    """
    one_of("form", form, ("smooth_l1", "l2"))
    number("beta", beta, low=0, open_low=True)

    def distance(moved: Tensor, still: Tensor) -> Tensor:
        if form == "l2":
            return F.mse_loss(moved, still.detach())
        return F.smooth_l1_loss(moved, still.detach(), beta=beta)

    one, two = distance(full, sparse), distance(sparse, full)
    return Alignment(one, two, full_weight * one + sparse_weight * two)


@dataclass(frozen=True)
class SparsityReport(Readable):
    """Of each token and query head, [batch, tokens, heads].

    ``kept``: the full weight on chosen blocks; ``entropy``: of the full weights, in nats; ``first``: the full weight on token 0;
    ``error``: |full - sparse|; ``bound``: (1 - kept) (max |v| of what is left out + |sparse|), which it never exceeds.
    """

    kept: Tensor
    entropy: Tensor
    first: Tensor
    error: Tensor
    bound: Tensor


def sparsity_report(
    q: Tensor, k: Tensor, v: Tensor, blocks: Tensor, *, block_size: int = 16, scale: float | None = None
) -> SparsityReport:
    """What the choice of blocks leaves out, and what it costs at most.

    >>> x = torch.randn(1, 9, 2, 4)
    >>> from lineament.modules.sparse_attention.selection import select_blocks
    >>> found = sparsity_report(x, x, x, select_blocks(x, x, block_size=2, top_k=2), block_size=2)
    >>> bool((found.error <= found.bound + 1e-6).all())
    True
    """
    full = weights(q, k, scale=scale)
    chosen = token_mask(blocks, q, block_size) & visible(q.shape[1], q.device)[:, None]
    dropped = ~chosen & visible(q.shape[1], q.device)[:, None]
    sparse = attention(q, k, v, blocks, block_size=block_size, scale=scale)
    lost = (full * dropped).sum(-1)
    norms = v.norm(dim=3).repeat_interleave(q.shape[2] // v.shape[2], 2).transpose(1, 2)
    largest = torch.where(dropped, norms[:, None], 0).amax(-1)
    bound = torch.where(dropped.any(-1), lost * (largest + sparse.norm(dim=3)), 0)
    return SparsityReport(
        (full * chosen).sum(-1),
        torch.special.entr(full).sum(-1),
        full[..., 0],
        (mixed(full, v) - sparse).norm(dim=3),
        bound,
    )


def rotary(x: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotary positions in the half-rotation convention, angles t θ^(-2i / size), on [batch, tokens, heads, size].

    >>> rotary(torch.ones(1, 1, 1, 2)).flatten().tolist()
    [1.0, 1.0]
    """
    half = x.shape[3] // 2
    rate = theta ** (-torch.arange(half, dtype=torch.float64, device=x.device) * 2 / x.shape[3])
    angle = torch.arange(x.shape[1], dtype=torch.float64, device=x.device)[:, None, None] * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    one, two = x[..., :half], x[..., half:]
    return torch.cat([one * cos - two * sin, two * cos + one * sin], 3)
