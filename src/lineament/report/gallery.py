"""Every outcome as a static site that works from disk: the catalogue with search and filters, a page for each paper.

What lies in the runs' folder is untrusted. Only the documented fields of an ``outcome.json`` are read, pages and
pictures get names made here, a picture is copied only if it lies inside its run's folder, and a run that cannot be
read becomes a line on the page instead of an end.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError, require, show
from lineament.core.files import atomic_write, output_folder, write_json, write_text
from lineament.report.interactive import library
from lineament.report.outcome import Outcome
from lineament.report.page import environment
from lineament.report.text import plain, printable

MANIFEST = "gallery.json"
_OURS = re.compile(r"(index\.html|papers/[a-z0-9-]+\.html|figures/[a-z0-9-]+\.(svg|png))")
_LARGEST = 64 * 2**20


@dataclass(frozen=True)
class Site:
    """What :func:`build` wrote; ``problems`` are plain sentences, one for each thing that could not be shown."""

    index: Path
    outcomes: int
    pages: int
    problems: tuple[str, ...]


@dataclass
class _Run:
    """One outcome as its page shows it; ``pictures`` hold site-relative file names."""

    outcome: Outcome
    place: str
    command: str
    pictures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def held(self) -> int:
        return sum(claim.holds for claim in self.outcome.claims)


def build(
    runs: str | Path,
    out: str | Path,
    *,
    catalogue: Sequence[Mapping[str, Any]],
    presets: Mapping[tuple[str, str], Mapping[str, Any]] | None = None,
) -> Site:
    """Write the gallery of every ``outcome.json`` below ``runs`` into the folder ``out``.

    Args:
        runs: a folder, searched to any depth.
        out: a new or empty folder, or one that holds an earlier gallery, which is replaced.
        catalogue: the papers as plain data, in the order to show (``lineament.papers.Paper.to_dict``).
        presets: configurations by slug and preset; a run's command names only the fields that differ.

    Raises:
        InputError: ``runs`` is no folder, or ``out`` cannot be written or holds something else.

    >>> import tempfile
    >>> site = build(tempfile.mkdtemp(), tempfile.mkdtemp(), catalogue=[])
    >>> site.index.name, len(site.problems)
    ('index.html', 1)
    """
    runs = Path(runs)
    require(runs.is_dir(), f"runs: {str(runs)!r} is no folder, expected one with runs in it")
    site = output_folder(out)
    old = _earlier(site)
    # Written first as well: a build that is killed leaves a folder that the next one knows as its own.
    write_json(site / MANIFEST, {"files": sorted(old), "problems": []})
    problems: list[str] = []
    written: list[str] = []
    found: dict[str, list[_Run]] = {}
    for path in _outcomes(runs, site):
        place = path.parent.relative_to(runs).as_posix()
        try:
            outcome = _checked(Outcome.read(path))
            run = _Run(outcome, place, _command(outcome, presets or {}))
        except (InputError, RecursionError) as error:
            problems.append(f"{place}: {str(error).split(': ', 1)[-1]}")
            continue
        serial = sum(map(len, found.values())) + 1
        run.pictures = _copy_pictures(path.parent, outcome, site, serial, problems, place, written)
        found.setdefault(outcome.slug, []).append(run)
    if not found and not problems:
        problems.append(f"{runs}: no outcome.json was found there")

    entries = [
        {**paper, "file": f"{paper['slug']}.html", "runs_here": found.get(paper["slug"], [])}
        for paper in catalogue
    ]
    known = {paper["slug"] for paper in catalogue}
    for position, slug in enumerate(sorted(set(found) - known), 1):
        entries.append(_stranger(slug, position, found[slug]))
    env = environment()
    script = (Path(__file__).parent / "templates" / "gallery.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shared = {"script": script, "script_hash": digest, "problems": problems}
    for position, entry in enumerate(entries):
        name = f"papers/{entry['file']}"
        scripts = library(picture["surfaces"] for run in entry["runs_here"] for picture in run.pictures)
        around = {
            "newer": entries[position - 1] if position else None,
            "older": entries[position + 1] if position + 1 < len(entries) else None,
        }
        write_text(
            site / name, env.get_template("paper.html.j2").render(paper=entry, library=scripts, **around)
        )
        written.append(name)
    count = sum(map(len, found.values()))
    index = env.get_template("gallery.html.j2").render(
        entries=entries,
        wings=sorted({str(entry["wing"]) for entry in entries}),
        years=sorted({int(entry["year"]) for entry in entries if entry["year"]}, reverse=True),
        outcomes=count,
        **shared,
    )
    write_text(site / "index.html", index)
    written.append("index.html")
    write_json(site / MANIFEST, {"files": sorted(written), "problems": plain(problems)})
    for name in sorted(old - set(written)):
        (site / name).unlink(missing_ok=True)
    return Site(site / "index.html", count, len(entries) + 1, tuple(problems))


def _earlier(site: Path) -> set[str]:
    """The files of an earlier gallery in ``site``; an error if the folder holds anything but one."""
    manifest = site / MANIFEST
    if manifest.exists():
        try:
            names = json.loads(manifest.read_text(encoding="utf-8"))["files"]
            return {name for name in names if _OURS.fullmatch(str(name))}
        except (OSError, ValueError, KeyError, TypeError):
            return set()
    others = sorted(entry.name for entry in site.iterdir() if not entry.name.startswith("."))
    require(
        not others,
        f"out: {str(site)!r} holds other files ({', '.join(map(repr, others[:3]))}); choose an empty or new folder",
    )
    return set()


def _outcomes(runs: Path, site: Path) -> list[Path]:
    """Every outcome.json below ``runs``, in order; links to folders are not followed, nor the site itself."""
    found = []
    for folder, folders, files in os.walk(runs):
        here = Path(folder)
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and (here / name).resolve() != site.resolve()
        )
        if "outcome.json" in files:
            found.append(here / "outcome.json")
    return found


def _checked(outcome: Outcome) -> Outcome:
    """The outcome, if its parts have the documented types (``Outcome.read`` checks only that they are there)."""
    for claim in outcome.claims:
        require(
            isinstance(claim.holds, bool),
            f"outcome.json: 'holds' of a claim is {show(claim.holds)}, not true or false",
        )
    for table in outcome.tables:
        rows = table.rows if isinstance(table.rows, list) else [None]
        simple = (str, int, float, type(None))
        require(
            isinstance(table.columns, list)
            and all(
                isinstance(row, list) and all(isinstance(value, simple) for value in row) for row in rows
            ),
            f"outcome.json: the table {show(table.title)} is not columns and rows of text and numbers",
        )
    return outcome


def _command(outcome: Outcome, presets: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The command line that makes this outcome again."""
    usual = presets.get((outcome.slug, outcome.preset), {})
    words = ["lineament", "reproduce", outcome.slug, "--preset", outcome.preset]
    for name, value in outcome.config.items():
        if name != "preset" and (name not in usual or usual[name] != value):
            words += [f"--{str(name).replace('_', '-')}", _as_text(value)]
    return " ".join(shlex.quote(word) for word in words)


def _as_text(value: Any) -> str:
    """A configuration's value as ``--FIELD VALUE`` takes it."""
    if isinstance(value, list):
        return ",".join(map(_as_text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value)


def _copy_pictures(
    folder: Path,
    outcome: Outcome,
    site: Path,
    serial: int,
    problems: list[str],
    place: str,
    written: list[str],
) -> list[dict[str, Any]]:
    """Copy a run's pictures, and their dark twins, under names made here; what may not be copied is a problem."""
    shown: list[dict[str, Any]] = []
    for position, figure in enumerate(outcome.figures, 1):
        entry = {
            "caption": str(figure.caption),
            "alt": str(figure.alt) or str(figure.caption),
            "light": "",
            "dark": "",
            "surfaces": figure.surfaces,
        }
        named = Path(str(figure.file))
        try:
            entry["light"] = _copy(folder, named, site, f"run-{serial}-{position}")
            written.append(entry["light"])
        except (InputError, OSError, ValueError) as error:
            entry["problem"] = (
                f"{printable(figure.file, limit=120)}, {getattr(error, 'strerror', None) or error}"
            )
            problems.append(f"{place}: the picture {entry['problem']}")
        else:
            twin = named.with_name(f"{named.stem}-dark{named.suffix}")
            if (folder / twin).is_file():
                try:
                    entry["dark"] = _copy(folder, twin, site, f"run-{serial}-{position}-dark")
                    written.append(entry["dark"])
                except (InputError, OSError) as error:
                    problems.append(
                        f"{place}: the dark picture {printable(twin)}, {getattr(error, 'strerror', None) or error}"
                    )
        shown.append(entry)
    return shown


def _copy(folder: Path, name: Path, site: Path, target: str) -> str:
    """Copy one picture out of a run's folder, if it is one and lies there; the site-relative name it got."""
    real = (folder / name).resolve()
    require(
        not name.is_absolute() and real.is_relative_to(folder.resolve()), "it lies outside the run's folder"
    )
    require(real.is_file(), "there is no such file")
    require(real.stat().st_size <= _LARGEST, f"it is larger than {_LARGEST // 2**20} MiB")
    with real.open("rb") as stream:
        head = stream.read(4096)
    kind = "png" if head.startswith(b"\x89PNG\r\n\x1a\n") else "svg" if b"<svg" in head else ""
    require(bool(kind), "it is neither PNG nor SVG")
    relative = f"figures/{target}.{kind}"
    with atomic_write(site / relative) as temporary:
        shutil.copyfile(real, temporary)
    return relative


def _stranger(slug: str, position: int, runs: list[_Run]) -> dict[str, Any]:
    """The entry of outcomes whose slug is no paper of the catalogue."""
    return {
        "slug": slug,
        "title": runs[0].outcome.title,
        "authors": "",
        "year": "",
        "arxiv": "",
        "url": "",
        "purpose": "A run of something that is not in the catalogue.",
        "wing": "other",
        "homes": [],
        "status": "not in the catalogue",
        "runs": "",
        "file": f"other-{position}.html",
        "runs_here": runs,
    }
