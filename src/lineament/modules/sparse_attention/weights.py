"""The weights of full attention, a few queries at a time, so that no [tokens, tokens] matrix is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.batching import auto_batch
from lineament.modules.sparse_attention.blocks import Blocks

# Weights held at once.
WEIGHTS = 2**20


@dataclass(frozen=True)
class Tile:
    """``padded``: the weights of ``queries`` behind as many zeros as there are queries, less one; ``entropy``: of each query, in nats."""

    queries: slice
    padded: Tensor
    entropy: Tensor

    @property
    def weights(self) -> Tensor:
        """On all keys up to the last of the queries, [batch, query heads, queries, keys], zero for padding."""
        return self.padded[..., self.padded.shape[2] - 1 :]


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

    def tile(start: int, stop: int) -> Tile:
        part = slice(start, stop)
        end = layout.offset + stop
        asked = grouped[:, :, :, part]
        logits = torch.matmul(asked.flatten(2, 3), keys[:, :, :end].mT)
        logits = logits.unflatten(2, asked.shape[2:4]).flatten(1, 2)
        at = position[layout.offset + part.start : end, None]
        lowest = torch.finfo(wide).min
        if layout.regular:
            # Only the keys of the tile itself may lie behind a query.
            logits[..., layout.offset + part.start :].masked_fill_(position[layout.offset + part.start : end] > at, lowest)  # fmt: skip
        else:
            seen = (position[:end] >= layout.begins[:, part, None]) & (position[:end] <= at)
            logits.masked_fill_(~seen[:, None], lowest)
        before = logits.shape[2] - 1
        padded = logits.new_empty(*logits.shape[:3], before + end)
        padded[..., :before] = 0
        weights = padded[..., before:]
        torch.softmax(logits, -1, out=weights)
        top, most = logits.amax(-1), weights.amax(-1)
        # Σ w log w from the logits, so that no logarithm of each weight is taken.
        entropy = top - most.log() - logits.mul_(weights).sum(-1)
        if not layout.regular:
            real = layout.own[:, None, part] >= 0
            weights.mul_(real[..., None])
            entropy = torch.where(real, entropy, 0)
        return Tile(part, padded, entropy)

    yield from auto_batch(tile, queries, most=step)


def by_block(weights: Tensor, layout: Blocks) -> Tensor:
    """The weight on each block, [batch, heads, queries, blocks], of weights on the first keys."""
    keys = weights.shape[-1]
    if layout.regular:
        whole = keys // layout.size * layout.size
        found = weights[..., :whole].unflatten(-1, (-1, layout.size)).sum(-1)
        if whole < keys:
            found = torch.cat([found, weights[..., whole:].sum(-1, keepdim=True)], -1)
        return F.pad(found, (0, layout.count - found.shape[-1]))
    index = layout.of_keys()[:, :keys].remainder(layout.count + 1)[:, None, None].expand(weights.shape)
    found = weights.new_zeros(*weights.shape[:3], layout.count + 1)
    return found.scatter_add_(3, index, weights)[..., :-1]


def by_distance(tile: Tile, offset: int) -> Tensor:
    """The weight at each distance from the query, summed over the tile's queries, [batch, heads, distances from 0]."""
    padded = tile.padded
    count, width = padded.shape[2:]
    # With rows one longer, column c of row i is key c + i - (count - 1): the columns are distances.
    shape = (*padded.shape[:2], count, offset + tile.queries.start + count)
    return padded.as_strided(shape, (*padded.stride()[:2], width + 1, 1)).sum(2).flip(-1)
