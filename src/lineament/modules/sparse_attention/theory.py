"""What does a choice of blocks leave out of full attention, and how far does that move the output?

Shen et al. 2026, arXiv 2511.20102, section 1.6 of our reading: attention sparsity, the exact decomposition of the error, Theorem 1, the gaps of two models
and the divergence of their predictions. All weights are built a few queries at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core.checks import require, show
from lineament.core.results import Readable
from lineament.modules.sparse_attention.attend import attend, check_values
from lineament.modules.sparse_attention.selection import Selection
from lineament.modules.sparse_attention.weights import by_block, weight_tiles


@dataclass(frozen=True)
class SparsityReport(Readable):
    """Of each query head and token, [batch, heads, queries]; zero for padding.

    ``kept``: AttnSparsity, the full weight on chosen blocks; ``delta``: the weight left out; ``entropy``: of the full weights, in nats;
    ``first``: the full weight on the first token of the document; ``error``: |full - sparse|; ``bound``: Theorem 1,
    delta (max |v| of what is left out + |sparse|), which the error never exceeds.
    """

    kept: Tensor
    delta: Tensor
    entropy: Tensor
    first: Tensor
    error: Tensor
    bound: Tensor

    @property
    def bits(self) -> Tensor:
        """The entropy in bits."""
        return self.entropy / math.log(2)

    @property
    def divergence(self) -> Tensor:
        """KL(sparse weights, full weights) in nats, which is -log kept, for the sparse weights are the full ones over kept."""
        return -torch.log1p(-self.delta)


@dataclass(frozen=True)
class Decomposition(Readable):
    """full - sparse = dropped - delta sparse, exactly. ``full``, ``sparse``, ``dropped`` (Σ a v of what is left out): [batch, heads, queries, size]."""

    full: Tensor
    sparse: Tensor
    dropped: Tensor
    delta: Tensor

    @property
    def difference(self) -> Tensor:
        """full - sparse, from the two parts."""
        return self.dropped - self.delta[..., None] * self.sparse


@torch.no_grad()
def sparsity_report(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None
) -> SparsityReport:
    """What the choice of blocks leaves out, and what it costs at most.

    Args:
        q: [batch, query heads, queries, size]. k, v: [batch, key heads, keys, size].
        selection: from :func:`select`, or a control such as :func:`oracle_blocks`.
        scale: of the logits, 1 / √size by default.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> from lineament.modules.sparse_attention.selection import select
    >>> found = sparsity_report(x, x, x, select(x, x, block_size=2, blocks=2))
    >>> bool((found.error <= found.bound + 1e-6).all())
    True
    """
    sparse = attend(q, k, v, selection, scale=scale).output
    check_values(q, k, v)
    groups, layout = q.shape[1] // k.shape[1], selection.layout
    values = v[:, :, : layout.keys]
    # Blocks before the own one are left out as a whole.
    longest = layout.split(values.norm(dim=3, keepdim=True)).amax(3)[..., 0].repeat_interleave(groups, 1)
    found = []
    for tile in weight_tiles(q, k, layout, scale):
        part = tile.queries
        chosen, dropped = _chosen(selection, part, q.shape[1])
        mass = by_block(tile.weights, layout)
        delta = (mass * dropped).sum(-1)
        near = sparse[:, :, part].to(mass.dtype)
        far = torch.where(dropped, longest[:, :, None].to(mass.dtype), 0).amax(-1)
        whole = _applied(tile.weights, values)
        place = layout.begins[:, None, part, None].clamp(max=tile.weights.shape[3] - 1)
        found.append(
            (
                (mass * chosen).sum(-1),
                delta,
                tile.entropy,
                tile.weights.gather(3, place.expand(*tile.weights.shape[:3], 1))[..., 0],
                (whole - near).norm(dim=3),
                torch.where(dropped.any(-1), delta * (far + near.norm(dim=3)), 0),
            )
        )
    return SparsityReport(*(torch.cat(parts, 2) for parts in zip(*found)))


@torch.no_grad()
def decompose(
    q: Tensor, k: Tensor, v: Tensor, selection: Selection, *, scale: float | None = None
) -> Decomposition:
    """The error of sparse attention in two parts: what the keys left out would have added, and how much too heavy the others weigh.

    full - sparse = Σ_dropped a v - delta sparse, with delta = Σ_dropped a; see :func:`sparsity_report` for the arguments.

    >>> x = torch.randn(1, 2, 9, 4)
    >>> from lineament.modules.sparse_attention.selection import select
    >>> found = decompose(x, x, x, select(x, x, block_size=2, blocks=2))
    >>> bool(torch.allclose(found.full - found.sparse, found.difference, atol=1e-6))
    True
    """
    check_values(q, k, v)
    layout = selection.layout
    sparse = attend(q, k, v, selection, scale=scale).output
    values, block = v[:, :, : layout.keys], layout.of_keys().clamp(min=0)[:, None, None]
    found = []
    for tile in weight_tiles(q, k, layout, scale):
        _, dropped = _chosen(selection, tile.queries, q.shape[1])
        keys = tile.weights.shape[3]
        index = block[..., :keys].expand(tile.weights.shape)
        lost = tile.weights * dropped.expand(*tile.weights.shape[:3], -1).gather(3, index)
        found.append((_applied(tile.weights, values), _applied(lost, values), lost.sum(-1)))
    full, dropped, delta = (torch.cat(parts, 2) for parts in zip(*found))
    return Decomposition(full, sparse, dropped, delta)


@dataclass(frozen=True)
class Gaps(Readable):
    """Distances over the last dimension: ``capability`` |reference - full|, ``attention`` |full - sparse|, ``total`` |reference - sparse|."""

    capability: Tensor
    attention: Tensor
    total: Tensor


def gaps(reference: Tensor, full: Tensor, sparse: Tensor) -> Gaps:
    """Why a sparse model differs from one trained with full attention: its total is at most the sum of the two gaps.

    Args:
        reference: outputs [..., size] of the network trained with full attention, at any place.
        full, sparse: outputs of the other network there, with full and with sparse attention.

    >>> found = gaps(torch.zeros(2), torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0]))
    >>> found.capability.item(), found.attention.item(), found.total.item()
    (5.0, 4.0, 3.0)
    """
    require(
        reference.shape == full.shape == sparse.shape,
        f"reference, full, sparse: got {show(reference)}, {show(full)}, {show(sparse)}, expected the same shape",
    )
    return Gaps(
        (reference - full).norm(dim=-1), (full - sparse).norm(dim=-1), (reference - sparse).norm(dim=-1)
    )


@dataclass(frozen=True)
class Divergence(Readable):
    """Of each prediction, in nats: ``entropy`` H(full), ``divergence`` KL(full, sparse), ``cross_entropy`` H(full, sparse), their sum."""

    entropy: Tensor
    divergence: Tensor

    @property
    def cross_entropy(self) -> Tensor:
        """-Σ full log sparse."""
        return self.entropy + self.divergence


def output_divergence(full: Tensor, sparse: Tensor) -> Divergence:
    """How far the predictions with sparse attention are from those with full attention: KL(full, sparse) over the last dimension.

    Args:
        full, sparse: logits [..., vocabulary]. Exchange them for KL(sparse, full).

    >>> found = output_divergence(torch.zeros(2), torch.tensor([0.0, 1.0]))
    >>> round(found.entropy.item(), 4), round(found.divergence.item(), 4)
    (0.6931, 0.1201)
    """
    require(
        full.shape == sparse.shape,
        f"sparse: got {show(sparse)} beside {show(full)}, expected logits of the same shape",
    )
    wide = torch.float64 if full.dtype == torch.float64 else torch.float32
    one, two = full.to(wide).log_softmax(-1), sparse.to(wide).log_softmax(-1)
    chance = one.exp()
    # A class without any chance adds nothing, whatever its logarithm.
    divergence = torch.where(chance > 0, chance * (one - two), 0).sum(-1)
    return Divergence(torch.special.entr(chance).sum(-1), divergence.clamp(min=0))


def _chosen(selection: Selection, part: slice, heads: int) -> tuple[Tensor, Tensor]:
    """The blocks that queries read, and those before their own that they do not, [batch, query heads, queries, blocks]."""
    chosen = Selection(selection.indices[:, :, part], selection.layout).mask()
    chosen = chosen.repeat_interleave(heads // chosen.shape[1], 1)
    return chosen, selection.layout.past(part)[:, None] & ~chosen


def _applied(weights: Tensor, v: Tensor) -> Tensor:
    """Σ a v by query head, [batch, heads, queries, size]."""
    groups = weights.unflatten(1, (v.shape[1], -1))
    out = torch.matmul(groups.flatten(2, 3), v[:, :, : weights.shape[3]].to(weights.dtype))
    return out.unflatten(2, groups.shape[2:4]).flatten(1, 2)
