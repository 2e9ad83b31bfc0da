"""Values over one or two coordinates, to be turned and read in a browser: what is drawn, as plain numbers and as plotly takes it.

The numbers are apart from the drawing, because a page must be able to show what comes from a file of anyone's: only finite numbers and
text survive :meth:`SurfacePlot.from_dict`, and every word is escaped, since plotly reads tags in its labels. Plotly itself is imported only to make a
figure of one's own (:meth:`SurfacePlot.figure`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lineament.core import checks

_LARGEST = 1_000_000  # values in one plot, which a browser still draws
_LONGEST = 120  # characters of a label
_LEVELS = 14


@dataclass(frozen=True)
class SurfacePlot:
    """A surface, or a curve where there is no second coordinate.

    Attributes:
        x: the first coordinate.
        y: the second one; empty for a curve.
        z: a row of values for each of ``x``, one for each of ``y`` (a curve: one value a row); ``None`` where there is none.
        labels: what is written along the first coordinate, the second and the height.
        title: what tells it from others beside it.
        origin: what lies at zero, marked there if it is not empty.
    """

    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float | None]]
    labels: tuple[str, str, str]
    title: str = ""
    origin: str = ""

    def __post_init__(self) -> None:
        width = max(len(self.y), 1)
        checks.require(
            len(self.x) > 1 and (not len(self.y) or len(self.y) > 1),
            f"surface plot: got {len(self.x)} by {len(self.y)} positions, expected at least two along each coordinate",
        )
        checks.require(
            len(self.z) == len(self.x) and all(len(row) == width for row in self.z),
            f"surface plot: the values' rows do not fit {len(self.x)} by {width} positions",
        )
        checks.require(
            len(self.x) * width <= _LARGEST,
            f"surface plot: got {len(self.x) * width} values, expected at most {_LARGEST}",
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "x": list(self.x),
            "y": list(self.y),
            "z": [list(row) for row in self.z],
            "labels": list(self.labels),
            "title": self.title,
            "origin": self.origin,
        }

    @classmethod
    def from_dict(cls, raw: Any) -> SurfacePlot:
        """From untrusted JSON: anything but numbers and text in their places is an ``InputError``.

        >>> SurfacePlot.from_dict({"x": [0, 1], "y": [], "z": [[1.0], [None]], "labels": ["a", "", "loss"]}).z
        ((1.0,), (None,))
        """
        try:
            first, second, height = raw["labels"]
            return cls(
                tuple(_number(v) for v in raw["x"]),
                tuple(_number(v) for v in raw["y"]),
                tuple(tuple(None if v is None else _number(v) for v in row) for row in raw["z"]),
                (str(first), str(second), str(height)),
                str(raw.get("title", "")),
                str(raw.get("origin", "")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise checks.InputError(f"surface plot: not one ({type(error).__name__}: {error})") from error

    @classmethod
    def from_values(
        cls, values: Mapping[str, Any], labels: tuple[str, str, str], *, title: str = "", origin: str = ""
    ) -> SurfacePlot:
        """Of tensors or lists ``x``, ``y`` (or none) and ``z``; what is not finite becomes a gap.

        >>> import torch
        >>> SurfacePlot.from_values({"x": torch.arange(2.0), "z": torch.tensor([1.0, torch.inf])}, ("a", "", "loss")).z
        ((1.0,), (None,))
        """

        def plain(value: Any) -> Any:
            return value.tolist() if hasattr(value, "tolist") else value

        rows = [row if isinstance(row, list) else [row] for row in plain(values["z"])]
        return cls(
            tuple(float(v) for v in plain(values["x"])),
            tuple(float(v) for v in plain(values.get("y", ()))),
            tuple(tuple(float(v) if math.isfinite(v) else None for v in row) for row in rows),
            labels,
            title,
            origin,
        )

    @classmethod
    def of(cls, found: Any, metric: str | None = None, *, title: str = "") -> SurfacePlot:
        """Of a loss, or another metric, along a line or in a plane, as :mod:`lineament.measure.landscape` returns them.

        >>> import torch; from lineament.measure.landscape.results import Plane
        >>> found = Plane(torch.arange(-1.0, 2), torch.arange(-1.0, 2), torch.arange(9.0).view(3, 3))
        >>> [drawn.type for drawn in SurfacePlot.of(found).figure().data]
        ['contour', 'scatter', 'surface', 'scatter3d']
        """
        z, height = found.loss if metric is None else found.metrics[metric], metric or "loss"
        if hasattr(found, "at"):
            return cls.from_values({"x": found.at, "z": z}, (found.label, "", height), title=title)
        values = {"x": found.a, "y": found.b, "z": z}
        return cls.from_values(values, (*found.labels, height), title=title, origin="these weights")

    def drawings(self) -> dict[str, dict[str, Any]]:
        """What plotly draws, by name (``"contour"`` and ``"surface"``, or ``"curve"``): ``data`` and ``layout``, as JSON has them.

        Colours and fonts are the page's to give, except that of the values.
        """
        if not len(self.y):
            return {"curve": {"data": self._curve(), "layout": self._flat(self.labels[2])}}
        return {
            "contour": {"data": self._contour(), "layout": self._flat(self.labels[1])},
            "surface": {"data": self._surface(), "layout": {"scene": self._scene()}},
        }

    def figure(self) -> Any:
        """A plotly ``Figure`` of one's own, contours and surface side by side, for a notebook or ``write_html``."""
        from plotly.graph_objects import Figure

        drawn = self.drawings()
        if "curve" in drawn:
            return Figure(drawn["curve"])
        flat, scene = drawn["contour"]["layout"], drawn["surface"]["layout"]["scene"]
        data = [*drawn["contour"]["data"], *drawn["surface"]["data"]]
        data[0]["colorbar"]["x"] = 0.44
        layout = {
            "xaxis": {**flat["xaxis"], "domain": [0.0, 0.42]},
            "yaxis": flat["yaxis"],
            "scene": {**scene, "domain": {"x": [0.55, 1.0], "y": [0.0, 1.0]}},
            "showlegend": False,
        }
        return Figure({"data": data, "layout": layout})

    def _curve(self) -> list[dict[str, Any]]:
        values = [row[0] for row in self.z]
        line = {
            "type": "scatter",
            "mode": "lines+markers" if len(values) < 60 else "lines",
            "x": list(self.x),
            "y": values,
            "text": [_shown(v) for v in values],
            "hovertemplate": f"{_escaped(self.labels[2])} %{{text}}<br>at %{{x:.4g}}<extra></extra>",
            "name": "",
        }
        return [line]

    def _contour(self) -> list[dict[str, Any]]:
        ticks = [k / 4 for k in range(5)]
        low, high = self._range()
        contour = {
            "type": "contour",
            "z": self._turned(self._shades()),
            "contours": {"start": 0.0, "end": 1.0, "size": 1 / _LEVELS, "coloring": "fill"},
            "line": {"width": 0.4, "color": "rgba(255,255,255,0.5)"},
            "zmin": 0.0,
            "zmax": 1.0,
            "colorbar": {
                "tickvals": ticks,
                "ticktext": [f"{low + (high - low) * t**3:.3g}" for t in ticks],
                "title": {"text": _escaped(self.labels[2])},
                "thickness": 12,
                "outlinewidth": 0,
                "ticks": "",
            },
            **self._read(),
        }
        return [contour, *self._here({"type": "scatter"}, {"symbol": "cross-thin", "size": 11})]

    def _surface(self) -> list[dict[str, Any]]:
        surface = {
            "type": "surface",
            "z": self._turned(self.z),
            "surfacecolor": self._turned(self._shades()),
            "cmin": 0.0,
            "cmax": 1.0,
            "showscale": False,
            "lighting": {"ambient": 0.85, "diffuse": 0.4, "specular": 0.05, "roughness": 0.9},
            **self._read(),
        }
        height = self._at_origin()
        if height is None:
            return [surface]
        low, high = self._range()
        # A little above, or the surface would hide half of the mark.
        above = height + 0.02 * (high - low)
        return [surface, *self._here({"type": "scatter3d", "z": [above]}, {"symbol": "circle", "size": 4})]

    def _read(self) -> dict[str, Any]:
        """Where the values are and what the pointer reads there; both drawings have that in common."""
        shown = [[_shown(v) for v in row] for row in self.z]
        return {
            "x": list(self.x),
            "y": list(self.y),
            "text": self._turned(shown),
            "hovertemplate": f"{_escaped(self.labels[2])} %{{text}}<br>at %{{x:.3g}}, %{{y:.3g}}<extra></extra>",
            "colorscale": "Viridis",
            "name": "",
        }

    def _here(self, kind: dict[str, Any], marker: dict[str, Any]) -> list[dict[str, Any]]:
        if not self.origin or not (min(self.x) <= 0 <= max(self.x) and min(self.y) <= 0 <= max(self.y)):
            return []
        line = {"width": 2, "color": "#ff9257"}
        return [
            {
                **kind,
                "mode": "markers",
                "x": [0.0],
                "y": [0.0],
                "marker": {**marker, "color": "#ff9257", "line": line},
                "hoverinfo": "skip",
                "showlegend": False,
                "name": _escaped(self.origin),
            }
        ]

    def _flat(self, upwards: str) -> dict[str, Any]:
        sides = (("xaxis", self.labels[0]), ("yaxis", upwards))
        return {
            name: {"title": {"text": _escaped(label)}, "zeroline": False, "automargin": True}
            for name, label in sides
        }

    def _scene(self) -> dict[str, Any]:
        names = ("first axis", "second axis", _escaped(self.labels[2]))
        return {
            **{
                f"{letter}axis": {
                    "title": {"text": name},
                    "nticks": 5,
                    "showspikes": False,
                    "zeroline": False,
                }
                for letter, name in zip("xyz", names)
            },
            "aspectmode": "manual",
            "aspectratio": {"x": 1, "y": 1, "z": 0.75},
            "camera": {"eye": {"x": 1.35, "y": -1.6, "z": 0.95}, "center": {"x": 0, "y": 0, "z": -0.12}},
        }

    def _shades(self) -> list[list[float | None]]:
        """Colours by the cube root of the height: equal steps would all lie on the walls and leave a valley plain."""
        low, high = self._range()
        span = high - low
        return [
            [None if v is None else round(((v - low) / span) ** (1 / 3), 4) if span > 0 else 0.0 for v in row]
            for row in self.z
        ]

    def _range(self) -> tuple[float, float]:
        values = [v for row in self.z for v in row if v is not None]
        return (min(values), max(values)) if values else (0.0, 0.0)

    def _at_origin(self) -> float | None:
        """The value nearest to zero along both coordinates."""
        nearest = [min(range(len(side)), key=lambda k: abs(side[k])) for side in (self.x, self.y)]
        return self.z[nearest[0]][nearest[1]]

    def _turned(self, rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Plotly's rows go along y."""
        return [list(column) for column in zip(*rows)]


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{checks.show(value)} is no finite number")
    return float(value)


def _shown(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"


def _escaped(text: str) -> str:
    """A label for plotly, which reads tags, entities and ``%{...}``."""
    short = text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
    visible = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in short)
    return html.escape(visible).replace("%", "&#37;").replace("{", "&#123;").replace("$", "&#36;")
