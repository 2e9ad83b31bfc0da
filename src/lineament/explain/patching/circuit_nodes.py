"""What the nodes of a circuit are: features of a dictionary at a site and its error, neurons, heads or whole layers; and the runs around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.core.models import unwrapped
from lineament.core.sites.hooks import Function
from lineament.core.sites.naming import Site, resolve
from lineament.explain.patching.components import Sites, architecture, find_components, flat, stage_of, unflat
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import pair_prompts
from lineament.explain.patching.runs import Runs


class Dictionary(Protocol):
    """Whatever encodes activations (..., width) into features (..., count) and decodes them.

    One that has ``codes`` and ``atoms`` too (:class:`lineament.core.codes.Dictionary`) is looked at through the features that are on, so that its size costs nothing.
    """

    def encode(self, x: Tensor, /) -> Tensor: ...
    def decode(self, f: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Units:
    """The activation itself as a dictionary: each feature a node, or ``groups`` runs of features (heads; 1: the whole vector). It has no error.

    >>> Units().encode(torch.ones(1, 2)).shape
    torch.Size([1, 2])
    """

    groups: int | None = None

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, f: Tensor) -> Tensor:
        return f


def component_nodes(model: nn.Module, kinds: Sites = ("z", "mlp_out")) -> dict[str, Units]:
    """Heads, MLPs, neurons or residual streams as nodes: {site: :class:`Units`} for :func:`lineament.explain.patching.circuits.node_effects`.

    Args:
        kinds: ``"z"`` (a node a head), ``"attn_out"``, ``"mlp_out"``, ``"resid_pre"`` ... (a node a layer), ``"neurons"`` (a node a neuron).

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=2, n_head=2)).eval()
    >>> list(component_nodes(net, ("z",)))
    ['transformer.h.0.attn.c_proj:in', 'transformer.h.1.attn.c_proj:in']
    """
    found: dict[str, Units] = {}
    names = {id(module): name for name, module in unwrapped(model).named_modules()}
    for component in find_components(model, kinds)[0]:
        require(
            component.kind not in ("q", "k", "v"), f"kinds: {component.kind!r} is no run of features; use 'z'"
        )
        site = component.read
        name = site.name if site.view is None else f"{names[id(site.module)]}:{site.side}"
        found[name] = Units({"head": component.count, "feature": None, "": 1}[component.units])
    return found


class NodeSites:
    """The dictionaries of one call where they sit, and the runs around them."""

    def __init__(
        self,
        model: nn.Module,
        clean: Any,
        patch: Any,
        metric: Metric,
        dictionaries: Mapping[str, Any],
        tokenizer: Any,
        mask: Any,
    ):
        require(
            isinstance(dictionaries, Mapping) and len(dictionaries) > 0,
            f"dictionaries: got {show(dictionaries)}, expected {{site: an object with encode and decode}}",
        )
        for name, dictionary in dictionaries.items():
            fits = callable(getattr(dictionary, "encode", None)) and callable(
                getattr(dictionary, "decode", None)
            )
            require(
                fits,
                f"dictionaries: {name!r} has {show(dictionary)}, expected an object with encode(x) and decode(f)",
            )
        self.dictionaries = dict(dictionaries)
        self.sites = resolve(model, dictionaries)
        for name, site in self.sites.items():
            require(
                site.view is None,
                f"dictionaries: {name!r} is a view of heads; name the projection's side and use Units(groups=heads)",
            )
        try:
            blocks = architecture(model).blocks
        except InputError:
            blocks = []
        self.stage = {name: stage_of(site, blocks) for name, site in self.sites.items()}
        pair = pair_prompts(model, clean, patch, metric, tokenizer=tokenizer, attention_mask=mask)
        self.runs = Runs(model, pair, metric, blocks, denoising=False)

    def exact(self, name: str) -> bool:
        return isinstance(self.dictionaries[name], Units)

    def parts(self, name: str, x: Tensor) -> tuple[Any, Tensor]:
        """Features and error of an activation (batch, positions, width); the features are :class:`Codes` where the dictionary gives these."""
        dictionary = self.dictionaries[name]
        with torch.no_grad():
            f = dictionary.codes(x) if callable(getattr(dictionary, "codes", None)) else dictionary.encode(x)
            back = dictionary.decode(f)
            if back.shape != x.shape:
                raise InputError(
                    f"dictionaries: {name!r} decodes to {show(back)}, expected the site's shape {tuple(x.shape)}"
                )
            return f, (x - back).to(x.dtype)

    def values(self, inputs: Tensor, *, keep: bool = False) -> tuple[dict[str, tuple[Any, Tensor]], Tensor]:
        """Features and error at every site, and the metric."""
        seen, score = self.runs.values(inputs, self.sites.values(), keep=keep)
        return {name: self.parts(name, flat(seen[site.key])) for name, site in self.sites.items()}, score

    def grouped(self, name: str, effects: Tensor) -> Tensor:
        groups = getattr(self.dictionaries[name], "groups", None) if self.exact(name) else None
        return effects if groups is None else effects.unflatten(-1, (groups, -1)).sum(-1)

    def run(
        self, changes: Mapping[str, Callable[[Tensor], Tensor]], times: int = 1, start: int | None = None
    ) -> Tensor:
        """The metric (times, batch) with activations (batch, positions, width) changed at some sites."""

        def whole(change: Callable[[Tensor], Tensor]) -> Function:
            return lambda value: unflat(change(flat(value)), value.shape)

        functions: dict[Site, Function] = {self.sites[n]: whole(c) for n, c in changes.items()}
        return self.runs.patched(start, times, functions)
