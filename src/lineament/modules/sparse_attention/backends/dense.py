"""Attention with a mask over all keys: for short sequences, and the oracle of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def attended(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float, *, lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Output and log-sum-exp where ``allowed``, [batch, any number of heads, queries, keys]; a query that may see nothing gives zeros."""
    groups = q.shape[1] // k.shape[1]
    sees = allowed.any(-1, keepdim=True)
    allowed, sees = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (allowed | ~sees, sees))
    if not lse:
        return torch.where(sees, _library(q, k, v, allowed, scale), 0), None
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    # One exponential of each logit, and no copy of them.
    logits = torch.matmul(q, k.mT).to(wide).mul_(scale).masked_fill_(~allowed, -torch.inf)
    highest = logits.detach().amax(-1, keepdim=True)
    chance = logits.sub_(highest).exp_()
    total = chance.sum(-1, keepdim=True)
    out = (torch.matmul(chance.to(v.dtype), v).to(wide) / total).to(v.dtype)
    return torch.where(sees, out, 0), torch.where(sees, highest + total.log(), -torch.inf)[..., 0]


def _library(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale, enable_gqa=True)
