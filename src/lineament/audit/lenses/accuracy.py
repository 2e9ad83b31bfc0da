"""How often is it right, for whom, and does it know when it is not?

Accuracy with Wilson's interval, by class and by group, the worst group; the confusions; calibration by the expected
calibration error over 15 bins (Guo et al. 2017, arXiv 1706.04599). For real-valued targets, R² and the mean absolute error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lineament.audit.phrases import compact, percent, points
from lineament.audit.preprocessing import Preprocessing, better_preprocessing
from lineament.audit.subject import Subject
from lineament.core.statistics.shares import wilson
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

TITLE = "How often is it right, and for whom?"
HELP = "how often it is right, by class and group, and whether its confidence can be trusted"
ORDER = 10
METHOD = "calibration"
SOURCE = ("On calibration of modern neural networks", 2017, "1706.04599")
BINS = 15


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


@dataclass(frozen=True)
class Bin:
    """The samples of about one confidence: how sure the network is of them, and how often it is right."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error, the mean confidence and accuracy, and the bins that hold samples."""

    error: float
    confidence: float
    accuracy: float
    bins: Sequence[Bin]
    gap_error: float = math.inf

    @property
    def gap(self) -> float:
        """By how much it is surer than right."""
        return self.confidence - self.accuracy


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


@dataclass(frozen=True)
class Labels:
    """How often single labels are right: in all (the interval is over samples), by label and by group; ``exact``: of all labels of a sample.

    ``majority`` is what naming the more frequent value of each label would be right for.
    """

    overall: Share
    exact: Share
    majority: float
    labels: Sequence[Share]
    groups: Sequence[Share]
    calibration: Calibration
    task: str = "multi-label"


@dataclass(frozen=True)
class Errors:
    """R² (NaN where the targets are all alike) and the mean absolute error of a group's answers, with their standard errors over samples."""

    name: str
    r2: float
    mae: float
    count: int
    mae_error: float = math.inf
    r2_error: float = math.inf

    @property
    def off(self) -> str:
        return f"{compact(self.mae)}{_give_or_take(1.96 * self.mae_error)}"


@dataclass(frozen=True)
class Values:
    """How far real-valued answers are off, in all and by group, and how far always answering the mean would be."""

    overall: Errors
    groups: Sequence[Errors]
    mean_predictor_mae: float
    task: str = "regression"


def applies(subject: Subject) -> str:
    return ""


def look(subject: Subject) -> Section:
    kinds = {"classification": _classes, "multi-label": _labels, "regression": _values}
    return kinds[subject.task](subject)


def calibration(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> Calibration:
    """Expected calibration error: Σ_b n_b/N · |accuracy_b - confidence_b| over equal bins of the top probability.

    >>> calibration(torch.tensor([[0.8, 0.2]] * 5), torch.tensor([0, 0, 0, 0, 1])).error < 1e-6
    True
    """
    confidence, decision = probabilities.double().max(1)
    right = (decision == targets).double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(number, minlength=bins)
    sure = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, confidence)
    hit = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, right)
    error = float((hit - sure).abs().sum() / len(targets))
    filled = count > 0
    bins_filled = zip(sure[filled], hit[filled], count[filled])
    return Calibration(
        error,
        float(confidence.mean()),
        float(right.mean()),
        [Bin(float(s / n), float(h / n), int(n)) for s, h, n in bins_filled],
        float((confidence - right).std()) / math.sqrt(len(right)) if len(right) > 1 else math.inf,
    )


def _classes(subject: Subject) -> Section:
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
        groups=_groups(subject, right),
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
        (overall.accuracy - g.accuracy for g in groups if _below(g, overall, len(groups))), default=0.0
    )
    weak = known.error > 0.1 or worst_gap > 0 or overall.accuracy < 0.8
    poor = worst_gap > 0.1 or found.poor or found.reordered is not None
    pictures = [*([_bars(groups, "group")] if len(groups) > 1 else []), _bars(classes, "class")]
    pictures += [
        _reliability(known),
        *([_confusion(subject, confusion, present)] if len(present) <= 30 else []),
    ]
    return Section(
        status="warning" if poor else "note" if weak else "good",
        number=percent(overall.accuracy),
        unit="of samples right",
        sentence=sentence,
        pictures=pictures,
        tables=[
            *([_table("By group", "group", groups)] if groups else []),
            _table("By class" + (", the 20 hardest" if len(classes) > 20 else ""), "class", classes),
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
    if _below(worst, best, len(groups)):
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
        if _below(worst, best, len(groups)):
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
    if _below(worst, overall, len(found.classes)) and overall.accuracy - worst.accuracy > 0.1:
        told.append(
            Finding(
                "note",
                f"Class {worst.quoted} is right in {worst.counted} only ({worst.interval}), against {percent(overall.accuracy)} overall.",
                advice="See what it is taken for (the table of mistakes), check the labels of a few of these samples, and train on more of them.",
                key="class behind",
            )
        )
    told += _confidence(known)
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


def _confidence(known: Calibration) -> list[Finding]:
    sure = abs(known.gap) - 1.96 * known.gap_error
    if known.error <= 0.05 or sure <= 0.03:
        return []
    return [
        Finding(
            "warning" if known.gap > 0 and sure > 0.1 else "note",
            f"It is {'over' if known.gap > 0 else 'under'}confident: {percent(known.confidence)} sure on average, and right in {percent(known.accuracy)}, a gap of {points(known.gap)} ± {points(1.96 * known.gap_error)} (95 % interval).",
            advice="Do not use its confidence as it is: divide the logits by one temperature that you fit on held-out data (the paper that the section names says how).",
            key="overconfident" if known.gap > 0 else "underconfident",
        )
    ]


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


def compared(count: int) -> float:
    """Half the width, in standard errors, of intervals whose ends are compared: the worst of many is low by chance, so that more of them ask for more.

    95 % for two; for more of them each has its part of the 5 % (Bonferroni).

    >>> round(compared(2), 2), round(compared(10), 2)
    (1.96, 2.77)
    """
    return NormalDist().inv_cdf(1 - 0.025 / max(count - 1, 1))


def _below(worst: Share, other: Share, count: int) -> bool:
    """Whether the worst of so many is right less often than another, beyond what chance does to the worst."""
    z = compared(count)
    ends = [wilson(round(s.accuracy * s.count), s.count, z) for s in (worst, other)]
    return ends[0][1] < ends[1][0]


def share(name: str, right: Tensor) -> Share:
    hits, total = int(right.sum()), len(right)
    return Share(name, hits / total, *wilson(hits, total), total)


def _groups(subject: Subject, right: Tensor) -> list[Share]:
    numbers = subject.samples.groups
    if numbers is None:
        return []
    return [
        share(subject.samples.group_names[g], right[numbers == g]) for g in torch.unique(numbers).tolist()
    ]


def _table(title: str, what: str, rows: Sequence[Share]) -> Table:
    ordered = sorted(rows, key=lambda r: r.accuracy)[:20]
    return Table(
        title,
        (what, "accuracy", "95 % interval", "samples"),
        [(r.name, percent(r.accuracy), f"{percent(r.low)} to {percent(r.high)}", r.count) for r in ordered],
    )


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


def _bars(rows: Sequence[Share], what: str) -> Picture:
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


def _reliability(known: Calibration) -> Picture:
    def draw(ax: Any) -> None:
        ax.plot([0, 1], [0, 1], color="C7", linewidth=1, linestyle="--", label="sure as often as right")
        sizes = [12 + 160 * b.count / max(x.count for x in known.bins) for b in known.bins]
        at = [b.confidence for b in known.bins]
        hit = [b.accuracy for b in known.bins]
        ax.plot(at, hit, color="C0", linewidth=1.2)
        ax.scatter(at, hit, s=sizes, color="C0", alpha=0.8, label="the network (size: samples)")
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="how sure it is", ylabel="how often it is right")
        # Above the axes: inside, the network's line may run through it.
        ax.legend(loc="lower left", ncols=2, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)

    return picture(
        draw,
        size=(5.2, 3.4),
        caption=f"Calibration: points below the line are overconfident. Expected calibration error {percent(known.error)}.",
        alt=f"Reliability diagram in {len(known.bins)} bins; mean confidence {percent(known.confidence)}, "
        f"accuracy {percent(known.accuracy)}.",
    )


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


def _labels(subject: Subject) -> Section:
    targets, chance = subject.targets > 0.5, subject.outputs.double().sigmoid()
    right = (chance > 0.5) == targets
    groups = subject.samples.groups
    found = Labels(
        _mean_share("all", right),
        share("all labels", right.all(1)),
        majority=float(torch.maximum(targets.double().mean(0), 1 - targets.double().mean(0)).mean()),
        labels=[share(subject.class_name(k), right[:, k]) for k in range(right.shape[1])],
        groups=[
            _mean_share(subject.samples.group_names[g], right[groups == g])
            for g in (torch.unique(groups).tolist() if groups is not None else [])
        ],
        calibration=calibration(torch.stack([1 - chance, chance], 2).flatten(0, 1), targets.long().flatten()),
    )
    # Labels of one sample are not independent, so the error of the gap is over samples too.
    gaps = (torch.maximum(chance, 1 - chance) - right.double()).mean(1)
    error = float(gaps.std()) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf
    found = replace(found, calibration=replace(found.calibration, gap_error=error))
    overall, known = found.overall, found.calibration
    hardest = min(found.labels, key=lambda share: share.accuracy)
    poor = overall.low <= found.majority
    told = f"It is right for {percent(overall.accuracy)} of {right.numel()} labels on {overall.count} samples ({overall.interval})"
    no_better = "is" if overall.accuracy <= found.majority else "may be"
    sentence = (
        f"{told}, and for every label of {percent(found.exact.accuracy)} of samples; naming the more frequent value of each label would be right for {percent(found.majority)} of labels. "
        f"The hardest label is {hardest.quoted} ({hardest.counted}). On average it is {percent(known.confidence)} sure."
    )
    return Section(
        status="warning" if poor else "note" if overall.accuracy < 0.8 or known.error > 0.1 else "good",
        number=percent(overall.accuracy),
        unit="of labels right",
        sentence=sentence,
        pictures=[
            *([_bars(found.groups, "group")] if len(found.groups) > 1 else []),
            _bars(found.labels, "label"),
            _reliability(known),
        ],
        tables=[
            *([_table("By group", "group", found.groups)] if found.groups else []),
            _table(
                "By label" + (", the 20 hardest" if len(found.labels) > 20 else ""), "label", found.labels
            ),
        ],
        numbers=plain(found),
        findings=[
            *_confidence(known),
            Finding(
                "warning" if poor else "good" if overall.accuracy >= 0.8 else "note",
                told
                + (
                    f", which {no_better} no better than naming the more frequent value of each ({percent(found.majority)})."
                    if poor
                    else "."
                ),
                advice="Make sure first that samples reach it as they did in training (their size and normalisation) and that labels stand in the same order in both."
                if poor
                else "",
                key="no better than the majority" if poor else "accuracy",
            ),
        ],
    )


def _mean_share(name: str, right: Tensor) -> Share:
    """The share of labels that are right; labels of one sample are not independent, so the interval is over samples."""
    each = right.double().mean(1)
    mean, error = float(each.mean()), float(each.std()) / len(each) ** 0.5 if len(each) > 1 else 0.5
    low, high = max(mean - 1.96 * error, 0.0), min(mean + 1.96 * error, 1.0)
    if mean in (0.0, 1.0):  # all samples alike show no spread, which is not certainty
        low, high = wilson(round(mean * len(each)), len(each))
    return Share(name, mean, low, high, len(each))


def _values(subject: Subject) -> Section:
    targets = subject.targets.reshape(len(subject), -1).double()
    answers = subject.outputs.reshape(len(subject), -1).double()
    error = (answers - targets).abs().mean(1)
    groups = subject.samples.groups

    def errors(name: str, rows: Tensor | slice) -> Errors:
        chosen = targets[rows]
        own = error[rows].flatten(1).mean(1) if error.ndim > 1 else error[rows]
        spread = float(own.std()) / math.sqrt(len(own)) if len(own) > 1 else math.inf
        return Errors(
            name,
            r2(answers[rows], chosen),
            float(own.mean()),
            len(chosen),
            spread,
            _r2_error(answers[rows], chosen),
        )

    by_group = [
        errors(subject.samples.group_names[g], groups == g)
        for g in (torch.unique(groups).tolist() if groups is not None else [])
    ]
    overall = errors("all", slice(None))
    found = Values(overall, by_group, float((targets - targets.mean(0)).abs().mean()))
    mean = f"where always answering the mean would be off by {compact(found.mean_predictor_mae)}"
    sentence = f"{_explained(overall)}; they are off by {overall.off} on average, {mean}."
    worst = max(by_group, key=lambda g: g.mae, default=None)
    if worst is not None and len(by_group) > 1:
        sentence += f" The worst group is “{printable(worst.name, limit=60)}”, off by {worst.off} ({worst.count} samples)."
    told = _value_findings(found)

    def draw(ax: Any) -> None:
        count = min(len(targets), 2000)
        ax.scatter(targets[:count, 0], answers[:count, 0], s=9, alpha=0.5, color="C0", linewidth=0)
        ends = [float(targets[:, 0].min()), float(targets[:, 0].max())]
        ax.plot(ends, ends, color="C7", linestyle="--", linewidth=1)
        ax.set(xlabel="target", ylabel="answer")

    return Section(
        method="",  # that of the lens is about classes
        status="warning"
        if overall.r2 < 0
        else "good"
        if {each.severity for each in told} == {"good"}
        else "note",
        number=compact(overall.r2),
        unit="R², the share of variance explained",
        sentence=sentence,
        pictures=[
            picture(
                draw,
                size=(5.2, 3.6),
                kind="png",
                caption="Answers against targets; a perfect network lies on the line.",
                alt=f"Scatter of answers against targets with R² {compact(overall.r2)}.",
            )
        ],
        tables=[
            Table.of(
                "Errors",
                {"group": "name", "R²": "r2", "mean absolute error": "mae", "samples": "count"},
                [overall, *by_group],
            )
        ],
        numbers=plain(found),
        findings=told,
    )


def _explained(overall: Errors) -> str:
    """How much of the variance the answers explain, with its interval."""
    if math.isnan(overall.r2):
        return f"The targets of the {overall.count} samples are all alike, so that its answers have no variance to explain"
    spread = _give_or_take(1.96 * overall.r2_error)
    if overall.r2 < 0:
        return f"By their squared errors, its answers are worse than always answering the mean (R² {compact(overall.r2)}{spread} on {overall.count} samples)"
    return f"Its answers explain {percent(overall.r2)}{_give_or_take(1.96 * overall.r2_error, percent)} of the variance of the targets of {overall.count} samples"


def _give_or_take(half: float, form: Callable[[float], str] = compact) -> str:
    """Half a 95 % interval behind its number."""
    return f" ± {form(float(f'{half:.2g}'))} (95 % interval)" if math.isfinite(half) else ""


def _value_findings(found: Values) -> list[Finding]:
    told = []
    worst = max(found.groups, key=lambda g: g.mae, default=None)
    best = min(found.groups, key=lambda g: g.mae, default=None)
    z = compared(len(found.groups))
    if (
        worst
        and best
        and worst.mae - z * worst.mae_error > best.mae + z * best.mae_error
        and worst.mae > 1.5 * best.mae
    ):
        told.append(
            Finding(
                "warning",
                f"Its error rises from {best.off} in group “{printable(best.name, limit=60)}” ({best.count} samples) to {worst.off} in group “{printable(worst.name, limit=60)}” ({worst.count} samples).",
                advice="Look at what sets that group apart, and train on more samples of it; give the error by group wherever you give it.",
                key="groups differ",
            )
        )
    overall = found.overall
    useless = overall.r2 < 0
    # An R² that its interval does not part from 0, or that there is none of, is no praise.
    unsure = not useless and not overall.r2 - 1.96 * overall.r2_error > 0
    told.append(
        Finding(
            "warning" if useless else "note" if unsure else "good",
            f"{_explained(overall)}; it is off by {compact(overall.mae)} on average"
            + (", which may be no better than always answering the mean." if unsure else "."),
            advice="Make sure that inputs and targets are scaled as they were in training."
            if useless or unsure
            else "",
            key="worse than the mean" if useless else "no better than the mean" if unsure else "accuracy",
        )
    )
    return told


def r2(found: Tensor, targets: Tensor) -> float:
    """1 - Σ(y - ŷ)² / Σ(y - ȳ)², over all values together.

    >>> r2(torch.tensor([[1.0], [3.0]]), torch.tensor([[1.0], [3.0]]))
    1.0
    """
    total = float((targets - targets.mean(0)).square().sum())
    return 1 - float((targets - found).square().sum()) / total if total > 0 else float("nan")


def _r2_error(found: Tensor, targets: Tensor) -> float:
    """The standard error of R² over samples, to first order in the two sums that it is made of."""
    off, spread = ((targets - other).square().sum(1) for other in (found, targets.mean(0)))
    total = float(spread.sum())
    if len(targets) < 2 or total == 0:
        return math.inf
    ratio = float(off.sum()) / total
    return float((off - ratio * spread).std()) * math.sqrt(len(targets)) / total
