"""Shares of right answers with their intervals: of all samples, by class, by group; how they are listed and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import percent
from lineament.audit.subject import Subject
from lineament.core.statistics.shares import wilson
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Picture
from lineament.report.text import printable


@dataclass(frozen=True)
class Share:
    """How many samples of a class or group are right, with a 95 % interval."""

    name: str
    accuracy: float
    low: float
    high: float
    count: int

    @property
    def quoted(self) -> str:
        return f"“{printable(self.name, limit=60)}”"

    @property
    def interval(self) -> str:
        return f"95 % interval {percent(self.low)} to {percent(self.high)}"

    @property
    def counted(self) -> str:
        return f"{percent(self.accuracy)} of {self.count}"


def share(name: str, right: Tensor) -> Share:
    hits, total = int(right.sum()), len(right)
    return Share(name, hits / total, *wilson(hits, total), total)


def mean_share(name: str, right: Tensor) -> Share:
    """The share of labels that are right; labels of one sample are not independent, so the interval is over samples."""
    each = right.double().mean(1)
    mean, error = float(each.mean()), float(each.std()) / len(each) ** 0.5 if len(each) > 1 else 0.5
    low, high = max(mean - 1.96 * error, 0.0), min(mean + 1.96 * error, 1.0)
    if mean in (0.0, 1.0):  # all samples alike show no spread, which is not certainty
        low, high = wilson(round(mean * len(each)), len(each))
    return Share(name, mean, low, high, len(each))


def groups_of(subject: Subject, right: Tensor) -> list[Share]:
    numbers = subject.samples.groups
    if numbers is None:
        return []
    return [
        share(subject.samples.group_names[g], right[numbers == g]) for g in torch.unique(numbers).tolist()
    ]


def compared(count: int) -> float:
    """Half the width, in standard errors, of intervals whose ends are compared: the worst of many is low by chance, so that more of them ask for more.

    95 % for two; for more of them each has its part of the 5 % (Bonferroni).

    >>> round(compared(2), 2), round(compared(10), 2)
    (1.96, 2.77)
    """
    return NormalDist().inv_cdf(1 - 0.025 / max(count - 1, 1))


def below(worst: Share, other: Share, count: int) -> bool:
    """Whether the worst of so many is right less often than another, beyond what chance does to the worst."""
    z = compared(count)
    ends = [wilson(round(s.accuracy * s.count), s.count, z) for s in (worst, other)]
    return ends[0][1] < ends[1][0]


def share_table(title: str, what: str, rows: Sequence[Share]) -> Table:
    ordered = sorted(rows, key=lambda r: r.accuracy)[:20]
    return Table(
        title,
        (what, "accuracy", "95 % interval", "samples"),
        [(r.name, percent(r.accuracy), f"{percent(r.low)} to {percent(r.high)}", r.count) for r in ordered],
    )


def share_bars(rows: Sequence[Share], what: str) -> Picture:
    shown = sorted(rows, key=lambda r: r.accuracy)
    clipped = len(shown) > 24
    shown = shown[:24]

    def draw(ax: Any) -> None:
        places = range(len(shown))
        values = [r.accuracy for r in shown]
        errors = [[r.accuracy - r.low for r in shown], [r.high - r.accuracy for r in shown]]
        ax.barh(
            places, values, xerr=errors, color="C0", height=0.7, error_kw={"ecolor": "C7", "elinewidth": 1.2}
        )
        ax.set_yticks(places, [printable(r.name, limit=22) for r in shown])
        ax.invert_yaxis()
        ax.set(xlim=(0, 1), xlabel="share of samples right")
        ax.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")

    plural = {"class": "classes", "group": "groups", "label": "labels"}[what]
    lowest, highest = shown[0], max(rows, key=lambda r: r.accuracy)
    return picture(
        draw,
        size=(6.4, 0.9 + 0.27 * len(shown)),
        caption=f"Accuracy by {what}, worst first{f' (24 of {len(rows)} {plural})' if clipped else ''}; lines are 95 % intervals.",
        alt=f"Bars of accuracy by {what}, from {percent(lowest.accuracy)} ({printable(lowest.name, limit=40)}) "
        f"to {percent(highest.accuracy)} ({printable(highest.name, limit=40)}).",
    )
