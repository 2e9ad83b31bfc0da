"""Where a transformer can be patched: the residual stream, attention, heads, MLPs and neurons, by layer, found from the configuration.

A place has a site to read (see :mod:`lineament.core.sites.activations`) and one to write. They differ where no module's edge carries the value: the residual
stream between attention and MLP is read where the second norm takes it and written as a shift of the attention's output. What is added to the
residual stream at the end of a block can be written as a shift of that, which spares running the block again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core.checks import InputError, one_of, require, show, suggest
from lineament.core.sites.heads import PARTS, plain
from lineament.core.sites.naming import Site, resolve

KINDS = {
    "resid_pre": "residual stream before the block",
    "resid_mid": "residual stream between attention and MLP",
    "resid_post": "residual stream after the block",
    "attn_out": "what attention adds to the residual stream",
    "mlp_out": "what the MLP adds to the residual stream",
    "neurons": "each neuron of the MLP, where its output projection takes it",
    "q": "each head's query",
    "k": "each head's key",
    "v": "each head's value",
    "z": "each head's mixed values, where the output projection takes them",
}
DEFAULT = ("resid_pre", "attn_out", "mlp_out")
Layout = Mapping[str, str | tuple[str, str]]

_LLAMA = {
    "blocks": "layers",
    "attention": "self_attn",
    "resid_mid": ("post_attention_layernorm:in", "self_attn"),
    "attn_out": "self_attn",
    "mlp_out": "mlp",
    "neurons": "mlp.down_proj:in",
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
_FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "blocks": "h",
        "attention": "attn",
        "resid_mid": ("ln_2:in", "attn"),
        "attn_out": "attn",
        "mlp_out": "mlp",
        "neurons": "mlp.c_proj:in",
        "attn_in": "ln_1:in",
        "mlp_in": "ln_2:in",
        "final_in": "ln_f:in",
    },
    "gpt_neox": {
        "blocks": "layers",
        "attention": "attention",
        "resid_mid": ("post_attention_layernorm:in", "attention"),
        "attn_out": "attention",
        "mlp_out": "mlp",
        "neurons": "mlp.dense_4h_to_h:in",
        "attn_in": "input_layernorm:in",
        "mlp_in": "post_attention_layernorm:in",
        "final_in": "final_layer_norm:in",
    },
    **dict.fromkeys(("llama", "mistral", "gemma", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA),
}


@dataclass(frozen=True)
class Place:
    """One kind of site in one layer.

    Attributes:
        read: where its value passes. write: where it is patched, by replacing (``shift`` False) or by adding the difference.
        stage: the first block that must run again after a patch; ``None`` without known blocks.
        direct: the patch is a shift of the residual stream at that stage, so that no hook is needed.
        units: ``""`` for a whole vector, ``"head"``, or ``"feature"``.
    """

    kind: str
    layer: int
    read: Site
    write: Site
    shift: bool
    stage: int | None
    direct: bool
    units: str

    @property
    def count(self) -> int:
        """How many heads."""
        return self.read.view.heads if self.read.view is not None and self.read.view.only is None else 1


_NOWHERE = Site("", nn.Identity(), "out")


@dataclass(frozen=True)
class Architecture:
    """The blocks of a model and, by name, where a kind of site is in each."""

    blocks: list[tuple[str, nn.Module]]
    names: Mapping[str, Any]
    parallel: bool = False
    root: str = ""

    def at(self, key: str, layer: int) -> str:
        """The site ``key`` (``attn_in``, ``mlp_out`` ...) of a layer."""
        return f"{self.blocks[layer][0]}.{self.names[key]}"


def architecture(model: nn.Module) -> Architecture:
    """The blocks of a GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 and 3 or Gemma 1 to 3 model, with or without its head.

    Raises:
        InputError: another architecture; it wants an explicit ``layout``.
    """
    for root, module in plain(model).named_modules():
        config: Any = getattr(module, "config", None)
        names = _FAMILIES.get(getattr(config, "model_type", None) or "")
        blocks = getattr(module, names["blocks"], None) if names else None
        if names and isinstance(blocks, nn.ModuleList):
            prefix = f"{root}.{names['blocks']}" if root else names["blocks"]
            named = [(f"{prefix}.{k}", plain(block)) for k, block in enumerate(blocks)]
            parallel = config.model_type == "gpt_neox" and bool(config.use_parallel_residual)
            return Architecture(named, names, parallel, root)
    kind = getattr(getattr(plain(model), "config", None), "model_type", None) or type(plain(model)).__name__
    raise InputError(
        f"model: the layout of {kind!r} is not known (known: {', '.join(_FAMILIES)}); name the sites, "
        "layout={'blocks': 'layers.*', 'resid_pre': 'layers.*:in', 'attn_out': 'layers.*.attention'}"
    )


def places(
    model: nn.Module, kinds: str | Iterable[str], layout: Layout | None = None
) -> tuple[list[Place], list[nn.Module]]:
    """The places of some kinds in every layer, and the model's blocks (none where a layout does not name them).

    Args:
        kinds: from :data:`KINDS`, or the names in ``layout``.
        layout: for other architectures: each kind's sites in the order of the layers, as a glob (``"layers.*.mlp"``) or a pair of globs
            (where to read, where to write the difference); ``"blocks"``, if each block takes the residual stream first and returns it, lets
            activation patching start in the middle. Single features are the nodes of a kind called ``"neurons"``, heads those of ``":z"`` and its like.

    Raises:
        InputError: an unknown kind or architecture, a kind that the architecture has not, or a site that does not exist.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> [place.read.name for place in places(net, "hidden", {"hidden": "[01]"})[0]]
    ['0', '1']
    """
    wanted = [kinds] if isinstance(kinds, str) else list(kinds)
    require(bool(wanted), "sites: got none, expected at least one kind of site")
    if layout is not None:
        return _explicit(model, wanted, layout)
    for kind in wanted:
        one_of("sites", kind, KINDS)
    known = architecture(model)
    drafts = [_place(known, kind, layer) for kind in wanted for layer in range(len(known.blocks))]
    # All names at once: finding one walks through the whole model.
    sites = resolve(model, [name for read, write, _ in drafts for name in (read, write)])
    found = [replace(draft, read=sites[read], write=sites[write]) for read, write, draft in drafts]
    return found, [block for _, block in known.blocks]


def _place(known: Architecture, kind: str, layer: int) -> tuple[str, str, Place]:
    """The names of the sites to read and to write, and the place without them."""
    name = known.blocks[layer][0]
    units = "feature" if kind == "neurons" else "head" if kind in PARTS else ""
    draft = Place(kind, layer, _NOWHERE, _NOWHERE, False, layer, False, units)
    if kind in PARTS:
        site = f"{name}.{known.names['attention']}:{kind}"
        return site, site, draft
    if kind == "resid_pre":
        return f"{name}:in", f"{name}:in", replace(draft, direct=True)
    if kind == "resid_post":
        return name, name, replace(draft, direct=True, stage=layer + 1)
    if kind == "resid_mid":
        require(
            not known.parallel,
            "sites: 'resid_mid' does not exist where attention and MLP both read the residual stream before the block (parallel residual)",
        )
        read, write = known.names[kind]
        return f"{name}.{read}", f"{name}.{write}", replace(draft, shift=True)
    site = f"{name}.{known.names[kind]}"
    last = kind == "mlp_out" or (kind == "attn_out" and known.parallel)
    return site, site, replace(draft, shift=last, stage=layer + 1, direct=True) if last else draft


def _explicit(model: nn.Module, wanted: list[str], layout: Layout) -> tuple[list[Place], list[nn.Module]]:
    require(
        isinstance(layout, Mapping), f"layout: got {show(layout)}, expected a mapping from kinds to sites"
    )
    blocks = (
        [site.module for site in resolve(model, [str(layout["blocks"])]).values()]
        if "blocks" in layout
        else []
    )
    index = {id(block): k for k, block in enumerate(blocks)}
    found = []
    for kind in wanted:
        if kind not in layout or kind == "blocks":
            raise InputError(
                f"sites: {kind!r} is not in the layout{suggest(kind, [k for k in layout if k != 'blocks'])}"
            )
        pair = layout[kind]
        read, write = (pair, pair) if isinstance(pair, str) else pair
        reads, writes = list(resolve(model, [read]).values()), list(resolve(model, [write]).values())
        require(
            len(reads) == len(writes), f"layout: {kind!r} reads {len(reads)} sites and writes {len(writes)}"
        )
        for layer, (r, w) in enumerate(zip(reads, writes)):
            stage = stage_of(w.module, blocks)
            shift = pair is not read
            at = index.get(id(w.module))
            direct = at is not None and not shift and w.view is None
            if direct and w.side == "out":
                stage = (at or 0) + 1
            units = "feature" if kind == "neurons" else "head" if r.view is not None else ""
            found.append(Place(kind, layer, r, w, shift, stage, direct, units))
    return found, blocks


def stage_of(module: nn.Module, blocks: list[nn.Module]) -> int | None:
    """The block that holds a module; what lies before the first block must run whole."""
    for k, block in enumerate(blocks):
        if any(part is module for part in block.modules()):
            return k
    return None


def flat(value: Tensor) -> Float[Tensor, "batch positions features"]:
    """Any activation as (batch, positions, features): vectors have one position, the positions of images are their pixels."""
    if value.ndim == 2:
        return value[:, None]
    if value.ndim == 3:
        return value
    require(
        value.ndim > 3,
        f"sites: {show(value)} passed, expected (batch, features), (batch, positions, features) or (batch, channels, height, width)",
    )
    return value.flatten(2).transpose(1, 2)


def unflat(value: Float[Tensor, "batch positions features"], like: torch.Size | tuple[int, ...]) -> Tensor:
    """What :func:`flat` made, in the form it had; the batch may have grown."""
    if len(like) <= 3:
        return value.reshape(-1, *like[1:])
    return value.transpose(1, 2).reshape(-1, *like[1:])
