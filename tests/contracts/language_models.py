"""Tiny language models of every family that the library knows, with weights at which mistakes show, and pairs of prompts for them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")

SMALL = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2, "head_dim": 8}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
    ),
    "pythia": lambda: transformers.GPTNeoXConfig(**SMALL, rotary_pct=0.5, use_parallel_residual=True),
    "neox-serial": lambda: transformers.GPTNeoXConfig(**SMALL, rotary_pct=0.5, use_parallel_residual=False),
    "llama": lambda: transformers.LlamaConfig(**GROUPED),
    "qwen2": lambda: transformers.Qwen2Config(**{**SMALL, "num_key_value_heads": 1}),
    "qwen3": lambda: transformers.Qwen3Config(**GROUPED),
    "gemma2": lambda: transformers.Gemma2Config(**GROUPED, final_logit_softcapping=3.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GROUPED),
}
GATED = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")


def build(config: Any, dtype: torch.dtype = torch.float32, std: float = 0.3) -> Any:
    """A model with normal weights: biases start at zero, where mistakes would not show."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.to(dtype)


def tiny(family: str, dtype: torch.dtype = torch.float32, std: float = 0.3) -> Any:
    return build(FAMILIES[family](), dtype, std)


def prompts(batch: int = 3, length: int = 6, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and corrupt tokens that differ at two positions, the first of them 1."""
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(3, 50, (batch, length), generator=generator)
    corrupt = clean.clone()
    for position in (1, length - 2):
        corrupt[:, position] = torch.randint(3, 50, (batch,), generator=generator)
    return clean, corrupt
