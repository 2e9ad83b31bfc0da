"""Which nodes make a circuit, and is it enough? Dictionary features, neurons, heads and layers, judged by faithfulness and completeness.

Marks et al., "Sparse Feature Circuits", 2024 (arXiv 2403.19647), with the coefficients of RelP (arXiv 2508.21258). At each site x = dec(f) + e: the
features f and the error e are nodes. The gradient passes the site as if nothing were there and reaches f through the decoder alone, so that nothing is
counted twice. A circuit keeps its nodes; everything else takes its mean over the patch batch at that position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import number, one_of
from lineament.core.codes import Codes
from lineament.core.models import frozen
from lineament.core.results import Readable
from lineament.core.sites.hooks import tap
from lineament.explain.patching.active_nodes import differences, mean_over_batch, some_changed, through_atoms
from lineament.explain.patching.circuit_nodes import NodeSites
from lineament.explain.patching.components import flat
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import Prompts
from lineament.explain.patching.runs import TOKENS_AT_ONCE, receiving
from lineament.explain.relevance.functions import wide
from lineament.explain.relevance.rules import Rules, relevance_rules

Method = Literal["attrib", "relp", "ig", "exact"]


@dataclass(frozen=True)
class NodeEffects(Readable):
    """The effect of replacing each node by its value on the patch input, on the metric (not normalised), for each example.

    Attributes:
        features: by site, (batch, positions, nodes); of a dictionary that gives :class:`~lineament.core.codes.Codes`, codes of the features that differ.
        errors: by site, (batch, positions); none where the dictionary is exact.
        method: how they were found. coverage: which rule acted in how many modules.
    """

    features: Mapping[str, Tensor | Codes]
    errors: Mapping[str, Tensor]
    method: str
    coverage: Mapping[str, int] = field(default_factory=dict)

    def mean(self, site: str) -> Tensor:
        """(positions, nodes): the mean over the examples."""
        value = self.features[site]
        return mean_over_batch(value) if isinstance(value, Codes) else value.mean(0)

    def to_dict(self) -> dict[str, Any]:
        means = {site: _listed(self.mean(site), value) for site, value in self.features.items()}
        return {
            "method": self.method,
            "features": means,
            "errors": {s: v.mean(0).tolist() for s, v in self.errors.items()},
        }


def _listed(mean: Tensor, value: Tensor | Codes) -> Any:
    """A dense map as lists; of codes the nodes with an effect, as [position, node, effect]."""
    if not isinstance(value, Codes):
        return mean.tolist()
    return [[t, node, float(mean[t, node])] for t, node in mean.nonzero().tolist()]


@torch.inference_mode(False)
def node_effects(
    model: nn.Module,
    clean: Prompts,
    patch: Prompts,
    metric: Metric,
    *,
    dictionaries: Mapping[str, Any],
    method: Method = "relp",
    steps: int = 10,
    rules: Rules = "relp",
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> NodeEffects:
    """What each node does to the metric when it takes its value from the patch input instead of the clean one.

    ``attrib``: (f_patch - f_clean)·∂m/∂f at the clean run, for the error Σ (e_patch - e_clean)·∂m/∂e; ``relp``: the same with LRP coefficients; ``ig``:
    the gradient's mean over (1-α) clean + α patch with α = 0, 1/N ... (N-1)/N, one site at a time; ``exact``: one run for each node that differs.

    Args:
        model, clean, patch, metric, tokenizer, attention_mask: as in :func:`lineament.explain.patching.activation.activation_patching`.
        dictionaries: by site, any object with ``encode`` and ``decode``; :func:`lineament.explain.patching.circuit_nodes.component_nodes` gives heads, neurons and layers.
        steps: N of ``ig``. rules: of ``relp``.

    Raises:
        InputError: prompts of unequal length, an unknown site or method, a dictionary of another width.

    Source: Marks et al. 2024, section 3.1.

    >>> from lineament.explain.patching.circuit_nodes import Units
    >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight)
    >>> clean, patch = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])
    >>> node_effects(net, clean, patch, lambda y: y[:, 0], dictionaries={"0": Units()}, method="attrib").features["0"].tolist()
    [[[1.0, 3.0]]]
    """
    one_of("method", method, ("attrib", "relp", "ig", "exact"))
    number("steps", steps, low=1, integer=True)
    nodes = NodeSites(model, clean, patch, metric, dictionaries, tokenizer, attention_mask)
    with frozen(model):
        target, _ = nodes.values(nodes.runs.source_inputs)
        if method in ("attrib", "relp"):
            return _first_order(nodes, target, method, rules if method == "relp" else "gradient")
        base, score = nodes.values(nodes.runs.base_inputs, keep=True)
        return _path(nodes, base, target, steps) if method == "ig" else _exact(nodes, base, target, score)


def _first_order(
    nodes: NodeSites, target: Mapping[str, tuple[Any, Tensor]], method: str, rules: Rules
) -> NodeEffects:
    features: dict[str, Any] = {name: _nothing(nodes, name, f) for name, (f, _) in target.items()}
    errors = {name: torch.zeros_like(e[..., 0]) for name, (_, e) in target.items()}

    def at(name: str) -> Callable[[Tensor], Tensor]:
        def see(x: Tensor) -> Tensor:
            f, e = nodes.parts(name, flat(x.detach()))
            f_to, e_to = target[name]

            def receive(coefficient: Tensor) -> None:
                g = flat(coefficient)
                features[name], errors[name] = _contracted(nodes, name, f, f_to, e_to - e, g)

            return receiving(x, receive)

        return see

    taps = {site: at(name) for name, site in nodes.sites.items()}
    runs = nodes.runs
    with torch.enable_grad(), relevance_rules(runs.model, rules) as coverage, tap(runs.model, taps):
        nodes.run({}).sum().backward()
    return _effects(nodes, features, errors, method, coverage.active())


def _nothing(nodes: NodeSites, name: str, f: Any) -> Any:
    """Effects of zero on every node."""
    if isinstance(f, Codes):
        return Codes(f.indices[..., :0], f.values[..., :0], f.width)
    return nodes.grouped(name, torch.zeros_like(f))


def _effects(
    nodes: NodeSites,
    features: Mapping[str, Any],
    errors: Mapping[str, Tensor],
    method: str,
    coverage: Mapping[str, int] | None = None,
) -> NodeEffects:
    kept = {name: error for name, error in errors.items() if not nodes.exact(name)}
    return NodeEffects(features, kept, method, coverage or {})


def _contracted(nodes: NodeSites, name: str, f: Any, f_to: Any, de: Tensor, g: Tensor) -> tuple[Any, Tensor]:
    """(f difference · coefficient through the decoder, e difference · coefficient)."""
    to_error = (wide(de) * wide(g)).sum(-1)
    if isinstance(f, Codes):
        df = differences(f, f_to)
        through = through_atoms(nodes.dictionaries[name].atoms, df.indices, g)
        return Codes(df.indices, wide(df.values) * wide(through), df.width), to_error
    if nodes.exact(name):
        through = g
    else:
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            through = torch.autograd.grad(nodes.dictionaries[name].decode(leaf), leaf, g.to(leaf.dtype))[0]
    return nodes.grouped(name, wide(f_to - f) * wide(through)), to_error


def _path(nodes: NodeSites, base: Any, target: Any, steps: int) -> NodeEffects:
    features: dict[str, Any] = {}
    errors: dict[str, Tensor] = {}
    for name in nodes.sites:
        (own, e), (other, e_to) = base[name], target[name]
        change = differences(own, other) if isinstance(own, Codes) else None
        f: Any = own if change is None else torch.zeros_like(change.values)
        f_to: Any = other if change is None else change.values
        if change is not None:
            # Over the features that differ, from nothing to the whole difference; what both have is in x.
            x = nodes.dictionaries[name].decode(own) + e
            e, e_to = x, x + (e_to - e)
        alphas = (torch.arange(steps, device=f.device, dtype=f.dtype) / steps).repeat_interleave(len(f))[
            :, None, None
        ]
        mixed_f = (1 - alphas) * f.repeat(steps, 1, 1) + alphas * f_to.repeat(steps, 1, 1)
        mixed_e = (1 - alphas) * e.repeat(steps, 1, 1) + alphas * e_to.repeat(steps, 1, 1)
        with torch.enable_grad():
            leaf_f, leaf_e = mixed_f.requires_grad_(), mixed_e.requires_grad_()
            x = _decoded(nodes.dictionaries[name], leaf_f, change, steps) + leaf_e
            score = nodes.run({name: lambda _, x=x: x}, steps, nodes.stage[name]).sum()
            g_f, g_e = torch.autograd.grad(score, [leaf_f, leaf_e])
        g_f, g_e = (g.unflatten(0, (steps, -1)).mean(0) for g in (g_f, g_e))
        effect = (f_to - f) * g_f
        features[name] = (
            nodes.grouped(name, effect) if change is None else Codes(change.indices, effect, change.width)
        )
        errors[name] = ((e_to - e) * g_e).sum(-1)
    return _effects(nodes, features, errors, "ig")


def _decoded(dictionary: Any, values: Tensor, change: Codes | None, steps: int) -> Tensor:
    """What features decode to; of features that differ, without the decoder's constant, which is in the activation already."""
    if change is None:
        return dictionary.decode(values)
    codes = Codes(change.indices.repeat(steps, 1, 1), values, change.width)
    nothing = Codes(change.indices[:1, :1, :1], torch.zeros_like(values[:1, :1, :1]).detach(), change.width)
    return dictionary.decode(codes) - dictionary.decode(nothing)


@torch.no_grad()
def _exact(nodes: NodeSites, base: Any, target: Any, score: Tensor) -> NodeEffects:
    features: dict[str, Any] = {}
    errors: dict[str, Tensor] = {}
    for name in nodes.sites:
        (f, e), (f_to, e_to) = base[name], target[name]
        if isinstance(f, Codes):
            features[name], errors[name] = _exact_of_active(nodes, name, base[name], target[name], score)
            continue
        decode = nodes.dictionaries[name].decode
        groups = nodes.grouped(name, f).shape[-1]
        run = f.shape[-1] // groups
        features[name], errors[name] = f.new_zeros(*f.shape[:2], groups), f.new_zeros(f.shape[:2])
        differs = (f != f_to).unflatten(-1, (groups, run)).any(-1).any(0)
        changed: list[tuple[int, int | None]] = [(t, g) for t, g in differs.nonzero().tolist()]
        changed += [] if nodes.exact(name) else [(t, None) for t in range(f.shape[1])]
        size = max(1, TOKENS_AT_ONCE // (f.shape[0] * f.shape[1]))
        for first in range(0, len(changed), size):
            part = changed[first : first + size]
            rows_f, rows_e = f.repeat(len(part), 1, 1), e.repeat(len(part), 1, 1)
            for k, (t, g) in enumerate(part):
                rows = slice(k * len(f), (k + 1) * len(f))
                if g is None:
                    rows_e[rows, t] = e_to[:, t]
                else:
                    rows_f[rows, t, g * run : (g + 1) * run] = f_to[:, t, g * run : (g + 1) * run]
            x = decode(rows_f) + rows_e
            change = nodes.run({name: lambda _, x=x: x}, len(part), nodes.stage[name]) - score
            for (t, g), effect in zip(part, change):
                if g is None:
                    errors[name][:, t] = effect
                else:
                    features[name][:, t, g] = effect
    return _effects(nodes, features, errors, "exact")


def _exact_of_active(
    nodes: NodeSites, name: str, base: tuple[Codes, Tensor], target: tuple[Codes, Tensor], score: Tensor
) -> tuple[Codes, Tensor]:
    """As :func:`_exact` for the features that differ, each as its change of the activation."""
    (f, e), (f_to, e_to) = base, target
    difference = differences(f, f_to)
    changed, change = some_changed(nodes.dictionaries[name], difference, e_to - e)
    x = nodes.dictionaries[name].decode(f) + e
    effects, errors = torch.zeros_like(difference.values), e.new_zeros(e.shape[:2])
    size = max(1, TOKENS_AT_ONCE // (x.shape[0] * x.shape[1]))
    for first in range(0, len(changed), size):
        part = changed[first : first + size]
        rows = x.repeat(len(part), 1, 1)
        for k, (t, latent) in enumerate(part):
            rows[k * len(x) : (k + 1) * len(x), t] += change(t, latent)
        moved = nodes.run({name: lambda _, x=rows: x}, len(part), nodes.stage[name]) - score
        for (t, latent), effect in zip(part, moved):
            if latent is None:
                errors[:, t] = effect
            else:
                own = (difference.indices[:, t] == latent) & (difference.values[:, t] != 0)
                effects[:, t] += own * effect[:, None].to(effects)
    return Codes(difference.indices, effects, difference.width), errors
