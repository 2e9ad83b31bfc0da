"""Each query's blocks copied side by side: for few queries, as in decoding, and for large groups with small blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lineament.core.batching import auto_batch
from lineament.modules.sparse_attention.blocks import Blocks

WIDE = True
# Copied key elements held at once.
COPIED = 2**22


def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp; the keys may be more than the layout's and in a smaller dtype, as in the buffer of a cache."""
    rows, group = _rows(q, indices)
    unit = _unit(k, layout)
    keys, values = _units(k, unit), _units(v, unit)
    out = q.new_empty(*rows.shape[:2], v.shape[3])
    lse = q.new_empty(rows.shape[:2])
    read, step = _reading(q, k, indices, layout, unit)

    def attended(start: int, stop: int) -> None:
        part = slice(start, stop)
        places, seen = read(part)
        logits = torch.bmm(rows[part] * scale, _chosen(keys, places, unit, q.dtype).mT)
        logits.masked_fill_(~seen[:, None], -torch.inf)
        top = logits.amax(-1, keepdim=True).clamp_(min=torch.finfo(q.dtype).min)
        weights = logits.sub_(top).exp_()
        total = weights.sum(-1, keepdim=True)
        torch.bmm(weights, _chosen(values, places, unit, q.dtype), out=out[part])
        out[part].div_(total.clamp(min=1e-30))
        lse[part] = (total.log_() + top)[..., 0]

    for _ in auto_batch(attended, len(rows), most=step):
        pass
    return _heads(out, q, indices, group), _heads(lse[..., None], q, indices, group)[..., 0]


def backward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float,
    lse: Tensor, d_out: Tensor, delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    rows, group = _rows(q, indices)
    d_rows, _ = _rows(d_out, indices)
    totals, deltas = (_rows(x[..., None], indices)[0] for x in (lse, delta))
    unit = _unit(k, layout)
    keys, values = _units(k, unit), _units(v, unit)
    d_q, d_k, d_v = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
    read, step = _reading(q, k, indices, layout, unit)

    def differentiated(start: int, stop: int) -> None:
        part = slice(start, stop)
        places, seen = read(part)
        chosen = _chosen(keys, places, unit, q.dtype)
        logits = torch.bmm(rows[part] * scale, chosen.mT) - totals[part]
        weights = torch.where(seen[:, None], logits.exp_(), 0)
        d_weights = torch.bmm(d_rows[part], _chosen(values, places, unit, q.dtype).mT)
        d_logits = d_weights.sub_(deltas[part]).mul_(weights).mul_(scale)
        d_q[part] = torch.bmm(d_logits, chosen)
        moved = torch.bmm(d_logits.mT, rows[part]).view(-1, keys.shape[1])
        turned = torch.bmm(weights.mT, d_rows[part]).view(-1, values.shape[1])
        # Added when all of them are there: a part for which memory did not do is computed again.
        flat = places.flatten()
        d_k.index_add_(0, flat, moved)
        d_v.index_add_(0, flat, turned)

    for _ in auto_batch(differentiated, len(rows), most=step):
        pass
    return _heads(d_q, q, indices, group), d_k.view(k.shape), d_v.view(v.shape)


def _unit(k: Tensor, layout: Blocks) -> int:
    """Tokens that are copied as one: whole blocks, where each begins at a multiple of its size."""
    return layout.size if layout.regular and k.shape[2] % layout.size == 0 else 1


def _units(x: Tensor, unit: int) -> Tensor:
    return x.reshape(-1, unit * x.shape[3])


def _chosen(x: Tensor, places: Tensor, unit: int, dtype: torch.dtype) -> Tensor:
    """The keys or values of each row, [rows, tokens, size]."""
    found = x.index_select(0, places.flatten())
    return found.view(len(places), places.shape[1] * unit, -1).to(dtype)


def _rows(x: Tensor, indices: Tensor) -> tuple[Tensor, int]:
    """[batch, query heads, queries, size] as [batch · selecting heads · queries, heads a selection, size]."""
    group = x.shape[1] // indices.shape[1]
    return x.unflatten(1, (-1, group)).transpose(2, 3).flatten(0, 2), group


def _heads(rows: Tensor, q: Tensor, indices: Tensor, group: int) -> Tensor:
    batch, heads, queries = indices.shape[:3]
    return rows.view(batch, heads, queries, group, -1).transpose(2, 3).reshape(*q.shape[:3], -1)


def _reading(
    q: Tensor, k: Tensor, indices: Tensor, layout: Blocks, unit: int
) -> tuple[Callable[[slice], tuple[Tensor, Tensor]], int]:
    """What a part of the rows reads, the flat numbers of units and which of their tokens it sees; and how many rows at once."""
    _, heads, queries, slots = indices.shape
    rows = indices.flatten(0, 2)
    number = torch.arange(len(rows), device=q.device)
    row = torch.div(number, heads * queries, rounding_mode="floor")
    # Selecting heads are the key heads, or several share one.
    head = torch.div(number, queries, rounding_mode="floor").remainder_(heads)
    head = torch.div(head, heads // k.shape[1], rounding_mode="floor")
    base = (row * k.shape[1] + head) * (k.shape[2] // unit)
    query = number.remainder(queries)
    shared = row if layout.starts.shape[0] > 1 else None
    within = layout.within[0 if shared is None else shared, query]
    place = torch.arange(layout.size, device=q.device)

    def read(part: slice) -> tuple[Tensor, Tensor]:
        chosen = rows[part]
        found = chosen.clamp(min=0)
        if unit == 1:
            first = layout.starts[0 if shared is None else shared[part, None], found]
            found = (first[..., None] + place).clamp_(max=k.shape[2] - 1).flatten(1)
        last = torch.where(chosen < 0, -1, layout.size - 1)
        # Of its own block, the first, a query sees what is not behind it.
        last[:, 0] = torch.where(chosen[:, 0] < 0, -1, within[part])
        return found + base[part, None], (place <= last[..., None]).flatten(1)

    return read, max(1, COPIED // (slots * layout.size * k.shape[3]))
