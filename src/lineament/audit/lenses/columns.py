"""Which columns of a table, or stretches and channels of a signal, does it rely on?

One part of the input at a time is taken from another sample that is answered otherwise, as the gaze lens does with patches of images: the share of
answers that become the other sample's says what hangs on that part alone. The control takes it from samples that do not have that answer. For values
it is the share of the difference to the other sample's answer that comes along. Half of the samples choose the part that is spoken of, the other half
measure it. Parts that say the same share the credit, and one of them alone may then seem to matter little.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import compact, mean_interval, percent, points
from lineament.audit.subject import Subject
from lineament.core.batching import progress
from lineament.core.statistics.shares import difference, share
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

TITLE = "Which parts of its input does it rely on?"
HELP = "which columns of a table, or stretches and channels of a signal, decide its answers"
ORDER = 26
VERDICT_ORDER = 2  # what it relies on comes first
METHOD = "exchange of columns"
SOURCE = ("Model class reliance", 2018, "1801.01489")
OPTIONAL = True
_ROWS, _MOST, _STRETCHES, _SHOWN = 400, 256, 10, 15
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Part:
    """A part of the input and what taking it from another sample does, with 95 % intervals.

    ``followed``: of answers, the share that become the other sample's; of values, the share of the difference to the other's that comes along.
    ``control`` is that share where the part comes from a sample without that answer, ``excess`` the difference. ``lost``: what accuracy
    loses, or by how much the mean absolute error grows, with the part of any other sample.
    """

    name: str
    followed: Interval
    control: float
    excess: Interval
    lost: Interval


@dataclass(frozen=True)
class Columns:
    """All parts on all samples, largest first; ``best`` the one that half of the samples chose, measured on the other half (``samples``)."""

    parts: Sequence[Part]
    best: Part
    samples: int
    of: int
    task: str

    @property
    def decides(self) -> bool:
        """Whether more than half of the answers hang on one part alone."""
        return self.best.excess[1] > 0.5

    @property
    def matters(self) -> bool:
        return self.best.excess[1] > 0.15


def applies(subject: Subject) -> str:
    x = subject.inputs(torch.tensor([0]))
    if subject.tokenizer is not None or not isinstance(x, Tensor) or not x.is_floating_point():
        return "Its inputs are no rows of numbers."
    if x.ndim not in (2, 3) or (x.ndim == 2 and subject.samples.inputs.ndim != 2):
        return "Its inputs are no columns of a table and no signals (batch, channels, steps)."
    if subject.samples.lengths is not None:
        return "Its inputs are sequences of several lengths, whose parts have no counterpart in one another."
    if x.ndim == 2 and not 2 <= x.shape[1] <= _MOST:
        return f"It takes {x.shape[1]} numbers a sample; columns are tried where there are 2 to {_MOST}."
    return ""


def look(subject: Subject) -> Section:
    names = _parts(subject)
    rows = subject.subset(subject.affordable(6e12, 3 * len(names), most=_ROWS, least=48), salt=11)
    exchange = _Exchange(subject, rows)
    measured = [
        exchange.outcome(index) for index in progress([index for _, index in names], "exchanging columns")
    ]
    half = torch.arange(len(rows)) % 2 == 0
    every = torch.ones_like(half)
    best = max(range(len(names)), key=lambda k: exchange.part("", measured[k], half).excess[0])
    parts = [exchange.part(name, found, every) for (name, _), found in zip(names, measured)]
    found = Columns(
        sorted(parts, key=lambda p: -p.excess[0]),
        exchange.part(names[best][0], measured[best], ~half),
        int((~half).sum()),
        len(names),
        subject.task,
    )
    top = found.best
    sentence = (
        f"Taking {top.name} alone from another sample {_effect(found)}, the most of {found.of} parts tried; this one was chosen on as many other samples. "
        + (f"With the {_noun(top)} of any sample, {_lost(found)}. " if math.isfinite(top.lost[1]) else "")
        + "Parts that say the same share the credit: what matters little alone may matter together with its like."
    )
    return Section(
        status="warning" if found.decides else "note" if found.matters else "good",
        number=percent(top.followed[0], 0),
        unit=("of answers follow " if subject.task == "classification" else "of the difference follows ")
        + top.name,
        sentence=sentence,
        pictures=[_figure(found)],
        tables=[_table(found)],
        numbers=plain(found),
        findings=[_finding(found)],
    )


def _parts(subject: Subject) -> list[tuple[str, tuple[Any, ...]]]:
    """The columns of rows; of signals the channels, where there are several, and stretches of steps."""
    shape = subject.inputs(torch.tensor([0])).shape
    whole = slice(None)
    if len(shape) == 2:
        columns = subject.samples.columns
        if len(columns) != shape[1]:
            columns = tuple(str(k) for k in range(shape[1]))
        return [(f"column “{printable(name, limit=40)}”", (whole, k)) for k, name in enumerate(columns)]
    found: list[tuple[str, tuple[Any, ...]]] = []
    if 1 < shape[1] <= _MOST:
        found += [(f"channel {k}", (whole, k)) for k in range(shape[1])]
    count = min(_STRETCHES, shape[2])
    edges = [round(k * shape[2] / count) for k in range(count + 1)]
    for start, stop in pairwise(edges):
        steps = f"step {start}" if stop == start + 1 else f"steps {start} to {stop - 1}"
        found.append((steps, (whole, whole, slice(start, stop))))
    return found


class _Exchange:
    """Samples, each with another that is answered otherwise, one that is not answered as that, and any other."""

    def __init__(self, subject: Subject, rows: Tensor):
        self.subject, self.rows = subject, rows
        self.classify = subject.task == "classification"
        generator = torch.Generator().manual_seed(subject.seed)
        said = subject.outputs[rows].argmax(1)
        count = len(rows)
        order = torch.rand(count, count, generator=generator)
        order.fill_diagonal_(2.0)
        self.any = order.argmin(1)
        self.other = self.control = self.any
        self.usable = torch.ones(count, dtype=torch.bool)
        if self.classify:
            unlike = said[:, None] != said[None, :]
            self.other = (order + 2 * ~unlike).argmin(1)
            self.usable = unlike.any(1)
            lent = said[self.other]
            same = said[None, :] == lent[:, None]
            # One's own row is no donor but where there is no further sample.
            self.control = (order + 2 * same).argmin(1)
            self.lent = lent
        self.before = subject.outputs[rows]

    def outcome(self, index: tuple[Any, ...]) -> dict[str, Tensor]:
        """For each sample what happens with the part of its other, its control, and any other."""
        donors = {"other": self.other, "any": self.any}
        if self.classify:
            donors["control"] = self.control
        answers = {name: self.swapped(index, donor) for name, donor in donors.items()}
        targets = self.subject.targets[self.rows]
        if self.classify:
            said = {name: answer.argmax(1) for name, answer in answers.items()}
            right = (self.before.argmax(1) == targets).double() - (said["any"] == targets).double()
            return {
                "follows": said["other"] == self.lent,
                "control": said["control"] == self.lent,
                "lost": right,
            }
        y = targets.reshape(len(targets), -1).double()
        before, after = (z.double() for z in (self.before, answers["any"]))
        if self.subject.task == "multi-label":
            # Labels are right or wrong one by one.
            lost = ((before > 0) == (y > 0.5)).double().mean(1) - ((after > 0) == (y > 0.5)).double().mean(1)
        else:
            lost = (after - y).abs().mean(1) - (before - y).abs().mean(1)
        way = self.before[self.other].double() - self.before.double()
        return {"way": way, "moved": answers["other"].double() - self.before.double(), "lost": lost}

    def swapped(self, index: tuple[Any, ...], donor: Tensor) -> Tensor:
        given = self.subject.layout.apply(self.subject.samples.inputs[self.rows[donor]])

        def change(x: Tensor, part: Tensor) -> Tensor:
            x = x.clone()
            x[index] = given[torch.searchsorted(self.rows, part)].to(x)[index]
            return x

        return self.subject.answer(self.rows, change)

    def part(self, name: str, found: dict[str, Tensor], chosen: Tensor) -> Part:
        lost = mean_interval(found["lost"][chosen])
        if not self.classify:
            followed = _slope(found["way"][chosen], found["moved"][chosen])
            return Part(name, followed, 0.0, followed, lost)
        chosen = chosen & self.usable
        follows, control = found["follows"][chosen], found["control"][chosen]
        return Part(name, share(follows), share(control)[0], difference(follows, control), lost)


def _slope(way: Tensor, moved: Tensor) -> Interval:
    """The share of the way that was moved, by least squares, and its 95 % interval over samples (heteroscedastic errors)."""
    energy = float(way.square().sum())
    if energy == 0:
        return 0.0, -math.inf, math.inf
    found = float((way * moved).sum()) / energy
    rest = ((way * (moved - found * way)).sum(1)).square().sum().sqrt()
    half = 1.96 * float(rest) / energy
    return found, found - half, found + half


def _noun(part: Part) -> str:
    return part.name.split(" ")[0]


def _effect(found: Columns) -> str:
    top = found.best
    if found.task == "classification":
        return (
            f"turns {percent(top.followed[0], 0)} of {found.samples} answers into that sample's, {percent(top.control, 0)} where it comes from samples without that answer "
            f"(the difference {_interval(top.excess)}, 95 % interval)"
        )
    return f"moves the answer by {_interval(top.followed)} of the difference to that sample's ({found.samples} samples, 95 % interval)"


def _lost(found: Columns) -> str:
    value, low, high = found.best.lost
    if found.task == "regression":
        return f"the mean absolute error grows by {compact(value)} ({compact(low)} to {compact(high)})"
    word = "accuracy falls by" if value >= 0 else "accuracy rises by"
    low, high = (low, high) if value >= 0 else (-high, -low)
    return f"{word} {points(value)} ({percent(low)} to {percent(high)})"


def _interval(values: Interval) -> str:
    value, low, high = values
    return f"{percent(value)} ({percent(low)} to {percent(high)})" if math.isfinite(low) else percent(value)


def _finding(found: Columns) -> Finding:
    top = found.best
    if found.decides or found.matters:
        how = "relies on" if found.decides else "leans on"
        return Finding(
            "warning" if found.decides else "note",
            f"It {how} {top.name}: taking it alone from another sample {_effect(found)}.",
            advice=f"If the {_noun(top)} should not decide, leave it out or mix it across the samples of the training data, train again and audit again."
            if found.decides
            else "",
            key="column decides" if found.decides else "column matters",
        )
    return Finding(
        "good",
        f"No single part of its input decides: taking {top.name}, the strongest of {found.of}, from another sample {_effect(found)}.",
        key="no column",
    )


def _table(found: Columns) -> Table:
    classify = found.task == "classification"
    lost = "error grows by" if found.task == "regression" else "accuracy lost"
    columns = ("part", "answers that follow" if classify else "share of the difference", *(("control", "difference (95 % interval)") if classify else ("95 % interval",)), f"{lost} (95 % interval)")  # fmt: skip
    told = []
    for part in found.parts[:_SHOWN]:
        value, low, high = part.lost
        cost = f"{compact(value)} ({compact(low)} to {compact(high)})" if found.task == "regression" else _interval(part.lost)  # fmt: skip
        middle = (percent(part.control), _interval(part.excess)) if classify else (f"{percent(part.excess[1])} to {percent(part.excess[2])}",)  # fmt: skip
        told.append((part.name, percent(part.followed[0]), *middle, cost))
    more = f", the {_SHOWN} strongest of {found.of}" if found.of > _SHOWN else ""
    return Table(f"One part at a time taken from another sample, on all samples tried{more}", columns, told)


def _figure(found: Columns) -> Picture:
    shown = found.parts[:_SHOWN]

    def draw(ax: Any) -> None:
        places = list(range(len(shown)))
        values = [100 * part.excess[0] for part in shown]
        ends = [(100 * (p.excess[0] - p.excess[1]), 100 * (p.excess[2] - p.excess[0])) for p in shown]
        errors = [[low if math.isfinite(low) else 0 for low, _ in ends], [high if math.isfinite(high) else 0 for _, high in ends]]  # fmt: skip
        ax.barh(places, values, xerr=errors, color="C0", height=0.6)
        ax.set_yticks(places, [part.name for part in shown])
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.axvline(0, linewidth=0.8, color="C7")
        ax.set(xlabel="answers that follow, beyond the control, %" if found.task == "classification" else "share of the difference that comes along, %")  # fmt: skip

    return picture(
        draw,
        size=(6.8, 1.2 + 0.3 * len(shown)),
        caption="What hangs on each part of the input alone, when it is taken from another sample, with 95 % intervals.",
        alt="Bars by part: " + ", ".join(f"{percent(p.excess[0], 0)} for {p.name}" for p in shown[:6]) + ".",
    )
