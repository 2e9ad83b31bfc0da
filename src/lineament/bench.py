"""Ours against a peer, side by side in one process: the rows that `lineament bench` prints and writes.

A benchmark file defines ``rows() -> Iterator[Row]`` and calls :func:`compare` for each line of its table. The
two sides run alternately (A B A B ...), so a drift of the machine's speed falls on both alike. ``ratio`` is
``peer_s / ours_s``: how many times the peer's speed ours reaches, so a ratio below ``target`` is a miss.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


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
