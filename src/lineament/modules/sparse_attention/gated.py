"""Llama with an output gate on each head of attention, and the models that the authors of SSA released, read without code of theirs.

Shen et al. 2026, arXiv 2511.20102, section 1.3. In the format ``llama-nsa`` each head has three gates, of which all but NSA's models use the second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from lineament.core.checks import require, show
from lineament.modules.sparse_attention.hf import NAME
from lineament.modules.sparse_attention.options import IN_CONFIG, MODES, Budget

# What a released configuration says and a Llama's does not take over.
_FOREIGN = (
    "auto_map",
    "architectures",
    "model_type",
    "block_size",
    "block_counts",
    "window_size",
    "inference_mode",
)


class GatedLlamaConfig(LlamaConfig):
    """A Llama's configuration with ``gates``, the number of gates of each head: one, or NSA's three with their ``window_size``."""

    model_type = "lineament_gated_llama"
    gates: int = 1
    window_size: int = 0


class GatedLlamaAttention(LlamaAttention):
    """A Llama's attention, whose output is multiplied by sigmoid(gate), one number for each head and token."""

    def __init__(self, config: GatedLlamaConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.gate = nn.Linear(config.hidden_size, config.num_attention_heads * config.gates, bias=False)

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        require(
            self.config._attn_implementation == NAME,
            f"attn_implementation: got {self.config._attn_implementation!r}, which would drop the gates; expected {NAME!r}, "
            "whose mode 'full' is full attention",
        )
        heads = self.config.num_attention_heads
        gate = self.gate(hidden_states).sigmoid().unflatten(-1, (heads, -1)).transpose(1, 2)
        return super().forward(hidden_states, *args, gate=gate, **options)


class GatedLlamaForCausalLM(LlamaForCausalLM):
    """``LlamaForCausalLM`` with gates; it runs full attention unless its configuration or :func:`sparse_attention` says otherwise.

    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> model = GatedLlamaForCausalLM(GatedLlamaConfig(**shape))
    >>> model.model.layers[0].self_attn.gate.weight.shape
    torch.Size([2, 16])
    """

    config_class = GatedLlamaConfig

    def __init__(self, config: GatedLlamaConfig):
        super().__init__(config)
        if not hasattr(config, IN_CONFIG):
            setattr(config, IN_CONFIG, Budget(mode="full").for_config())
        config._attn_implementation = NAME
        for number, layer in enumerate(self.model.layers):
            held: Any = layer
            held.self_attn = GatedLlamaAttention(config, number)
        self.post_init()


def from_released(folder: str | Path) -> GatedLlamaForCausalLM:
    """A model in the authors' format ``llama-nsa``, in eval mode, on plain transformers and any device.

    It has the mode and budget that its configuration names (sparse where it names none); :func:`sparse_attention` changes them. Cached
    decoding, left padding and packed documents give what one full forward gives, other than with the authors' code.

    Args:
        folder: with ``config.json`` and safetensors.

    Raises:
        InputError: no such folder, another format, weights that do not fit.

    >>> model = from_released("SSA-1B")  # doctest: +SKIP
    """
    folder = Path(folder)
    require(
        (folder / "config.json").is_file(),
        f"folder: {str(folder)!r} has no config.json, expected a released model",
    )
    told = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = told.get("model_type")
    require(
        kind == "llama-nsa",
        f"folder: {str(folder)!r} holds a model of type {kind!r}, expected 'llama-nsa'; other models open with from_pretrained",
    )
    mode, window = told.get("inference_mode") or "sparse", int(told.get("window_size") or 0)
    require(mode in MODES, f"folder: its inference_mode is {show(mode)}, expected one of {', '.join(MODES)}")
    config = GatedLlamaConfig(
        **{name: value for name, value in told.items() if name not in _FOREIGN},
        gates=3 if window else 1,
        window_size=window,
    )
    setattr(config, IN_CONFIG, Budget(int(told["block_size"]), int(told["block_counts"]), mode).for_config())
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    require(bool(weights), f"folder: {str(folder)!r} holds no safetensors")
    dtype = next(iter(weights.values())).dtype
    model: Any = GatedLlamaForCausalLM(config)
    model.to(dtype)
    weights = dict(_renamed(name, value, config) for name, value in weights.items())
    if config.tie_word_embeddings:
        weights.setdefault("lm_head.weight", weights.get("model.embed_tokens.weight", torch.empty(0)))
    own = {name: value.shape for name, value in model.state_dict().items()}
    differ = sorted(own.keys() ^ weights.keys()) or [name for name in own if own[name] != weights[name].shape]
    require(
        not differ, f"folder: weights of {str(folder)!r} do not fit its configuration, the first {differ[:1]}"
    )
    model.load_state_dict(weights)
    return model.eval()


def _renamed(name: str, value: Tensor, config: GatedLlamaConfig) -> tuple[str, Tensor]:
    if not name.endswith("self_attn.g_proj.weight"):
        return name, value
    # By head: the gates of the compressed, the selected and the window branch.
    if config.gates == 1:
        value = value.unflatten(0, (-1, 3))[:, 1].contiguous()
    return name.replace("g_proj", "gate"), value
