"""The weights of full attention, a few queries at a time, so that no [tokens, tokens] matrix is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.modules.sparse_attention.blocks import Blocks

# Weights held at once.
WEIGHTS = 2**21


@dataclass(frozen=True)
class Tile:
    """``weights``: of ``queries`` on all keys up to the last of them, [batch, query heads, queries, keys], zero for padding;
    ``entropy``: of each query, in nats."""

    queries: slice
    weights: Tensor
    entropy: Tensor


def weight_tiles(q: Tensor, k: Tensor, layout: Blocks, scale: float | None = None) -> Iterator[Tile]:
    """Softmax weights in at least float32, tile by tile."""
    rows, heads, queries, size = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    factor = size**-0.5 if scale is None else scale
    grouped = q.unflatten(1, (k.shape[1], -1)).to(wide) * factor
    keys = k[:, :, : layout.keys].to(wide)
    position = torch.arange(layout.keys, device=q.device)
    # At least a few rows, for products of single rows are slow.
    step = max(8, WEIGHTS // (rows * heads * layout.keys))
    for start in range(0, queries, step):
        part = slice(start, min(start + step, queries))
        stop = layout.offset + part.stop
        asked = grouped[:, :, :, part]
        logits = torch.matmul(asked.flatten(2, 3), keys[:, :, :stop].mT)
        logits = logits.unflatten(2, asked.shape[2:4]).flatten(1, 2)
        at = position[layout.offset + part.start : stop, None]
        lowest = torch.finfo(wide).min
        if layout.regular:
            # Only the keys of the tile itself may lie behind a query.
            logits[..., layout.offset + part.start :].masked_fill_(position[layout.offset + part.start : stop] > at, lowest)  # fmt: skip
        else:
            seen = (position[:stop] >= layout.begins[:, part, None]) & (position[:stop] <= at)
            logits.masked_fill_(~seen[:, None], lowest)
        logits -= logits.amax(-1, keepdim=True)
        weights = logits.exp()
        total = weights.sum(-1, keepdim=True)
        weights /= total
        entropy = total[..., 0].log() - (weights * logits.clamp(min=-1e4)).sum(-1)
        if not layout.regular:
            real = (layout.own[:, None, part] >= 0).to(wide)
            weights, entropy = weights * real[..., None], entropy * real
        yield Tile(part, weights, entropy)


def by_block(weights: Tensor, layout: Blocks) -> Tensor:
    """The weight on each block, [batch, heads, queries, blocks], of weights on the first keys."""
    keys = weights.shape[-1]
    if layout.regular:
        count = -(-keys // layout.size)
        padded = F.pad(weights, (0, count * layout.size - keys))
        found = padded.unflatten(-1, (count, layout.size)).sum(-1)
        return F.pad(found, (0, layout.count - count))
    index = layout.of_keys()[:, :keys].remainder(layout.count + 1)[:, None, None].expand(weights.shape)
    found = weights.new_zeros(*weights.shape[:3], layout.count + 1)
    return found.scatter_add_(3, index, weights)[..., :-1]


def by_distance(tile: Tile, offset: int) -> Tensor:
    """The weight at each distance from the query, summed over the tile's queries, [batch, heads, distances from 0]."""
    count, first = tile.weights.shape[2], offset + tile.queries.start
    # With rows one longer, column c of row i is key c + i - (count - 1): the columns are distances.
    padded = F.pad(tile.weights, (count - 1, 0)).contiguous()
    width = padded.shape[3]
    stride = padded.stride()
    shape = (*padded.shape[:3], first + count)
    return padded.as_strided(shape, (stride[0], stride[1], width + 1, 1)).sum(2).flip(-1)
