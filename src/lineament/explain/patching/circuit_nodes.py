"""What the nodes of a circuit are: features of a dictionary at a site with its error, neurons, heads or whole layers, where they sit in the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.core.sites.heads import plain
from lineament.core.sites.naming import resolve
from lineament.explain.patching.engine import Engine
from lineament.explain.patching.inputs import pair
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.sites import Layout, Place, flat, places, stage_of, unflat


class Dictionary(Protocol):
    """Whatever encodes activations (..., width) into features (..., count) and decodes them."""

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


def component_nodes(
    model: nn.Module, kinds: str | Sequence[str] = ("z", "mlp_out"), layout: Layout | None = None
) -> dict[str, Units]:
    """Heads, MLPs, neurons or residual streams as nodes: {site: :class:`Units`} for :func:`node_effects`.

    Args:
        kinds: ``"z"`` (a node a head), ``"attn_out"``, ``"mlp_out"``, ``"resid_pre"`` ... (a node a layer), ``"neurons"`` (a node a neuron).
    """
    found: dict[str, Units] = {}
    for place in places(model, kinds, layout)[0]:
        require(place.kind not in ("q", "k", "v"), f"kinds: {place.kind!r} is no run of features; use 'z'")
        name = place.read.name.rsplit(":", 1)[0] if place.read.view is not None else place.read.name
        groups = {"head": place.count, "feature": None, "": 1}[place.units]
        if place.read.view is not None:
            inner = {id(m): n for n, m in plain(model).named_modules()}
            name = f"{inner[id(place.read.module)]}:{place.read.side}"
        found[name] = Units(groups)
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
        self.model, self.dictionaries = model, dict(dictionaries)
        self.sites = {name: next(iter(resolve(model, [name]).values())) for name in dictionaries}
        for name, site in self.sites.items():
            require(
                site.view is None,
                f"dictionaries: {name!r} is a view of heads; name the projection's side and use Units(groups=heads)",
            )
        try:
            blocks = places(model, "resid_pre")[1]
        except InputError:
            blocks = []
        self.stage = {name: stage_of(site.module, blocks) for name, site in self.sites.items()}
        inputs = pair(model, clean, patch, metric, tokenizer=tokenizer, attention_mask=mask)
        nodes = [
            Place("node", k, site, site, False, None, False, "") for k, site in enumerate(self.sites.values())
        ]
        self.engine = Engine(model, inputs, metric, nodes, blocks, denoising=False)

    def exact(self, name: str) -> bool:
        return isinstance(self.dictionaries[name], Units)

    def parts(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features and error of an activation (batch, positions, width)."""
        dictionary = self.dictionaries[name]
        with torch.no_grad():
            f = dictionary.encode(x)
            back = dictionary.decode(f)
            if back.shape != x.shape:
                raise InputError(
                    f"dictionaries: {name!r} decodes to {show(back)}, expected the site's shape {tuple(x.shape)}"
                )
            return f, x - back

    def values(
        self, inputs: Tensor, *, keep: bool = False
    ) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        seen, score = self.engine.values(inputs, keep=keep)
        found = {}
        for name, site in self.sites.items():
            found[name] = self.parts(name, flat(seen[id(site.module), site.side]))
        return found, score

    def grouped(self, name: str, effects: Tensor) -> Tensor:
        groups = getattr(self.dictionaries[name], "groups", None) if self.exact(name) else None
        return effects if groups is None else effects.unflatten(-1, (groups, -1)).sum(-1)

    def run(
        self, changes: Mapping[str, Callable[[Tensor], Tensor]], times: int = 1, start: int | None = None
    ) -> Tensor:
        """The metric (times, batch) with activations (batch, positions, width) changed at some sites."""
        stream = None
        if start is not None:
            one = self.engine.stages[start]
            stream = one.repeat(times, *[1] * (one.ndim - 1))

        def whole(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda value: unflat(change(flat(value)), value.shape)

        sites = {
            (id(self.sites[n].module), self.sites[n].side): (self.sites[n], whole(c))
            for n, c in changes.items()
        }
        return self.engine.forward(start, times, stream, sites)
