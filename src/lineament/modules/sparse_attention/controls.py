"""Other choices of blocks, against which a selection is judged at equal budget: the last ones, random ones, and the oracle's.

Each gives a :class:`~lineament.modules.sparse_attention.selection.Selection` that :func:`attend` and :func:`sparsity_report` take; a query always reads its own block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lineament.core import checks
from lineament.modules.sparse_attention.blocks import Blocks, lay_out
from lineament.modules.sparse_attention.selection import SCORES, Selection, check_budget, check_heads, choose
from lineament.modules.sparse_attention.weights import by_block, weight_tiles


def last_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 64,
    blocks: int = 8,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> Selection:
    """The newest blocks; the options are those of :func:`select`.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> last_blocks(x, x, block_size=2, blocks=2).indices[0, 0, -1].tolist()
    [4, 3]
    """
    layout = _laid_out(q, k, blocks, block_size, offset, documents, padding)
    newest = torch.arange(layout.count, device=q.device, dtype=torch.float32)
    found = [choose(newest.expand(*shape), layout, blocks, queries=part).indices for part, shape in _tiles(q, k, layout)]  # fmt: skip
    return Selection(torch.cat(found, 2), layout)


def random_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 64,
    blocks: int = 8,
    seed: int = 0,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> Selection:
    """Random blocks of the past, drawn anew for each key head and query; the options are those of :func:`select`.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> random_blocks(x, x, block_size=2, blocks=2).mask().sum(-1)[0, 0].tolist()
    [1, 1, 2, 2, 2, 2, 2, 2, 2]
    """
    checks.seed("seed", seed)
    layout = _laid_out(q, k, blocks, block_size, offset, documents, padding)
    generator = torch.Generator().manual_seed(seed)
    found = [
        choose(torch.rand(shape, generator=generator).to(q.device), layout, blocks, queries=part).indices
        for part, shape in _tiles(q, k, layout)
    ]
    return Selection(torch.cat(found, 2), layout)


@torch.no_grad()
def oracle_blocks(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 64,
    blocks: int = 8,
    scale: float | None = None,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> Selection:
    """The blocks with the largest weight in full attention, summed over the heads of a group: no choice a key head keeps more.

    It computes full attention, so it tells what a selection could reach and saves nothing. The options are those of :func:`select`.

    >>> x = torch.eye(4)[[0, 1, 2, 3, 1]].view(1, 1, 5, 4)
    >>> oracle_blocks(x, x, block_size=1, blocks=2).indices[0, 0, -1].tolist()
    [4, 1]
    """
    layout = _laid_out(q, k, blocks, block_size, offset, documents, padding)
    found = []
    for tile in weight_tiles(q, k, layout, scale):
        mass = by_block(tile.weights, layout).unflatten(1, (k.shape[1], -1)).sum(2)
        found.append(choose(mass, layout, blocks, queries=tile.queries).indices)
    return Selection(torch.cat(found, 2), layout)


def _laid_out(
    q: Tensor,
    k: Tensor,
    blocks: int,
    block_size: int,
    offset: int | None,
    documents: Tensor | None,
    padding: Tensor | None,
) -> Blocks:
    check_heads(q, k)
    check_budget(blocks, 0, 0)
    return lay_out(q, k, block_size, offset=offset, documents=documents, padding=padding)


def _tiles(q: Tensor, k: Tensor, layout: Blocks) -> Iterator[tuple[slice, tuple[int, int, int, int]]]:
    """Queries whose scores are held at once, and the shape of these."""
    rows, heads, queries = q.shape[0], k.shape[1], q.shape[2]
    step = max(1, SCORES // (rows * heads * layout.count))
    for start in range(0, queries, step):
        stop = min(start + step, queries)
        yield slice(start, stop), (rows, heads, stop - start, layout.count)
