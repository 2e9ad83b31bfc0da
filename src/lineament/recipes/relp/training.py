"""The small language models of the relp recipe: trained here in minutes on one task, evaluated in float64, saved as Hugging Face directories."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.batching import progress
from lineament.data.patching_tasks import (
    TokenPairs,
    synthetic_greater_than,
    synthetic_induction,
    synthetic_ioi,
)

TASKS: dict[str, Callable[..., TokenPairs]] = {
    "ioi": synthetic_ioi,
    "greater-than": synthetic_greater_than,
    "induction": synthetic_induction,
}


def network(vocabulary: int, positions: int, *, layers: int, width: int, heads: int, seed: int) -> Any:
    """A GPT-2 of transformers with random weights, no dropout and an unembedding of its own."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=width, n_layer=layers, n_head=heads, activation_function="gelu",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
        # GPT-2's own scale of 0.02 is for great widths: at 64 dimensions the heads then need many more steps to tell tokens apart.
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.3 if "wte" in name or "wpe" in name else 0.07)
        return model


def train(
    task: str,
    *,
    layers: int,
    width: int,
    heads: int,
    steps: int,
    batch: int = 128,
    lr: float = 2e-3,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The weights after AdamW (100 steps of warm-up, then a cosine) on cross-entropy of the answer at the last position, fresh prompts at every step."""
    first = TASKS[task](1)
    model = network(
        len(first.vocabulary), first.clean.shape[1], layers=layers, width=width, heads=heads, seed=seed
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    data = TASKS[task](batch * steps, seed=1000 + seed)
    targets = data.correct
    if data.right is not None:
        # Any year above is right: one of them, at random.
        generator = torch.Generator().manual_seed(seed)
        targets = torch.multinomial(data.right.float(), 1, generator=generator)[:, 0]
    for step in progress(range(steps), f"training ({task})"):
        rows = slice(step * batch, (step + 1) * batch)
        logits = model(input_ids=data.clean[rows], use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = F.cross_entropy(logits, targets[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def accuracy(model: Any, pairs: TokenPairs) -> float:
    """The share of clean prompts whose most probable next token is right."""
    with torch.no_grad():
        top = model(input_ids=pairs.clean, use_cache=False).logits[:, -1].argmax(-1)
    right = top == pairs.correct if pairs.right is None else pairs.right[torch.arange(len(pairs)), top]
    return float(right.double().mean())
