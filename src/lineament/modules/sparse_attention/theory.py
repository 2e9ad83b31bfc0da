"""What a choice of blocks leaves out of full attention, how concentrated that is, and what leaving it out costs at most.

Shen et al. 2026, arXiv 2511.20102, section 1.6. Full weights are formed for a tile of queries at a time, in float32, so nothing grows with the square of the
tokens. Divergence of sparse from full weights needs no second pass: KL(sparse | full) = -log(kept weight).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lineament.core.checks import require, show
from lineament.core.results import Readable
from lineament.modules.sparse_attention.attend import check_values
from lineament.modules.sparse_attention.blocks import Blocks, lay_out
from lineament.modules.sparse_attention.selection import Selection

# Full weights held at once.
WEIGHTS = 2**22


@dataclass(frozen=True)
class SparsityReport(Readable):
    """Of each query head and token, [batch, heads, queries]; padded queries are 0 and not ``real``, [batch or 1, queries].

    ``kept``: the full weight on chosen blocks (the paper's AttnSparsity); ``entropy``: of the full weights, in nats; ``first`` and
    ``first_block``: the full weight on the document's first token and block; ``error``: |full - sparse|; ``bound``:
    (1 - kept) (max |v| of what is left out + |sparse|), which it never exceeds (Theorem 1). ``received``: [batch, heads, keys], the mean
    weight of each key over all queries.
    """

    kept: Tensor
    entropy: Tensor
    first: Tensor
    first_block: Tensor
    error: Tensor
    bound: Tensor
    received: Tensor
    real: Tensor

    @property
    def delta(self) -> Tensor:
        """The full weight that is left out."""
        return torch.where(self.real[:, None], 1 - self.kept, 0).clamp(min=0)

    @property
    def bits(self) -> Tensor:
        """The entropy in bits."""
        return self.entropy / math.log(2)

    @property
    def divergence(self) -> Tensor:
        """KL of the sparse from the full weights in nats; the other way round it is infinite as soon as anything is left out."""
        return torch.where(self.real[:, None], -self.kept.log(), 0)

    @property
    def peak(self) -> Tensor:
        """The largest mean weight that one key draws, wherever it stands, [batch, heads]."""
        return self.received.amax(-1)

    def by_head(self, name: str) -> Tensor:
        """The mean of ``kept``, ``entropy``, ... over real queries and the batch, one a head."""
        values, count = getattr(self, name), self.real.expand(len(self.kept), -1).sum()
        return values.double().sum((0, 2)) / count


@torch.no_grad()
def sparsity_report(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None
) -> SparsityReport:
    """What the choice of blocks leaves out, and what it costs at most; without gradient.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> from lineament.modules.sparse_attention.selection import select
    >>> found = sparsity_report(x, x, x, select(x, x, block_size=2, blocks=2))
    >>> bool((found.error <= found.bound + 1e-6).all())
    True
    """
    check_values(q, k, v)
    layout, groups = selection.layout, q.shape[1] // k.shape[1]
    keys = v[:, :, : layout.keys].to(_wide(q))
    norms = keys.norm(dim=3)[:, :, None, None]
    of_keys, parts = layout.of_keys(), []
    received = q.new_zeros(*q.shape[:2], layout.keys, dtype=_wide(q))
    for tile in full_weights(q, k, layout, scale):
        chosen = _heads(selection.tokens(tile.queries), groups, k.shape[1])
        full, dropped = tile.full, tile.seen & ~chosen
        sparse = tile.logits.masked_fill(~chosen, -torch.inf).softmax(-1).nan_to_num(0.0)
        lost = (full * dropped).sum(-1)
        sparse_out, full_out = (_weighted(weights, keys) for weights in (sparse, full))
        bound = lost * (torch.where(dropped, norms, 0).amax(-1) + sparse_out.norm(dim=-1))
        start = layout.begins[:, tile.queries]
        opening = (of_keys[:, None] == layout.first[:, tile.queries, None])[:, None, None]
        parts.append(
            (
                (full * chosen).sum(-1),
                torch.special.entr(full).sum(-1),
                full.gather(-1, start[:, None, None, :, None].expand(*full.shape[:-1], 1))[..., 0],
                (full * opening).sum(-1),
                (full_out - sparse_out).norm(dim=-1),
                torch.where(dropped.any(-1), bound, 0),
            )
        )
        received += full.flatten(1, 2).sum(2)
    kept, entropy, first, opened, error, bound = (torch.cat(each, -1).flatten(1, 2) for each in zip(*parts))
    real = layout.own >= 0
    count = real.expand(len(q), -1).sum(1).clamp(min=1)
    received = received / count[:, None, None]
    return SparsityReport(kept, entropy, first, opened, error, bound, received, real)


@dataclass(frozen=True)
class Decomposition(Readable):
    """full - sparse = ``dropped`` - ``rescaled``, exactly: Σ a v over what is left out, and delta times the sparse output."""

    dropped: Tensor
    rescaled: Tensor


@torch.no_grad()
def decomposition(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None
) -> Decomposition:
    """The difference of full and sparse attention in its two parts, [batch, query heads, queries, size].

    >>> from lineament.modules.sparse_attention.attend import attend_both
    >>> x = torch.randn(1, 2, 9, 4)
    >>> both = attend_both(x, x, x, block_size=2, blocks=2)
    >>> parts = decomposition(x, x, x, both.selection)
    >>> bool(torch.allclose(both.full - both.sparse, parts.dropped - parts.rescaled, atol=1e-5))
    True
    """
    check_values(q, k, v)
    keys = v[:, :, : selection.layout.keys].to(_wide(q))
    found = []
    for tile in full_weights(q, k, selection.layout, scale):
        chosen = _heads(selection.tokens(tile.queries), q.shape[1] // k.shape[1], k.shape[1])
        left = tile.full * ~chosen
        sparse = tile.logits.masked_fill(~chosen, -torch.inf).softmax(-1).nan_to_num(0.0)
        found.append((_weighted(left, keys), left.sum(-1, keepdim=True) * _weighted(sparse, keys)))
    return Decomposition(*(torch.cat(each, 3).flatten(1, 2) for each in zip(*found)))


@torch.no_grad()
def mass_by_distance(
    q: Tensor,
    k: Tensor,
    edges: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096),
    *,
    scale: float | None = None,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> Tensor:
    """The mean full weight at each distance back, [query heads, edges + 1]: below the first of the rising ``edges``, between each two, and from the last on.

    >>> x = torch.zeros(1, 1, 4, 2)
    >>> [round(each, 4) for each in mass_by_distance(x, x, (1, 2))[0].tolist()]  # itself, one back, further back
    [0.5208, 0.2708, 0.2083]
    """
    bounds = torch.tensor(list(edges), device=q.device)
    require(len(bounds) > 0 and bool((bounds.diff() > 0).all()), f"edges: got {show(edges)}, expected distances that rise")  # fmt: skip
    layout = lay_out(q, k, 1, offset=offset, documents=documents, padding=padding)
    position = torch.arange(layout.keys, device=q.device)
    total = q.new_zeros(q.shape[1], len(bounds) + 1, dtype=_wide(q))
    for tile in full_weights(q, k, layout, scale):
        back = position[layout.offset :][tile.queries, None] - position
        place = torch.bucketize(back, bounds, right=True).flatten()
        total.index_add_(1, place, tile.full.flatten(1, 2).sum(0).flatten(1))
    return total / (layout.own >= 0).expand(len(q), -1).sum()


@dataclass(frozen=True)
class Gaps(Readable):
    """``total`` <= ``capability`` + ``attention`` at each token: |reference - sparse|, |reference - full| and |full - sparse|."""

    capability: Tensor
    attention: Tensor
    total: Tensor


def gaps(reference: Tensor, full: Tensor, sparse: Tensor) -> Gaps:
    """How far sparse outputs of a model are from another model's full ones, and how much of that its own full outputs explain.

    Args:
        reference: outputs of a model with full attention. full, sparse: those of the model asked about, in either mode, all [..., size].

    >>> one = torch.ones(1, 2)
    >>> gaps(one, 2 * one, 4 * one).total.item() <= 2**0.5 + 8**0.5
    True
    """
    require(
        reference.shape == full.shape == sparse.shape,
        f"reference, full, sparse: got {show(reference)}, {show(full)} and {show(sparse)}, expected one shape",
    )
    pairs = ((reference, full), (full, sparse), (reference, sparse))
    return Gaps(*((one.to(_wide(one)) - two.to(_wide(one))).norm(dim=-1) for one, two in pairs))


def output_divergence(full: Tensor, sparse: Tensor) -> Tensor:
    """KL(full | sparse) of the next token's distribution in nats, from logits [..., vocabulary].

    >>> logits = torch.tensor([0.0, 1.0])
    >>> output_divergence(logits, logits + 3).item()
    0.0
    """
    require(
        full.shape == sparse.shape, f"sparse: got {show(sparse)}, expected logits like full, {show(full)}"
    )
    one, two = (x.to(_wide(x)).log_softmax(-1) for x in (full, sparse))
    return (one.exp() * (one - two)).sum(-1).clamp(min=0)


class Tile(NamedTuple):
    """Some queries: their logits, what they see, and their full weights, [batch, key heads, group, tile, keys]."""

    queries: slice
    logits: Tensor
    seen: Tensor
    full: Tensor


def full_weights(q: Tensor, k: Tensor, layout: Blocks, scale: float | None = None) -> Iterator[Tile]:
    """The full weights of all queries, tile by tile, without gradient."""
    factor = q.shape[3] ** -0.5 if scale is None else scale
    groups = q.shape[1] // k.shape[1]
    q, k = q.detach().to(_wide(q)), k[:, :, : layout.keys].detach().to(_wide(q))
    position = torch.arange(layout.keys, device=q.device)
    step = max(1, WEIGHTS // max(1, q.shape[0] * q.shape[1] * layout.keys))
    for start in range(0, q.shape[2], step):
        part = slice(start, start + step)
        rows = q[:, :, part].unflatten(1, (-1, groups)).flatten(2, 3)
        logits = (torch.matmul(rows, k.mT) * factor).unflatten(2, (groups, -1))
        seen = (position >= layout.begins[:, part, None]) & (
            position <= position[layout.offset :][part, None]
        )
        seen = (seen & (layout.own[:, part] >= 0)[..., None])[:, None, None]
        full = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        yield Tile(part, logits, seen, full)


def _weighted(weights: Tensor, values: Tensor) -> Tensor:
    """Σ weights · values of each key head, [batch, key heads, group, tile, size]."""
    return torch.matmul(weights.flatten(2, 3), values).unflatten(2, weights.shape[2:4])


def _heads(chosen: Tensor, groups: int, key_heads: int) -> Tensor:
    """Booleans of key heads or of query heads as [batch, key heads, group or 1, tile, keys]."""
    return chosen[:, :, None] if chosen.shape[1] == key_heads else chosen.unflatten(1, (key_heads, groups))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
