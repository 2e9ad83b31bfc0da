"""Which nodes make a circuit, and is it enough? Dictionary features, neurons, heads and layers, judged by faithfulness and completeness.

Marks et al., "Sparse Feature Circuits", 2024 (arXiv 2403.19647), with the coefficients of RelP (arXiv 2508.21258). At each site x = dec(f) + e: the
features f and the error e are nodes. The gradient passes the site as if nothing were there and reaches f through the decoder alone, so that nothing is
counted twice. A circuit keeps its nodes; everything else takes its mean over the patch batch at that position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import payload
from lineament.core.checks import InputError, number, one_of, require, show
from lineament.core.heads import plain
from lineament.core.hooks import watch
from lineament.core.models import frozen
from lineament.core.naming import Site, resolve
from lineament.explain.lrp_functions import wide
from lineament.explain.patch_engine import Engine
from lineament.explain.patch_inputs import Prompts, pair
from lineament.explain.patch_metrics import Metric
from lineament.explain.patch_sites import Layout, Place, flat, places, unflat
from lineament.explain.relevance import Rules, relevance_rules

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Literal["attrib", "relp", "ig", "exact"]
Errors = Literal["default", "remove", "keep"]
_ROWS = 4096


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


@dataclass(frozen=True)
class NodeEffects:
    """The effect of replacing each node by its value on the patch input, on the metric (not normalised), for each example.

    Attributes:
        features: by site, (batch, positions, nodes). errors: by site, (batch, positions); none where the dictionary is exact.
        method: how they were found. coverage: which rule acted in how many modules.
    """

    features: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    method: str
    coverage: Mapping[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        means = {site: value.mean(0).tolist() for site, value in self.features.items()}
        return {"method": self.method, "features": means, "errors": {s: v.mean(0).tolist() for s, v in self.errors.items()}}


@dataclass(frozen=True)
class CircuitCurve:
    """Faithfulness (of the circuit) and completeness (of what is outside; low is good) against the size of the circuit."""

    thresholds: Sequence[float]
    nodes: Sequence[int]
    faithfulness: Sequence[float]
    completeness: Sequence[float]
    full: float
    empty: float

    def at(self, nodes: Sequence[int], which: Literal["faithfulness", "completeness"] = "faithfulness") -> list[float]:
        """The curve at these numbers of nodes, linearly between its points."""
        import numpy as np

        order = np.argsort(self.nodes, kind="stable")
        return np.interp(nodes, np.array(self.nodes)[order], np.array(getattr(self, which))[order]).tolist()

    def plot(self, ax: Axes | None = None, *, label: str = "") -> Axes:
        """Both curves against the number of nodes."""
        from matplotlib.figure import Figure

        if ax is None:
            ax = Figure(layout="constrained").subplots()
        name = f"{label} " if label else ""
        (line,) = ax.plot(self.nodes, self.faithfulness, marker="o", label=f"{name}faithfulness")
        ax.plot(self.nodes, self.completeness, linestyle="--", color=line.get_color(), label=f"{name}completeness")
        ax.set(xlabel="nodes in the circuit", ylabel="share of the metric", xscale="symlog")
        ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in vars(self).items()}


class _Sites:
    """The dictionaries of one call where they sit, and the runs around them."""

    def __init__(self, model: nn.Module, clean: Any, patch: Any, metric: Metric, dictionaries: Mapping[str, Any], tokenizer: Any, mask: Any):
        require(
            isinstance(dictionaries, Mapping) and len(dictionaries) > 0,
            f"dictionaries: got {show(dictionaries)}, expected {{site: an object with encode and decode}}",
        )
        for name, dictionary in dictionaries.items():
            fits = callable(getattr(dictionary, "encode", None)) and callable(getattr(dictionary, "decode", None))
            require(fits, f"dictionaries: {name!r} has {show(dictionary)}, expected an object with encode(x) and decode(f)")
        self.model, self.dictionaries = model, dict(dictionaries)
        self.sites = {name: next(iter(resolve(model, [name]).values())) for name in dictionaries}
        for name, site in self.sites.items():
            require(site.view is None, f"dictionaries: {name!r} is a view of heads; name the projection's side and use Units(groups=heads)")
        try:
            blocks = places(model, "resid_pre")[1]
        except InputError:
            blocks = []
        from lineament.explain.patch_sites import _stage

        self.stage = {name: _stage(site.module, blocks) for name, site in self.sites.items()}
        inputs = pair(model, clean, patch, metric, tokenizer=tokenizer, attention_mask=mask)
        nodes = [Place("node", k, site, site, False, None, False, "") for k, site in enumerate(self.sites.values())]
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
                raise InputError(f"dictionaries: {name!r} decodes to {show(back)}, expected the site's shape {tuple(x.shape)}")
            return f, x - back

    def values(self, inputs: Tensor, *, keep: bool = False) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        seen, score = self.engine.values(inputs, keep=keep)
        found = {}
        for name, site in self.sites.items():
            found[name] = self.parts(name, flat(seen[id(site.module), site.side]))
        return found, score

    def grouped(self, name: str, effects: Tensor) -> Tensor:
        groups = getattr(self.dictionaries[name], "groups", None) if self.exact(name) else None
        return effects if groups is None else effects.unflatten(-1, (groups, -1)).sum(-1)

    def run(self, changes: Mapping[str, Callable[[Tensor], Tensor]], times: int = 1, start: int | None = None) -> Tensor:
        """The metric (times, batch) with activations (batch, positions, width) changed at some sites."""
        stream = None
        if start is not None:
            one = self.engine.stages[start]
            stream = one.repeat(times, *[1] * (one.ndim - 1))

        def whole(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda value: unflat(change(flat(value)), value.shape)

        sites = {(id(self.sites[n].module), self.sites[n].side): (self.sites[n], whole(c)) for n, c in changes.items()}
        return self.engine.forward(start, times, stream, sites)


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
    modules: Mapping[Any, str] | None = None,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> NodeEffects:
    """What each node does to the metric when it takes its value from the patch input instead of the clean one.

    ``attrib``: (f_patch - f_clean)·∂m/∂f at the clean run, for the error Σ (e_patch - e_clean)·∂m/∂e; ``relp``: the same with LRP coefficients; ``ig``:
    the gradient's mean over (1-α) clean + α patch with α = 0, 1/N ... (N-1)/N, one site at a time; ``exact``: one run for each node that differs.

    Args:
        model, clean, patch, metric, tokenizer, attention_mask: as in :func:`lineament.explain.patching.activation_patching`.
        dictionaries: by site, any object with ``encode`` and ``decode``; :func:`component_nodes` gives heads, neurons and layers.
        steps: N of ``ig``. rules, modules: of ``relp``.

    Raises:
        InputError: prompts of unequal length, an unknown site or method, a dictionary of another width.

    Source: Marks et al. 2024, section 3.1.

    >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.ones_(net[1].weight)
    >>> clean, patch = torch.zeros(1, 2), torch.tensor([[1.0, 3.0]])
    >>> node_effects(net, clean, patch, lambda y: y[:, 0], dictionaries={"0": Units()}, method="attrib").features["0"].tolist()
    [[[1.0, 3.0]]]
    """
    one_of("method", method, ("attrib", "relp", "ig", "exact"))
    number("steps", steps, low=1, integer=True)
    work = _Sites(model, clean, patch, metric, dictionaries, tokenizer, attention_mask)
    with frozen(model):
        target, _ = work.values(work.engine.source_inputs)
        if method in ("attrib", "relp"):
            return _first_order(work, target, method, rules if method == "relp" else "gradient", modules if method == "relp" else None)
        base, score = work.values(work.engine.base_inputs, keep=bool(work.engine.blocks))
        return _path(work, base, target, steps) if method == "ig" else _exact(work, base, target, score)


def _first_order(work: _Sites, target: Mapping[str, tuple[Tensor, Tensor]], method: str, rules: Rules, modules: Any) -> NodeEffects:
    features: dict[str, Tensor] = {}
    errors: dict[str, Tensor] = {}

    def tap(name: str) -> Callable[[Any], Any]:
        def see(value: Any) -> Any:
            path, tensor = payload.find(value) or ((), None)
            if tensor is None:
                raise InputError(f"dictionaries: {name!r} passed {show(value)}, which holds no tensor")
            if not tensor.requires_grad:
                tensor = tensor.detach().requires_grad_()
            f, e = work.parts(name, flat(tensor.detach()))
            f_to, e_to = target[name]

            def contract(gradient: Tensor) -> None:
                g = flat(gradient)
                features[name], errors[name] = _contracted(work, name, f, f_to - f, (e_to - e), g)

            onward = tensor.clone()
            onward.register_hook(contract)
            return payload.replace(value, path, onward)

        return see

    with torch.enable_grad(), relevance_rules(work.model, rules, modules=modules) as coverage, ExitStack() as stack:
        for name, site in work.sites.items():
            watch(Site(site.name, site.module, site.side), tap(name), stack, last=True)
        work.run({}).sum().backward()
    for name, (f, e) in target.items():
        features.setdefault(name, work.grouped(name, torch.zeros_like(f)))
        errors.setdefault(name, torch.zeros_like(e[..., 0]))
    features = {name: features[name] for name in work.sites}
    errors = {name: errors[name] for name in work.sites if not work.exact(name)}
    return NodeEffects(features, errors, method, coverage.active())


def _contracted(work: _Sites, name: str, f: Tensor, df: Tensor, de: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(f difference · coefficient through the decoder, e difference · coefficient)."""
    if work.exact(name):
        through = g
    else:
        with torch.enable_grad():
            leaf = f.detach().requires_grad_()
            through = torch.autograd.grad(work.dictionaries[name].decode(leaf), leaf, g.to(leaf.dtype))[0]
    return work.grouped(name, wide(df) * wide(through)), (wide(de) * wide(g)).sum(-1)


def _path(work: _Sites, base: Any, target: Any, steps: int) -> NodeEffects:
    features, errors = {}, {}
    for name in work.sites:
        (f, e), (f_to, e_to) = base[name], target[name]
        alphas = (torch.arange(steps, device=f.device, dtype=f.dtype) / steps).repeat_interleave(len(f))[:, None, None]
        mixed_f = (1 - alphas) * f.repeat(steps, 1, 1) + alphas * f_to.repeat(steps, 1, 1)
        mixed_e = (1 - alphas) * e.repeat(steps, 1, 1) + alphas * e_to.repeat(steps, 1, 1)
        with torch.enable_grad():
            leaf_f, leaf_e = mixed_f.requires_grad_(), mixed_e.requires_grad_()
            x = work.dictionaries[name].decode(leaf_f) + leaf_e
            score = work.run({name: lambda _, x=x: x}, steps, work.stage[name]).sum()
            g_f, g_e = torch.autograd.grad(score, [leaf_f, leaf_e])
        g_f, g_e = (g.unflatten(0, (steps, -1)).mean(0) for g in (g_f, g_e))
        features[name] = work.grouped(name, (f_to - f) * g_f)
        errors[name] = ((e_to - e) * g_e).sum(-1)
    return NodeEffects(features, {n: e for n, e in errors.items() if not work.exact(n)}, "ig")


@torch.no_grad()
def _exact(work: _Sites, base: Any, target: Any, score: Tensor) -> NodeEffects:
    features, errors = {}, {}
    for name in work.sites:
        (f, e), (f_to, e_to) = base[name], target[name]
        decode = work.dictionaries[name].decode
        groups = work.grouped(name, f).shape[-1]
        run = f.shape[-1] // groups
        features[name], errors[name] = f.new_zeros(*f.shape[:2], groups), f.new_zeros(f.shape[:2])
        differs = (f != f_to).unflatten(-1, (groups, run)).any(-1).any(0)
        nodes: list[tuple[int, int | None]] = [(t, g) for t, g in differs.nonzero().tolist()]
        nodes += [] if work.exact(name) else [(t, None) for t in range(f.shape[1])]
        size = max(1, _ROWS // (f.shape[0] * f.shape[1]))
        for first in range(0, len(nodes), size):
            part = nodes[first : first + size]
            rows_f, rows_e = f.repeat(len(part), 1, 1), e.repeat(len(part), 1, 1)
            for k, (t, g) in enumerate(part):
                rows = slice(k * len(f), (k + 1) * len(f))
                if g is None:
                    rows_e[rows, t] = e_to[:, t]
                else:
                    rows_f[rows, t, g * run : (g + 1) * run] = f_to[:, t, g * run : (g + 1) * run]
            x = decode(rows_f) + rows_e
            change = work.run({name: lambda _, x=x: x}, len(part), work.stage[name]) - score
            for (t, g), effect in zip(part, change):
                if g is None:
                    errors[name][:, t] = effect
                else:
                    features[name][:, t, g] = effect
    return NodeEffects(features, {n: e for n, e in errors.items() if not work.exact(n)}, "exact")


@torch.inference_mode(False)
@torch.no_grad()
def circuit_curve(
    model: nn.Module,
    clean: Prompts,
    patch: Prompts,
    metric: Metric,
    effects: NodeEffects | Mapping[str, Float[Tensor, "positions nodes"]],
    *,
    dictionaries: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
    errors: Errors = "default",
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> CircuitCurve:
    """Faithfulness and completeness of the circuits of all nodes whose mean effect exceeds each threshold.

    faithfulness = (m(C) - m(∅)) / (m(M) - m(∅)); completeness is that of the complement. Nodes outside take their mean over the patch batch, position
    by position; inside they are what the run makes of them.

    Args:
        clean, patch: the prompts to judge on (others than those the effects come from, for an honest curve), of the same length.
        effects: from :func:`node_effects`; \\|mean over the examples\\| is compared with the thresholds.
        thresholds: by default 15 from 1e-4 to 1, logarithmically.
        errors: the error nodes are nodes like others, all removed, or all kept.

    Raises:
        InputError: as :func:`node_effects`; also a model that does no better than the empty circuit (less than 1e-4 apart).

    Source: Marks et al. 2024, section 4.
    """
    one_of("errors", errors, ("default", "remove", "keep"))
    levels = torch.logspace(-4, 0, 15).tolist() if thresholds is None else [float(t) for t in thresholds]
    require(isinstance(effects, NodeEffects), f"effects: got {show(effects)}, expected the NodeEffects of node_effects")
    assert isinstance(effects, NodeEffects)
    work = _Sites(model, clean, patch, metric, dictionaries, tokenizer, attention_mask)
    for name in dictionaries:
        require(name in effects.features, f"effects: has no site {name!r}; it has {list(effects.features)}")
    with frozen(model):
        target, _ = work.values(work.engine.source_inputs)
        means = {name: (f.mean(0), e.mean(0)) for name, (f, e) in target.items()}
        full = float(work.run({}).mean())
        everything = {name: effects.features[name].mean(0) for name in work.sites}
        everything_e = {name: value.mean(0) for name, value in effects.errors.items()}

        def judged(level: float | None, inside: bool) -> float:
            """The metric with the circuit (or its complement) intact; ``None`` keeps nothing."""
            changes = {}
            for name in work.sites:
                f_keep = torch.zeros_like(everything[name], dtype=torch.bool)
                e_keep = f_keep[:, :1]
                if level is not None:
                    f_keep = (everything[name].abs() > level) == inside
                    e_keep = f_keep[:, :1] | True
                    if name in everything_e:
                        chosen = (everything_e[name].abs() > level)[:, None]
                        chosen = {"default": chosen, "remove": chosen & False, "keep": chosen | True}[errors]
                        e_keep = chosen if inside or errors == "keep" else ~chosen
                changes[name] = _ablation(work, name, f_keep, e_keep, *means[name])
            return float(work.run(changes).mean())

        empty = judged(None, True)
        require(
            abs(full - empty) >= 1e-4,
            f"metric: {full:.6g} for the whole model and {empty:.6g} with every node ablated are alike (less than 1e-4 apart), so that there is nothing to "
            "be faithful to",
        )
        nodes, faithful, complete = [], [], []
        for level in levels:
            count = sum(int((value.abs() > level).sum()) for value in everything.values())
            if errors == "default":
                count += sum(int((value.abs() > level).sum()) for value in everything_e.values())
            nodes.append(count)
            faithful.append((judged(level, True) - empty) / (full - empty))
            complete.append((judged(level, False) - empty) / (full - empty))
    return CircuitCurve(levels, nodes, faithful, complete, full, empty)


def _ablation(work: _Sites, name: str, f_keep: Tensor, e_keep: Tensor, f_mean: Tensor, e_mean: Tensor) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        require(
            x.shape[1] == f_keep.shape[0],
            f"effects: of {f_keep.shape[0]} positions at {name!r}, expected the {x.shape[1]} of these prompts",
        )
        f, e = work.parts(name, x)
        keep = f_keep.repeat_interleave(f.shape[-1] // f_keep.shape[-1], -1)
        mixed = torch.where(keep, f, f_mean)
        return work.dictionaries[name].decode(mixed) + torch.where(e_keep, e, e_mean)

    return change
