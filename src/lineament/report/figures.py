"""The house style of every figure: one drawing function, drawn once for light pages and once for dark ones.

Colours are Okabe and Ito's colour-blind-safe set (2008), shifted in lightness so that each keeps a contrast of at
least 3:1 with its page. The bytes are the same on every run: SVG ids come from a fixed salt, no date is written, and
letters are outlines, so that no font of the reader's machine matters. ``$`` in a class name is a dollar sign.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lineament.core.checks import InputError, number, one_of, require
from lineament.core.files import atomic_write
from lineament.report.outcome import Figure
from lineament.report.section import Picture
from lineament.report.surface_plot import SurfacePlot
from lineament.report.text import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

THEMES: dict[str, dict[str, Any]] = {
    "light": {
        "page": "#ffffff",
        "ink": "#1c2126",
        "muted": "#5b646e",
        "line": "#d9dde2",
        "cycle": ["#0068a6", "#c44f00", "#007d5b", "#a9467f", "#9a6a00", "#2f86bd", "#7a5cc2", "#6a727b"],
    },
    "dark": {
        "page": "#14181d",
        "ink": "#e6e9ec",
        "muted": "#a2abb5",
        "line": "#353c45",
        "cycle": ["#62b4ee", "#ff9257", "#3fcf9f", "#ec9cc9", "#e8b54a", "#a4d8f7", "#b7a1f5", "#a2abb5"],
    },
}


def style(theme: str) -> dict[str, Any]:
    """matplotlib's rcParams for ``theme`` ("light" or "dark"); colours ``"C0"`` to ``"C7"`` follow the theme.

    >>> style("dark")["text.parse_math"], style("light")["figure.facecolor"]
    (False, '#ffffff')
    """
    from cycler import cycler

    colours = THEMES[one_of("theme", theme, THEMES)]
    ink, muted, line, paper = (colours[k] for k in ("ink", "muted", "line", "page"))
    return {
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "axes.facecolor": paper,
        "axes.prop_cycle": cycler(color=colours["cycle"]),
        "axes.edgecolor": muted,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "axes.titlesize": 11,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.labelsize": 10.5,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "axes.axisbelow": True,
        "axes.formatter.use_mathtext": False,
        "axes.formatter.useoffset": False,
        "grid.color": line,
        "grid.linewidth": 0.7,
        "text.color": ink,
        "text.parse_math": False,
        "text.usetex": False,
        "font.family": ["DejaVu Sans"],
        "font.size": 10,
        "xtick.color": muted,
        "ytick.color": muted,
        "xtick.labelcolor": ink,
        "ytick.labelcolor": ink,
        "xtick.labelsize": 9.5,
        "ytick.labelsize": 9.5,
        "legend.frameon": False,
        "legend.fontsize": 9.5,
        "lines.linewidth": 1.8,
        "lines.solid_capstyle": "round",
        "lines.markersize": 5,
        "patch.edgecolor": paper,
        "image.cmap": "viridis",
        "image.interpolation": "nearest",
        "svg.fonttype": "path",
        "svg.hashsalt": "lineament",
        "figure.dpi": 100,
        "savefig.dpi": 180,
        "path.simplify": True,
    }


_drawn: ContextVar[bool] = ContextVar("drawn", default=True)


@contextmanager
def undrawn() -> Iterator[None]:
    """Within the block pictures keep their words and stay empty: for who wants the numbers of many reports.

    >>> with undrawn():
    ...     picture(lambda ax: ax.plot([0, 1]), alt="a line", caption="").light
    b''
    """
    token = _drawn.set(False)
    try:
        yield
    finally:
        _drawn.reset(token)


def picture(
    draw: Callable[[Any], Any],
    *,
    alt: str,
    caption: str,
    size: tuple[float, float] = (6.4, 3.6),
    kind: Literal["svg", "png"] = "svg",
    panels: tuple[int, int] = (1, 1),
    surfaces: Sequence[SurfacePlot] = (),
) -> Picture:
    """Draw a figure for light and for dark pages.

    Args:
        draw: called twice, with one ``Axes`` or, for several panels, with an array of them of shape ``panels``;
            colours it names as ``"C0"`` ... ``"C7"`` (``"C7"`` is the quiet grey) follow the theme.
        alt: the alt text, what the picture shows.
        caption: the line below the picture.
        size: width and height in inches.
        kind: ``"svg"`` for lines and bars, ``"png"`` for images and thousands of points.
        panels: rows and columns.
        surfaces: the values that a page with scripts shows in its place, to be turned and read.

    Returns:
        A :class:`~lineament.report.section.Picture`; equal input gives equal bytes.

    Raises:
        InputError: an empty ``alt``, an unknown ``kind``, a size or number of panels that is not positive.

    >>> shown = picture(lambda ax: ax.bar(["a", "$b"], [1, 2]), alt="two bars", caption="Counts.")
    >>> shown.light[:5], shown.light == shown.dark
    (b'<?xml', False)
    """
    require(bool(str(alt).strip()), "alt: got an empty text, expected what the picture shows")
    one_of("kind", kind, ["svg", "png"])
    require(
        len(size) == 2 and len(panels) == 2, f"size and panels: got {size} and {panels}, expected two each"
    )
    for inches in size:
        number("size", inches, low=0, open_low=True)
    for count in panels:
        number("panels", count, low=1, integer=True)
    light, dark = (
        _render(draw, theme, size, kind, panels) if _drawn.get() else b"" for theme in ("light", "dark")
    )
    return Picture(light=light, dark=dark, kind=kind, caption=caption, alt=alt, surfaces=tuple(surfaces))


def shades(ax: Axes, colour: str, *, below: str = "") -> Any:
    """A colormap from the page's own shade to ``colour``; for signed values from ``below`` over the page's shade."""
    from matplotlib.colors import LinearSegmentedColormap, to_rgb

    ends = [to_rgb(below)] if below else []
    return LinearSegmentedColormap.from_list("shades", [*ends, to_rgb(ax.get_facecolor()), to_rgb(colour)])


def save(shown: Picture, folder: str | Path, name: str) -> Figure:
    """Write a picture into a run's folder as ``NAME.svg`` (or png) with its dark twin ``NAME-dark.svg`` beside it.

    The gallery shows the twin to readers of dark pages. Returns the entry for ``Outcome.figures``.

    >>> import tempfile
    >>> save(picture(lambda ax: ax.plot([0, 1]), alt="a line", caption=""), tempfile.mkdtemp(), "rise").file
    'rise.svg'
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise InputError(f"name: got {name!r}, expected letters, digits, '-', '_' and '.' only")
    for end, data in (("", shown.light), ("-dark", shown.dark)):
        with atomic_write(Path(folder) / f"{name}{end}.{shown.kind}") as temporary:
            temporary.write_bytes(data)
    return Figure(file=f"{name}.{shown.kind}", caption=shown.caption, alt=shown.alt, surfaces=shown.surfaces)


def _render(
    draw: Callable[[Any], Any], theme: str, size: tuple[float, float], kind: str, panels: tuple[int, int]
) -> bytes:
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

    buffer = io.BytesIO()
    # "default" first: a matplotlibrc of the reader's must not change what a report looks like. No pyplot, so no
    # global figure list grows and no window system is asked for.
    with matplotlib.style.context(["default", style(theme)]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        figure = Canvas(figsize=size, layout="constrained")
        (FigureCanvasSVG if kind == "svg" else FigureCanvasAgg)(figure)
        axes = figure.subplots(*panels, squeeze=False)
        draw(axes[0, 0] if panels == (1, 1) else axes)
        for ax in figure.get_axes():
            _plain_log_labels(ax)
            _printable_labels(ax)
        for label in figure.findobj(Text):
            label.set_text(printable(label.get_text(), keep="\n"))
        hidden = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        figure.savefig(buffer, format=kind, metadata=hidden)
    data = buffer.getvalue()
    # matplotlib repeats every label in a comment, where a control character would make the XML unreadable.
    return re.sub(rb"\s*<!--.*?-->", b"", data, flags=re.DOTALL) if kind == "svg" else data


def _plain_log_labels(ax: Axes) -> None:
    """Logarithmic axes label themselves in mathtext, which is off: write 10⁻² in Unicode instead."""
    from matplotlib.ticker import FuncFormatter, LogFormatter, NullFormatter

    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(abs(float(end)) for end in axis.get_view_interval())
        # A short axis reads best in plain numbers, a long one in powers; never both on one axis.
        formatter = FuncFormatter(_number if low > 1e-3 and high < 1e5 else _power)
        if isinstance(axis.get_major_formatter(), LogFormatter):
            axis.set_major_formatter(formatter)
        if isinstance(axis.get_minor_formatter(), LogFormatter):
            # Less than one decade shows no major tick at all, so there the minor ones carry the numbers.
            short = low > 0 and high / low < 10
            axis.set_minor_formatter(FuncFormatter(_number) if short else NullFormatter())


def _printable_labels(ax: Axes) -> None:
    """Tick labels are made anew at every drawing: make their makers printable (a lone surrogate ends a drawing)."""
    for axis in (ax.xaxis, ax.yaxis):
        for formatter in (axis.get_major_formatter(), axis.get_minor_formatter()):
            make = formatter.format_ticks
            formatter.format_ticks = lambda values, make=make: [
                printable(t, keep="\n", limit=60) for t in make(values)
            ]


def _number(value: float, _position: int | None = None) -> str:
    return f"{value:g}".replace("-", "−")


def _power(value: float, _position: int | None = None) -> str:
    exponent = round(math.log10(abs(value))) if value else 0
    if not value or not math.isclose(abs(value), 10.0**exponent, rel_tol=1e-6):
        return _number(value)
    superscript = str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ("−" if value < 0 else "") + (f"{10**exponent}" if exponent in (0, 1) else f"10{superscript}")
