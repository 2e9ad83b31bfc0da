"""Tiny decoders of transformers, one of each family that is promised."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHAPE = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 50, "max_position_embeddings": 256,
}  # fmt: skip
SMALL_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 256}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", SHAPE),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", SHAPE),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**SHAPE, "head_dim": 8}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**SHAPE, "sliding_window": None}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", SMALL_GPT2 | {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}  # fmt: skip
# Further ones that were tried: what their configurations need beside SHAPE.
OTHERS: dict[str, dict[str, Any]] = {
    "Cohere": {}, "Gemma": {"head_dim": 8}, "Gemma2": {"head_dim": 8, "attn_logit_softcapping": None, "layer_types": ["full_attention"] * 2},
    "Glm": {"head_dim": 8}, "GPTNeoX": {}, "Granite": {"attention_multiplier": 0.5}, "Mixtral": {"num_local_experts": 2}, "Olmo": {}, "Olmo2": {},
    "OPT": {"ffn_dim": 32, "word_embed_proj_dim": 32, "dropout": 0.0}, "Phi": {}, "Phi3": {}, "SmolLM3": {}, "StableLm": {},
    "Starcoder2": {"sliding_window": None},
}  # fmt: skip
SPECIAL = {"bos_token_id": 1, "eos_token_id": 49, "pad_token_id": 0}


def made(name: str, seed: int = 0, **changes: Any) -> Any:
    """A model in evaluation mode with large enough weights that attention matters."""
    config, model, shape = FAMILIES.get(
        name, (f"{name}Config", f"{name}ForCausalLM", SHAPE | OTHERS.get(name, {}))
    )
    torch.manual_seed(seed)
    built = getattr(transformers, model)(getattr(transformers, config)(**(shape | SPECIAL | changes)))
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return built.eval()


def prompts(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    """Token numbers without the special ones."""
    return torch.randint(2, 49, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def checkpointing(model: Any, *, use_reentrant: bool) -> None:
    """Switch activation checkpointing on, by its name of today or of transformers 4."""
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)({"use_reentrant": use_reentrant})
