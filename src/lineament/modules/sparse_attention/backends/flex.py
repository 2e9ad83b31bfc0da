"""PyTorch's FlexAttention over the tiles of 128 queries and 128 keys in which any query chose a block; what it did not choose of a tile is masked.

Near queries must agree for tiles to be skipped. On CUDA it is compiled, with gradients; elsewhere it runs forward only, and holds all pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import require, show
from lineament.modules.sparse_attention.selection import Selection

TILE = 128


def attended(q: Tensor, k: Tensor, v: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask

    require(
        q.is_cuda or not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))),
        f"backend: 'flex' gives no gradients on {q.device.type}, got q, {show(q)}, that wants them; expected torch.no_grad() or another backend",
    )
    if not q.is_cuda:
        q, k, v = q.detach(), k.detach(), v.detach()
    layout, chosen = selection.layout, selection.mask()
    block, group = layout.of_keys().remainder(layout.count + 1), q.shape[1] // chosen.shape[1]
    # Padded keys are in no block.
    chosen = torch.nn.functional.pad(chosen, (0, 1))
    rows, offset = len(block) - 1, layout.offset

    def reads(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return chosen[b, h // group, i, block[b.clamp(max=rows), j]] & (j <= i + offset)

    counts, tiles = _tiles(selection)
    counts, tiles = (x.repeat_interleave(group, 1) for x in (counts, tiles))
    mask = BlockMask.from_kv_blocks(
        counts, tiles, BLOCK_SIZE=TILE, mask_mod=reads, seq_lengths=(q.shape[2], layout.keys)
    )
    shared = q.shape[1] != k.shape[1]
    out, found = _function(q.is_cuda)(
        q, k, v, block_mask=mask, scale=scale, enable_gqa=shared, return_aux=AuxRequest(lse=True)
    )
    return out, found.lse


def _tiles(selection: Selection) -> tuple[Tensor, Tensor]:
    """How many tiles of keys each tile of queries reads, and which, first in their order, [batch, heads, tiles of queries, tiles of keys]."""
    layout, indices = selection.layout, selection.indices
    batch, heads, queries, _ = indices.shape
    width = -(-layout.keys // TILE)
    there = indices >= 0
    starts, stops = (
        x[:, None, None]
        .expand(batch, heads, queries, -1)
        .gather(3, indices.clamp(min=0))
        for x in (layout.starts, layout.stops)
    )  # fmt: skip
    row = torch.arange(queries, device=indices.device)[:, None] // TILE
    read = indices.new_zeros(batch, heads, -(-queries // TILE) * (width + 1), dtype=torch.int32)
    # A block lies in a few tiles that follow one another.
    for step in range(-(-layout.size // TILE) + 1):
        tile = starts // TILE + step
        tile = torch.where(there & (tile * TILE < stops), tile, width)
        read.scatter_(2, (row * (width + 1) + tile).flatten(2), 1)
    read = read.unflatten(2, (-1, width + 1))[..., :-1]
    order = read.argsort(dim=-1, descending=True, stable=True)
    return read.sum(-1, dtype=torch.int32), order.int()


@cache
def _function(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention) if compiled else flex_attention
