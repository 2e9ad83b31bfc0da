"""Which connections carry a behaviour: edge attribution patching with gradients or LRP coefficients.

Syed, Rager, Conmy 2023 (arXiv 2310.10348), with the coefficients of RelP (arXiv 2508.21258) as an option. An edge goes from what a component adds to
the residual stream to the input of a later one; its score is Σ (u_source - u_base)·c with c the coefficient at that input, by that way alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lineament.core import payload
from lineament.core.checks import number, one_of, require
from lineament.core.heads import head_view
from lineament.core.hooks import eagerly, watch
from lineament.core.models import frozen
from lineament.core.naming import Site, resolve
from lineament.explain.patching.engine import Engine
from lineament.explain.patching.inputs import Prompts, pair
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.sites import Place, architecture
from lineament.explain.relevance.context import Rules, relevance_rules
from lineament.explain.relevance.functions import wide

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class EdgeResult:
    """Scores of the edges, (upstream, downstream); NaN where there is no edge because the downstream component comes first.

    Attributes:
        upstream, downstream: the components' names: ``embed``, ``attn 0`` or ``head 0.3``, ``mlp 0`` ..., ``logits``.
        scores: the mean of ``per_example`` over the batch. method: how the coefficient was made.
    """

    scores: Float[Tensor, "upstream downstream"]
    per_example: Float[Tensor, "batch upstream downstream"]
    upstream: Sequence[str]
    downstream: Sequence[str]
    method: str
    coverage: Mapping[str, int] = field(default_factory=dict)

    def top(self, k: int = 10) -> list[tuple[str, str, float]]:
        """The ``k`` edges of greatest absolute score."""
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
        from matplotlib.figure import Figure

        if ax is None:
            ax = Figure(layout="constrained").subplots()
        values = self.scores.float().cpu().numpy()
        top = float(self.scores.nan_to_num().abs().max()) or 1.0
        image = ax.imshow(values, cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
        ax.figure.colorbar(image, ax=ax, label="share of the metric")
        ax.set_xticks(range(len(self.downstream)), list(self.downstream), rotation=60, ha="right")
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
    direction: str = "denoising",
    normalise: bool = True,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> EdgeResult:
    """The effect of every edge between components, approximated from two forwards and one backward.

    Upstream are the embeddings, each attention block (with ``heads`` each head) and each MLP; downstream each attention block's and MLP's input before
    its norm, and the final norm's. Scores are summed over positions and are those of :func:`lineament.explain.patching.methods.relevance_patching` split by
    where they go: over all downstream components, a row sums to its node's score.

    Args:
        rules: ``"gradient"`` is edge attribution patching. The others are those of relevance patching.

    Raises:
        InputError: as relevance patching; with ``heads``, a block that normalises the sum of its heads (Gemma 2 and 3), where a head adds nothing of
            its own to the residual stream.

    Source: Syed et al. 2023; Rezaei Jafari et al. 2025.
    """
    one_of("direction", direction, ("denoising", "noising"))
    inputs = pair(model, clean, corrupt, metric, tokenizer=tokenizer, attention_mask=attention_mask)
    known = architecture(model)
    upstream, downstream = [("embed", _site(model, f"{known.blocks[0][0]}:in"), -1)], []
    for layer in range(len(known.blocks)):
        upstream += [(f"attn {layer}", _site(model, known.at("attn_out", layer)), 2 * layer)]
        upstream += [(f"mlp {layer}", _site(model, known.at("mlp_out", layer)), 2 * layer + 1)]
        downstream += [(f"attn {layer}", _site(model, known.at("attn_in", layer)), 2 * layer)]
        # In parallel blocks the MLP does not see its own layer's attention.
        downstream += [
            (
                f"mlp {layer}",
                _site(model, known.at("mlp_in", layer)),
                2 * layer + (0 if known.parallel else 1),
            )
        ]
    final = f"{known.root}.{known.names['final_in']}" if known.root else known.names["final_in"]
    downstream += [("logits", _site(model, final), 2 * len(known.blocks))]
    projections: dict[int, tuple[Site, Tensor, int]] = {}
    if heads:
        require(
            known.names["attn_out"] == known.names["attention"],
            "heads: this architecture normalises the sum of a block's heads, so that a head adds nothing of its own to the residual stream; give heads=False",
        )
        for layer, (name, block) in enumerate(known.blocks):
            attention = block.get_submodule(known.names["attention"])
            view: Any = head_view(attention, "z", getattr(model, "config", None))
            weight = view.module.weight.T if hasattr(view.module, "out_features") else view.module.weight
            projections[layer] = (_site(model, f"{name}.{known.names['attention']}:z"), weight, view.heads)
    places = [
        Place(name, k, site, site, False, None, False, "") for k, (name, site, _) in enumerate(upstream)
    ]
    places += [
        Place("z", layer, site, site, False, None, False, "head")
        for layer, (site, _, _) in projections.items()
    ]
    engine = Engine(model, inputs, metric, places, [], denoising=direction == "denoising")
    with frozen(model):
        source_values, source = engine.values(engine.source_inputs)
        base_values, base = engine.values(engine.base_inputs)
        gap = float(source.mean()) - float(base.mean())
        require(
            not normalise or abs(gap) >= 1e-4,
            f"metric: {float(source.mean()):.6g} and {float(base.mean()):.6g} on the two runs are alike (less than 1e-4 apart); choose pairs or a metric that tell "
            "them apart, or normalise=False",
        )
        differences = _differences(source_values, base_values, inputs.mask)
        names, orders, moved = [], [], []
        for name, site, order in upstream:
            layer = order // 2
            if heads and name.startswith("attn"):
                site_z, weight, count = projections[layer]
                z = differences[id(site_z.module), site_z.side].unflatten(-1, (count, -1))
                matrix = weight.detach().unflatten(0, (count, -1))
                for head in range(count):
                    names.append(f"head {layer}.{head}")
                    orders.append(order)
                    moved.append(z[:, :, head] @ matrix[head])
            else:
                names.append(name)
                orders.append(order)
                moved.append(differences[id(site.module), site.side])
        stacked = torch.stack([wide(m) for m in moved])
        scores = stacked.new_full((engine.batch, len(names), len(downstream)), float("nan"))

        def tap(column: int, order: int) -> Any:
            rows = [k for k, o in enumerate(orders) if o < order]
            # A block that adds nothing back sends no coefficient: its edges are zero, not missing.
            scores[:, rows, column] = 0.0

            def contract(gradient: Tensor) -> None:
                scores[:, rows, column] = torch.einsum("ubtd,btd->bu", stacked[rows], wide(gradient))

            def see(value: Any) -> Any:
                path, tensor = payload.find(value) or ((), torch.empty(0))
                if not tensor.requires_grad:
                    tensor = tensor.detach().requires_grad_()
                onward = tensor.clone()
                onward.register_hook(contract)
                return payload.replace(value, path, onward)

            return see

        with (
            torch.enable_grad(),
            relevance_rules(model, rules, modules=modules) as coverage,
            ExitStack() as stack,
        ):
            for column, (_, site, order) in enumerate(downstream):
                watch(Site(site.name, site.module, site.side), tap(column, order), stack, last=True)
            _rooted(known.blocks[0][1], stack)
            stack.enter_context(eagerly())
            engine.judge(inputs.call(model, engine.base_inputs))[0].sum().backward()
    if normalise:
        scores = scores / gap
    method = "edge attribution" if rules == "gradient" and not modules else "edge relevance"
    return EdgeResult(
        scores.mean(0), scores, names, [name for name, _, _ in downstream], method, coverage.active()
    )


def _rooted(block: nn.Module, stack: ExitStack) -> None:
    """The graph begins at the first block's input, so that every way through the model is part of it."""

    def see(value: Any) -> Any:
        path, tensor = payload.find(value) or ((), torch.empty(0))
        return (
            None if tensor.requires_grad else payload.replace(value, path, tensor.detach().requires_grad_())
        )

    watch(Site("the first block", block, "in"), see, stack, last=True)


def _site(model: nn.Module, name: str) -> Site:
    return next(iter(resolve(model, [name]).values()))


def _differences(
    source: Mapping[Any, Tensor], base: Mapping[Any, Tensor], mask: Tensor | None
) -> dict[Any, Tensor]:
    found = {key: source[key] - value for key, value in base.items()}
    return found if mask is None else {key: value * mask[..., None] for key, value in found.items()}
