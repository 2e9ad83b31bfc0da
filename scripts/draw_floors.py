"""Draw the floors of the house from the code's own imports, as SVG on standard output.

The floors are the layers of the import-linter contract in `pyproject.toml`; the files and the arrows come from the
source. The documentation draws the picture anew at every build, so that it is always true.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "lineament"
WIDTH, ROW, GAP, MARGIN = 960, 96, 58, 24


def floors() -> list[list[str]]:
    """The layers of the contract, top first; each a list of wing names."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(c["layers"] for c in contracts if c["type"] == "layers")
    # Wings in brackets may be empty still.
    named = [
        [part.strip().strip("()").removeprefix("lineament.") for part in layer.split("|")] for layer in layers
    ]
    there = [[wing for wing in wings if files_of(wing)] for wings in named]
    return [wings for wings in there if wings]


def wing_of(module: str) -> str:
    return module.removeprefix("lineament.").split(".")[0]


def files_of(wing: str) -> list[str]:
    folder = PACKAGE / wing
    if folder.is_dir():
        inside = [p.stem for p in folder.glob("*.py") if p.stem != "__init__"]
        return sorted(inside + [f"{p.name}/" for p in folder.iterdir() if (p / "__init__.py").exists()])
    return [wing] if (PACKAGE / f"{wing}.py").exists() else []


def arrows(wings: set[str]) -> Counter[tuple[str, str]]:
    """How many import statements lead from one wing to another."""
    counts: Counter[tuple[str, str]] = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        here = wing_of(".".join(("lineament", *path.relative_to(PACKAGE).with_suffix("").parts)))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                # `from lineament import bench` names the wing in the alias, not in the module.
                names = (
                    [f"lineament.{a.name}" for a in node.names]
                    if node.module == "lineament"
                    else [node.module]
                )
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                there = wing_of(name)
                if name.startswith("lineament.") and here in wings and there in wings and here != there:
                    counts[here, there] += 1
    return counts


def clipped(names: list[str], room: int) -> list[str]:
    """File names broken into lines of at most ``room`` characters."""
    lines: list[str] = []
    for name in names:
        if lines and len(lines[-1]) + len(name) + 3 <= room:
            lines[-1] += " · " + name
        else:
            lines.append(name)
    return lines


def draw() -> str:
    rows = floors()
    wings = {wing for row in rows for wing in row}
    boxes: dict[str, tuple[float, float, float]] = {}
    shapes: list[str] = []
    for level, row in enumerate(rows):
        width = (WIDTH - 2 * MARGIN - (len(row) - 1) * GAP) / len(row)
        for place, wing in enumerate(row):
            x, y = MARGIN + place * (width + GAP), MARGIN + level * (ROW + GAP)
            boxes[wing] = (x, y, width)
            shapes.append(f'<rect x="{x:.0f}" y="{y}" width="{width:.0f}" height="{ROW}" rx="8"/>')
            shapes.append(f'<text class="wing" x="{x + 14:.0f}" y="{y + 25}">{wing}</text>')
            names = files_of(wing)
            for line, text in enumerate(clipped(names, int(width / 7.4))[:3] if names != [wing] else []):
                shapes.append(f'<text x="{x + 14:.0f}" y="{y + 46 + 17 * line}">{text}</text>')
    lines: list[str] = []
    for (here, there), count in sorted(arrows(wings).items()):
        (x1, y1, w1), (x2, y2, w2) = boxes[here], boxes[there]
        order = sorted(wings)
        # Spread the ends along the edges, so that arrows between the same floors stay apart.
        out = x1 + w1 * (order.index(there) + 1) / (len(order) + 1)
        into = x2 + w2 * (order.index(here) + 1) / (len(order) + 1)
        lines.append(
            f'<path d="M{out:.0f} {y1 + ROW} C{out:.0f} {y1 + ROW + 40} {into:.0f} {y2 - 40} {into:.0f} {y2 - 4}" '
            f'stroke-width="{min(1 + count / 6, 4):.1f}"><title>{here} imports {there} in {count} places</title></path>'
        )
    height = 2 * MARGIN + len(rows) * ROW + (len(rows) - 1) * GAP
    style = (
        "rect{fill:#eef1f8;stroke:#4b5a86}text{font:13px sans-serif;fill:#333d5c}.wing{font-weight:bold;font-size:16px}"
        "path{fill:none;stroke:#8a94b8;marker-end:url(#tip);opacity:.75}"
    )
    tip = (
        '<marker id="tip" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto" markerUnits="userSpaceOnUse">'
        '<path d="M0 0L6 3L0 6z" style="fill:#8a94b8;stroke:none;marker-end:none"/></marker>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
        f"<title>The floors of Lineament: imports run downwards only</title><style>{style}</style><defs>{tip}</defs>"
        f'<rect width="100%" height="100%" style="fill:#fff;stroke:none"/>\n'
        + "\n".join([*lines, *shapes])
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    sys.stdout.write(draw())
