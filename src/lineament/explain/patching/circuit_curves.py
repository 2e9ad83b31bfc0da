"""Is a circuit enough, and is anything left outside? Faithfulness and completeness against the number of nodes.

Marks et al., "Sparse Feature Circuits", 2024 (arXiv 2403.19647). What is not in the circuit takes its mean over the patch batch, position by position.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.core.codes import Codes
from lineament.core.models import frozen
from lineament.core.results import Readable
from lineament.explain.patching.active_nodes import kept_or_mean, mean_over_batch
from lineament.explain.patching.circuit_nodes import NodeSites
from lineament.explain.patching.circuits import NodeEffects
from lineament.explain.patching.metrics import Metric
from lineament.explain.patching.prompts import Prompts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Errors = Literal["default", "remove", "keep"]


@dataclass(frozen=True)
class CircuitCurve(Readable):
    """Faithfulness (of the circuit) and completeness (of what is outside; low is good) against the size of the circuit."""

    thresholds: Sequence[float]
    nodes: Sequence[int]
    faithfulness: Sequence[float]
    completeness: Sequence[float]
    full: float
    empty: float

    def at(
        self, nodes: Sequence[int], which: Literal["faithfulness", "completeness"] = "faithfulness"
    ) -> list[float]:
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
        ax.plot(
            self.nodes, self.completeness, linestyle="--", color=line.get_color(), label=f"{name}completeness"
        )
        ax.set(xlabel="nodes in the circuit", ylabel="share of the metric", xscale="symlog")
        ax.legend()
        return ax

    def to_dict(self) -> dict[str, Any]:
        return {
            key: list(value) if isinstance(value, (list, tuple)) else value
            for key, value in vars(self).items()
        }


@torch.inference_mode(False)
@torch.no_grad()
def circuit_curve(
    model: nn.Module,
    clean: Prompts,
    patch: Prompts,
    metric: Metric,
    effects: NodeEffects,
    *,
    dictionaries: Mapping[str, Any],
    thresholds: Sequence[float] | None = None,
    errors: Errors = "default",
    start_layer: int = 0,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> CircuitCurve:
    """Faithfulness and completeness of the circuits of all nodes whose mean effect exceeds each threshold.

    faithfulness = (m(C) - m(∅)) / (m(M) - m(∅)); completeness is that of the complement. Nodes outside take their mean over the patch batch, position
    by position; inside they are what the run makes of them.

    Args:
        clean, patch: the prompts to judge on (others than those the effects come from, for an honest curve), of the same length.
        effects: from :func:`lineament.explain.patching.circuits.node_effects`; \\|mean over the examples\\| is compared with the thresholds.
        thresholds: by default 15 from 1e-4 to 1, logarithmically.
        errors: the error nodes are nodes like others, all removed, or all kept.
        start_layer: sites in earlier blocks are left as they are, in the circuit, its complement and the empty one, and their nodes are not counted
            (Marks et al.: 2 of Pythia-70M's 6 layers, 8 of Gemma-2-2B's 26).

    Raises:
        InputError: as :func:`lineament.explain.patching.circuits.node_effects`; also no site from the start layer on, a model that does no better than the empty circuit (less than 1e-4 apart).

    Source: Marks et al. 2024, section 4.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> net = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2)).eval()
    >>> from lineament.explain import component_nodes, node_effects
    >>> clean, other = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 4, 3]])
    >>> metric = lambda logits: 100 * (logits[:, -1, 5] - logits[:, -1, 6])
    >>> nodes = component_nodes(net)
    >>> effects = node_effects(net, clean, other, metric, dictionaries=nodes)
    >>> curve = circuit_curve(net, clean, other, metric, effects, dictionaries=nodes, thresholds=[0.0])
    >>> round(float(curve.faithfulness[0]), 3)  # with every node in it, a circuit is the model
    1.0
    """
    one_of("errors", errors, ("default", "remove", "keep"))
    levels = (
        torch.logspace(-4, 0, 15, dtype=torch.float64).tolist()
        if thresholds is None
        else [float(t) for t in thresholds]
    )
    if not isinstance(effects, NodeEffects):
        raise InputError(f"effects: got {show(effects)}, expected the NodeEffects of node_effects")
    nodes = NodeSites(model, clean, patch, metric, dictionaries, tokenizer, attention_mask)
    for name in dictionaries:
        require(name in effects.features, f"effects: has no site {name!r}; it has {list(effects.features)}")
    number("start_layer", start_layer, low=0, integer=True)
    # What lies outside the blocks (the embeddings, say) comes before them all.
    judged_sites = [
        name for name in nodes.sites if start_layer == 0 or (nodes.stage[name] or 0) >= start_layer
    ]
    require(
        bool(judged_sites),
        f"start_layer: got {start_layer}, before which lie all sites ({', '.join(nodes.sites)}); expected an earlier layer",
    )
    with frozen(model):
        target, _ = nodes.values(nodes.runs.source_inputs)
        means = {
            name: (mean_over_batch(f) if isinstance(f, Codes) else f.mean(0), e.mean(0))
            for name, (f, e) in target.items()
        }
        full = float(nodes.run({}).mean())
        everything = {name: effects.mean(name) for name in judged_sites}
        everything_e = {n: value.mean(0) for n, value in effects.errors.items() if n in everything}

        def judged(level: float | None, inside: bool) -> float:
            """The metric with the circuit (or its complement) intact; ``None`` keeps nothing."""
            changes = {}
            for name in judged_sites:
                f_keep = torch.zeros_like(everything[name], dtype=torch.bool)
                e_keep = f_keep[:, :1]
                if level is not None:
                    f_keep = (everything[name].abs() > level) == inside
                    e_keep = f_keep[:, :1] | True
                    if name in everything_e:
                        chosen = (everything_e[name].abs() > level)[:, None]
                        chosen = {"default": chosen, "remove": chosen & False, "keep": chosen | True}[errors]
                        e_keep = chosen if inside or errors == "keep" else ~chosen
                changes[name] = _ablation(nodes, name, f_keep, e_keep, *means[name])
            return float(nodes.run(changes).mean())

        empty = judged(None, True)
        require(
            abs(full - empty) >= 1e-4,
            f"metric: {full:.6g} for the whole model and {empty:.6g} with every node ablated are alike (less than 1e-4 apart), so that there is nothing to "
            "be faithful to",
        )
        counts, faithful, complete = [], [], []
        for level in levels:
            count = sum(int((value.abs() > level).sum()) for value in everything.values())
            if errors == "default":
                count += sum(int((value.abs() > level).sum()) for value in everything_e.values())
            counts.append(count)
            faithful.append((judged(level, True) - empty) / (full - empty))
            complete.append((judged(level, False) - empty) / (full - empty))
    return CircuitCurve(levels, counts, faithful, complete, full, empty)


def averaged_curve(curves: Sequence[CircuitCurve], nodes: Sequence[int] | None = None) -> CircuitCurve:
    """The mean of several tasks' curves at common numbers of nodes, each curve linearly between its points.

    Args:
        nodes: where; by default 15 from the largest of the curves' smallest sizes to the smallest of their largest, logarithmically, so that no curve is asked
            beyond its ends.

    Returns:
        A curve without thresholds, whose ``full`` and ``empty`` are means of the curves'.

    Raises:
        InputError: no curve, or curves that have no number of nodes in common.

    >>> a = CircuitCurve((1.0, 0.0), (0, 10), (0.0, 1.0), (1.0, 0.0), 2.0, 0.0)
    >>> b = CircuitCurve((1.0, 0.0), (0, 20), (0.0, 1.0), (1.0, 0.0), 4.0, 0.0)
    >>> averaged_curve([a, b], [5, 10]).faithfulness
    [0.375, 0.75]
    """
    require(len(curves) > 0, "curves: got none, expected at least one")
    if nodes is None:
        low, high = max(min(c.nodes) for c in curves), min(max(c.nodes) for c in curves)
        require(
            low <= high,
            f"curves: one begins at {low} nodes and another ends at {high}; expected curves that overlap",
        )
        steps = torch.logspace(0, 1, 15, base=max(1, high) / max(1, low), dtype=torch.float64) * max(1, low)
        nodes = sorted({low, *(min(high, max(low, round(s))) for s in steps.tolist()), high})
    means = {}
    for which in ("faithfulness", "completeness"):
        rows = [curve.at(nodes, which) for curve in curves]
        means[which] = [sum(column) / len(curves) for column in zip(*rows)]
    full, empty = (sum(getattr(c, end) for c in curves) / len(curves) for end in ("full", "empty"))
    return CircuitCurve((), list(nodes), means["faithfulness"], means["completeness"], full, empty)


def _ablation(
    nodes: NodeSites, name: str, f_keep: Tensor, e_keep: Tensor, f_mean: Tensor, e_mean: Tensor
) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        require(
            x.shape[1] == f_keep.shape[0],
            f"effects: of {f_keep.shape[0]} positions at {name!r}, expected the {x.shape[1]} of these prompts",
        )
        f, e = nodes.parts(name, x)
        if isinstance(f, Codes):
            mixed = kept_or_mean(nodes.dictionaries[name], f, f_keep, f_mean)
            return mixed + torch.where(e_keep, e, e_mean)
        keep = f_keep.repeat_interleave(f.shape[-1] // f_keep.shape[-1], -1)
        mixed = torch.where(keep, f, f_mean)
        return nodes.dictionaries[name].decode(mixed) + torch.where(e_keep, e, e_mean)

    return change
