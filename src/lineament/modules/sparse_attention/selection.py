"""Which blocks of the past may a query read? Causal block selection by mean keys.

Shen et al., "SSA: Sparse Sparse Attention by Aligning Full and Sparse Attention Outputs in Feature Space", ICML 2026, arXiv 2511.20102, section 1.2; MoBA
(Lu et al. 2025) scores otherwise. The best blocks are chosen exactly by default; the released kernel keeps only half of what it has found whenever it
meets a further chunk of ``block_size`` blocks, so that it prefers the newest chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch
from torch import Tensor

from lineament.core.batching import auto_batch
from lineament.core.checks import number, one_of, require, show
from lineament.core.results import Readable
from lineament.modules.sparse_attention.blocks import Blocks, lay_out

SCORINGS = ("group_softmax", "dot")
SELECTIONS = ("exact", "released")
# Scores held at once.
SCORES = 2**20


class Choosing(TypedDict, total=False):
    """How blocks are chosen: the options of :func:`select`, which says what they mean, but for the scale."""

    block_size: int
    blocks: int
    scoring: Literal["group_softmax", "dot"]
    offset: int | None
    documents: Tensor | None
    padding: Tensor | None
    sinks: int
    recent: int


@dataclass(frozen=True)
class Selection(Readable):
    """The blocks that each query reads: ``indices``, [batch, heads, queries, slots], its own first, and -1 where it reads fewer.

    The heads are the key heads, or for ``dot`` the query heads. ``layout`` says which tokens a block holds.
    """

    indices: Tensor
    layout: Blocks

    def mask(self) -> Tensor:
        """Which blocks are read, [batch, heads, queries, blocks] booleans."""
        found = self.indices.new_zeros((*self.indices.shape[:3], self.layout.count + 1), dtype=torch.bool)
        return found.scatter_(3, self.indices.remainder(self.layout.count + 1), True)[..., :-1]

    def tokens(self) -> Tensor:
        """Which keys are read, [batch, heads, queries, keys] booleans; of its own block a query reads what is not behind it."""
        layout = self.layout
        position = torch.arange(layout.keys, device=self.indices.device)
        block = (
            layout.of_keys().remainder(layout.count + 1)[:, None, None].expand(*self.indices.shape[:3], -1)
        )
        mask = torch.nn.functional.pad(self.mask(), (0, 1))
        return mask.gather(3, block) & (position <= position[layout.offset :, None])


def select(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 64,
    blocks: int = 8,
    scoring: Literal["group_softmax", "dot"] = "group_softmax",
    scale: float | None = None,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
    sinks: int = 0,
    recent: int = 0,
    selection: Literal["exact", "released"] = "exact",
) -> Selection:
    """The blocks that each query reads: its own, and the best of those before it, scored in float32 and without gradient.

    Args:
        q: [batch, query heads, queries, size]. k: [batch, key heads, keys, size]; query head h reads key head h // (query heads / key heads).
        block_size, blocks: tokens of a block, and blocks of a query, its own included.
        scoring: ``"group_softmax"``: probabilities over the complete blocks, summed over the heads of a group, one choice a key head;
            ``"dot"``: q · mean key, a choice a query head, as in MoBA.
        scale: of the logits, 1 / √size by default.
        offset: which key the first query is; by default the queries are the last keys.
        documents: [batch, keys] document numbers, or the cumulative lengths of packed documents.
        padding: [batch, keys], a tokenizer's mask: 1 for real tokens.
        sinks, recent: blocks at the start of the document, and blocks just before the own one, that are read in any case.
        selection: ``"released"`` repeats the released kernel's inexact choice.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> select(x, x, block_size=4, blocks=2).mask().sum(-1)[0, 0].tolist()
    [1, 1, 1, 1, 2, 2, 2, 2, 2]
    """
    check_heads(q, k)
    one_of("scoring", scoring, SCORINGS)
    one_of_selections(selection)
    layout = lay_out(q, k, block_size, offset=offset, documents=documents, padding=padding)
    return best_blocks(
        q, layout.means(k[:, :, : layout.keys].detach()), layout, blocks,
        scoring=scoring, scale=scale, sinks=sinks, recent=recent, selection=selection,
    )  # fmt: skip


@torch.no_grad()
def best_blocks(
    q: Tensor,
    means: Tensor,
    layout: Blocks,
    blocks: int,
    *,
    scoring: str = "group_softmax",
    scale: float | None = None,
    sinks: int = 0,
    recent: int = 0,
    selection: str = "exact",
) -> Selection:
    """The selection by the mean keys of all blocks, [batch, key heads, blocks, size]."""
    check_budget(blocks, sinks, recent)
    if selection == "released":
        check_released(layout.size, blocks, scoring, sinks + recent)
        require(not bool(layout.first.any()), "selection: 'released' knows no packed documents")
    groups = q.shape[1] // means.shape[1]
    grouped = q.unflatten(1, (means.shape[1], groups)).to(means.dtype)
    factor = q.shape[3] ** -0.5 if scale is None else scale
    tile = max(1, SCORES // (q.shape[0] * q.shape[1] * layout.count))

    def best(start: int, stop: int) -> Tensor:
        part = slice(start, stop)
        # Nothing is scored that lies ahead of all queries of the tile.
        ahead = layout.count if selection == "released" else max(1, int(layout.own[:, part].max()) + 1)
        # The heads of a group as rows, so that the means are not copied for each.
        rows = grouped[:, :, :, part].flatten(2, 3)
        logits = torch.matmul(rows, means[:, :, :ahead].mT).unflatten(2, (groups, -1))
        past = layout.past(part)[..., :ahead]
        if scoring == "dot":
            score = logits.flatten(1, 2)
        else:
            # The own block takes part in the normaliser once it is complete.
            own = torch.arange(ahead, device=q.device) == layout.own[:, part, None]
            complete = past | (own & (layout.within[:, part, None] == layout.size - 1))
            barred = torch.zeros_like(complete, dtype=logits.dtype).masked_fill_(~complete, -math.inf)
            torch.add(barred[:, None, None], logits, alpha=factor, out=logits)
            score = logits.softmax(-1).sum(2)
        if selection == "released":
            return _released(score, layout, part, blocks)
        return choose(score, layout, blocks, queries=part, sinks=sinks, recent=recent).indices

    return Selection(torch.cat(list(auto_batch(best, q.shape[2], most=tile)), 2), layout)


@torch.no_grad()
def choose(
    score: Tensor,
    layout: Blocks,
    blocks: int,
    *,
    queries: slice = slice(None),
    sinks: int = 0,
    recent: int = 0,
) -> Selection:
    """The selection by any scores, [batch, heads, queries, blocks]: the own block, and the highest-scored of those before it.

    Scores of the blocks that lie ahead of all queries may be left out.
    """
    check_budget(blocks, sinks, recent)
    scored, slots = score.shape[-1], min(blocks, layout.count)
    own, past = layout.own[:, None, queries, None], layout.past(queries)[:, None, :, :scored]
    score = score.masked_fill(~past, -math.inf)
    if sinks or recent:
        number_of = torch.arange(scored, device=score.device)
        forced = (number_of < layout.first[:, None, queries, None] + sinks) | (number_of >= own - recent)
        score = score.masked_fill(forced & past, math.inf)
    best = score.topk(min(slots, scored) - 1, dim=-1).indices
    best = best.masked_fill(~past.expand(score.shape).gather(-1, best), -1)
    best = torch.nn.functional.pad(best, (0, slots - 1 - best.shape[-1]), value=-1)
    return Selection(torch.cat([own.expand(*score.shape[:3], 1), best], -1), layout)


def one_of_selections(selection: str) -> Literal["exact", "released"]:
    """The way to choose, if there is such a one."""
    one_of("selection", selection, SELECTIONS)
    return "released" if selection == "released" else "exact"


def check_heads(q: Tensor, k: Tensor) -> int:
    """Query heads a key head."""
    require(
        q.ndim == 4 and k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3],
        f"k: got {show(k)} beside queries {show(q)}, expected [batch, heads, tokens, size] with the same batch and size",
    )
    require(
        q.shape[1] % k.shape[1] == 0,
        f"q: {q.shape[1]} query heads cannot share {k.shape[1]} key heads evenly",
    )
    return q.shape[1] // k.shape[1]


def check_budget(blocks: int, sinks: int, recent: int) -> None:
    """Forced blocks and the own one fit into the budget."""
    number("blocks", blocks, low=1, integer=True)
    number("sinks", sinks, low=0, integer=True)
    number("recent", recent, low=0, integer=True)
    require(
        sinks + recent < blocks,
        f"sinks, recent: {sinks} + {recent} forced blocks and the own one are more than blocks={blocks}",
    )


def check_released(size: int, blocks: int, scoring: str, forced: int) -> None:
    """The released kernel can choose so many blocks of this size."""
    require(
        scoring == "group_softmax" and not forced,
        "selection: 'released' knows neither scoring='dot' nor sinks and recent blocks",
    )
    require(
        size >= 2 and size & (size - 1) == 0 and 1 << (blocks - 1).bit_length() <= size,
        f"selection: 'released' wants block_size a power of two that is no less than blocks, got {size} and {blocks}",
    )


def _released(score: Tensor, layout: Blocks, queries: slice, blocks: int) -> Tensor:
    """What the released kernel's streaming merge keeps: at each chunk of ``size`` blocks half of the old and half of the new candidates."""
    size, own = layout.size, layout.own[:, None, queries, None]
    number_of = torch.arange(-(-layout.count // size) * size, device=score.device)
    score = torch.nn.functional.pad(score, (0, len(number_of) - layout.count))
    score = torch.where(number_of < own, score, torch.where(number_of == own, math.inf, 0.0))
    index = torch.where(number_of <= own, number_of, -1).expand(score.shape)
    kept, which = _ordered(score[..., :size], index[..., :size])
    for start in range(size, len(number_of), size):
        new, names = _ordered(score[..., start : start + size], index[..., start : start + size])
        half = size // 2
        merged = _ordered(
            torch.cat([kept[..., :half], new[..., :half]], -1),
            torch.cat([which[..., :half], names[..., :half]], -1),
        )
        met = own >= start
        kept, which = torch.where(met, merged[0], kept), torch.where(met, merged[1], which)
    # The kernel rounds the number of blocks up to a power of two.
    return which[..., : 1 << (blocks - 1).bit_length()]


def _ordered(score: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    score, order = score.sort(dim=-1, descending=True, stable=True)
    return score, index.gather(-1, order)
