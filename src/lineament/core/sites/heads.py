"""Where the heads of an attention block are: the projection that carries them and the columns of each head.

Queries, keys and values are read where their projection returns them (before rotary embedding, and before the
``q_norm``/``k_norm`` of Qwen3 and Gemma 3, which are sites of their own); ``z``, the heads' mixed values, where the
output projection takes them. Numbers of heads, of key-value heads and head sizes come from the model's configuration:

- GPT-2: ``c_attn`` returns all queries, then all keys, then all values; ``c_proj`` takes ``z``;
- GPT-NeoX and Pythia: ``query_key_value`` returns query, key and value of head 0, then of head 1 ...; ``dense`` takes ``z``;
- OPT, BART, Phi, GPT-Neo, GPT-J (``out_proj`` or ``dense``), T5 (``q``, ``k``, ``v``, ``o``), DistilBERT (``q_lin`` ..., ``out_lin``) alike;
- BERT, RoBERTa and their like: ``query``, ``key``, ``value``; ``z`` is what the block itself returns, since its output projection lies outside;
- Bloom as GPT-NeoX; Falcon so too, or, where heads share keys, its queries first and then a key and a value for each group;
- Llama, Gemma 1 to 3, Qwen2, Qwen3 and their like: ``q_proj``, ``k_proj``, ``v_proj``, ``o_proj``, with fewer key-value
  heads than query heads where these are grouped.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core.models import unwrapped

PARTS = ("q", "k", "v", "z")
# What the projections of an attention block are called: that which takes the heads' mixed values, and those that make queries.
_OUTPUTS = ("o_proj", "out_proj", "out_lin", "c_proj", "dense", "o")
_INPUTS = ("q_proj", "c_attn", "query_key_value", "q", "q_lin", "qkv_proj", "Wqkv")
# Names of projections that make queries, keys and values apart.
_APART = ("{}_proj", "{}", "{}_lin")
_LONG = {"q": "query", "k": "key", "v": "value"}


@dataclass(frozen=True)
class HeadView:
    """Head ``h`` of ``heads`` has the columns ``start + h*step ... start + h*step + size - 1`` of one side of ``module``."""

    module: nn.Module
    side: str
    heads: int
    size: int
    start: int = 0
    step: int = 0
    only: int | None = None

    def columns(self, device: torch.device) -> Tensor:
        heads = (
            torch.arange(self.heads, device=device)
            if self.only is None
            else torch.tensor([self.only], device=device)
        )
        return (self.start + heads[:, None] * self.step + torch.arange(self.size, device=device)).flatten()

    def read(self, wide: Float[Tensor, "*batch columns"]) -> Float[Tensor, "*batch heads size"]:
        """The heads (a copy); without the heads' dimension where one head was asked for."""
        picked = wide.index_select(-1, self.columns(wide.device))
        return picked if self.only is not None else picked.unflatten(-1, (self.heads, self.size))

    def write(
        self, wide: Float[Tensor, "*batch columns"], heads: Float[Tensor, "*batch heads size"]
    ) -> Float[Tensor, "*batch columns"]:
        """``wide`` with these heads in it (a copy); gradients flow to both."""
        flat = heads if self.only is not None else heads.flatten(-2)
        return wide.index_copy(-1, self.columns(wide.device), flat)


def head_view(attention: nn.Module, part: str, config: Any) -> HeadView | None:
    """The view of ``part`` (``q``, ``k``, ``v`` or ``z``) of an attention block, or ``None`` where it has none.

    Args:
        attention: the block that holds the projections.
        config: the configuration of the model it belongs to.
    """
    count = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(count, int) or not isinstance(width, int):
        return None
    groups = getattr(config, "num_key_value_heads", None) or count
    named = ((attention, "head_dim"), (attention, "key_value_proj_dim"), (config, "head_dim"))
    size = next((n for where, what in named if (n := getattr(where, what, None))), width // count)
    children = {name: unwrapped(child) for name, child in attention.named_children()}
    index, all_heads = PARTS.index(part), count * size
    if part == "z":
        output = next((children[name] for name in _OUTPUTS if name in children), None)
        reads = any(name in children for name in _INPUTS)
        view = HeadView(output, "in", count, size, 0, size) if reads and output is not None else None
        if view is None and children.keys() >= {*_LONG.values()}:
            # What it returns are the heads side by side.
            queries = HeadView(children["query"], "out", count, size, 0, size)
            return HeadView(attention, "out", count, size, 0, size) if _width(queries) == all_heads else None
        return view if view and _width(view) == all_heads else None
    match _layout(children, config):
        case "apart":
            heads = count if part == "q" else groups
            names = [_LONG[part], *(name.format(part) for name in _APART)]
            projection = next(children[name] for name in names if name in children)
            view, width = HeadView(projection, "out", heads, size, 0, size), heads * size
        case "side by side":
            view, width = (
                HeadView(children["c_attn"], "out", count, size, index * all_heads, size),
                3 * all_heads,
            )
        case "crossed" if part == "q":
            view, width = HeadView(children["q_attn"], "out", count, size, 0, size), all_heads
        case "crossed":
            start = (index - 1) * all_heads
            view, width = HeadView(children["c_attn"], "out", count, size, start, size), 2 * all_heads
        case "grouped":
            # For each group of heads that share keys its queries, a key and a value; or all queries before one of both.
            shared = getattr(config, "num_kv_heads", None) or 1
            groups = shared if getattr(config, "new_decoder_architecture", False) else 1
            own, width = count // groups, (count + 2 * groups) * size
            if part == "q" and groups > 1 and own > 1:
                return None
            heads = count if part == "q" else groups
            start = (0 if part == "q" else own + index - 1) * size
            step = size if part == "q" and groups == 1 else (own + 2) * size
            view = HeadView(children["query_key_value"], "out", heads, size, start, step)
        case "interleaved":
            view = HeadView(children["query_key_value"], "out", count, size, index * size, 3 * size)
            width = 3 * all_heads
        case _:
            return None
    return view if _width(view) == width else None


def _layout(children: dict[str, Any], config: Any) -> str | None:
    """How a block lays out its projections; ``crossed``: the queries apart, keys and values of another sequence together."""
    names = children.keys()
    long = {*_LONG.values()} <= names
    if (
        long
        or {"q", "k", "v", "o"} <= names
        or any({f"{p}_{end}" for p in "qkv"} <= names for end in ("proj", "lin"))
    ):
        return "apart"
    if {"c_attn", "c_proj"} <= names:
        return "crossed" if "q_attn" in names else "side by side"
    # Other families use the same names for other layouts.
    kind = str(getattr(config, "model_type", ""))
    if not {"query_key_value", "dense"} <= names:
        return None
    if kind == "falcon" and (
        getattr(config, "multi_query", False) or getattr(config, "new_decoder_architecture", False)
    ):
        return "grouped"
    return "interleaved" if "neox" in kind or kind in ("bloom", "falcon") else None


def attention_pattern(output: Any) -> Tensor | None:
    """The attention's probabilities (batch, head, query, key) among what a block returns: the tensor of four dimensions whose rows sum to 1.

    >>> attention_pattern((torch.zeros(1, 2, 4), torch.full((1, 1, 2, 2), 0.5))).shape
    torch.Size([1, 1, 2, 2])
    """
    members = output if isinstance(output, (tuple, list)) else ()
    for member in members[1:]:
        if isinstance(member, Tensor) and member.ndim == 4 and member.is_floating_point():
            sums = member.detach().float().sum(-1)
            if torch.allclose(sums, torch.ones_like(sums), atol=2e-2) and bool((member >= 0).all()):
                return member
    return None


def _width(view: HeadView) -> int | None:
    """How many columns that side of the projection has: another layout under the same names is not mistaken for this."""
    weight = getattr(view.module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return None
    linear = hasattr(view.module, "out_features")  # GPT-2's Conv1D keeps its weight the other way round
    return weight.shape[0 if (view.side == "out") == linear else 1]
