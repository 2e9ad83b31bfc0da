"""What can be patched in a transformer: the residual stream, attention, heads, MLPs and neurons of every layer, found from its configuration.

A component is read at one site and patched at one. They differ where no module takes or returns the value: the residual stream between attention and MLP
is read where the second norm takes it, and patched by adding the difference to the attention's output. What a block adds to the residual stream at its end
can be patched by adding the difference to that, which saves running the block again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core.checks import InputError, one_of, require, show
from lineament.core.models import unwrapped
from lineament.core.sites.families import FAMILIES, blocks_of
from lineament.core.sites.heads import PARTS, HeadView
from lineament.core.sites.naming import Site, resolve
from lineament.explain.patching.tracing import traced

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
# A choice of kinds, or for architectures that are not known {kind: glob, or (glob to read, glob to patch)}.
Sites = str | Iterable[str] | Mapping[str, str | tuple[str, str]]


@dataclass(frozen=True)
class Component:
    """One kind of component in one layer.

    Attributes:
        read: where its value passes. write: where it is patched, by replacing it or, with ``shift``, by adding the difference.
        stage: the first block that must run again after a patch; ``None`` without known blocks.
        direct: the patch is a change of the residual stream that enters that block, so that no hook is needed.
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
    def heads(self) -> HeadView | None:
        """The view of the heads where each head is a node."""
        return self.read.view if self.units == "head" else None

    @property
    def count(self) -> int:
        """How many heads."""
        return self.heads.heads if self.heads is not None and self.heads.only is None else 1

    def contracted(self, product: Tensor) -> Tensor:
        """Sums of a product of the read side's shape over what makes one node: (batch, positions) or (batch, positions, units)."""
        if self.heads is not None:
            heads = self.heads.read(flat(product))
            return heads.sum(-1, keepdim=self.heads.only is not None)
        return flat(product) if self.units == "feature" else flat(product).sum(-1)


@dataclass(frozen=True)
class Architecture:
    """The blocks of a model, and the names of its kinds of sites within a block."""

    blocks: list[Site]
    names: Mapping[str, Any]
    parallel: bool = False
    root: str = ""

    def name(self, key: str, layer: int) -> str:
        """The name of the site ``key`` (``attn_in``, ``mlp_out`` ...) of a layer."""
        return f"{self.blocks[layer].name}.{self.names[key]}"

    def kinds(self) -> list[str]:
        """The kinds of :data:`KINDS` that the blocks have as sites; where a model flattens its positions there is none."""
        flattened = self.names.get("flattened", ())
        has = {key for key, name in self.names.items() if key == "attention" or name not in flattened}
        has |= {"resid_pre", "resid_post"}
        return [kind for kind in KINDS if ("attention" if kind in PARTS else kind) in has]

    def check(self, kind: str) -> None:
        require(
            kind in self.kinds(),
            f"sites: {kind!r} is no site of this architecture; it has {', '.join(self.kinds())}; others can be named, sites={{kind: glob}}",
        )


def architecture(model: nn.Module, *, trace: bool = False) -> Architecture:
    """The blocks of a GPT-2, GPT-NeoX, Llama, Mistral, Qwen 2 and 3 or Gemma 1 to 3 model, with or without its head.

    Args:
        trace: find the parts of other language models by what passes in them.

    Raises:
        InputError: another architecture, whose sites must be named.
    """
    found = blocks_of(model)
    if found is not None:
        root, names, config, blocks = found
        prefix = f"{root}.{names['blocks']}" if root else names["blocks"]
        parallel = config.model_type == "gpt_neox" and bool(config.use_parallel_residual)
        sites = [Site(f"{prefix}.{k}", unwrapped(block)) for k, block in enumerate(blocks)]
        return Architecture(sites, names, parallel, root)
    if trace and hasattr(unwrapped(model), "get_input_embeddings"):
        prefix, blocks, names, parallel = traced(model)
        return Architecture(blocks, names, parallel, prefix.rpartition(".")[0])
    kind = (
        getattr(getattr(unwrapped(model), "config", None), "model_type", None)
        or type(unwrapped(model)).__name__
    )
    raise InputError(
        f"model: the architecture of {kind!r} is not known (known: {', '.join(FAMILIES)}); name the sites, "
        "sites={'blocks': 'layers.*', 'resid_pre': 'layers.*:in', 'attn_out': 'layers.*.attention'}"
    )


def find_components(model: nn.Module, sites: Sites) -> tuple[list[Component], list[Site]]:
    """The components of some kinds in every layer, and the model's blocks (none where they are not named).

    Args:
        sites: kinds from :data:`KINDS`. For other architectures a mapping: each kind's sites in the order of the layers, as a glob
            (``"layers.*.mlp"``) or a pair of globs (where to read, where to add the difference); under ``"blocks"`` the blocks, if each takes the
            residual stream first and returns it, which lets activation patching start in the middle. Single features are the nodes of a kind
            called ``"neurons"``, heads those of ``":z"`` and its like.

    Raises:
        InputError: an unknown kind or architecture, a kind that the architecture has not, or a site that does not exist.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> [component.read.name for component in find_components(net, {"hidden": "[01]"})[0]]
    ['0', '1']
    """
    if isinstance(sites, Mapping):
        return _named(model, sites)
    kinds = [sites] if isinstance(sites, str) else list(sites)
    require(bool(kinds), "sites: got none, expected at least one kind of site")
    for kind in kinds:
        one_of("sites", kind, KINDS)
    known = architecture(model, trace=True)
    for kind in kinds:
        known.check(kind)
    drafts = [_draft(known, kind, layer) for kind in kinds for layer in range(len(known.blocks))]
    # All names at once: finding one walks through the whole model.
    found = resolve(model, [name for read, write, _ in drafts for name in (read, write)])
    return [
        replace(draft, read=found[read], write=found[write]) for read, write, draft in drafts
    ], known.blocks


def _draft(known: Architecture, kind: str, layer: int) -> tuple[str, str, Component]:
    """The names of the sites to read and to write, and the component without them."""
    block = known.blocks[layer]
    units = "feature" if kind == "neurons" else "head" if kind in PARTS else ""
    draft = Component(kind, layer, block, block, False, layer, False, units)
    if kind in PARTS:
        site = f"{known.name('attention', layer)}:{kind}"
        return site, site, draft
    if kind == "resid_pre":
        return f"{block.name}:in", f"{block.name}:in", replace(draft, direct=True)
    if kind == "resid_post":
        return block.name, block.name, replace(draft, direct=True, stage=layer + 1)
    if kind == "resid_mid":
        require(
            not known.parallel,
            "sites: 'resid_mid' does not exist where attention and MLP both read the residual stream before the block (parallel residual)",
        )
        read, write = known.names[kind]
        return f"{block.name}.{read}", f"{block.name}.{write}", replace(draft, shift=True)
    site = known.name(kind, layer)
    last = kind == "mlp_out" or (kind == "attn_out" and known.parallel)
    return site, site, replace(draft, shift=last, stage=layer + 1, direct=True) if last else draft


def _named(model: nn.Module, named: Mapping[str, Any]) -> tuple[list[Component], list[Site]]:
    blocks = list(resolve(model, str(named["blocks"])).values()) if "blocks" in named else []
    kinds = {kind: pair for kind, pair in named.items() if kind != "blocks"}
    require(bool(kinds), "sites: got none, expected at least one kind of site")
    found = []
    for kind, pair in kinds.items():
        read, write = (pair, pair) if isinstance(pair, str) else pair
        reads, writes = list(resolve(model, read).values()), list(resolve(model, write).values())
        require(
            len(reads) == len(writes), f"sites: {kind!r} reads {len(reads)} sites and writes {len(writes)}"
        )
        for layer, (r, w) in enumerate(zip(reads, writes)):
            shift = pair is not read
            edge = any(w.module is block.module for block in blocks)
            direct = edge and not shift and w.view is None
            stage = stage_of(w, blocks)
            stage = stage + 1 if stage is not None and direct and w.side == "out" else stage
            units = "feature" if kind == "neurons" else "head" if r.view is not None else ""
            found.append(Component(kind, layer, r, w, shift, stage, direct, units))
    return found, blocks


def stage_of(site: Site, blocks: list[Site]) -> int | None:
    """The block that holds a site; what lies before the first block must run whole."""
    for k, block in enumerate(blocks):
        if any(part is site.module for part in block.module.modules()):
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
