"""A line, a plane and random perturbations of a loss: what was measured, and how it is drawn.

The surface is drawn on plain axes, by a projection of its own: so it is one picture among others in a figure, and needs no script. To turn one
and read its values, :class:`lineament.report.surface_plot.SurfacePlot` makes a plotly figure of a line or a plane.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core.results import Readable, axes


@dataclass(frozen=True)
class Line(Readable):
    """The loss along one axis; ``metrics`` likewise, ``record`` says how the axis was made."""

    at: Float[Tensor, "positions"]
    loss: Float[Tensor, "positions"]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    label: str = "axis"
    record: Mapping[str, Any] = field(default_factory=dict)

    def curvature(self) -> float:
        """(Z(h) - 2 Z(0) + Z(-h)) / h² at the middle, which along an eigenvector is its eigenvalue."""
        k = len(self.at) // 2
        h = float(self.at[k + 1] - self.at[k])
        return float(self.loss[k + 1] - 2 * self.loss[k] + self.loss[k - 1]) / h**2

    def barrier(self) -> float:
        """By how much the loss rises at most above the straight line between its ends."""
        share = (self.at - self.at[0]) / (self.at[-1] - self.at[0])
        return float((self.loss - (1 - share) * self.loss[0] - share * self.loss[-1]).max())

    def to_dict(self) -> dict[str, Any]:
        return {
            "at": self.at.tolist(),
            "loss": _plain(self.loss),
            "metrics": {name: _plain(v) for name, v in self.metrics.items()},
            "label": self.label,
            **self.record,
        }

    def plot(self, ax: Any = None, metric: str | None = None) -> Any:
        """The loss, or a metric, along the line."""
        ax = axes(ax)
        ax.plot(self.at.tolist(), (self.loss if metric is None else self.metrics[metric]).tolist())
        ax.set(xlabel=self.label, ylabel=metric or "loss")
        return ax


@dataclass(frozen=True)
class Plane(Readable):
    """The loss on a grid: ``loss[i, j]`` at ``a[i]`` along the first axis and ``b[j]`` along the second."""

    a: Float[Tensor, "rows"]
    b: Float[Tensor, "columns"]
    loss: Float[Tensor, "rows columns"]
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, str] = ("first axis", "second axis")
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def centre(self) -> float:
        """The loss in the middle of the grid: the network's own, on a grid by ``dist`` and ``steps``."""
        return float(self.loss[len(self.a) // 2, len(self.b) // 2])

    def curvatures(self) -> tuple[float, float, float]:
        """Second differences in the middle: along the first axis, along the second, and mixed."""
        z, i, j = self.loss, len(self.a) // 2, len(self.b) // 2
        h, k = float(self.a[i + 1] - self.a[i]), float(self.b[j + 1] - self.b[j])
        first = float(z[i + 1, j] - 2 * z[i, j] + z[i - 1, j]) / h**2
        second = float(z[i, j + 1] - 2 * z[i, j] + z[i, j - 1]) / k**2
        mixed = float(z[i + 1, j + 1] - z[i + 1, j - 1] - z[i - 1, j + 1] + z[i - 1, j - 1]) / (4 * h * k)
        return first, second, mixed

    def to_dict(self) -> dict[str, Any]:
        return {
            "a": self.a.tolist(),
            "b": self.b.tolist(),
            "loss": _plain(self.loss),
            "metrics": {name: _plain(v) for name, v in self.metrics.items()},
            "labels": list(self.labels),
            **self.record,
        }

    def plot(self, ax: Any = None, metric: str | None = None, levels: int = 14) -> Any:
        """Contours, logarithmic in the height above the lowest point; a cross at the network itself."""
        ax = axes(ax)
        z = self._shown(metric)
        x, y = self.a.tolist(), self.b.tolist()
        if float(z.max()) > float(z.min()):
            low, high = float(z.min()), float(z.max())
            # Equal steps of height would all lie on the walls: a valley shows in steps that grow.
            edges = [low + (high - low) * (k / levels) ** 3 for k in range(levels + 1)]
            drawn = ax.contourf(x, y, z.T.numpy(), levels=edges, cmap="viridis")
            ax.figure.colorbar(drawn, ax=ax, label=metric or "loss", format="%.3g")
        if float(self.a.min()) <= 0 <= float(self.a.max()) and float(self.b.min()) <= 0 <= float(
            self.b.max()
        ):
            ax.plot([0], [0], marker="+", color="C1", markersize=10, linestyle="none")
        ax.set(xlabel=self.labels[0], ylabel=self.labels[1])
        return ax

    def surface(
        self, ax: Any = None, metric: str | None = None, *, azimuth: float = 35.0, elevation: float = 28.0
    ) -> Any:
        """The plane as a landscape seen from above and aside, drawn back to front on plain axes."""
        from matplotlib.collections import PolyCollection

        ax = axes(ax)
        z = self._shown(metric)
        span = max(float(z.max() - z.min()), 1e-300)
        height = (z - z.min()) / span
        u = torch.linspace(-1, 1, len(self.a), dtype=torch.float64)[:, None].expand_as(z)
        v = torch.linspace(-1, 1, len(self.b), dtype=torch.float64)[None, :].expand_as(z)
        turn, tilt = math.radians(azimuth), math.radians(elevation)
        right = u * math.cos(turn) - v * math.sin(turn)
        depth = u * math.sin(turn) + v * math.cos(turn)
        up = 1.3 * height * math.cos(tilt) + depth * math.sin(tilt)
        corners = torch.stack([right, up], -1)
        cells = torch.stack(
            [corners[:-1, :-1], corners[1:, :-1], corners[1:, 1:], corners[:-1, 1:]], 2
        ).reshape(-1, 4, 2)
        order = depth[:-1, :-1].reshape(-1).argsort(descending=True)
        tops = height[:-1, :-1].reshape(-1)[order]
        drawn = PolyCollection(list(cells[order].numpy()), cmap="viridis", linewidths=0.2, edgecolors="face")
        drawn.set_array((tops * span + z.min()).numpy())
        ax.add_collection(drawn)
        ax.figure.colorbar(drawn, ax=ax, label=metric or "loss", format="%.3g")
        ax.autoscale_view()
        ax.set_axis_off()
        return ax

    def _shown(self, metric: str | None) -> Tensor:
        """Finite values for a drawing; what is not finite is shown as the largest finite value."""
        z = (self.loss if metric is None else self.metrics[metric]).double()
        finite = z[torch.isfinite(z)]
        top = float(finite.max()) if len(finite) else 0.0
        return torch.where(torch.isfinite(z), z, torch.full_like(z, top))


@dataclass(frozen=True)
class Perturbations(Readable):
    """By how much the loss rises at random places at one distance from a network."""

    loss: float
    rises: Float[Tensor, "count"]
    radius: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        return {"loss": self.loss, "rises": _plain(self.rises), "radius": self.radius, "seed": self.seed}

    def plot(self, ax: Any = None) -> Any:
        """Their histogram."""
        ax = axes(ax)
        ax.hist(self.rises[torch.isfinite(self.rises)].tolist(), bins=20)
        ax.set(xlabel=f"rise of the loss at radius {self.radius:g}", ylabel="random places")
        return ax


def _plain(values: Tensor) -> Any:
    """Nested lists; JSON has neither NaN nor infinity, so they become null."""
    if values.ndim:
        return [_plain(v) for v in values]
    number = float(values)
    return number if math.isfinite(number) else None
