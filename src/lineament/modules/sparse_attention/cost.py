"""What does a model of transformers lose when its queries read only the best k blocks: in all layers, and in one layer alone?

Perplexity, and the divergence of its predictions from those with full attention (Shen et al. 2026, arXiv 2511.20102).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import number, require, show
from lineament.core.models import device_of, frozen
from lineament.core.results import Readable
from lineament.modules.sparse_attention.hf import attention_modules, sparse_attention
from lineament.modules.sparse_attention.theory import output_divergence

# Predictions compared at once.
LOGITS = 2**24


@dataclass(frozen=True)
class SparseCost(Readable):
    """In nats a token, for each of the sequences.

    Attributes:
        full: the loss with full attention, [sequences].
        rise: by how much sparse attention in all layers raises it, [budgets, sequences]; exp(rise) is the ratio of perplexities.
        divergence: KL(full, sparse) of the predictions then, [budgets, sequences].
        layer_rise, layer_divergence: the same where one layer alone is sparse, with ``layer_blocks`` blocks, [layers, sequences].
        layers: their numbers; layers with a sliding window are left out.
        blocks, layer_blocks, block_size: the budgets.
    """

    full: Tensor
    rise: Tensor
    divergence: Tensor
    layer_rise: Tensor
    layer_divergence: Tensor
    layers: tuple[int, ...]
    blocks: tuple[int, ...]
    layer_blocks: int | None
    block_size: int


@torch.no_grad()
def sparse_cost(
    model: nn.Module,
    input_ids: Tensor,
    *,
    block_size: int = 64,
    blocks: Sequence[int] = (1, 2, 4, 8),
    layer_blocks: int | None = None,
) -> SparseCost:
    """Run the model with full attention, with each budget, and, where ``layer_blocks`` is given, with each layer alone on that budget.

    Args:
        model: a decoder of transformers; it is left as it was.
        input_ids: [sequences, tokens], of one length and without padding; one sequence is read at a time.
        block_size, blocks, layer_blocks: tokens of a block, and blocks of a query.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> found = sparse_cost(LlamaForCausalLM(LlamaConfig(**shape)), torch.arange(18)[None] % 10, block_size=4, blocks=(1, 5), layer_blocks=1)
    >>> found.rise.shape, found.layer_rise.shape, abs(found.rise[1].item()) < 1e-6
    (torch.Size([2, 1]), torch.Size([2, 1]), True)
    """
    require(
        isinstance(input_ids, Tensor)
        and input_ids.ndim == 2
        and input_ids.shape[1] > 1
        and not input_ids.is_floating_point(),
        f"input_ids: got {show(input_ids)}, expected token numbers [sequences, tokens], two tokens at least",
    )
    for budget in (*blocks, *([] if layer_blocks is None else [layer_blocks])):
        number("blocks", budget, low=1, integer=True)
    called: Any = model
    every = sorted(module.layer_idx for module in attention_modules(model))
    full, rise, divergence = [], [], []
    with (
        frozen(model, requires_grad=None),
        sparse_attention(model, block_size=block_size, mode="full") as budget,
    ):
        layers = [layer for layer in every if layer not in budget.kept]
        alone = [["sparse" if i == layer else "full" for i in range(every[-1] + 1)] for layer in layers]
        settings: list[tuple[int, Any]] = [(count, "sparse") for count in blocks]
        if layer_blocks is not None:
            settings += [(layer_blocks, modes) for modes in alone]
        for ids in input_ids.to(device_of(model)).split(1):
            budget.mode = "full"
            known = called(input_ids=ids, use_cache=False).logits[0, :-1]
            full.append(_loss(known, ids[0, 1:]))
            for count, mode in settings:
                budget.blocks, budget.mode = count, mode
                found = called(input_ids=ids, use_cache=False).logits[0, :-1]
                rise.append(_loss(found, ids[0, 1:]) - full[-1])
                divergence.append(_divergence(known, found))
    rises, divergences = (
        torch.tensor(x, dtype=torch.float64).view(len(input_ids), -1).T for x in (rise, divergence)
    )
    split = len(blocks)
    return SparseCost(
        torch.tensor(full, dtype=torch.float64), rises[:split], divergences[:split], rises[split:], divergences[split:],
        tuple(layers), tuple(blocks), layer_blocks, block_size,
    )  # fmt: skip


def _loss(logits: Tensor, targets: Tensor) -> float:
    parts = zip(_parts(logits), targets.split(_step(logits)))
    return sum(float(nn.functional.cross_entropy(x.float(), y, reduction="sum")) for x, y in parts) / len(
        targets
    )


def _divergence(full: Tensor, sparse: Tensor) -> float:
    parts = zip(_parts(full), _parts(sparse))
    return sum(float(output_divergence(one, two).divergence.sum()) for one, two in parts) / len(full)


def _parts(logits: Tensor) -> tuple[Tensor, ...]:
    return logits.split(_step(logits))


def _step(logits: Tensor) -> int:
    return max(1, LOGITS // logits.shape[1])
