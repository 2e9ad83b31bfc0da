"""Block by block: the queries that chose a block are multiplied with it as one matrix, and each query's shares are merged by their log-sum-exp.

Keys and values are read where they lie. Sorted by block, the (query, slot) pairs are cut into tiles of equal size, the last of a block being filled up
with an empty query, so that one batched product serves many blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core.batching import auto_batch
from lineament.modules.sparse_attention.blocks import Blocks

WIDE = True
# Rows of a tile, logits of one batched product, and output elements of the pairs held at once.
ROWS, LOGITS, SHARES = 128, 2**19, 2**22


def forward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3])
    keys, values = layout.split(k), layout.split(v)

    def attend_part(at: tuple[int, int], shared: int, heads: slice, part: slice) -> None:
        row, head = at
        chosen, queries = indices[row, head, part], _padded(q[row, heads, part] * scale)
        pairs, group = chosen.numel(), queries.shape[1]
        shares = q.new_empty(pairs + 1, group, v.shape[3])
        tops, sums = (q.new_empty(pairs + 1, group) for _ in range(2))
        if bool((missing := chosen.flatten() < 0).any()):
            # Slots without a block: no tile writes them, and they weigh nothing.
            for x, value in ((shares, 0.0), (tops, -torch.inf), (sums, 0.0)):
                x[:-1][missing] = value

        def attended(pair: Tensor, query: Tensor, block: Tensor, seen: Tensor | None) -> None:
            logits = _logits(queries, keys[row, shared], query, block, seen)
            top = logits.amax(-1, keepdim=True)
            weights = logits.sub_(top).exp_()
            found = torch.bmm(weights, values[row, shared].index_select(0, block))
            shares.index_copy_(0, pair, found.unflatten(1, (-1, group)).flatten(0, 1))
            tops.index_copy_(0, pair, top.view(-1, group))
            sums.index_copy_(0, pair, weights.sum(-1).view(-1, group))

        for tiles in _tiles(chosen, layout, row, part, group):
            tiles.each(attended)
        slots = chosen.shape[1]
        shares, tops, sums = (x[:-1].unflatten(0, (-1, slots)) for x in (shares, tops, sums))
        top = tops.amax(1, keepdim=True)
        merge = (tops - top.clamp(min=torch.finfo(q.dtype).min)).exp()
        total = (merge * sums).sum(1)
        merge.div_(total.clamp(min=1e-30)[:, None])
        out[row, heads, part] = shares.mul_(merge[..., None]).sum(1).transpose(0, 1)
        lse[row, heads, part] = (total.log() + top[:, 0]).T

    for where in _parts(q, v, indices):
        attend_part(*where)
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, layout: Blocks, scale: float,
    lse: Tensor, d_out: Tensor, delta: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v."""
    keys, values = layout.split(k), layout.split(v)
    d_q, d_k, d_v = torch.zeros_like(q), torch.zeros_like(keys), torch.zeros_like(values)

    def differentiate_part(at: tuple[int, int], shared: int, heads: slice, part: slice) -> None:
        row, head = at
        chosen, queries, d_rows = (
            indices[row, head, part], _padded(q[row, heads, part]), _padded(d_out[row, heads, part])
        )  # fmt: skip
        # An empty query has no gradient, whatever its weights.
        totals, deltas = (_padded(x[row, heads, part, None])[..., 0] for x in (lse, delta))
        group = queries.shape[1]
        moved = torch.zeros_like(queries)

        def differentiated(pair: Tensor, query: Tensor, block: Tensor, seen: Tensor | None) -> None:
            logits = _logits(queries, keys[row, shared], query, block, seen, scale)
            weights = logits.sub_(_tile(totals, query, block)[..., None]).exp_()
            d_tile = _tile(d_rows, query, block)
            turned = torch.bmm(weights.mT, d_tile)
            d_weights = torch.bmm(d_tile, values[row, shared].index_select(0, block).mT)
            d_logits = d_weights.sub_(_tile(deltas, query, block)[..., None]).mul_(weights).mul_(scale)
            pulled = torch.bmm(d_logits.mT, _tile(queries, query, block))
            found = torch.bmm(d_logits, keys[row, shared].index_select(0, block))
            # Added when all of them are there: tiles for which memory did not do are computed again.
            d_v[row, shared].index_add_(0, block, turned)
            d_k[row, shared].index_add_(0, block, pulled)
            moved.index_add_(0, query, found.unflatten(1, (-1, group)).flatten(0, 1))

        for tiles in _tiles(chosen, layout, row, part, group):
            tiles.each(differentiated)
        d_q[row, heads, part] = moved[:-1].transpose(0, 1)

    for where in _parts(q, v, indices):
        differentiate_part(*where)
    return d_q, layout.joined(d_k), layout.joined(d_v)


@dataclass(frozen=True)
class _Tiles:
    """``pair`` and ``query`` of each place, [tiles, places]; the ``block`` of each tile; for own blocks how far each place sees."""

    pair: Tensor
    query: Tensor
    block: Tensor
    last: Tensor | None
    size: int
    group: int

    def each(self, work: Callable[[Tensor, Tensor, Tensor, Tensor | None], None]) -> None:
        """Work on some tiles at a time, on fewer where memory does not do: on their pairs and queries, flat, their blocks, and what is seen of these."""
        place = torch.arange(self.size, device=self.pair.device)

        def some(start: int, stop: int) -> None:
            part, seen = slice(start, stop), None
            if self.last is not None:
                seen = (place <= self.last[part, :, None]).repeat_interleave(self.group, 1)
            work(self.pair[part].flatten(), self.query[part].flatten(), self.block[part], seen)

        most = max(1, LOGITS // max(1, self.pair.shape[1] * self.group * self.size))
        for _ in auto_batch(some, len(self.block), most=most):
            pass


def _tiles(chosen: Tensor, layout: Blocks, row: int, part: slice, group: int):
    """The tiles of the own blocks, then those of past blocks, which are complete and seen whole."""
    queries, slots = chosen.shape
    within = layout.within[row if len(layout.within) > 1 else 0, part]
    number = torch.arange(queries * slots, device=chosen.device).view(queries, slots)
    for own, columns in ((True, slice(0, 1)), (False, slice(1, None))):
        block, pair = chosen[:, columns].flatten(), number[:, columns].flatten()
        there = block >= 0
        block, pair = block[there], pair[there]
        if not len(block):
            continue
        block, order = block.sort(stable=True)
        pair = pair[order]
        counts = block.bincount(minlength=layout.count)
        places = min(max(8, ROWS // group), int(counts.max()))
        needed = (counts + places - 1) // places
        opened = torch.cat([needed.new_zeros(1), needed.cumsum(0)])
        rank = torch.arange(len(block), device=block.device) - (counts.cumsum(0) - counts)[block]
        target = opened[block] * places + rank
        table = pair.new_full((int(opened[-1]) * places,), queries * slots)
        table[target] = pair
        table = table.view(-1, places)
        query = torch.div(table, slots, rounding_mode="floor")
        last = torch.cat([within, within.new_full((1,), layout.size - 1)])[query] if own else None
        of_tile = torch.arange(layout.count, device=block.device).repeat_interleave(needed)
        yield _Tiles(table, query, of_tile, last, layout.size, group)


def _parts(q: Tensor, v: Tensor, indices: Tensor):
    """(row, selecting head), its key head, its query heads and a slice of the queries."""
    rows, selecting, queries, slots = indices.shape
    group = q.shape[1] // selecting
    step = max(1, SHARES // (slots * group * v.shape[3]))
    for row in range(rows):
        for head in range(selecting):
            for start in range(0, queries, step):
                heads = slice(head * group, (head + 1) * group)
                yield (row, head), head // (selecting // v.shape[1]), heads, slice(start, start + step)


def _padded(x: Tensor) -> Tensor:
    """[heads, queries, size] as [queries + an empty one, heads, size]."""
    return torch.cat([x.transpose(0, 1), x.new_zeros(1, len(x), x.shape[2])])


def _tile(x: Tensor, query: Tensor, block: Tensor) -> Tensor:
    """The rows of the queries by tile, [tiles, places · heads, ...]."""
    return x.index_select(0, query).unflatten(0, (len(block), -1)).flatten(1, 2)


def _logits(
    queries: Tensor,
    keys: Tensor,
    query: Tensor,
    block: Tensor,
    seen: Tensor | None,
    scale: float | None = None,
) -> Tensor:
    logits = torch.bmm(_tile(queries, query, block), keys.index_select(0, block).mT)
    if scale is not None:
        logits.mul_(scale)
    return logits if seen is None else logits.masked_fill_(~seen, -torch.inf)
