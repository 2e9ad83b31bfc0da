"""A small language model of bytes whose gated perceptrons lose 10, 20 and 30 % of their width: perplexity by criterion and repair."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.models import frozen
from lineament.edit.pruned import PruneOptions
from lineament.edit.pruning import prune
from lineament.recipes.kit.text import read_text
from lineament.train.callbacks import Cosine
from lineament.train.loop import fit

REMOVED = (0.1, 0.2, 0.3)
ARMS = [
    (criterion, repair)
    for criterion in ("energy", "saliency", "magnitude", "random")
    for repair in ("alone", "compensation")
]


@dataclass(frozen=True)
class Spoken:
    """Perplexity of held-out bytes: of the whole model, and {"share removed | criterion | repair": of the pruned ones}."""

    whole: float
    pruned: dict[str, float]


def spoken(config: Any, seed: int) -> Spoken:
    data = read_text(config.text).encode("utf-8")[: config.bytes]
    ids = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    rows = ids[: len(ids) // config.length * config.length].view(-1, config.length)
    cut = max(8, len(rows) // 20)
    test, train = rows[:cut][:200], rows[cut:]
    model = _trained(train, config, seed)
    some = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:128]
    drawn = train[some]
    found = {}
    for removed in REMOVED:
        for criterion, repair in ARMS:
            pruned = prune(
                model, drawn, keep=1 - removed, criterion=criterion, compensate="delta" if repair == "compensation" else None,
                options=PruneOptions(seed=seed),
            )  # fmt: skip
            found[f"{removed:g} | {criterion} | {repair}"] = perplexity(pruned.model, test)
    return Spoken(perplexity(model, test), found)


def _loss(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores[:, :-1].flatten(0, 1), targets[:, 1:].flatten())


def _trained(rows: Tensor, config: Any, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 256, "hidden_size": config.lm_width, "intermediate_size": 4 * config.lm_width, "num_hidden_layers": config.lm_layers,
        "num_attention_heads": 4, "max_position_embeddings": config.length, "tie_word_embeddings": False,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))
    steps = min(len(rows), config.lm_steps * 16) // 16
    rows = rows[: steps * 16]
    fit(
        model, ({"input_ids": rows}, rows), optimizer=lambda net: torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.1), batch_size=16,
        epochs=max(1, config.lm_steps // steps), loss=_loss, seed=seed, callbacks=[Cosine()],
    )  # fmt: skip
    return model.eval()


def perplexity(model: Any, rows: Tensor) -> float:
    """exp of the mean negative log-likelihood of a byte."""
    with frozen(model), torch.no_grad():
        losses = [float(_loss(model(input_ids=some).logits, some)) * len(some) for some in rows.split(16)]
    return math.exp(sum(losses) / len(rows))
