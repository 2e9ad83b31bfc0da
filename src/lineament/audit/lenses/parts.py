"""Which channels can be silenced, and at what cost?

The channels of each place are taken in up to eight groups of neighbours; each group is set to zero and, separately, to its mean, and the loss of
accuracy and the rise of the loss are measured (ablation; Meyes et al. 2019, arXiv 1901.08644). The mean takes away what the channels
say about a sample; zero also takes away what they always add. What is left when channels are really taken out is in :mod:`lineament.audit.removal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lineament.audit import removal as removed
from lineament.audit.phrases import compact, percent, short
from lineament.audit.removal import removal
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.batching import progress
from lineament.core.sites.activations import patch
from lineament.core.sites.depth import channel_axis
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain

TITLE = "Which parts can it do without?"
HELP = "which channels can be silenced, at what cost"
ORDER = 60
METHOD = "ablation"
DENSE = True
SOURCE = ("Ablation studies in artificial neural networks", 2019, "1901.08644")
_GROUPS = 8
_WORK = 1.5e12


@dataclass(frozen=True)
class Silenced:
    """What silencing a group of channels does: the rise of the loss, its standard error, and the share of answers that change.

    For values, ``changed`` is how far answers move in units of their spread, and no accuracy is lost.
    """

    cost: float
    error: float
    changed: float
    accuracy_lost: float | None

    def to_dict(self) -> dict[str, float]:
        found = {"cost": self.cost, "error": self.error, "changed": self.changed}
        return found if self.accuracy_lost is None else {**found, "accuracy_lost": self.accuracy_lost}


@dataclass(frozen=True)
class Group:
    """Neighbouring channels of one site, held at their mean and, separately, at zero."""

    site: str
    start: int
    stop: int
    mean: Silenced
    zero: Silenced

    @property
    def channels(self) -> str:
        """Counted from 0 as the network counts them."""
        alone = self.start == self.stop - 1
        return f"channel {self.start}" if alone else f"channels {self.start} to {self.stop - 1}"

    def to_dict(self) -> dict[str, Any]:
        found = {
            "site": self.site,
            "from": self.start,
            "to": self.stop - 1,
            "channels": self.stop - self.start,
        }
        for how, silenced in (("mean", self.mean), ("zero", self.zero)):
            found |= {f"{how}_{name}": value for name, value in silenced.to_dict().items()}
        return found


@dataclass(frozen=True)
class Parts:
    """What each group of channels is worth on the samples ``rows``; ``free``: how many can be silenced with hardly an answer changing."""

    loss: float
    rows: Sequence[int]
    groups: Sequence[Group]
    free: int
    task: str
    unit: str = "sample"

    @property
    def counted(self) -> bool:
        """Whether answers are classes, of which some change and others do not."""
        return self.task in ("classification", "dense")

    @property
    def answers(self) -> str:
        return "answers" if self.unit == "sample" else f"{self.unit}s' answers"

    @property
    def samples(self) -> int:
        return len(self.rows)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "samples": self.samples}

    @property
    def top(self) -> Group:
        return max(self.groups, key=lambda g: g.mean.changed)

    @property
    def effect(self) -> tuple[str, str]:
        """What silencing does to answers, before and after the number."""
        if self.counted:
            return "changes ", f" of {self.answers}"
        return "moves the answers by ", " of their spread"

    @property
    def little(self) -> str:
        """What silencing may do at most to a group that is called dispensable."""
        if self.counted:
            return f"fewer than 1 % of {self.answers} changing"
        return "the answers moving by less than 1 % of their spread"


def applies(subject: Subject) -> str:
    return subject.sealed


def look(subject: Subject) -> Section:
    tries = 2 * _GROUPS * len(subject.sites) + 2
    rows = subject.subset(subject.affordable(_WORK, tries, most=512, least=32), salt=3)
    targets = subject.targets[rows]
    means = _means(subject, rows)
    before, base = subject.answered(rows)
    classify = subject.task in ("classification", "dense")
    known = subject.known[rows] if subject.task == "dense" else torch.ones(len(rows), dtype=torch.bool)
    named = _named(subject, before)
    right = (named == targets)[known] if classify else None
    work = [(site, group) for site in subject.sites for group in _split(len(means[site]))]
    groups = []
    for site, (start, stop) in progress(work, "silencing channels"):
        outcomes = []
        for value in (means[site][start:stop], torch.zeros(stop - start)):
            with patch(subject.model, {site: _silence(subject, site, start, stop, value)}):
                after, losses = subject.answered(rows)
            cost, lost = (losses - base).double(), None
            if right is not None:
                again = _named(subject, after)
                lost = float((right.float() - (again == targets)[known].float()).mean())
                changed = float((named != again)[known].double().mean())
            else:
                changed = _moved(before, after)
            error = float(cost.std() / len(cost) ** 0.5) if len(cost) > 1 else 0.0
            outcomes.append(Silenced(float(cost.mean()), error, changed, lost))
        groups.append(Group(site, start, stop, *outcomes))
    loss = float(base.mean())
    ranked = sorted(groups, key=lambda g: -g.mean.changed)
    free = sum(g.mean.changed < 0.01 for g in groups)
    found = Parts(loss, rows.tolist(), groups, free, subject.task, subject.unit)
    top, changed = ranked[0], ranked[0].mean.changed
    effect = percent(changed).join(found.effect)
    direction = "raises" if top.mean.cost >= 0 else "lowers"
    sentence = (
        f"On {len(rows)} samples, silencing {top.channels} at {short(top.site, 40)} (held at the mean) {effect}, the most of {len(groups)} groups tried, and {direction} the loss "
        f"from {compact(loss)} to {compact(loss + top.mean.cost)} (± {compact(1.96 * top.mean.error)}, 95 % interval). "
        if changed > 0
        else f"On {len(rows)} samples, silencing any one of {len(groups)} groups of channels changes no answer."
    )
    told = (
        f"{free} groups ({percent(free / len(groups), 0)}) can each be silenced with {found.little}."
        if 0 < free < len(groups)
        else f"Each of the {len(groups)} groups can be silenced alone with {found.little}."
        if free
        else f"No group can be silenced with {found.little}."
    )
    sentence += told if changed > 0 else ""
    helped = min(groups, key=lambda g: g.mean.cost)
    if helped.mean.cost < -3 * max(helped.mean.error, 1e-12) and helped is not top:
        sentence += (
            f" Silencing {helped.channels} at {short(helped.site, 40)} even lowers the loss, to {compact(loss + helped.mean.cost)} (± {compact(1.96 * helped.mean.error)}): "
            "on these data, what they say misleads."
        )
    taken, why = removal(subject)
    sentence = f"{sentence.strip()} {removed.sentence(subject, taken) if taken else ''}".strip()
    columns = ("place", "channels", "answers changed" if classify else "answers moved", "loss + (mean)", "± s.e.", "loss + (zero)",
               *(("accuracy lost",) if classify else ()))  # fmt: skip
    return Section(
        status="note" if free > 0.5 * len(groups) else "good",
        number=percent(free / len(groups), 0),
        unit="of channel groups are dispensable, one at a time",
        sentence=sentence,
        pictures=[_figure(subject, found), *([removed.figure(taken)] if taken else [])],
        tables=[
            Table(
                f"The most important of {len(groups)} groups",
                columns,
                [
                    (
                        g.site,
                        g.channels.partition(" ")[2],
                        percent(g.mean.changed),
                        g.mean.cost,
                        g.mean.error,
                        g.zero.cost,
                        *((percent(g.mean.accuracy_lost or 0.0),) if classify else ()),
                    )
                    for g in ranked[:12]
                ],
            ),
            *(removed.tables(taken) if taken else []),
        ],
        numbers={**plain(found), "removal": plain(taken) if taken else {"skipped": why}},
        findings=[_finding(found)],
    )


def _finding(found: Parts) -> Finding:
    share = found.free / len(found.groups)
    if share > 0.5:
        return Finding(
            "note",
            f"{percent(share, 0)} of its channel groups can each be silenced with {found.little}, on {found.samples} samples: it has room to spare.",
            advice="Nothing, if its size is no burden; otherwise train one with fewer channels, or take groups away one after the other and measure again.",
            key="room to spare",
        )
    effect = percent(found.top.mean.changed, 0).join(found.effect)
    return Finding(
        "good",
        f"It uses {'most' if found.free else 'all'} of its parts: {percent(share, 0) if found.free else 'none'} of its channel groups can be silenced with {found.little}, on {found.samples} samples; silencing the most important, at {short(found.top.site, 40)}, {effect}.",
        key="parts used",
    )


def _means(subject: Subject, rows: Tensor) -> dict[str, Tensor]:
    # Of each batch the sums, and how many were summed.
    batches: dict[str, list[tuple[Tensor, int]]] = {site: [] for site in subject.sites}
    for _, acts in subject.activations(rows, "mean activations"):
        for site, x in acts.items():
            x = x.movedim(channel_axis(subject.model, site, x), -1).flatten(0, -2).double()
            batches[site].append((x.sum(0).cpu(), len(x)))
    means = {}
    for site, some in batches.items():
        sums, counts = zip(*shards.interleaved(some))
        means[site] = (torch.stack(sums).sum(0) / sum(counts)).float()
    return means


def _split(width: int) -> list[tuple[int, int]]:
    """Neighbouring channels in at most eight groups of nearly equal size.

    >>> _split(20)[:3], len(_split(20)), _split(2)
    ([(0, 2), (2, 5), (5, 7)], 8, [(0, 1), (1, 2)])
    """
    count = min(_GROUPS, width)
    edges = [int(i * width / count) for i in range(count + 1)]
    return list(pairwise(edges))


def _silence(subject: Subject, site: str, start: int, stop: int, value: Tensor) -> Any:
    def change(x: Tensor) -> Tensor:
        moved = x.movedim(channel_axis(subject.model, site, x), -1)
        moved[..., start:stop] = value.to(moved)
        return x

    return change


def _named(subject: Subject, answers: Tensor) -> Tensor:
    """The class that is named for each sample, or at each position of it."""
    return answers.long() if subject.task == "dense" else answers.argmax(1)


def _moved(before: Tensor, after: Tensor) -> float:
    """How far values move, in units of their spread."""
    spread = float(before.double().std())
    return float((after - before).double().square().mean().sqrt()) / spread if spread > 0 else 0.0


def _figure(subject: Subject, found: Parts) -> Any:
    classify = found.counted
    sites = list(subject.sites)
    rows = [[g.mean.changed for g in found.groups if g.site == site] for site in sites]
    width = max(len(r) for r in rows)
    grid = [[*r, *([float("nan")] * (width - len(r)))] for r in rows]

    def draw(ax: Any) -> None:
        top = max(max((v for v in row if v == v), default=0.0) for row in grid)
        # Where nothing changes, the bar still wants an end that its labels tell from zero.
        image = ax.imshow(grid, cmap=shades(ax, "C1"), vmin=0, vmax=max(top, 0.05), aspect="auto")
        ax.set_yticks(range(len(sites)), [short(site) for site in sites])
        ax.set_xticks(range(width), [str(i + 1) for i in range(width)])
        ax.set(xlabel="group of neighbouring channels")
        for i, row in enumerate(grid):
            for j, value in enumerate(row):
                if value == value:
                    text = f"{100 * value:.0f}"
                    ax.text(j, i, text, ha="center", va="center", fontsize=7.5)
        bar = ax.figure.colorbar(image, ax=ax, shrink=0.9)
        bar.outline.set_visible(False)
        bar.set_label("answers changed" if classify else "answers moved")
        bar.ax.yaxis.set_major_formatter(lambda v, _: f"{100 * v:.3g} %")

    top = found.top
    return picture(
        draw,
        size=(6.8, 1.5 + 0.36 * len(sites)),
        caption="How much hangs on each group of channels: "
        + (
            f"percent of {found.answers} that change"
            if classify
            else "how far answers move, in percent of their spread,"
        )
        + " when it is held at its mean, places in depth order. Fields without colour are parts it can do without.",
        alt=f"Grid of {len(sites)} places by up to {width} channel groups; the most important is group {top.start} to {top.stop - 1} at {short(top.site)}.",
    )
