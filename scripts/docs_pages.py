"""What of the documentation is read off the code (an MkDocs hook): the API by wing, the papers, the picture of the floors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "lineament"
WINGS = (
    "core",
    "data",
    "load",
    "train",
    "optim",
    "losses",
    "modules",
    "dictionaries",
    "explain",
    "measure",
    "learn",
    "edit",
    "privacy",
    "kernels",
    "handcrafted",
    "report",
    "audit",
)


def on_files(files: Files, config: Any) -> Files:
    """Add ``api/WING.md`` for each wing, ``papers/index.md`` and ``img/floors.svg``."""
    sys.path.insert(0, str(Path(__file__).parent))
    from draw_floors import draw

    files.append(File.generated(config, "img/floors.svg", content=draw()))
    for wing in WINGS:
        modules = sorted(
            p.relative_to(PACKAGE.parent).with_suffix("") for p in (PACKAGE / wing).rglob("[a-z]*.py")
        )
        body = "\n".join(f"\n::: {'.'.join(m.parts)}\n" for m in modules)
        files.append(File.generated(config, f"api/{wing}.md", content=f"# `lineament.{wing}`\n{body}"))
    files.append(File.generated(config, "papers/index.md", content=catalogue()))
    return files


def catalogue() -> str:
    """The table of all papers, newest first; those with a page link to it."""
    from lineament.papers import search

    lines = [
        "# The papers",
        "",
        "The methods of Lineament and where they live; the same list as `lineament papers`.",
        "",
        "| paper | year | arXiv | what it is for | home | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for paper in search():
        page = (ROOT / "docs" / "papers" / f"{paper.slug}.md").is_file()
        title = f"[{paper.title}]({paper.slug}.md)" if page else paper.title
        homes = ", ".join(f"`{place}`" for place in paper.homes)
        state = "there" if paper.there else "not there yet"
        lines.append(
            f"| {title} | {paper.year} | [{paper.arxiv}]({paper.url}) | {paper.purpose} | {homes} | {state} |"
        )
    return "\n".join(lines) + "\n"
