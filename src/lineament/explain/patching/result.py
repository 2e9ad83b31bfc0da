"""What patching gives: a score for every node, its picture and its largest scores; and how well one map approximates another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core.checks import number, require, suggest
from lineament.core.results import Readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Node(NamedTuple):
    """One component: its kind, layer, position (``None``: all of them) and head or feature (``None``: the whole vector)."""

    kind: str
    layer: int
    position: int | None
    unit: int | None
    score: float


@dataclass(frozen=True)
class PatchingResult(Readable):
    """The effect of patching each node, or its approximation.

    Attributes:
        method: which method made it.
        scores: by kind of site, (layers, positions) or (layers, positions, units): 0 leaves the metric as in the base run, 1 brings it to the other's.
        per_example: the same for each example, with the batch first; ``scores`` is its mean.
        direction: ``"denoising"`` (base: corrupt) or ``"noising"`` (base: clean).
        base, source: the metric of the base run and of the run whose activations are patched in (NaN without one).
        labels: the tokens of the first prompt, for pictures.
        coverage: which rule acted in how many modules.
        settings: how it was called.
    """

    method: str
    scores: Mapping[str, Tensor]
    per_example: Mapping[str, Tensor]
    direction: str
    base: float
    source: float
    labels: Sequence[str] = ()
    coverage: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def top(self, k: int = 10, *, kind: str | None = None) -> list[Node]:
        """The ``k`` nodes with the largest absolute scores, over all kinds or in one."""
        number("k", k, low=1, integer=True)
        nodes: list[Node] = []
        for name in self._kinds(kind):
            scores = self.scores[name]
            single = scores.shape[1] == 1 and self.settings.get("positions") == "together"
            for index in scores.abs().flatten().topk(min(k, scores.numel())).indices.tolist():
                at = [int(i) for i in torch.unravel_index(torch.tensor(index), scores.shape)]
                unit = at[2] if len(at) == 3 else None
                position = None if single else self._position(at[1])
                nodes.append(Node(name, at[0], position, unit, float(scores[tuple(at)])))
        return sorted(nodes, key=lambda node: -abs(node.score))[:k]

    def map(self, kind: str) -> Float[Tensor, "layers columns"]:
        """The picture of one kind: layer by position, or layer by head or feature (summed over positions)."""
        scores = self.scores[self._kinds(kind)[0]]
        return scores if scores.ndim == 2 else scores.sum(1)

    def plot(self, ax: Axes | None = None, *, kind: str | None = None) -> Axes:
        """A heat map of one kind (the first by default): layer by position, or layer by head."""
        name = self._kinds(kind)[0]
        values = self.map(name)
        by_position = self.scores[name].ndim == 2
        ax = heat_map(values, ax, labels=self.labels if by_position else ())
        ax.set(
            ylabel="layer",
            xlabel="position" if by_position else "head or feature",
            title=f"{name}: {self.method}",
        )
        ax.set_yticks(range(values.shape[0]))
        return ax

    def to_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "direction": self.direction,
            "base": self.base,
            "source": self.source,
            "scores": {kind: value.tolist() for kind, value in self.scores.items()},
            "labels": list(self.labels),
            "coverage": dict(self.coverage),
            "settings": dict(self.settings),
        }

    def _kinds(self, kind: str | None) -> list[str]:
        if kind is None:
            return list(self.scores)
        require(kind in self.scores, f"kind: got {kind!r}, which was not patched{suggest(kind, self.scores)}")
        return [kind]

    def _position(self, index: int) -> int:
        chosen = self.settings.get("positions")
        return int(chosen[index]) if isinstance(chosen, (list, tuple)) else index


def heat_map(values: Float[Tensor, "rows columns"], ax: Axes | None, *, labels: Sequence[str] = ()) -> Axes:
    """Scores in red and blue about zero, with a colour bar; ``labels`` of the columns where there is one for each."""
    from matplotlib.figure import Figure

    if ax is None:
        ax = Figure(layout="constrained").subplots()
    top = float(values.nan_to_num().abs().max()) or 1.0
    image = ax.imshow(
        values.float().cpu().numpy(), cmap="RdBu", vmin=-top, vmax=top, aspect="auto", interpolation="nearest"
    )
    ax.figure.colorbar(image, ax=ax, label="share of the metric")
    if len(labels) == values.shape[1]:
        ax.set_xticks(range(len(labels)), list(labels), rotation=60, ha="right")
    return ax


@dataclass(frozen=True)
class Fidelity(Readable):
    """How well an approximation agrees with activation patching, for one kind of site.

    Attributes:
        pearson, spearman: correlations of the flattened maps (NaN where one is constant).
        rmse: root mean square difference.
        overlap: share of the k entries with the largest absolute truth that are among the approximation's k largest.
        k, entries: of the overlap, and how many entries the map has.
    """

    pearson: float
    spearman: float
    rmse: float
    overlap: float
    k: int
    entries: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def fidelity(
    approximation: PatchingResult | Mapping[str, Tensor],
    truth: PatchingResult | Mapping[str, Tensor],
    *,
    k: int = 10,
) -> dict[str, Fidelity]:
    """Agreement of two sets of maps for every kind of site that both have: Pearson, Spearman, RMSE and top-k overlap.

    Pearson follows a few large entries, and where clean and corrupt prompts begin alike, many entries are zero for every method: read all four.

    Raises:
        InputError: no kind in common, or maps of different shapes.

    >>> agreement = fidelity({"mlp_out": torch.tensor([[1.0, 2.0]])}, {"mlp_out": torch.tensor([[2.0, 4.0]])}, k=1)
    >>> round(agreement["mlp_out"].pearson, 6), agreement["mlp_out"].overlap
    (1.0, 1.0)
    """
    from scipy.stats import rankdata

    number("k", k, low=1, integer=True)
    ours = approximation.scores if isinstance(approximation, PatchingResult) else approximation
    theirs = truth.scores if isinstance(truth, PatchingResult) else truth
    kinds = [kind for kind in theirs if kind in ours]
    require(bool(kinds), f"fidelity: {list(ours)} and {list(theirs)} have no kind of site in common")
    found = {}
    for kind in kinds:
        a, b = ours[kind].double().cpu(), theirs[kind].double().cpu()
        require(
            a.shape == b.shape,
            f"fidelity: maps of {kind!r} have shapes {tuple(a.shape)} and {tuple(b.shape)}",
        )
        a, b = a.flatten(), b.flatten()
        most = min(k, len(a))
        both = set(a.abs().topk(most).indices.tolist()) & set(b.abs().topk(most).indices.tolist())
        ranks = torch.from_numpy(rankdata(a)), torch.from_numpy(rankdata(b))
        found[kind] = Fidelity(
            correlation(a, b),
            correlation(*ranks),
            float((a - b).square().mean().sqrt()),
            len(both) / most,
            most,
            len(a),
        )
    return found


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation of two vectors; NaN where one is constant.

    >>> round(correlation(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([2.0, 1.0, 0.0])), 6)
    -1.0
    """
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if scale > 0 else float("nan")
