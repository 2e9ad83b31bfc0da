"""What of a film could not be read? Places where frames are missing that the file should have.

A jump in a film's times alone is none: a recorder may have paused, an edit list may leave a while empty. It is one where packets lie in between that gave no frame, or
where the file holds bytes that came out as no packet: some readers step over what is broken without a word.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class Jump(NamedTuple):
    """Times between which a film of one frame rate shows no frame: ``frame`` is the last before, and so many are ``missing``."""

    frame: int
    begins: int
    ends: int
    missing: int


def jumps(times: Sequence[int]) -> list[Jump]:
    """Where the times of a film of one frame rate leave some out.

    >>> jumps([*range(0, 400, 40), *range(600, 1000, 40)])
    [Jump(frame=9, begins=360, ends=600, missing=5)]
    """
    steps = np.diff(times)
    usual = float(np.median(steps)) if len(steps) else 0.0
    if not len(steps) or np.mean(np.abs(steps - usual) <= max(1, 0.1 * usual)) < 0.9:
        return []
    found = np.flatnonzero(steps > 1.5 * usual + 1).tolist()
    return [Jump(k, times[k], times[k + 1], round(float(steps[k]) / usual) - 1) for k in found]


def lost(candidates: Sequence[Jump], packets: Iterable[Any], video: Any) -> list[Jump]:
    """The jumps in which something of the film was lost, by all packets of the file, of which none need be decoded."""
    pieces: list[tuple[int, int]] = []
    shown: list[tuple[int, int, int]] = []
    for packet in packets:
        if packet.pos is None or packet.size == 0:
            continue
        pieces.append((packet.pos, packet.size))
        if packet.stream is video and packet.pts is not None and not packet.is_discard:
            shown.append((packet.pts, packet.pos, packet.size))
    if not shown:
        return list(candidates)
    shown.sort()
    times, places, sizes = (np.array(column) for column in zip(*shown))
    starts, lengths = (np.array(column) for column in zip(*sorted(pieces)))
    holes = starts[1:] - starts[:-1] - lengths[:-1]
    # What usually lies around a frame lay around a lost one too: headers, and where each tick of a fine clock has a chunk of its own, empty chunks, in a pause as well.
    around = np.diff(np.concatenate([[0], holes.cumsum()])[np.searchsorted(starts, np.sort(places))])
    beside = float(np.median(around)) if len(around) else 0.0
    # Headers between packets take some bytes too; frames of a film take about as many each.
    holes = np.maximum(holes - np.quantile(holes, 0.95), 0) if len(holes) else holes
    usual = float(np.median(sizes))
    found = []
    for jump in candidates:
        first = int(np.searchsorted(times, jump.begins, "right")) - 1
        after = int(np.searchsorted(times, jump.ends))
        undecoded = after - first > 1
        low, high = places[max(first, 0)], places[min(after, len(places) - 1)]
        unread = holes[(starts[:-1] >= low) & (starts[:-1] < high)].sum()
        if undecoded or unread > jump.missing * (beside + usual / 4):
            found.append(jump)
    return found


def unsaid_end(video: Any, end: int | None, times: Sequence[int]) -> float:
    """Seconds that the stream is said to have after ``end``, where they are more than two frames'."""
    if end is None or not video.time_base:
        return 0.0
    told, start = _seconds(video.metadata.get("DURATION", "")), 0
    if video.duration:
        told, start = float(video.duration * video.time_base), video.start_time or 0
    left = told - float((end - start) * video.time_base)
    # Some containers tell the rate of their clock for the frames'.
    usual = float(np.median(np.diff(times)) * video.time_base) if len(times) > 1 else 0.0
    return left if left > 2.5 * max(1 / float(video.average_rate or Fraction(25)), usual) else 0.0


def ends_midway(path: Path) -> bool:
    """Whether a transport stream ends within a packet: each has 188 bytes (192 with a clock, 204 with checks), of which one is the letter G."""
    with path.open("rb") as file:
        head = file.read(1024)
    for length, place in ((188, 0), (192, 4), (204, 0)):
        if {*head[place::length]} == {0x47}:
            return path.stat().st_size % length != 0
    return False


def checked(packet: bytes) -> bool:
    """Whether the checksums of an FFV1 frame's slices are right; of one that has none, they never are.

    From the end of the frame, each slice's last eight bytes are its size without them (3), a byte, and a CRC-32, whose remainder over the slice is 0. A decoder patches a
    slice that is damaged from the frame before without a word.

    >>> checked(b"no frame")
    False
    """
    end = len(packet)
    while end > 0:
        start = end - 8 - int.from_bytes(packet[max(end - 8, 0) : max(end - 5, 0)], "big")
        # zlib's is of the mirrored bits, and begins and ends with all of them turned.
        if start < 0 or zlib.crc32(packet[start:end].translate(_MIRRORED), 0xFFFFFFFF) != 0xFFFFFFFF:
            return False
        end = start
    return len(packet) > 0


def ranges(numbers: Iterable[int]) -> str:
    """Numbers in words, at most twelve places of them.

    >>> ranges([3, 5, 6, 7, 12]), ranges(range(0, 40, 2))
    ('3, 5 to 7, 12', '0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22 and 8 more')
    """
    numbers = sorted(set(numbers))
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    told = ", ".join(f"{run[0]} to {run[-1]}" if run[1:] else str(run[0]) for run in runs[:12])
    more = sum(len(run) for run in runs[12:])
    return told + (f" and {more} more" if more else "")


def counted(lines: Sequence[str]) -> Iterator[str]:
    """Lines without repetition: how often each comes in a row is said once.

    >>> list(counted(["a", "a", "b"]))
    ['a (2 times)', 'b']
    """
    for line, same in groupby(lines):
        count = len(list(same))
        yield line if count == 1 else f"{line} ({count} times)"


def _seconds(text: str) -> float:
    parts = re.fullmatch(r"(\d+):(\d+):([\d.]+)", text)
    return 0.0 if parts is None else 3600 * int(parts[1]) + 60 * int(parts[2]) + float(parts[3])
