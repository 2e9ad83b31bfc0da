"""Which connections carry a behaviour: edge attribution patching with gradients or LRP coefficients.

Syed, Rager, Conmy 2023 (arXiv 2310.10348), with the coefficients of RelP (arXiv 2508.21258) as an option. An edge goes from what a component adds to
the residual stream to the input of a later one; its score is Σ (u_source - u_base)·c with c the coefficient at that input, by that way alone. The input of
an attention block can be split into queries, keys and values, whole or by head: each has its own way through the block's norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import one_of, require
from lineament.core.models import frozen
from lineament.core.sites import main_tensor
from lineament.core.sites.heads import HeadView, head_view
from lineament.core.sites.hooks import eagerly, watch
from lineament.core.sites.naming import Site, resolve
from lineament.explain.patching.edge_result import EdgeResult
from lineament.explain.patching.engine import Engine, tapped
from lineament.explain.patching.inputs import Prompts, pair
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.sites import Architecture, Place, architecture
from lineament.explain.relevance.context import Rules, relevance_rules
from lineament.explain.relevance.functions import wide

__all__ = ["EdgeResult", "edge_patching"]

Inputs = Literal["attention", "qkv", "qkv heads"]


@dataclass(frozen=True)
class _End:
    """One end of edges: its name, its site, and when it comes (attention of layer l: 2l, MLP: 2l + 1)."""

    name: str
    site: Site
    order: int


@torch.inference_mode(False)
def edge_patching(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts,
    metric: Metric,
    *,
    rules: Rules = "relp",
    modules: Mapping[Any, str] | None = None,
    heads: bool = False,
    inputs: Inputs = "attention",
    direction: str = "denoising",
    normalise: bool = True,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> EdgeResult:
    """The effect of every edge between components, approximated from two forwards and one backward.

    Upstream are the embeddings, each attention block (with ``heads`` each head) and each MLP; downstream each attention block's and MLP's input before
    its norm, and the final norm's. Scores are summed over positions and are those of :func:`lineament.explain.patching.relevance_patching` split by
    where they go: over all downstream components, a row sums to its node's score.

    Args:
        rules: ``"gradient"`` is edge attribution patching. The others are those of relevance patching.
        heads: each head is an upstream component.
        inputs: one downstream end for each attention block; ``"qkv"``: one each for its queries, keys and values, which sum to that; ``"qkv heads"``: these by
            head, keys and values by group where heads share them. Each costs one more backward through the block's projections and norm.

    Raises:
        InputError: as relevance patching; with ``heads``, a block that normalises the sum of its heads (Gemma 2 and 3), where a head adds nothing of
            its own to the residual stream.

    Source: Syed et al. 2023; Rezaei Jafari et al. 2025.
    """
    one_of("direction", direction, ("denoising", "noising"))
    one_of("inputs", inputs, ("attention", "qkv", "qkv heads"))
    prompts = pair(model, clean, corrupt, metric, tokenizer=tokenizer, attention_mask=attention_mask)
    known = architecture(model)
    upstream, downstream = _ends(model, known)
    projections = _projections(model, known) if heads else {}
    places = [
        Place(end.name, k, end.site, end.site, False, None, False, "") for k, end in enumerate(upstream)
    ]
    places += [
        Place("z", layer, site, site, False, None, False, "head")
        for layer, (site, _, _) in projections.items()
    ]
    engine = Engine(model, prompts, metric, places, [], denoising=direction == "denoising")
    with frozen(model):
        source_values, source = engine.values(engine.source_inputs)
        base_values, base = engine.values(engine.base_inputs)
        gap = float(source.mean()) - float(base.mean())
        require(
            not normalise or abs(gap) >= 1e-4,
            f"metric: {float(source.mean()):.6g} and {float(base.mean()):.6g} on the two runs are alike (less than 1e-4 apart); choose pairs or a metric that tell "
            "them apart, or normalise=False",
        )
        differences = _differences(source_values, base_values, prompts.mask)
        names, orders, stacked = _moved(upstream, projections, differences)
        columns: dict[str, Tensor] = {}

        def score(name: str, order: int, coefficient: Tensor) -> None:
            rows = [k for k, o in enumerate(orders) if o < order]
            columns[name][:, rows] = torch.einsum("ubtd,btd->bu", stacked[rows], wide(coefficient))

        with (
            torch.enable_grad(),
            relevance_rules(model, rules, modules=modules) as coverage,
            ExitStack() as stack,
        ):
            splits: list[_Split] = []
            for end in downstream:
                split = inputs != "attention" and end.name.startswith("attn")
                if split:
                    name = f"{known.blocks[end.order // 2][0]}.{known.names['attention']}"
                    splits.append(_Split(model, name, end, by_head=inputs == "qkv heads"))
                for name in splits[-1].views if split else [end.name]:
                    # A block that adds nothing back sends no coefficient: its edges are zero, not missing.
                    columns[name] = stacked.new_full((engine.batch, len(names)), float("nan"))
                    columns[name][:, [k for k, o in enumerate(orders) if o < end.order]] = 0.0
                if split:
                    splits[-1].watch(stack)
                else:
                    see = _tap(lambda g, end=end: score(end.name, end.order, g))
                    watch(Site(end.site.name, end.site.module, end.site.side), see, stack, last=True)
            _rooted(known.blocks[0][1], stack)
            stack.enter_context(eagerly())
            engine.judge(prompts.call(model, engine.base_inputs))[0].sum().backward(retain_graph=bool(splits))
            for split in splits:
                for name in split.views:
                    coefficient = split.coefficient(name)
                    if coefficient is not None:
                        score(name, split.end.order, coefficient)
    scores = torch.stack(list(columns.values()), 2)
    if normalise:
        scores = scores / gap
    method = "edge attribution" if rules == "gradient" and not modules else "edge relevance"
    return EdgeResult(scores.mean(0), scores, names, list(columns), method, coverage.active())


class _Split:
    """The input of one attention block on its ways to queries, keys and values."""

    def __init__(self, model: nn.Module, attention: str, end: _End, *, by_head: bool):
        self.end, layer = end, end.order // 2
        self.views: dict[str, tuple[HeadView, int | None]] = {}
        for part in "qkv":
            view: Any = _site(model, f"{attention}:{part}").view
            for head in range(view.heads) if by_head else [None]:
                self.views[f"{part} {layer}" if head is None else f"{part} {layer}.{head}"] = view, head
        self.start: Tensor | None = None
        self.ends: dict[int, Tensor] = {}
        self.back: dict[int, Tensor] = {}

    def watch(self, stack: ExitStack) -> None:
        """Record the block's input, what its projections return, and the coefficients that come back to these."""

        def begin(value: Any) -> Any:
            new = tapped(value, lambda gradient: None)
            found: Any = main_tensor.find(new)
            self.start = found[1]
            return new

        def ending(key: int) -> Any:
            def see(value: Any) -> Any:
                found: Any = main_tensor.find(value)
                self.ends[key] = found[1]
                return tapped(value, lambda gradient: self.back.__setitem__(key, gradient.detach()))

            return see

        watch(Site(self.end.site.name, self.end.site.module, self.end.site.side), begin, stack, last=True)
        for module in {id(view.module): view.module for view, _ in self.views.values()}.values():
            watch(Site("projection", module, "out"), ending(id(module)), stack, last=True)

    def coefficient(self, name: str) -> Tensor | None:
        """The coefficient of the block's input by this way alone; none where nothing flows back."""
        view, head = self.views[name]
        key = id(view.module)
        if self.start is None or key not in self.back or not self.ends[key].requires_grad:
            return None
        read = view.read(self.back[key])
        if head is not None:
            read = read * torch.zeros(view.heads, 1, dtype=read.dtype, device=read.device).index_fill_(
                0, torch.tensor([head], device=read.device), 1.0
            )
        only = view.write(torch.zeros_like(self.back[key]), read)
        return torch.autograd.grad(self.ends[key], self.start, only, retain_graph=True, allow_unused=True)[0]


def _ends(model: nn.Module, known: Architecture) -> tuple[list[_End], list[_End]]:
    """Where edges begin and where they end, in the order of the forward."""
    upstream, downstream = [_End("embed", _site(model, f"{known.blocks[0][0]}:in"), -1)], []
    for layer in range(len(known.blocks)):
        upstream.append(_End(f"attn {layer}", _site(model, known.at("attn_out", layer)), 2 * layer))
        upstream.append(_End(f"mlp {layer}", _site(model, known.at("mlp_out", layer)), 2 * layer + 1))
        downstream.append(_End(f"attn {layer}", _site(model, known.at("attn_in", layer)), 2 * layer))
        # In parallel blocks the MLP does not see its own layer's attention.
        order = 2 * layer + (0 if known.parallel else 1)
        downstream.append(_End(f"mlp {layer}", _site(model, known.at("mlp_in", layer)), order))
    final = f"{known.root}.{known.names['final_in']}" if known.root else known.names["final_in"]
    downstream.append(_End("logits", _site(model, final), 2 * len(known.blocks)))
    return upstream, downstream


def _projections(model: nn.Module, known: Architecture) -> dict[int, tuple[Site, Tensor, int]]:
    """By layer, the site of the heads' mixed values, the weight (values, width) that adds them to the residual stream, and the number of heads."""
    require(
        known.names["attn_out"] == known.names["attention"],
        "heads: this architecture normalises the sum of a block's heads, so that a head adds nothing of its own to the residual stream; give heads=False",
    )
    found = {}
    for layer, (name, block) in enumerate(known.blocks):
        attention = block.get_submodule(known.names["attention"])
        view: Any = head_view(attention, "z", getattr(model, "config", None))
        weight = view.module.weight.T if hasattr(view.module, "out_features") else view.module.weight
        found[layer] = (_site(model, f"{name}.{known.names['attention']}:z"), weight, view.heads)
    return found


def _moved(
    upstream: list[_End],
    projections: Mapping[int, tuple[Site, Tensor, int]],
    differences: Mapping[Any, Tensor],
) -> tuple[list[str], list[int], Tensor]:
    """Names, orders and (components, batch, positions, width): how what each upstream component adds differs between the runs."""
    names, orders, moved = [], [], []
    for end in upstream:
        layer = end.order // 2
        if end.name.startswith("attn") and layer in projections:
            site, weight, count = projections[layer]
            z = differences[id(site.module), site.side].unflatten(-1, (count, -1))
            matrix = weight.detach().unflatten(0, (count, -1))
            for head in range(count):
                names.append(f"head {layer}.{head}")
                moved.append(z[:, :, head] @ matrix[head])
            orders += [end.order] * count
        else:
            names.append(end.name)
            orders.append(end.order)
            moved.append(differences[id(end.site.module), end.site.side])
    return names, orders, torch.stack([wide(m) for m in moved])


def _tap(contract: Any) -> Any:
    return lambda value: tapped(value, contract)


def _rooted(block: nn.Module, stack: ExitStack) -> None:
    """The graph begins at the first block's input, so that every way through the model is part of it."""

    def see(value: Any) -> Any:
        path, tensor = main_tensor.find(value) or ((), torch.empty(0))
        return (
            None
            if tensor.requires_grad
            else main_tensor.replace(value, path, tensor.detach().requires_grad_())
        )

    watch(Site("the first block", block, "in"), see, stack, last=True)


def _site(model: nn.Module, name: str) -> Site:
    return next(iter(resolve(model, [name]).values()))


def _differences(
    source: Mapping[Any, Tensor], base: Mapping[Any, Tensor], mask: Tensor | None
) -> dict[Any, Tensor]:
    found = {key: source[key] - value for key, value in base.items()}
    return found if mask is None else {key: value * mask[..., None] for key, value in found.items()}
