"""What turns and reads a picture's values on a page: the drawing library, the script that uses it, and the values as safe JSON.

Plotly is packed (a third of its size) and inside the page once, so that the page asks for nothing; a page without such a picture holds no script. What is
not obvious: the content security policy names both scripts by their hashes, so that a script from anyone's words still could not run.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from lineament.report.surface_plot import SurfacePlot
from lineament.report.text import printable

# What a screen reader says of each drawing.
_ALT_TEXTS = {
    "contour": "{} as contours. The arrow keys walk over the grid and read the value below.",
    "surface": "{} as a surface. The arrow keys turn it; plus and minus come nearer and go away.",
    "curve": "{} as a curve. The arrow keys left and right walk along it and read the value below.",
}


@dataclass(frozen=True)
class Library:
    """The scripts of a page: plotly packed (gzip, base64), ours as it is, and the policy's names for both."""

    packed: Markup
    script: Markup
    policy: str


def library(surfaces: Iterable[Sequence[SurfacePlot]]) -> Library | None:
    """The scripts, if any picture has a surface."""
    return _library() if any(len(each) for each in surfaces) else None


def drawings(surfaces: Sequence[SurfacePlot]) -> Markup:
    r"""What is drawn as JSON inside a script element, which nothing in it can end.

    >>> shown = SurfacePlot((0, 1), (), ((1.0,), (2.0,)), ("a", "", "</script><!--"))
    >>> "<" in drawings([shown]), "\\u003c" in drawings([shown])
    (False, True)
    """
    found = [{**each.drawings(), "height": printable(each.labels[2], limit=60)} for each in surfaces]
    text = json.dumps(found, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


def kinds(surfaces: Sequence[SurfacePlot]) -> list[tuple[str, str]]:
    """The drawings that any of the surfaces has, each with its alt text."""
    there = {kind: each.labels[2] for each in surfaces for kind in each.drawings()}
    return [(kind, text.format(there[kind])) for kind, text in _ALT_TEXTS.items() if kind in there]


@functools.cache
def _library() -> Library:
    from plotly.offline import get_plotlyjs

    # An HTML parser reads a lone carriage return as a line's end, which would change the hash.
    plotly = get_plotlyjs().replace("\r\n", "\n").replace("\r", "\n")
    ours = (Path(__file__).parent / "templates" / "surface_plot.js").read_text(encoding="utf-8")
    policy = " ".join(f"'sha256-{_digest(text)}'" for text in (plotly, ours))
    packed = base64.b64encode(gzip.compress(plotly.encode(), 9, mtime=0)).decode()
    return Library(Markup(packed), Markup(ours), policy)


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
