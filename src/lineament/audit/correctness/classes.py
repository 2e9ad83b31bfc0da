"""How often a classifier is right, by class and by group, and what it takes for what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lineament.audit.correctness.confidence import Calibration, calibration, confidence_findings, reliability
from lineament.audit.correctness.shares import Share, below, groups_of, share, share_bars, share_table
from lineament.audit.phrases import percent
from lineament.audit.preprocessing import Preprocessing, better_preprocessing
from lineament.audit.subject import Subject
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable


@dataclass(frozen=True)
class Classes:
    """How often a classifier is right: in all, by class and by group; ``majority``: the share of the most frequent class.

    ``otherwise``: another preprocessing under which it is right more often, looked for where it is near chance; ``reordered``: how often it would be right were its outputs in the order that suits half of the samples best, on the other half;
    only where that explains its answers and the given order does not.
    """

    overall: Share
    balanced: float
    majority: float
    classes: Sequence[Share]
    groups: Sequence[Share]
    calibration: Calibration
    confusion: Sequence[Sequence[int]]
    reordered: Share | None = None
    otherwise: Preprocessing | None = None
    task: str = "classification"

    @property
    def poor(self) -> bool:
        """Whether it may be no better than always naming the most frequent class."""
        return self.overall.low <= self.majority


def of_classes(subject: Subject) -> Section:
    targets = subject.targets
    decisions = subject.outputs.argmax(1)
    right = decisions == targets
    present = torch.unique(targets).tolist()
    width = subject.outputs.shape[1]
    confusion = torch.bincount(targets * width + decisions, minlength=width * width).reshape(width, width)
    classes = [share(subject.class_name(k), right[targets == k]) for k in present]
    found = Classes(
        share("all", right),
        balanced=sum(c.accuracy for c in classes) / len(classes),
        majority=float(confusion.sum(1).max()) / len(right),
        classes=classes,
        groups=groups_of(subject, right),
        calibration=calibration(torch.softmax(subject.outputs.double(), 1), targets),
        confusion=confusion.tolist() if width <= 200 else [],
    )
    found = replace(found, reordered=reordered(found.overall, found.majority, targets, decisions, width))
    lost = found.poor or float(subject.loss(subject.outputs, targets)) > math.log(max(width, 2))
    if lost and found.reordered is None:
        found = replace(found, otherwise=better_preprocessing(subject))
    overall, groups, known = found.overall, found.groups, found.calibration
    hardest = min(classes, key=lambda c: c.accuracy)
    sentence = (
        f"It is right for {right.sum()} of {len(right)} samples ({overall.interval}); guessing the most frequent "
        f"class would be right for {percent(found.majority)}. "
    )
    sentence += _between(groups) if len(groups) > 1 else ""
    if hardest.accuracy < max(c.accuracy for c in classes):
        alike = sum(c.accuracy == hardest.accuracy for c in classes)
        sentence += (
            f"The hardest class is {hardest.quoted} ({hardest.counted}). "
            if alike == 1
            else f"Of {len(classes)} classes, {alike} are hardest alike ({percent(hardest.accuracy)}). "
        )
    sentence += f"On average it is {percent(known.confidence)} sure, " + (
        "which fits how often it is right."
        if abs(known.gap) < 0.03
        else f"which is {'more' if known.gap > 0 else 'less'} than its accuracy warrants."
    )
    worst_gap = max(
        (overall.accuracy - g.accuracy for g in groups if below(g, overall, len(groups))), default=0.0
    )
    weak = known.error > 0.1 or worst_gap > 0 or overall.accuracy < 0.8
    poor = worst_gap > 0.1 or found.poor or found.reordered is not None
    pictures = [*([share_bars(groups, "group")] if len(groups) > 1 else []), share_bars(classes, "class")]
    pictures += [
        reliability(known),
        *([_confusion(subject, confusion, present)] if len(present) <= 30 else []),
    ]
    return Section(
        status="warning" if poor else "note" if weak else "good",
        number=percent(overall.accuracy),
        unit="of samples right",
        sentence=sentence,
        pictures=pictures,
        tables=[
            *([share_table("By group", "group", groups)] if groups else []),
            share_table("By class" + (", the 20 hardest" if len(classes) > 20 else ""), "class", classes),
            *([_mistakes(subject, confusion)] if not bool(right.all()) else []),
        ],
        numbers=plain(found),
        findings=_class_findings(found),
    )


def _between(groups: Sequence[Share]) -> str:
    """How far apart the groups are, and whether chance would do that."""
    worst, best = min(groups, key=lambda g: g.accuracy), max(groups, key=lambda g: g.accuracy)
    if percent(worst.accuracy) == percent(best.accuracy):
        return f"It is right equally often in all {len(groups)} groups. "
    ends = f"{best.counted} in {best.quoted} but {worst.counted} in {worst.quoted}"
    if below(worst, best, len(groups)):
        return f"Groups differ: {ends}. "
    return f"Groups hardly differ, as far as so many samples can tell: {ends}. "


def _class_findings(found: Classes) -> list[Finding]:
    overall, groups, known = found.overall, found.groups, found.calibration
    told = []
    if found.reordered is not None:
        other = found.reordered
        told.append(
            Finding(
                "warning",
                f"Its outputs seem to be in another order than the class numbers: it is right for {overall.counted} samples, and would be right for "
                f"{other.counted} ({other.interval}) in the order that suits the other {overall.count - other.count} best.",
                advice="Give the names of the classes in the order of the model's outputs (`classes`): labels then follow their names. Until then no number by class means anything.",
                key="outputs reordered",
            )
        )
    if found.otherwise is not None:
        other = found.otherwise
        told.append(
            Finding(
                "warning",
                f"{other.words}: samples do not reach it as they did in training.",
                advice="Give the normalisation of its training (`normalize`), or store the samples as they were then, and audit again: until then no other number means anything.",
                key="preprocessing",
            )
        )
    if len(groups) > 1:
        best, worst = max(groups, key=lambda g: g.accuracy), min(groups, key=lambda g: g.accuracy)
        if below(worst, best, len(groups)):
            told.append(
                Finding(
                    "warning" if best.accuracy - worst.accuracy > 0.1 else "note",
                    f"Accuracy falls from {best.counted} in group {best.quoted} ({best.interval}) to {worst.counted} in group {worst.quoted} ({worst.interval}).",
                    advice="Look at what sets that group apart, and train on more samples of it or weigh them up; give the accuracy by group wherever you give it.",
                    key="groups differ",
                )
            )
        else:
            alike = f"Its {len(groups)} groups fare alike, as far as {overall.count} samples can tell."
            told.append(Finding("good", alike, key="groups alike"))
    worst = min(found.classes, key=lambda c: c.accuracy)
    if below(worst, overall, len(found.classes)) and overall.accuracy - worst.accuracy > 0.1:
        told.append(
            Finding(
                "note",
                f"Class {worst.quoted} is right in {worst.counted} only ({worst.interval}), against {percent(overall.accuracy)} overall.",
                advice="See what it is taken for (the table of mistakes), check the labels of a few of these samples, and train on more of them.",
                key="class behind",
            )
        )
    told += confidence_findings(known)
    poor = found.poor
    no_better = "is" if overall.accuracy <= found.majority else "may be"
    told.append(
        Finding(
            "warning" if poor else "good" if overall.accuracy >= 0.8 else "note",
            f"It is right for {overall.counted} samples ({overall.interval})"
            + (
                f", which {no_better} no better than always naming the most frequent class ({percent(found.majority)})."
                if poor
                else "."
            ),
            advice="Make sure first that samples reach it as they did in training (their size and normalisation) and that class numbers mean the same to both; then train it longer or on more data."
            if poor
            else "",
            key="no better than the majority" if poor else "accuracy",
        )
    )
    return told


def reordered(
    overall: Share, majority: float, targets: Tensor, decisions: Tensor, width: int
) -> Share | None:
    """How often a network is right with its outputs reordered, where that and only that explains its answers; as in :class:`Classes`."""
    half = torch.arange(len(targets)) % 2 == 0
    counts = torch.bincount(targets[half] * width + decisions[half], minlength=width * width)
    _, best = linear_sum_assignment(counts.reshape(width, width).numpy(), maximize=True)
    other = share("reordered", torch.from_numpy(best)[targets[~half]] == decisions[~half])
    # Halfway from always naming the most frequent class to always right; a better order is no mere improvement.
    explains = other.low > (1 + majority) / 2
    return other if explains and (overall.low <= majority or other.low > 2 * overall.high) else None


def _mistakes(subject: Subject, confusion: Tensor) -> Table:
    wrong = confusion.clone()
    wrong.fill_diagonal_(0)
    width = len(wrong)
    top = wrong.flatten().topk(min(8, width * width))
    rows = [
        (
            subject.class_name(i // width),
            subject.class_name(i % width),
            n,
            percent(n / max(int(confusion[i // width].sum()), 1)),
        )
        for n, i in zip(top.values.tolist(), top.indices.tolist())
        if n
    ]
    return Table("Most frequent mistakes", ("true class", "taken for", "times", "of that class"), rows)


def _confusion(subject: Subject, confusion: Tensor, present: list[int]) -> Picture:
    chosen = confusion[present]
    shares = (chosen / chosen.sum(1, keepdim=True)).numpy()
    shown = sorted({*present, *chosen.sum(0).nonzero().flatten().tolist()})
    shares = shares[:, shown]

    def draw(ax: Any) -> None:
        ax.imshow(shares, cmap=shades(ax, "C0"), vmin=0, vmax=1)
        limit = 14 if len(shown) <= 15 else 9
        ax.set_xticks(
            range(len(shown)), [printable(subject.class_name(k), limit=limit) for k in shown], rotation=90
        )
        ax.set_yticks(range(len(present)), [printable(subject.class_name(k), limit=limit) for k in present])
        ax.set(xlabel="taken for", ylabel="true class")
        if len(shown) <= 12:
            for i in range(len(present)):
                for j in range(len(shown)):
                    if chosen[i][shown[j]]:
                        ax.text(
                            j,
                            i,
                            int(chosen[i][shown[j]]),
                            ha="center",
                            va="center",
                            fontsize=7.5,
                            color=ax.get_facecolor() if shares[i, j] > 0.55 else None,
                        )

    side = 1.6 + 0.3 * max(len(shown), 4)
    return picture(
        draw,
        size=(min(side, 7.0), min(side, 7.0)),
        caption="Confusions: each row is a true class, the fuller the colour, the more often it is taken for the column's class.",
        alt=f"Confusion matrix of {len(present)} classes; {percent(float(confusion.diagonal().sum() / confusion.sum()))} lies on its diagonal.",
    )
