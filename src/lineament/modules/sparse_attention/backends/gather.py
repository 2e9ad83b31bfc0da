"""Each query's blocks copied side by side: for few queries, as in decoding, and for large groups with small blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from lineament.modules.sparse_attention.blocks import Blocks

# Copied key elements held at once.
COPIED = 2**22


def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the keys may be more than the layout's and in a smaller dtype, as in the buffer of a cache."""
    rows, group = _rows(q, indices)
    keys, values = k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    out = q.new_empty(*rows.shape[:2], v.shape[3])
    lse = q.new_empty(rows.shape[:2])
    for part, tokens, seen in _parts(q, k, indices, layout):
        logits = _logits(rows[part] * scale, keys, tokens, seen)
        top = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).min)
        weights = (logits - top).exp_()
        total = weights.sum(-1, keepdim=True)
        chosen = values.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).to(q.dtype)
        torch.div(torch.bmm(weights, chosen), total.clamp(min=1e-30), out=out[part])
        lse[part] = (total.log() + top)[..., 0]
    return _heads(out, q, indices, group), _heads(lse[..., None], q, indices, group)[..., 0]


def backward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float,
    lse: Tensor, d_out: Tensor, delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    rows, group = _rows(q, indices)
    d_rows, _ = _rows(d_out, indices)
    totals, deltas = (_rows(x[..., None], indices)[0] for x in (lse, delta))
    keys, values = k.reshape(-1, k.shape[3]), v.reshape(-1, v.shape[3])
    d_q, d_k, d_v = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
    for part, tokens, seen in _parts(q, k, indices, layout):
        logits = _logits(rows[part] * scale, keys, tokens, seen)
        weights = torch.where(logits == -torch.inf, 0, (logits - totals[part]).exp())
        flat = tokens.flatten()
        chosen = values.index_select(0, flat).unflatten(0, tokens.shape)
        d_logits = weights * (torch.bmm(d_rows[part], chosen.mT) - deltas[part]) * scale
        d_q[part] = torch.bmm(d_logits, keys.index_select(0, flat).unflatten(0, tokens.shape))
        d_k.index_add_(0, flat, torch.bmm(d_logits.mT, rows[part]).flatten(0, 1))
        d_v.index_add_(0, flat, torch.bmm(weights.mT, d_rows[part]).flatten(0, 1))
    return _heads(d_q, q, indices, group), d_k.view(k.shape), d_v.view(v.shape)


def _logits(rows: Tensor, keys: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
    chosen = keys.index_select(0, tokens.flatten()).unflatten(0, tokens.shape).to(rows.dtype)
    return torch.bmm(rows, chosen.mT).masked_fill_(~seen[:, None], -torch.inf)


def _rows(x: Tensor, indices: Tensor) -> tuple[Tensor, int]:
    """[batch, query heads, queries, size] as [batch · selecting heads · queries, heads a selection, size]."""
    group = x.shape[1] // indices.shape[1]
    return x.unflatten(1, (-1, group)).transpose(2, 3).flatten(0, 2), group


def _heads(rows: Tensor, q: Tensor, indices: Tensor, group: int) -> Tensor:
    batch, heads, queries = indices.shape[:3]
    return rows.view(batch, heads, queries, group, -1).transpose(2, 3).reshape(*q.shape[:3], -1)


def _parts(q: Tensor, k: Tensor, indices: Tensor, layout: Blocks):
    """Parts of the rows, with the flat key numbers that they read and which of those they see."""
    _, heads, queries, slots = indices.shape
    rows = indices.flatten(0, 2)
    number = torch.arange(len(rows), device=q.device)
    row = number // (heads * queries)
    # Selecting heads are the key heads, or several share one.
    head = number // queries % heads // (heads // k.shape[1])
    base = (row * k.shape[1] + head) * k.shape[2]
    shared = row if layout.starts.shape[0] > 1 else torch.zeros_like(row)
    place = torch.arange(layout.size, device=q.device)
    step = max(1, COPIED // (slots * layout.size * k.shape[3]))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        chosen, at = rows[part], shared[part]
        first = layout.starts[at[:, None], chosen.clamp(min=0)]
        tokens = first[..., None] + place
        last = torch.full_like(chosen, layout.size - 1)
        last[:, 0] = layout.within[at, number[part] % queries]
        seen = (place <= last[..., None]) & (chosen >= 0)[..., None]
        tokens = tokens.clamp(max=k.shape[2] - 1) + base[part, None, None]
        yield part, tokens.flatten(1), seen.flatten(1)
