"""What the parts of known transformer families are called, so that a kind of site ("what the MLP adds") has a name in each of them.

A value is the name of a site within a block (:mod:`lineament.core.sites.naming`); a pair says where the residual stream between attention and MLP is
read and where it can be changed, because no module returns it.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lineament.core.checks import InputError, show
from lineament.core.models import unwrapped

_LLAMA = {
    "blocks": "layers",
    "embedding": "embed_tokens",
    "attention": "self_attn",
    "resid_mid": ("post_attention_layernorm:in", "self_attn"),
    "attn_out": "self_attn",
    "mlp_out": "mlp",
    "neurons": "mlp.down_proj:in",
    "mixed": "self_attn.o_proj:in",
    "attn_in": "input_layernorm:in",
    "mlp_in": "post_attention_layernorm:in",
    "final_in": "norm:in",
}
# Gemma 2 and 3 normalise what attention and MLP return before they add it.
_GEMMA = {
    **_LLAMA,
    "resid_mid": ("pre_feedforward_layernorm:in", "post_attention_layernorm"),
    "attn_out": "post_attention_layernorm",
    "mlp_out": "post_feedforward_layernorm",
    "mlp_in": "pre_feedforward_layernorm:in",
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "blocks": "h",
        "embedding": "wte",
        "attention": "attn",
        "resid_mid": ("ln_2:in", "attn"),
        "attn_out": "attn",
        "mlp_out": "mlp",
        "neurons": "mlp.c_proj:in",
        "mixed": "attn.c_proj:in",
        "attn_in": "ln_1:in",
        "mlp_in": "ln_2:in",
        "final_in": "ln_f:in",
    },
    "gpt_neox": {
        "blocks": "layers",
        "embedding": "embed_in",
        "attention": "attention",
        "resid_mid": ("post_attention_layernorm:in", "attention"),
        "attn_out": "attention",
        "mlp_out": "mlp",
        "neurons": "mlp.dense_4h_to_h:in",
        "mixed": "attention.dense:in",
        "attn_in": "input_layernorm:in",
        "mlp_in": "post_attention_layernorm:in",
        "final_in": "final_layer_norm:in",
    },
    **dict.fromkeys(("llama", "mistral", "gemma", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
}
# What a model's name holds, its family, and what Hugging Face calls the model below the head.
_BY_NAME = (
    ("gpt2", "gpt2", "transformer"),
    ("pythia", "gpt_neox", "gpt_neox"),
    ("gpt-neox", "gpt_neox", "gpt_neox"),
    ("gemma-2-", "gemma2", "model"),
    ("gemma-3-", "gemma3_text", "model"),
    ("gemma", "gemma", "model"),
    ("llama", "llama", "model"),
    ("mistral", "mistral", "model"),
    ("qwen", "qwen2", "model"),
)
# TransformerLens' hooks within a block, by the kind of site; the residual stream is the block's own input and output.
_HOOKS = {
    "hook_attn_out": "attn_out",
    "hook_mlp_out": "mlp_out",
    "mlp.hook_post": "neurons",
    "attn.hook_z": "mixed",
    "hook_resid_mid": "resid_mid",
}


def blocks_of(model: nn.Module) -> tuple[str, dict[str, Any], Any, nn.ModuleList] | None:
    """Of a known family the name of what holds the blocks' list, the names in a block, the configuration and the blocks; else ``None``."""
    for root, module in unwrapped(model).named_modules():
        config: Any = getattr(module, "config", None)
        names = FAMILIES.get(getattr(config, "model_type", None) or "")
        blocks = getattr(module, names["blocks"], None) if names else None
        if names and isinstance(blocks, nn.ModuleList):
            return root, names, config, blocks
    return None


def site_of_hook(hook: str, model: nn.Module | str) -> str:
    """The site that a hook of TransformerLens names in the Hugging Face model.

    Args:
        model: the model, or its name ("gpt2-small", "google/gemma-2-2b"), from which the family is told.

    Raises:
        InputError: another hook, or a model of no known family.

    >>> site_of_hook("blocks.7.hook_resid_pre", "gpt2-small"), site_of_hook("blocks.3.hook_mlp_out", "google/gemma-2-2b")
    ('transformer.h.7:in', 'model.layers.3.post_feedforward_layernorm')
    """
    root, names = _named_family(hook, model)
    prefix = f"{root}." if root else ""
    if hook == "hook_embed":
        return prefix + names["embedding"]
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    block = f"{prefix}{names['blocks']}.{found[1]}" if found else ""
    if found and found[2] in ("hook_resid_pre", "hook_resid_post"):
        return f"{block}:in" if found[2].endswith("pre") else block
    if found and found[2] in _HOOKS:
        name = names[_HOOKS[found[2]]]
        return f"{block}.{name if isinstance(name, str) else name[0]}"
    known = ["hook_resid_pre", "hook_resid_post", *_HOOKS]
    raise InputError(
        f"site: the hook {show(hook)} has no site here; expected hook_embed or blocks.LAYER. with one of {', '.join(known)}"
    )


def hook_of_site(site: str, model: nn.Module | str) -> str | None:
    """The hook of TransformerLens for a site, the other way round than :func:`site_of_hook`; ``None`` where there is none.

    >>> hook_of_site("transformer.h.7.attn.c_proj:in", "gpt2"), hook_of_site("transformer.ln_f", "gpt2")
    ('blocks.7.attn.hook_z', None)
    """
    try:
        root, names = _named_family(site, model)
    except InputError:
        return None
    site = site.removesuffix(":out")
    prefix = f"{root}." if root else ""
    if site == prefix + names["embedding"]:
        return "hook_embed"
    found = re.fullmatch(rf"{re.escape(prefix + names['blocks'])}\.(\d+)(.*)", site)
    if found is None:
        return None
    ends = {"": "hook_resid_post", ":in": "hook_resid_pre"}
    for hook, kind in _HOOKS.items():
        name = names[kind]
        ends.setdefault(f".{name if isinstance(name, str) else name[0]}", hook)
    hook = ends.get(found[2])
    return None if hook is None else f"blocks.{found[1]}.{hook}"


def _named_family(what: str, model: nn.Module | str) -> tuple[str, dict[str, Any]]:
    if isinstance(model, str):
        lowered = model.lower()
        for part, family, root in _BY_NAME:
            if part in lowered:
                return root, FAMILIES[family]
        raise InputError(
            f"model: {model!r} is of no known family ({', '.join(FAMILIES)}), so that {what!r} has no site; name the site, site='layers.3'"
        )
    found = blocks_of(model)
    if found is None:
        raise InputError(
            f"model: {type(unwrapped(model)).__name__} is of no known family ({', '.join(FAMILIES)}), so that {what!r} has no site; "
            "name the site, site='layers.3'"
        )
    return found[0], found[1]
