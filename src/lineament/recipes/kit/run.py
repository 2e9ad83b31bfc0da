"""One run of a recipe in one folder: begun, resumed after a kill, found finished, or refused.

The folder says itself what it holds. ``run.json`` is written first and names the recipe and its configuration;
``.stages`` holds what a killed run has finished; ``outcome.json`` comes last, and with it the run is done.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError, one_of, require
from lineament.core.files import output_folder, write_json
from lineament.recipes.kit.configuration import PRESETS, configure, load
from lineament.report.outcome import Outcome, versions
from lineament.report.text import plain

MARKER = "run.json"


@dataclass(frozen=True)
class Run:
    """What :func:`reproduce` did: the outcome, its folder, and whether it was ``"run"``, ``"resumed"`` or ``"found"``."""

    outcome: Outcome
    folder: Path
    how: str


def reproduce(
    slug: str,
    preset: str = "quick",
    values: Mapping[str, str] | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    note: Any = None,
) -> Run:
    """Run a paper's recipe into a folder, or give back the outcome that the same configuration left there.

    Args:
        slug: the paper.
        preset: ``"quick"``, ``"small"`` or ``"paper"``.
        values: configuration fields as text (see :func:`lineament.recipes.configure`).
        out: the folder; default ``runs/SLUG-PRESET``.
        overwrite: replace what an earlier run left in the folder.
        note: called with a line of text when an unfinished run goes on.

    Raises:
        InputError: unknown paper, preset or field, a value of the wrong type, or a folder that cannot be written or
            holds something else.

    >>> reproduce("gns", "quick", out="runs/gns").outcome.claims[0].holds  # doctest: +SKIP
    True
    """
    recipe = load(slug)
    config = configure(recipe.Config.preset(one_of("preset", preset, PRESETS)), values or {})
    folder = output_folder(Path("runs") / f"{slug}-{preset}" if out is None else out)
    identity = {"slug": slug, "config": plain(asdict(config))}
    ours = overwrite and _clear(folder)
    found = _finished(folder, identity)
    if found is not None:
        _tidy(folder)
        return Run(found, folder, "found")
    resumed = _claim(folder, identity, ours)
    if resumed and note is not None:
        note(f"{folder} holds an unfinished run of the same configuration: going on with it")
    start = time.perf_counter()
    outcome = recipe.run(config, out=folder)
    outcome = replace(
        outcome,
        preset=preset,
        config=identity["config"],
        seconds=outcome.seconds or time.perf_counter() - start,
        versions=dict(outcome.versions) or versions(),
    )
    write_json(folder / "outcome.json", plain(outcome.to_dict()))
    _tidy(folder)
    return Run(outcome, folder, "resumed" if resumed else "run")


def _finished(folder: Path, identity: dict[str, Any]) -> Outcome | None:
    """The outcome in ``folder`` if it is this configuration's; an error if it is another's."""
    path = folder / "outcome.json"
    if not path.exists():
        return None
    outcome = Outcome.read(path)
    same = {"slug": outcome.slug, "config": outcome.config} == identity
    if not same:
        keys = {**outcome.config, **identity["config"]}
        other = [k for k in keys if outcome.config.get(k) != identity["config"].get(k)]
        what = outcome.slug if outcome.slug != identity["slug"] else "other " + ", ".join(other)
        raise InputError(
            f"out: {str(folder)!r} holds the outcome of another run ({what}); "
            "choose another folder or pass overwrite=True"
        )
    return outcome


def _claim(folder: Path, identity: dict[str, Any], ours: bool) -> bool:
    """Mark an empty folder as this run's; whether an unfinished run of the same configuration is there."""
    marker = folder / MARKER
    if marker.exists():
        try:
            there = json.loads(marker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            there = None
        require(
            there == identity,
            f"out: {str(folder)!r} holds an unfinished run of another configuration; "
            "choose another folder or pass overwrite=True",
        )
        return True
    # Hidden files are a file manager's, or a killed write's; anything else is somebody's.
    others = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    require(
        ours or not others,
        f"out: {str(folder)!r} holds other files ({', '.join(map(repr, others[:3]))}); choose an empty or new folder",
    )
    write_json(marker, identity)
    return False


def _tidy(folder: Path) -> None:
    shutil.rmtree(folder / ".stages", ignore_errors=True)
    (folder / MARKER).unlink(missing_ok=True)


def _clear(folder: Path) -> bool:
    """Remove what an earlier run wrote, and only that; whether there was one."""
    path = folder / "outcome.json"
    ours = path.exists() or (folder / MARKER).exists()
    if path.exists():
        with suppress(InputError):
            for figure in Outcome.read(path).figures:
                name = Path(str(figure.file))
                if name.name == str(figure.file):
                    for twin in (name.name, f"{name.stem}-dark{name.suffix}"):
                        (folder / twin).unlink(missing_ok=True)
        path.unlink()
    elif (folder / MARKER).exists():
        # Unfinished: its figures are not listed anywhere yet, and the new run writes them by the same names.
        (folder / MARKER).unlink()
        for entry in folder.iterdir():
            if entry.is_file() and entry.suffix in (".svg", ".png"):
                entry.unlink()
    shutil.rmtree(folder / ".stages", ignore_errors=True)
    return ours
