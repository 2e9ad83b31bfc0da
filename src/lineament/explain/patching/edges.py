"""Which connections carry a behaviour: edge attribution patching with gradients or LRP coefficients.

Syed, Rager, Conmy 2023 (arXiv 2310.10348), with the coefficients of RelP (arXiv 2508.21258) as an option. An edge goes from what a component adds to
the residual stream to the input of a later one; its score is Σ (u_source - u_base)·c with c the coefficient at that input, by that way alone. The input of
an attention block can be split into queries, keys and values, whole or by head: each has its own way through the block's norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core.checks import number, one_of, require
from lineament.core.models import frozen, weight_of
from lineament.core.results import Readable
from lineament.core.sites.hooks import tap
from lineament.core.sites.naming import Site, resolve
from lineament.explain.patching.components import Architecture, architecture
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import Prompts, pair_prompts
from lineament.explain.patching.result import heat_map
from lineament.explain.patching.runs import Runs, Values, receiving
from lineament.explain.relevance.functions import wide
from lineament.explain.relevance.rules import Rules, relevance_rules

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Inputs = Literal["attention", "qkv", "qkv heads"]


@dataclass(frozen=True)
class EdgeResult(Readable):
    """Scores of the edges, (upstream, downstream); NaN where there is no edge because the downstream component comes first.

    Attributes:
        upstream, downstream: the components' names: ``embed``, ``attn 0`` or ``head 0.3``, ``mlp 0`` ..., ``logits``; with the inputs of attention apart
            ``q 0``, ``k 0``, ``v 0``, or ``q 0.3`` by head.
        scores: the mean of ``per_example`` over the batch. method: how the coefficient was made.
    """

    scores: Float[Tensor, "upstream downstream"]
    per_example: Float[Tensor, "batch upstream downstream"]
    upstream: Sequence[str]
    downstream: Sequence[str]
    method: str
    coverage: Mapping[str, int] = field(default_factory=dict)

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """The ``k`` edges with the largest absolute scores."""
        number("k", k, low=1, integer=True)
        size = self.scores.nan_to_num().abs().flatten()
        found = size.topk(min(k, int((~self.scores.isnan()).sum()))).indices.tolist()
        edges: list[tuple[str, str, float]] = []
        for index in found:
            row, column = divmod(index, len(self.downstream))
            edges.append(
                (str(self.upstream[row]), str(self.downstream[column]), float(self.scores[row, column]))
            )
        return edges

    def plot(self, ax: Axes | None = None) -> Axes:
        """A heat map, upstream by downstream."""
        ax = heat_map(self.scores, ax, labels=self.downstream)
        ax.set_yticks(range(len(self.upstream)), list(self.upstream))
        ax.set(xlabel="to", ylabel="from", title=f"edges: {self.method}")
        return ax

    def to_dict(self) -> dict[str, Any]:
        rows = [[None if value != value else value for value in row] for row in self.scores.tolist()]
        return {
            "method": self.method,
            "upstream": list(self.upstream),
            "downstream": list(self.downstream),
            "scores": rows,
        }


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
    heads: bool = False,
    inputs: Inputs = "attention",
    direction: str = "denoising",
    normalise: bool = True,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> EdgeResult:
    """The effect of every edge between components, approximated from two forwards and one backward.

    Upstream are the embeddings, each attention block (with ``heads`` each head) and each MLP; downstream each attention block's and MLP's input before
    its norm, and the final norm's. Scores are summed over positions and are those of :func:`lineament.explain.patching.relevance.relevance_patching` split by
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

    >>> _ = torch.manual_seed(0)
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    >>> clean, corrupt = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> result = edge_patching(net, clean, corrupt, lambda logits: logits[:, -1, 5] - logits[:, -1, 6])
    >>> len(result.upstream), len(result.downstream)  # embeddings, attention, MLP to attention, MLP, the final norm
    (3, 3)
    """
    one_of("direction", direction, ("denoising", "noising"))
    one_of("inputs", inputs, ("attention", "qkv", "qkv heads"))
    pair = pair_prompts(model, clean, corrupt, metric, tokenizer=tokenizer, attention_mask=attention_mask)
    known = architecture(model)
    upstream, downstream = _ends(model, known)
    projections = _projections(model, known) if heads else {}
    sites = [end.site for end in upstream] + [site for site, _ in projections.values()]
    runs = Runs(model, pair, metric, known.blocks, denoising=direction == "denoising")
    with frozen(model):
        source, source_score = runs.values(runs.source_inputs, sites)
        base, base_score = runs.values(runs.base_inputs, sites)
        if normalise:
            runs.check_apart(base_score, source_score)
        differences = {key: runs.masked(source[key] - value) for key, value in base.items()}
        names, orders, moved = _moved(upstream, projections, differences)
        columns: dict[str, Tensor] = {}

        def score(name: str, order: int, coefficient: Tensor) -> None:
            rows = [k for k, o in enumerate(orders) if o < order]
            columns[name][:, rows] = torch.einsum("ubtd,btd->bu", moved[rows], wide(coefficient))

        with torch.enable_grad(), relevance_rules(model, rules) as coverage, ExitStack() as stack:
            splits: list[_Split] = []
            for end in downstream:
                split = inputs != "attention" and end.name.startswith("attn")
                if split:
                    name = known.name("attention", end.order // 2)
                    splits.append(_Split(model, name, end, by_head=inputs == "qkv heads"))
                    stack.enter_context(tap(model, splits[-1].taps()))
                else:
                    receive = partial(score, end.name, end.order)
                    stack.enter_context(tap(model, {end.site: lambda x, r=receive: receiving(x, r)}))
                for name in splits[-1].views if split else [end.name]:
                    # A block that adds nothing back sends no coefficient: its edges are zero, not missing.
                    columns[name] = moved.new_full((runs.batch, len(names)), float("nan"))
                    columns[name][:, [k for k, o in enumerate(orders) if o < end.order]] = 0.0
            stack.enter_context(tap(model, {known.blocks[0].input: _rooted}))
            logits = pair.call(model, runs.base_inputs)
            runs.judge(logits)[0].sum().backward(retain_graph=bool(splits))
            for split in splits:
                for name in split.views:
                    coefficient = split.coefficient(name)
                    if coefficient is not None:
                        score(name, split.end.order, coefficient)
    scores = torch.stack(list(columns.values()), 2)
    if normalise:
        scores = scores / (source_score.mean() - base_score.mean())
    method = "edge attribution" if rules == "gradient" else "edge relevance"
    return EdgeResult(scores.mean(0), scores, names, list(columns), method, coverage.active())


class _Split:
    """The input of one attention block on its ways to queries, keys and values."""

    def __init__(self, model: nn.Module, attention: str, end: _End, *, by_head: bool):
        self.end, layer = end, end.order // 2
        self.views: dict[str, tuple[Site, int | None]] = {}
        for part in "qkv":
            site = _site(model, f"{attention}:{part}")
            heads = site.view.heads if by_head and site.view is not None else None
            for head in [None] if heads is None else range(heads):
                self.views[f"{part} {layer}" if head is None else f"{part} {layer}.{head}"] = site, head
        self.start: Tensor | None = None
        self.outputs: dict[tuple[int, str], Tensor] = {}
        self.back: dict[tuple[int, str], Tensor] = {}

    def taps(self) -> dict[Site, Any]:
        """Record the block's input, what its projections return, and the coefficients that come back to these."""

        def begin(x: Tensor) -> Tensor:
            self.start = receiving(x, lambda coefficient: None)
            return self.start

        def ending(site: Site, y: Tensor) -> Tensor:
            self.outputs[site.key] = y
            return receiving(y, lambda coefficient: self.back.__setitem__(site.key, coefficient.detach()))

        # Queries, keys and values may come from one projection.
        ends = {site.key: site.whole for site, _ in self.views.values()}
        return {self.end.site: begin, **{site: partial(ending, site) for site in ends.values()}}

    def coefficient(self, name: str) -> Tensor | None:
        """The coefficient of the block's input by this way alone; none where nothing flows back."""
        site, head = self.views[name]
        view: Any = site.view
        if self.start is None or site.key not in self.back or not self.outputs[site.key].requires_grad:
            return None
        back = self.back[site.key]
        read = view.read(back)
        if head is not None:
            only = torch.zeros_like(read)
            only[..., head, :] = read[..., head, :]
            read = only
        by_this_way = view.write(torch.zeros_like(back), read)
        return torch.autograd.grad(
            self.outputs[site.key], self.start, by_this_way, retain_graph=True, allow_unused=True
        )[0]


def _rooted(x: Tensor) -> Tensor | None:
    """The graph begins at the first block's input, so that every way through the model is part of it."""
    return None if x.requires_grad else x.detach().requires_grad_()


def _ends(model: nn.Module, known: Architecture) -> tuple[list[_End], list[_End]]:
    """Where edges begin and where they end, in the order of the forward."""
    upstream, downstream = [_End("embed", known.blocks[0].input, -1)], []
    for layer in range(len(known.blocks)):
        sites = {k: _site(model, known.name(k, layer)) for k in ("attn_out", "mlp_out", "attn_in", "mlp_in")}
        upstream.append(_End(f"attn {layer}", sites["attn_out"], 2 * layer))
        upstream.append(_End(f"mlp {layer}", sites["mlp_out"], 2 * layer + 1))
        downstream.append(_End(f"attn {layer}", sites["attn_in"], 2 * layer))
        # In parallel blocks the MLP does not see its own layer's attention.
        downstream.append(_End(f"mlp {layer}", sites["mlp_in"], 2 * layer + (0 if known.parallel else 1)))
    final = f"{known.root}.{known.names['final_in']}" if known.root else known.names["final_in"]
    downstream.append(_End("logits", _site(model, final), 2 * len(known.blocks)))
    return upstream, downstream


def _projections(
    model: nn.Module, known: Architecture
) -> dict[int, tuple[Site, Float[Tensor, "heads size width"]]]:
    """By layer, the site of the heads' mixed values, and the weight that adds them to the residual stream."""
    require(
        known.names["attn_out"] == known.names["attention"],
        "heads: this architecture normalises the sum of a block's heads, so that a head adds nothing of its own to the residual stream; give heads=False",
    )
    found = {}
    for layer in range(len(known.blocks)):
        site = _site(model, f"{known.name('attention', layer)}:z")
        view: Any = site.view
        weight = weight_of(site.module).detach()
        weight = weight.T if hasattr(site.module, "out_features") else weight
        found[layer] = site.whole, weight.unflatten(0, (view.heads, -1))
    return found


def _moved(
    upstream: list[_End], projections: Mapping[int, tuple[Site, Tensor]], differences: Values
) -> tuple[list[str], list[int], Float[Tensor, "components batch positions width"]]:
    """Names, orders, and how what each upstream component adds differs between the runs."""
    names, orders, moved = [], [], []
    for end in upstream:
        layer = end.order // 2
        if end.name.startswith("attn") and layer in projections:
            site, weight = projections[layer]
            z = differences[site.key].unflatten(-1, (len(weight), -1))
            names += [f"head {layer}.{head}" for head in range(len(weight))]
            moved += [z[:, :, head] @ weight[head] for head in range(len(weight))]
            orders += [end.order] * len(weight)
        else:
            names.append(end.name)
            orders.append(end.order)
            moved.append(differences[end.site.key])
    return names, orders, torch.stack([wide(m) for m in moved])


def _site(model: nn.Module, name: str) -> Site:
    return resolve(model, name)[name]
