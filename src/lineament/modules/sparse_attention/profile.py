"""Where does full attention lie: how spread, on which tokens, how far back, and how much of it do the best k blocks hold?

Sink mass, reach and entropy as in Shen et al. 2026, arXiv 2511.20102; for one layer's queries and keys, or for all layers of a model of transformers.
Only means by head are kept, never the weights of all pairs of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import number, require, show
from lineament.core.results import Readable
from lineament.modules.sparse_attention.attend import full_attention
from lineament.modules.sparse_attention.blocks import Blocks, lay_out
from lineament.modules.sparse_attention.branch import Branch
from lineament.modules.sparse_attention.selection import check_heads
from lineament.modules.sparse_attention.weights import by_block, by_distance, weight_tiles


@dataclass(frozen=True)
class AttentionProfile(Readable):
    """Means over the real queries, [batch, heads] each, unless said otherwise.

    Attributes:
        entropy: of the weights, in nats; ``bits`` has it in bits.
        first, first_block: sink mass, the weight on the first token and on the first block of the document.
        received: the weight on each key, over the queries that may see it, [batch, heads, keys].
        distance: the weight at each distance from the query, [batch, heads, keys]; they add up to 1.
        away: the same without the first token of the document.
        best: the weight on the own block and the best of those before it, for each of ``blocks``, [batch, heads, budgets].
    """

    entropy: Tensor
    first: Tensor
    first_block: Tensor
    received: Tensor
    distance: Tensor
    away: Tensor
    best: Tensor
    blocks: tuple[int, ...]

    @property
    def bits(self) -> Tensor:
        """The entropy in bits."""
        return self.entropy / math.log(2)

    def reach(self, share: float = 0.9) -> Tensor:
        """How many of the newest tokens, the query's own included, hold ``share`` of the weight that is not on the first token, [batch, heads]."""
        number("share", share, low=0, high=1)
        held = self.away.double().cumsum(-1)
        return (held < share * held[..., -1:] - 1e-9).sum(-1) + 1


@torch.no_grad()
def attention_profile(
    q: Tensor,
    k: Tensor,
    *,
    block_size: int = 64,
    blocks: Sequence[int] = (1, 2, 4, 8),
    scale: float | None = None,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> AttentionProfile:
    """Where full attention lies, by head; the options are those of :func:`select`, ``blocks`` being several budgets.

    >>> x = torch.zeros(1, 1, 4, 2)
    >>> found = attention_profile(x, x, block_size=2, blocks=(1, 2))
    >>> [round(v, 3) for v in found.best.flatten().tolist()], round(found.first.item(), 3)
    ([0.708, 1.0], 0.521)
    """
    check_heads(q, k)
    for budget in blocks:
        number("blocks", budget, low=1, integer=True)
    layout = lay_out(q, k, block_size, offset=offset, documents=documents, padding=padding)
    rows, heads = q.shape[:2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    begins = layout.begins.expand(rows, -1)
    position = torch.arange(layout.offset, layout.keys, device=q.device)
    sums = q.new_zeros(3, rows, heads, dtype=wide)
    received, distance, away = q.new_zeros(3, rows, heads, layout.keys, dtype=wide)
    best = q.new_zeros(rows, heads, len(blocks), dtype=wide)
    for tile in weight_tiles(q, k, layout, scale):
        part, weights = tile.queries, tile.weights
        keys = weights.shape[3]
        mass = by_block(weights, layout)
        place = begins[:, None, part, None].clamp(max=keys - 1).expand(*weights.shape[:3], 1)
        first = weights.gather(3, place)[..., 0]
        opening = layout.first[:, None, part, None].expand(*mass.shape[:3], 1)
        sums += torch.stack([tile.entropy, first, mass.gather(3, opening)[..., 0]]).sum(-1)
        received[..., :keys] += weights.sum(2)
        near = by_distance(tile, layout.offset)
        distance[..., : near.shape[-1]] += near
        away[..., : near.shape[-1]] += near
        back = (position[part] - begins[:, part]).clamp(min=0)[:, None].expand(first.shape)
        away.scatter_add_(2, back, -first)
        best += _held(mass, layout, part, blocks)
    counts = (layout.own >= 0).sum(1).expand(rows).clamp(min=1).to(wide)
    entropy, first, first_block = sums / counts[:, None]
    far = counts[:, None, None]
    seen = _readers(layout).expand(rows, -1).clamp(min=1).to(wide)
    return AttentionProfile(
        entropy, first, first_block, received / seen[:, None], distance / far, away.clamp(min=0) / far,
        best / far, tuple(blocks),
    )  # fmt: skip


def _held(mass: Tensor, layout: Blocks, part: slice, blocks: Sequence[int]) -> Tensor:
    """The weight on the own block and on the best ones before it, summed over queries, [batch, heads, budgets]."""
    own = layout.own[:, None, part, None].clamp(min=0).expand(*mass.shape[:3], 1)
    own_mass = mass.gather(3, own).sum((2, 3))
    others = mass.scatter(3, own, 0)
    most = min(max(blocks), layout.count) - 1
    if most == 0:
        return torch.stack([own_mass] * len(blocks), -1)
    top = others.topk(most, dim=-1).values.sum(2).cumsum(-1)
    return torch.stack([own_mass + (top[..., min(b - 1, most) - 1] if b > 1 else 0) for b in blocks], -1)


def _readers(layout: Blocks) -> Tensor:
    """How many queries may see each key, [rows, keys]."""
    position = torch.arange(layout.offset, layout.keys, device=layout.own.device)
    rows, real = layout.own.shape[0], (layout.own >= 0).long()
    steps = layout.own.new_zeros(rows, layout.keys + 1)
    steps.scatter_add_(1, layout.begins, real)
    steps.scatter_add_(1, (position + 1).expand(rows, -1), -real)
    return steps.cumsum(1)[:, :-1]


@dataclass
class Watch(Branch):
    """The model attends fully, and each layer's profile is kept, a batch after another."""

    alpha: float = 0.0
    budgets: tuple[int, ...] = (1, 2, 4, 8)
    profiles: dict[int, list[AttentionProfile]] = field(default_factory=dict)

    def attended(
        self,
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past: dict[str, Any],
        scale: float | None,
        gate: Tensor | None,
    ) -> Tensor:
        size = self.of(module.layer_idx).block_size
        found = attention_profile(q, k, block_size=size, blocks=self.budgets, scale=scale, **past)
        self.profiles.setdefault(module.layer_idx, []).append(found)
        out = full_attention(q, k, v, scale=scale, **past)
        return out if gate is None else gate * out


@torch.no_grad()
def attention_profiles(
    model: nn.Module, input_ids: Tensor, *, block_size: int = 64, blocks: Sequence[int] = (1, 2, 4, 8)
) -> dict[int, AttentionProfile]:
    """The profile of each layer of a decoder of transformers on these tokens, [batch, tokens], from one forward pass.

    Layers with a sliding window are left out.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> found = attention_profiles(LlamaForCausalLM(LlamaConfig(**shape)).eval(), torch.arange(9)[None], block_size=2)
    >>> list(found), found[0].best.shape
    ([0, 1], torch.Size([1, 2, 4]))
    """
    from lineament.modules.sparse_attention.hf import attention_modules, kept_layers, running

    require(
        isinstance(input_ids, Tensor) and input_ids.ndim == 2 and not input_ids.is_floating_point(),
        f"input_ids: got {show(input_ids)}, expected token numbers [batch, tokens]",
    )
    modules = attention_modules(model)
    watch = Watch(block_size, 1, kept=kept_layers(modules), budgets=tuple(blocks))
    with running(modules, watch):
        model(input_ids=input_ids, use_cache=False)
    return {layer: found[0] for layer, found in sorted(watch.profiles.items()) if layer not in watch.kept}
