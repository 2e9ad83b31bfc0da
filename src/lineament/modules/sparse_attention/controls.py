"""Choices of blocks to compare a selection with: the last ones, random ones, and an oracle's, those of the greatest true weight.

A selection that does no better than the last blocks has found nothing; what it lacks to the oracle is the price of scoring by mean keys.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import one_of
from lineament.modules.sparse_attention.blocks import lay_out
from lineament.modules.sparse_attention.selection import Selection, check_heads, choose
from lineament.modules.sparse_attention.theory import full_weights

CONTROLS = ("last", "random", "oracle")


@torch.no_grad()
def control_selection(
    q: Tensor,
    k: Tensor,
    by: Literal["last", "random", "oracle"],
    *,
    block_size: int = 64,
    blocks: int = 8,
    scale: float | None = None,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    seed: int = 0,
) -> Selection:
    """A selection for each key head that ignores the mean keys, its own block counted in the budget as in :func:`lineament.modules.select`.

    Args:
        q, k: [batch, heads, tokens, size].
        by: ``"last"``: the latest blocks; ``"random"``: any past blocks, drawn from ``seed``; ``"oracle"``: those with the most full
            attention weight, summed over the heads that share them.

    >>> x = torch.randn(1, 1, 8, 4)
    >>> control_selection(x, x, "last", block_size=2, blocks=2).indices[0, 0, -1].tolist()
    [3, 2]
    """
    one_of("by", by, CONTROLS)
    check_heads(q, k)
    layout = lay_out(q, k, block_size, offset=offset, documents=documents, padding=padding)
    found = []
    if by == "oracle":
        of_keys = layout.of_keys()
        for tile in full_weights(q, k, layout, scale):
            weight = tile.full.sum(2)
            place = of_keys.remainder(layout.count + 1)[:, None, None].expand_as(weight)
            score = weight.new_zeros(*weight.shape[:3], layout.count + 1).scatter_add_(3, place, weight)
            found.append(choose(score[..., :-1], layout, blocks, queries=tile.queries).indices)
        return Selection(torch.cat(found, 2), layout)
    number_of = torch.arange(layout.count, device=q.device, dtype=torch.float32)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    step = max(1, 2**24 // (k.shape[0] * k.shape[1] * layout.count))
    for start in range(0, q.shape[2], step):
        part = slice(start, min(start + step, q.shape[2]))
        shape = (k.shape[0], k.shape[1], part.stop - start, layout.count)
        score = (
            number_of.expand(shape) if by == "last" else torch.rand(shape, generator=generator).to(q.device)
        )
        found.append(choose(score, layout, blocks, queries=part).indices)
    return Selection(torch.cat(found, 2), layout)
