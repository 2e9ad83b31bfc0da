"""Does a network rely on one fixed patch of its images, whatever they show? Found by looking, decided by intervening.

Each small window of the frame is exchanged, in every image, with the same window of an image that the network answers otherwise. If the
answer goes with the window, the window decides; covering it with the mean image says how much accuracy hangs on it.
The window is chosen on one half of the samples and measured on the other, against equally large windows elsewhere, so that the
choice cannot flatter the result. A window that decides one answer only is looked for beside: whoever lends it, the others are its control.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.audit.phrases import mean_interval
from lineament.audit.subject import Subject
from lineament.core.batching import progress
from lineament.core.statistics.shares import Interval, difference, share

# Fewer donors with an answer do not tell whether it goes with a window.
_LEAST = 8
# The excess whose lower bound must be passed before one answer is said to go with a window. A digit's own middle, where a zero is dark,
# reaches 0.3 (the battery of `benchmarks/audit.py`); planted marks reach 0.75.
_ONE = 0.45
# Operations up to which windows overlap by half.
_SCAN = 2e12


@dataclass(frozen=True)
class Window:
    """A rectangle of the frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self) -> tuple[slice, slice]:
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    def area(self, height: int, width: int) -> float:
        """Its share of an image of this size."""
        return self.height * self.width / (height * width)

    def overlaps(self, other: Window) -> bool:
        return (
            self.top < other.top + other.height
            and other.top < self.top + self.height
            and self.left < other.left + other.width
            and other.left < self.left + self.width
        )

    def where(self, height: int, width: int) -> str:
        """Where it lies in an image of this size, and its pixels.

        >>> Window(0, 0, 4, 4).where(20, 20)
        'the top left (rows 1–4, columns 1–4)'
        """
        row = ("top", "middle", "bottom")[min(int(3 * (self.top + self.height / 2) / height), 2)]
        column = ("left", "centre", "right")[min(int(3 * (self.left + self.width / 2) / width), 2)]
        name = "the centre" if (row, column) == ("middle", "centre") else f"the {row} {column}"
        rows = f"rows {self.top + 1}–{self.top + self.height}"
        return f"{name} ({rows}, columns {self.left + 1}–{self.left + self.width})"


@dataclass(frozen=True)
class OneAnswer:
    """A window that one answer goes with, on the samples that chose neither; shares with 95 % intervals.

    ``followed``: images that get the window from one with this answer and then get the answer; ``control``: those that get the window from others.
    """

    window: Window
    answer: int
    samples: int
    followed: Interval
    control: float
    excess: Interval
    decides: bool


@dataclass(frozen=True)
class Exchange:
    """What the intervention showed on the samples that did not choose the window (``rows``, each with its donor in ``donors``); shares, with 95 % intervals.

    ``others``: the windows elsewhere; ``followed``: images whose answer became that of the image that lent the window, and the same for other windows;
    ``lost``: accuracy lost by the exchange; ``covered``: by covering with the mean image.
    """

    window: Window
    area: float
    samples: int
    accuracy: float
    swapped_accuracy: float
    covered_accuracy: float
    others_swapped_accuracy: float
    others_covered_accuracy: float
    followed: float
    others_followed: float
    followed_excess: tuple[float, float, float]
    lost_excess: tuple[float, float, float]
    covered_excess: tuple[float, float, float]
    gaze_share: float
    decides: bool
    matters: bool
    map: list[list[float]]
    windows: int
    rows: Sequence[int]
    donors: Sequence[int]
    others: Sequence[Window]
    one: OneAnswer | None = None


def examine(subject: Subject, rows: Tensor, mean_map: Tensor, *, fraction: float = 0.2) -> Exchange:
    """Find the window that decides most, and measure how much it does.

    Args:
        rows: samples to use; one half chooses, the other measures.
        mean_map: (height, width) where the network looks on average, non-negative; its peaks are tried besides a regular grid.
        fraction: the window's side as a fraction of the image's.
    """
    height, width = subject.inputs(rows[:1]).shape[-2:]
    size = (max(2, math.ceil(fraction * height)), max(2, math.ceil(fraction * width)))
    grid = _grid(height, width, size, step=2)
    if subject.flops * len(rows) / 2 * len(grid) > _SCAN:
        grid = _grid(height, width, size)
    peaks = _peaks(mean_map, size)
    half = _half(subject, len(rows))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(subject.seed))
    choose, measure = (rows[order[:half]].sort().values, rows[order[half:]].sort().values)
    average = _average(subject, rows)
    scan: dict[Window, float] = {}
    single: dict[tuple[int, Window], float] = {}
    trial = _Trial(subject, choose, average)

    def tried(windows: Sequence[Window], description: str) -> None:
        for window in progress([w for w in dict.fromkeys(windows) if w not in scan], description):
            answer = trial.swapped(window)
            follows, swapped = (answer == trial.lent).float(), (answer == trial.targets).float()
            scan[window] = float(follows.mean() + (trial.right - swapped).mean())
            single.update({(each, window): trial.excess(answer, each)[1] for each in trial.frequent()})
            shown[window] = float(follows.mean())

    shown: dict[Window, float] = {}
    tried([*grid, *peaks], "exchanging windows")
    # What decides may lie across windows.
    leads = sorted(scan, key=scan.__getitem__)[-2:] + [
        w for _, w in sorted(single, key=single.__getitem__)[-2:]
    ]
    for lead in leads:
        tried(_around(lead, height, width), "exchanging windows around the first")
    best = max(scan, key=scan.__getitem__)
    trial = _Trial(subject, measure, average)
    one = _one(trial, *max(single, key=single.__getitem__)) if single else None
    follows, swapped, covered = trial.outcome(best)
    others = [w for w in _grid(height, width, size) if not w.overlaps(best)]
    others = [
        others[i]
        for i in torch.randperm(len(others), generator=torch.Generator().manual_seed(1)).tolist()[:12]
    ]
    sums = [torch.zeros(len(measure)) for _ in range(3)]
    for window in progress(others, "exchanging other windows"):
        for total, value in zip(sums, trial.outcome(window)):
            total += value
    o_follows, o_swapped, o_covered = (s / max(len(others), 1) for s in sums)
    followed_excess = mean_interval(follows - o_follows)
    lost_excess = mean_interval(o_swapped - swapped)
    covered_excess = mean_interval(o_covered - covered)
    share = mean_map[best.cut()].sum() / mean_map.sum().clamp_min(1e-30)
    columns = len({w.left for w in grid})
    return Exchange(
        window=best,
        area=best.area(height, width),
        samples=len(measure),
        accuracy=float(trial.right.mean()),
        swapped_accuracy=float(swapped.mean()),
        covered_accuracy=float(covered.mean()),
        others_swapped_accuracy=float(o_swapped.mean()),
        others_covered_accuracy=float(o_covered.mean()),
        followed=float(follows.mean()),
        others_followed=float(o_follows.mean()),
        followed_excess=followed_excess,
        lost_excess=lost_excess,
        covered_excess=covered_excess,
        gaze_share=float(share),
        # Reliance shows in the answers, right or wrong: where a shortcut misleads, losing it even helps.
        decides=followed_excess[1] > needed(len(torch.unique(subject.outputs.argmax(1)))),
        matters=lost_excess[1] > 0.05 or covered_excess[1] > 0.05,
        map=torch.tensor([shown[w] for w in grid]).reshape(-1, columns).tolist(),
        windows=len(scan),
        rows=measure.tolist(),
        donors=trial.donors.tolist(),
        others=others,
        one=one,
    )


def _one(trial: _Trial, answer: int, window: Window) -> OneAnswer:
    swapped = trial.swapped(window)
    lent, others = trial.halves(answer)
    excess = trial.excess(swapped, answer)
    return OneAnswer(
        window,
        answer,
        int(lent.sum()),
        share(swapped[lent] == answer),
        share(swapped[others] == answer)[0],
        excess,
        excess[1] > _ONE,
    )


def needed(answers: int) -> float:
    """The share of answers that must follow a patch, beyond other patches, before it is said to decide.

    A change of answer for no reason lands on the lender's with probability 1 / (answers - 1), so that few possible answers ask for more.

    >>> needed(2), needed(10)
    (0.35, 0.15)
    """
    return round(0.1 + 0.5 / max(answers, 2), 12)


class _Trial:
    """Some samples with a donor that is answered otherwise for each, and what the network says to both."""

    def __init__(self, subject: Subject, rows: Tensor, average: Tensor):
        self.subject, self.rows, self.average = subject, rows, average
        self.targets = subject.targets[rows]
        self.donors = donors(subject, rows)
        decisions = subject.outputs.argmax(1)
        self.own, self.lent = decisions[rows], decisions[self.donors]
        self.right = (decisions[rows] == self.targets).float()
        self.donor_of = dict(zip(rows.tolist(), self.donors.tolist()))

    def swapped(self, window: Window) -> Tensor:
        """The answers after the exchange."""
        return self.subject.answer(self.rows, lambda x, part: self.swap(x, part, window)).argmax(1)

    def halves(self, answer: int) -> tuple[Tensor, Tensor]:
        """The samples whose donor has this answer, and those of which neither they nor their donor has."""
        lent = self.lent == answer
        return lent, ~lent & (self.own != answer)

    def frequent(self) -> list[int]:
        """The answers that enough donors have."""
        answers, counts = self.lent.unique(return_counts=True)
        return answers[counts >= _LEAST].tolist()

    def excess(self, swapped: Tensor, answer: int) -> Interval:
        """How much more often this answer comes where the donor has it than where it has not."""
        lent, others = self.halves(answer)
        return difference(swapped[lent] == answer, swapped[others] == answer)

    def outcome(self, window: Window) -> tuple[Tensor, Tensor, Tensor]:
        """For each sample whether the answer followed the donor, was right after the exchange, and right when covered."""
        answer = self.swapped(window)
        follows = (answer == self.lent).float()
        right = (answer == self.targets).float()
        covered = self.subject.answer(self.rows, lambda x, _part: self.cover(x, window)).argmax(1)
        return follows, right, (covered == self.targets).float()

    def swap(self, x: Tensor, part: Tensor, window: Window) -> Tensor:
        return exchanged(self.subject, x, part, self.donor_of, window)

    def cover(self, x: Tensor, window: Window) -> Tensor:
        x = x.clone()
        x[(..., *window.cut())] = self.average.to(x)[(..., *window.cut())]
        return x


def exchanged(
    subject: Subject, x: Tensor, part: Tensor, donor_of: Mapping[int, int], window: Window
) -> Tensor:
    """Inputs with the window taken from the inputs of their donors."""
    donors = subject.inputs(torch.tensor([donor_of[row] for row in part.tolist()]))
    x = x.clone()
    x[(..., *window.cut())] = donors[(..., *window.cut())]
    return x


def donors(subject: Subject, rows: Tensor) -> Tensor:
    """For each sample a random one to which the network gives another answer; any other one if it always answers the same."""
    generator = torch.Generator().manual_seed(subject.seed + 17)
    decisions = subject.outputs.argmax(1)
    chosen = []
    for row in rows.tolist():
        other = (decisions != decisions[row]).nonzero().flatten()
        if not len(other):
            other = torch.arange(len(subject))
        chosen.append(int(other[int(torch.randint(len(other), (1,), generator=generator))]))
    return torch.tensor(chosen)


def _half(subject: Subject, count: int) -> int:
    half = count // 2
    return (
        max(subject.batch_size, half // subject.batch_size * subject.batch_size)
        if subject.fixed_batch
        else half
    )


def _average(subject: Subject, rows: Tensor) -> Tensor:
    total = None
    for part in subject.parts(rows):
        x = subject.inputs(part).double().sum(0)
        total = x if total is None else total + x
    return (total / len(rows)).float() if total is not None else torch.zeros(0)


def _grid(height: int, width: int, size: tuple[int, int], step: int = 1) -> list[Window]:
    """Windows side by side, or a ``step``-th of a side apart; the last of a row or column is moved inwards to fit."""
    down, across = (math.ceil(side / step) for side in size)
    tops = sorted({min(t, height - size[0]) for t in range(0, height, down)})
    lefts = sorted({min(left, width - size[1]) for left in range(0, width, across)})
    return [Window(t, left, *size) for t in tops for left in lefts]


def _around(window: Window, height: int, width: int) -> list[Window]:
    """Windows a quarter of a side away."""
    steps = max(1, window.height // 4), max(1, window.width // 4)
    return [
        replace(
            window,
            top=min(max(window.top + i * steps[0], 0), height - window.height),
            left=min(max(window.left + j * steps[1], 0), width - window.width),
        )
        for i in (-1, 0, 1)
        for j in (-1, 0, 1)
    ]


def _peaks(mean_map: Tensor, size: tuple[int, int], most: int = 4) -> list[Window]:
    """The windows in which most of the map lies, one after the other, none overlapping."""
    sums = F.avg_pool2d(mean_map[None, None].double(), size, stride=1)[0, 0]
    found: list[Window] = []
    for index in sums.flatten().argsort(descending=True, stable=True).tolist():
        window = Window(index // sums.shape[1], index % sums.shape[1], *size)
        if not any(window.overlaps(other) for other in found):
            found.append(window)
        if len(found) == most:
            break
    return found
