"""Which blocks of the past may a query read? Causal block selection by mean keys.

Shen et al., "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space", ICML 2026, arXiv 2511.20102, section 1.2; MoBA
(Lu et al. 2025) scores otherwise. The best blocks are chosen exactly; the released kernel's approximate choice is not repeated.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, one_of, require, show

SCORINGS = ("group_softmax", "dot")


@torch.no_grad()
def select_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 16,
    top_k: int = 16,
    scoring: Literal["group_softmax", "dot"] = "group_softmax",
    scale: float | None = None,
) -> Tensor:
    """The blocks that each query reads: its own, and the best of those before it.

    Args:
        q: [batch, tokens, query heads, size]. k: [batch, tokens, key heads, size]; query head h reads key head h // (query heads / key heads).
        block_size, top_k: tokens of a block, and blocks of a query, its own included.
        scoring: ``"group_softmax"``: probabilities over the complete blocks, summed over the heads of a group, one choice a key head;
            ``"dot"``: q · mean key, a choice a query head, as in MoBA.
        scale: of the logits, 1 / √size by default.

    Returns:
        [batch, tokens, key heads (query heads for "dot"), blocks] booleans.

    >>> x = torch.randn(1, 9, 2, 4)
    >>> select_blocks(x, x, block_size=4, top_k=2).sum(-1)[0, :, 0].tolist()
    [1, 1, 1, 1, 2, 2, 2, 2, 2]
    """
    groups = check_heads(q, k)
    number("block_size", block_size, low=1, integer=True)
    number("top_k", top_k, low=1, integer=True)
    one_of("scoring", scoring, SCORINGS)
    batch, tokens, heads, size = q.shape
    means = block_means(k, block_size)
    blocks = means.shape[1]
    position = torch.arange(tokens, device=q.device)
    own, number_of = position // block_size, torch.arange(blocks, device=q.device)
    past = number_of < own[:, None]
    grouped = q.view(batch, tokens, heads // groups, groups, size)
    found = torch.einsum("btkgd,bnkd->btkgn", grouped, means)
    if scoring == "group_softmax":
        found = found * (size**-0.5 if scale is None else scale)
        complete = (number_of < (position + 1)[:, None] // block_size)[None, :, None, None]
        whole = found.masked_fill(~complete, -math.inf).logsumexp(-1, keepdim=True)
        score = torch.where(past[None, :, None, None], (found - whole).exp(), 0).sum(3)
    else:
        score = found.flatten(2, 3)
    past, current = past[:, None], (number_of == own[:, None])[:, None]
    score = score.masked_fill(~past, -math.inf).masked_fill(current, math.inf)
    best = score.topk(min(top_k, blocks), dim=-1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(-1, best, True) & (past | current)


def block_means(k: Tensor, block_size: int) -> Tensor:
    """The mean key of each block, the last of which may be short, [batch, blocks, heads, size]."""
    batch, tokens, heads, size = k.shape
    blocks = -(-tokens // block_size)
    padded = F.pad(k, (0, 0, 0, 0, 0, blocks * block_size - tokens))
    count = (tokens - torch.arange(blocks, device=k.device) * block_size).clamp(max=block_size)
    return padded.view(batch, blocks, block_size, heads, size).sum(2) / count[:, None, None]


def check_heads(q: Tensor, k: Tensor) -> int:
    """Query heads a key head."""
    require(
        q.ndim == 4 and k.ndim == 4 and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3],
        f"k: got {show(k)} beside queries {show(q)}, expected [batch, tokens, heads, size] with the same batch, tokens and size",
    )
    require(
        q.shape[2] % k.shape[2] == 0,
        f"q: {q.shape[2]} query heads cannot share {k.shape[2]} key heads evenly",
    )
    return q.shape[2] // k.shape[2]
