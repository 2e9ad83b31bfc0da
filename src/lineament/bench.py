"""Ours against a peer, side by side in one process: the rows that `lineament bench` prints and writes.

A benchmark file defines ``rows() -> Iterator[Row]`` and calls :func:`compare` for each line of its table. The
two sides run alternately (A B A B ...), so a drift of the machine's speed falls on both alike. ``ratio`` is
``peer_s / ours_s``: how many times the peer's speed ours reaches, so a ratio below ``target`` is a miss.
"""

from __future__ import annotations

import difflib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lineament.core.checks import InputError, require


@dataclass(frozen=True)
class Row:
    """One comparison. ``peer_s`` is ``None`` when the peer is not installed; then nothing was compared."""

    slug: str
    what: str
    ours_s: float
    peer: str
    peer_s: float | None
    ratio: float | None
    target: float | None
    met: bool | None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    slug: str,
    what: str,
    ours: Callable[[], Any],
    peer: str,
    theirs: Callable[[], Any] | None,
    *,
    target: float | None = None,
    repeats: int = 7,
    warmup: int = 1,
    scale: float = 1.0,
    note: str = "",
) -> Row:
    """Time ``ours`` and ``theirs`` alternately and return the medians as a :class:`Row`.

    Args:
        ours, theirs: functions without arguments; ``theirs`` is ``None`` when the peer is not installed.
        target: the least acceptable ``peer_s / ours_s``.
        scale: multiplies the peer's time, when the peer is timed on a known fraction of the work.
        note: what the reader must know (the physical limit, the gap to it).
    """

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    sides = [ours] if theirs is None else [ours, theirs]
    for _ in range(warmup):
        for side in sides:
            side()
    times: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats):
        # Swap who goes first, so that whatever one side leaves in the caches falls on both alike.
        order = range(len(sides)) if repeat % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            times[index].append(seconds(sides[index]))
    ours_s = statistics.median(times[0])
    peer_s = None if theirs is None else statistics.median(times[1]) * scale
    ratio = None if peer_s is None else peer_s / ours_s
    met = None if ratio is None or target is None else ratio >= target
    return Row(slug, what, ours_s, peer, peer_s, ratio, target, met, note)


# What a benchmark's own process runs: the file's rows, one JSON line each as soon as it is measured, so that the
# rows before a crash are kept. Whatever the benchmark or its peer prints goes elsewhere.
_WORKER = """
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("benchmark", sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules["benchmark"] = module
spec.loader.exec_module(module)
repeats = {} if sys.argv[3] == "default" else {"repeats": int(sys.argv[3])}
with open(sys.argv[2], "a", encoding="utf-8") as out:
    for row in module.rows(**repeats):
        print(json.dumps(row.to_dict()), file=out, flush=True)
"""


def folder() -> Path:
    """Where the benchmark files are: inside the installed package, or beside a checkout's ``src``.

    Raises:
        InputError: neither is there.
    """
    here = Path(__file__).resolve().parent
    for place in (here / "_benchmarks", here.parents[1] / "benchmarks"):
        if place.is_dir() and any(place.glob("*.py")):
            return place
    raise InputError("bench: no benchmark files were found beside this installation of lineament")


def files() -> dict[str, Path]:
    """Every benchmark by slug (the file's name with ``-`` for ``_``), in alphabetical order."""
    found = (path for path in folder().glob("*.py") if not path.name.startswith("_"))
    return {path.stem.replace("_", "-"): path for path in sorted(found)}


def run(path: str | Path, repeats: int | None = None) -> tuple[list[Row], str]:
    """One benchmark file in a process of its own.

    Args:
        path: the file; it defines ``rows(repeats=...)``.
        repeats: timings of each side; ``None`` leaves the file's own number.

    Returns:
        The rows measured, and "" or, if the process ended early, its last line of error.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "rows.jsonl"
        command = [
            *(sys.executable, "-c", _WORKER, str(path), str(out)),
            "default" if repeats is None else str(repeats),
        ]
        done = subprocess.run(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace"
        )
        rows: list[Row] = []
        if out.exists():
            for line in out.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(Row(**json.loads(line)))
                except (ValueError, TypeError):
                    # The last line of a killed process may be cut off.
                    continue
    if done.returncode == 0:
        return rows, ""
    last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
    return rows, last[0] if last else f"ended with status {done.returncode}"


def chosen(slugs: Sequence[str]) -> dict[str, Path]:
    """The benchmark files of ``slugs``, or all of them for none; an unknown slug names the ones there are."""
    known = files()
    for slug in slugs:
        near = difflib.get_close_matches(slug, known, n=1)
        require(
            slug in known,
            f"SLUG: got {slug!r}, which is no benchmark{f'; nearest: {near[0]!r}' if near else ''} "
            f"(known: {', '.join(known) or 'none'})",
        )
    return {slug: known[slug] for slug in (dict.fromkeys(slugs) if slugs else known)}
