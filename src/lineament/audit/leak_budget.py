"""How far an audit of messages gets in a given time: how long its prior is trained, how many steps each search takes, and what is left out.

A search of fewer steps than :data:`FEWEST` says nothing, so that it is better to leave out the last defences and sizes of messages than to search all of them too little.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lineament.privacy.defences import Defence

FEWEST = 20
_PRIOR, _SAFE = 0.3, 0.85
Look = tuple[int, Defence]


@dataclass(frozen=True)
class Plan:
    """Steps of each layer, and how many of the searches (sizes and defences, in the order that was asked for) are run with them."""

    steps: int
    looks: int


@dataclass(frozen=True)
class Budget:
    """So many minutes from ``started`` on (in :func:`time.monotonic`'s seconds)."""

    minutes: float
    started: float

    @property
    def left(self) -> float:
        """Seconds."""
        return 60 * self.minutes - (time.monotonic() - self.started)

    def prior_steps(self, train: Callable[[int], object], most: int) -> int:
        """How long a prior may be trained: so that it takes three tenths of the time, and as long as asked for where there is time for that."""
        if most <= 10:
            return most
        few, some = _seconds(train, 1), _seconds(train, 9)
        each = max((some - few) / 8, 1e-6)
        return min(most, max(1, int((_PRIOR * self.left - few) / each)))

    def plan(self, look: Callable[[int], object], looks: Sequence[Look]) -> Plan:
        """How many steps fit, from a few searches of the first size and defence that are thrown away.

        Args:
            look: search and score with so many steps of each layer.
        """
        once = _seconds(look, 1)  # with what is done only once, such as importing
        if 4 * once > self.left:  # no time to try further
            fixed, each = once, once / 4
        else:
            fixed, steps = _seconds(look, 1), 5
            longer = _seconds(look, steps)
            while longer < 2 * fixed and 16 * longer < self.left:
                steps *= 4
                longer = _seconds(look, steps)
            # Where steps cannot be told from the rest of a search, a quarter of it is taken for theirs.
            each = max((longer - fixed) / (steps - 1), longer / (4 * steps))
        first = len(looks[0][1].copies())
        for count in range(len(looks), 0, -1):
            ways = sum(len(defence.copies()) for _, defence in looks[:count]) / first
            steps = int((_SAFE * self.left / ways - fixed) / each) + 1
            if steps >= FEWEST or count == 1:
                return Plan(max(1, steps), count)
        return Plan(1, 1)

    def fits(self, seconds: float) -> bool:
        """Whether there is time for something that is expected to take so long, or nearly."""
        return seconds <= self.left + 0.1 * 60 * self.minutes


def told_left_out(looks: Sequence[Look], minutes: float) -> list[str]:
    """What a report says of searches that there was no time for."""
    if not looks:
        return []
    names = [f"messages of {size} under {defence}" if str(defence) != "nothing" else f"undefended messages of {size}" for size, defence in looks]  # fmt: skip
    span = "1 minute was" if minutes == 1 else f"{minutes:g} minutes were"
    return [f"Left out, because {span} too short for it: {'; '.join(names)}."]


def _seconds(run: Callable[[int], object], steps: int) -> float:
    begun = time.monotonic()
    run(steps)
    return time.monotonic() - begun
