"""How concentrated is the attention of a decoder of transformers, layer by layer, and what would the best blocks hold of it?

The model runs with full attention; each layer is asked for a choice of blocks and what that leaves out (:mod:`.theory`). No weights are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import number, require, show
from lineament.core.models import frozen
from lineament.core.results import Readable
from lineament.modules.sparse_attention.attend import full_attention
from lineament.modules.sparse_attention.branch import Branch
from lineament.modules.sparse_attention.hf import attention_modules, kept_layers, running
from lineament.modules.sparse_attention.selection import Selection, select
from lineament.modules.sparse_attention.theory import mass_by_distance, sparsity_report

EDGES = tuple(2**n for n in range(17))


@dataclass(frozen=True)
class LayerReport(Readable):
    """A layer's attention on the text, each a mean over its tokens, one value a query head.

    ``kept``: [budgets, heads], the full weight on the chosen blocks; ``entropy``: nats; ``first``, ``first_block``, ``peak``: the weight on
    token 0, on the first block, and on the key that draws most; ``error``, ``bound``: |full - sparse| and Theorem 1's bound at the
    smallest budget; ``reach``: back how many tokens half of the weight lies, up to a factor of 2.
    """

    layer: int
    kept: Tensor
    entropy: Tensor
    first: Tensor
    first_block: Tensor
    peak: Tensor
    error: Tensor
    bound: Tensor
    reach: Tensor


@dataclass
class _Probe(Branch):
    budgets: tuple[int, ...] = ()
    reports: dict[int, LayerReport] = field(default_factory=dict)

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
        assert isinstance(self.block_size, int)
        wide = select(q, k, block_size=self.block_size, blocks=max(self.budgets), scale=scale, **past)
        # The best are in order, so a smaller budget is a beginning of a larger one.
        found = [
            sparsity_report(q, k, v, Selection(wide.indices[..., :n], wide.layout), scale=scale)
            for n in self.budgets
        ]
        one = found[self.budgets.index(min(self.budgets))]
        mass = mass_by_distance(q, k, EDGES, scale=scale, **past)
        half = (mass.double().cumsum(1) < 0.5).sum(1)
        self.reports[module.layer_idx] = LayerReport(
            module.layer_idx,
            torch.stack([each.by_head("kept") for each in found]),
            one.by_head("entropy"),
            one.by_head("first"),
            one.by_head("first_block"),
            one.peak.double().mean(0),
            one.by_head("error"),
            one.by_head("bound"),
            torch.tensor([0, *EDGES])[half.clamp(max=len(EDGES)).cpu()],
        )
        out = full_attention(q, k, v, scale=scale, **past)
        return out if gate is None else gate * out


@torch.no_grad()
def attention_report(
    model: nn.Module,
    input_ids: Tensor,
    *,
    block_size: int = 64,
    blocks: Sequence[int] = (8,),
    attention_mask: Tensor | None = None,
) -> list[LayerReport]:
    """What the best blocks would hold of a decoder's full attention, layer by layer; layers with a sliding window are left out.

    Args:
        model: any decoder that :func:`lineament.modules.sparse_attention.sparse_attention` takes.
        input_ids: [batch, tokens].
        blocks: the budgets to ask about.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> found = attention_report(LlamaForCausalLM(LlamaConfig(**shape)), torch.arange(9)[None], block_size=2, blocks=(1, 5))
    >>> [each.layer for each in found], [round(each, 4) for each in found[0].kept[1].tolist()]
    ([0, 1], [1.0, 1.0])
    """
    require(input_ids.ndim == 2, f"input_ids: got {show(input_ids)}, expected [batch, tokens]")
    require(len(blocks) > 0, "blocks: got none, expected at least one budget")
    for each in blocks:
        number("blocks", each, low=1, integer=True)
    modules = attention_modules(model)
    probe = _Probe(block_size, max(blocks), kept=kept_layers(modules), budgets=tuple(blocks))
    with running(modules, probe), frozen(model):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return [probe.reports[layer] for layer in sorted(probe.reports)]
