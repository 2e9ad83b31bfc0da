"""What edge patching gives: a score for every connection, its picture and the greatest of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from lineament.core.checks import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class EdgeResult:
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
