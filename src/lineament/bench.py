"""Ours against a peer, or against a known truth: the rows that `lineament bench` prints and writes.

A benchmark file defines ``rows() -> Iterator[Row]`` and calls :func:`compare` for each line of its table. The
two sides run alternately (A B A B ...), so a drift of the machine's speed falls on both alike. ``ratio`` is
``peer_s / ours_s``: how many times the peer's speed ours reaches, so a ratio below ``target`` is a miss. A file that
asks how often something is right gives a :class:`Trial` for each object of known truth, and a :class:`Rate` for each share made of them.
"""

from __future__ import annotations

import difflib
import json
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lineament.core import engines
from lineament.core.checks import InputError, require
from lineament.core.files import possible_file, write_json
from lineament.report.text import plain


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


@dataclass(frozen=True)
class Trial:
    """One object of known truth, and what was found of it.

    ``truth``: what there is to find, by name, and how strong it is (0: it is not there); ``found``: what was found, by name, and how severe it is called;
    ``numbers``: (value, low, high, true value) of what was measured with an interval; ``chooses``: whether thresholds may be chosen on it.
    """

    slug: str
    what: str
    planted: str
    truth: dict[str, float]
    found: dict[str, str]
    numbers: Mapping[str, Sequence[float]]
    chooses: bool
    ours_s: float
    met: None = None

    def to_dict(self) -> dict[str, Any]:
        return {"row": "trial", **asdict(self)}


@dataclass(frozen=True)
class Rate:
    """How often something was found, of ``count`` trials, with its 95 % interval; ``at_most``: the target is a ceiling.

    ``met`` is ``None`` where there is no target, and where the trials are too few to tell (:func:`decided`).
    """

    slug: str
    what: str
    hits: int
    count: int
    low: float
    high: float
    target: float | None
    at_most: bool
    met: bool | None
    note: str = ""

    @property
    def share(self) -> float:
        return self.hits / self.count

    def to_dict(self) -> dict[str, Any]:
        return {"row": "rate", **asdict(self)}


def decided(low: float, high: float, target: float | None, *, at_most: bool) -> bool | None:
    """Whether a rate meets its target; ``None`` where its interval reaches across the target: too few trials to tell.

    >>> decided(0.0, 0.015, 0.02, at_most=True), decided(0.0, 0.793, 0.05, at_most=True), decided(0.0, 0.793, 0.95, at_most=False)
    (True, None, False)
    """
    if target is None:
        return None
    below, above = high <= target, low >= target
    return None if below == above else below == at_most


AnyRow = Row | Trial | Rate


def row_of(stored: dict[str, Any]) -> AnyRow:
    """The row that ``to_dict`` wrote."""
    kinds: dict[str, Any] = {"comparison": Row, "trial": Trial, "rate": Rate}
    return kinds[stored.get("row", "comparison")](**{k: v for k, v in stored.items() if k != "row"})


def _name(row: AnyRow) -> tuple[str, str, str]:
    return row.slug, row.what, row.peer if isinstance(row, Row) else ""


@dataclass(frozen=True)
class Ended:
    """A benchmark whose process ended before its last row, and why."""

    slug: str
    reason: str


@dataclass
class _Settings:
    """What this process was told: whether to be quick, and the rows that an earlier run has measured already."""

    quick: bool = False
    measured: dict[tuple[str, str, str], AnyRow] = field(default_factory=dict)


_settings = _Settings()
# A run of so many seconds is not repeated where the benchmarks are to be quick.
_LONG = 0.5


def quick() -> bool:
    """Whether ``lineament bench --quick`` asked for small sizes."""
    return _settings.quick


def earlier(slug: str, what: str) -> Trial | None:
    """The trial that an unfinished run has made already."""
    found = _settings.measured.get((slug, what, ""))
    return found if isinstance(found, Trial) else None


def resident_mib() -> float:
    """This process's peak memory so far, in MiB: a peak never falls, so that one process measures one side."""
    status = Path("/proc/self/status")
    if status.exists():
        # Unlike getrusage's, this peak starts anew with the program: nothing of the parent's is in it.
        return int(re.findall(r"VmHWM:\s*(\d+)", status.read_text())[0]) / 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


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
        target: the smallest acceptable ``peer_s / ours_s``.
        repeats, warmup: timings of each side, and runs before them. Where :func:`quick` one of each at most, and a first run that
            took over half a second is the timing.
        scale: multiplies the peer's time, when the peer is timed on a known fraction of the work.
        note: what the reader must know (the physical limit, the gap to it).
    """
    known = _settings.measured.get((slug, what, peer))
    if isinstance(known, Row):
        return known
    if quick():
        repeats, warmup = 1, min(warmup, 1)

    def seconds(function: Callable[[], Any]) -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    sides = [ours] if theirs is None else [ours, theirs]
    first: list[list[float]] = [[] for _ in sides]
    for _ in range(warmup):
        for taken, side in zip(first, sides):
            taken.append(seconds(side))
    times = [[t for t in side if quick() and t > _LONG] for side in first]
    for repeat in range(repeats):
        # Swap who goes first, so that whatever one side leaves in the caches falls on both alike.
        order = range(len(sides)) if repeat % 2 == 0 else reversed(range(len(sides)))
        for index in order:
            if not (quick() and times[index]):
                times[index].append(seconds(sides[index]))
    ours_s = statistics.median(times[0])
    peer_s = None if theirs is None else statistics.median(times[1]) * scale
    ratio = None if peer_s is None else peer_s / ours_s
    met = None if ratio is None or target is None else ratio >= target
    return Row(slug, what, ours_s, peer, peer_s, ratio, target, met, note)


# What a benchmark's own process runs: the file's rows, one JSON line each as soon as it is measured. Whatever the benchmark or its peer
# prints goes nowhere.
_WORKER = """
import importlib.util, json, os, sys
out = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
from lineament import bench
from lineament.core import engines
told = json.loads(sys.stdin.read())
bench._settings.quick = told["quick"]
bench._settings.measured = {bench._name(r): r for r in map(bench.row_of, told["measured"])}
spec = importlib.util.spec_from_file_location(engines.USER_MODULE + "benchmark", told["path"])
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
with engines.engine(told["engine"]):
    for row in module.rows(**told["options"]):
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


def measure(
    benchmarks: dict[str, Path],
    *,
    repeats: int | None = None,
    quick: bool = False,
    json: str | Path | None = None,
    engine: str | None = None,
) -> Iterator[AnyRow | Ended]:
    """Every row of some benchmarks as soon as it is measured; a process that ends early ends with an :class:`Ended`.

    Args:
        benchmarks: as :func:`chosen` gives them; each runs in a process of its own.
        repeats: timings of each side; ``None`` leaves each file's own number.
        quick: small sizes, once each.
        json: a file that holds the rows so far at any moment. While the run is unfinished a second file beside it says what was asked for:
            the same call then begins with the rows that are there.
        engine: where networks of known truth are made and audited side by side, see :func:`lineament.core.engines.engine`.

    Raises:
        InputError: ``json`` cannot be written, or the engine is not there.
    """
    if engine is not None:
        engines.available(engine)
    rows: list[AnyRow] = []
    request = {"slugs": list(benchmarks), "repeats": repeats, "quick": quick}
    target = unfinished = None
    if json is not None:
        target = possible_file("json", json)
        require(target.parent.is_dir(), f"json: {str(target.parent)!r} is no folder that exists")
        unfinished = target.with_name(f".{target.name}.unfinished")
        rows = _earlier(target, unfinished, request)
        write_json(unfinished, request)
        write_json(target, plain([row.to_dict() for row in rows]))
    with ExitStack() as processes:
        # Small sizes take about as long as the imports: the next process imports meanwhile. Timings that are to be trusted run alone.
        waiting = [_process(processes) for _ in range(1 if quick else 0)]
        for slug, path in benchmarks.items():
            known = [row for row in rows if row.slug == slug]
            yield from known
            options = {} if repeats is None else {"repeats": repeats}
            process = waiting.pop() if waiting else _process(processes)
            if quick and slug != next(reversed(benchmarks)):
                waiting.append(_process(processes))
            for item in _rows(slug, path, options, quick, known, engine, process):
                if not isinstance(item, Ended):
                    rows.append(item)
                    if target is not None:
                        write_json(target, plain([row.to_dict() for row in rows]))
                yield item
    if unfinished is not None:
        unfinished.unlink(missing_ok=True)


def _earlier(target: Path, unfinished: Path, request: dict[str, Any]) -> list[AnyRow]:
    """The rows of an unfinished run that was asked for the same."""
    try:
        if json.loads(unfinished.read_text(encoding="utf-8")) == request:
            return [row_of(row) for row in json.loads(target.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    return []


def _process(stack: ExitStack) -> subprocess.Popen[str]:
    """A process that has imported what every benchmark needs and waits to be told which one to run; killed, if it still runs, when the stack closes."""
    process = subprocess.Popen(
        [sys.executable, "-c", _WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    stack.enter_context(process)
    stack.callback(process.kill)
    return process


def _rows(
    slug: str,
    path: Path,
    options: dict[str, int],
    quick: bool,
    known: Iterable[AnyRow],
    engine: str | None,
    process: subprocess.Popen[str],
) -> Iterator[AnyRow | Ended]:
    """The rows of one file that are not known yet."""
    told = {
        "path": str(path),
        "options": options,
        "quick": quick,
        "engine": engine,
        "measured": [row.to_dict() for row in known],
    }
    there = {_name(row) for row in known}
    assert process.stdin and process.stdout and process.stderr
    said: list[str] = []
    stderr = process.stderr
    # Read on the side: a process that fills the pipe of its errors would wait for a reader.
    reader = threading.Thread(target=lambda: said.extend(stderr), daemon=True)
    reader.start()
    process.stdin.write(json.dumps(told))
    process.stdin.close()
    for line in process.stdout:
        try:
            row = row_of(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError):
            # The last line of a killed process may be cut off.
            continue
        if _name(row) not in there:
            yield row
    status = process.wait()
    reader.join()
    if status:
        last = [line.strip() for line in said if line.strip()][-1:]
        yield Ended(slug, last[0] if last else f"ended with status {status}")


def chosen(slugs: Sequence[str]) -> dict[str, Path]:
    """The benchmark files of ``slugs``, or all of them for none; an unknown slug names the ones there are."""
    known = files()
    for slug in slugs:
        near = difflib.get_close_matches(slug, known, n=1)
        require(
            slug in known,
            f"slugs: got {slug!r}, which is no benchmark{f'; nearest: {near[0]!r}' if near else ''} "
            f"(known: {', '.join(known) or 'none'})",
        )
    return {slug: known[slug] for slug in (dict.fromkeys(slugs) if slugs else known)}
