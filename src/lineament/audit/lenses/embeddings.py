"""Does its embedding tell apart people, products or voices that look alike?

Every pair of samples by cosine: genuine pairs have one label, impostors two. The true-accept rate (TAR) is the share of genuine pairs above the threshold that a
share of all impostors (the false-accept rate, FAR) passes. Pairs of one label are not independent, so that intervals come from draws of labels (a bootstrap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.audit.phrases import compact, percent, percent_interval
from lineament.audit.subject import Subject
from lineament.measure.embeddings.geometry import geometry
from lineament.measure.embeddings.pairs import Recognition, recognition
from lineament.measure.embeddings.retrieval import retrieval
from lineament.measure.embeddings.spread import recognition_spread
from lineament.measure.embeddings.verification import roc
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain

TITLE = "Whom does its embedding recognise?"
HELP = "how well its embedding tells labels apart, also such as it was never trained on"
ORDER = 28
METHOD = "elasticface"
EMBEDDING = True
ON_REQUEST = True
_SHOWN, _NEIGHBOURS = 5, 10
# Where two samples of different labels are as alike as that on the mean, the embedding crowds; directions at random have 0.
_CROWDED = 0.5


@dataclass(frozen=True)
class Group:
    """Of the impostor pairs within a group, the share above the threshold that all impostors set, with its interval over draws of labels."""

    name: str
    labels: int
    pairs: int
    false_accepts: float
    low: float
    high: float


@dataclass(frozen=True)
class Embeddings:
    """What is measured: ``recognised`` at ``far`` with intervals, groups, and how the points lie on the sphere.

    ``alignment``: mean squared distance of genuine pairs; ``uniformity``: the logarithm of the mean of exp(-2 d²) over all pairs; ``hubs``: how many samples have
    none of the others' 10 nearest neighbours lists, and the longest list that one sample is on. ``alike`` and ``unlike``: rows in the data, of impostors and genuine pairs.
    ``impostor_mean``: the mean cosine of impostors; ``retrieved``: R@k, of the samples with a mate the share that has one among the k nearest others.
    """

    site: str
    width: int
    recognised: Recognition
    far: float
    tar: tuple[float, float, float]
    recall: tuple[float, float, float]
    effective_rank: float
    alignment: float
    uniformity: float
    hubs: tuple[int, int]
    above_median: float
    groups: Sequence[Group]
    alike: Sequence[tuple[int, int, float]]
    unlike: Sequence[tuple[int, int, float]]
    impostor_mean: float
    retrieved: dict[int, float]


def applies(subject: Subject) -> str:
    inside = subject.embedding is None and subject.task == "classification"
    return subject.unlabelled(2) or (subject.sealed if inside else "")


def features(subject: Subject, rows: Tensor) -> tuple[str, Tensor]:
    """Where the embedding passes, and the embeddings of some rows: at the site that was named, a classifier's at what its last layer reads, else the outputs."""
    site = subject.embedding
    if site is None and subject.task == "embedding":
        return "the output", subject.outputs[rows]
    site = subject.sites[-1] if site is None else site
    return site, subject.passed(site, rows)


def look(subject: Subject) -> Section:
    rows = torch.arange(len(subject))
    site, x = features(subject, rows)
    norms = x.norm(dim=1)
    kept = (norms > 0) & norms.isfinite()
    rows, unit = rows[kept], F.normalize(x[kept].float(), dim=1)
    labels = subject.targets[rows]
    fars = (1e-1, 1e-2, 1e-3)
    recognised = recognition(unit, labels, fars)
    # The smallest rate at which at least ten impostors may pass.
    at = max(k for k, far in enumerate(fars) if k == 0 or far * recognised.impostors >= 10)
    spread = recognition_spread(unit, labels, fars, seed=subject.seed)
    threshold = recognised.thresholds[at]
    alike, unlike = _extremes(unit, labels)
    like = torch.cat([s for _, s in _genuine(unit, labels)])
    everything = (float(unit.double().sum(0).square().sum()) - len(unit)) / 2
    near = retrieval(unit, labels)
    impostors, lie = torch.tensor([s for _, _, s in alike]), geometry(unit, labels, neighbours=_NEIGHBOURS)
    found = Embeddings(
        site=site,
        width=unit.shape[1],
        recognised=recognised,
        far=fars[at],
        tar=(recognised.tar[at], *spread.tar[at]),
        recall=(recognised.recall, *spread.recall),
        effective_rank=lie.effective_rank,
        alignment=lie.alignment,
        uniformity=lie.uniformity,
        hubs=(lie.lonely, lie.hub),
        above_median=float((impostors > like.median()).float().mean()),
        groups=_groups(subject, unit, labels, rows, threshold),
        alike=[(int(rows[i]), int(rows[j]), s) for i, j, s in alike],
        unlike=[(int(rows[i]), int(rows[j]), s) for i, j, s in unlike],
        impostor_mean=(everything - float(like.double().sum())) / recognised.impostors,
        retrieved=dict(zip(near.ks, near.recall)),
    )
    findings = _findings(found)
    dropped = int((~kept).sum())
    lost = f" {dropped} samples whose embedding is zero are left out." if dropped else ""
    who = "labels it was not trained on" if subject.task == "embedding" else "these classes"
    sentence = (
        f"Over {recognised.genuine:,} pairs of one label and {recognised.impostors:,} of two ({len(unit):,} samples of {recognised.people:,} labels, {found.width} coordinates at {site}): "
        f"{_said(found)}. The nearest other sample is of the same label for {percent_interval(found.recall)}. Intervals are over draws of labels. "
        + ("" if who == "these classes" else "Whether these labels were in its training is not known here: for people it never saw, the data must hold such ones. ")
        + f"{found.hubs[0]:,} samples are among nobody's {_NEIGHBOURS} nearest, and one is among those of {found.hubs[1]:,}.{lost}"
    )  # fmt: skip
    return Section(
        status=findings[0].severity,
        number=percent(found.tar[0]),
        unit=f"of pairs of one label accepted, at {_rate(found.far)}",
        sentence=sentence,
        pictures=[_curve(unit, labels, found), *_faces(subject, found)],
        tables=_tables(subject, found),
        numbers=plain(found),
        findings=findings,
    )


def _rate(far: float) -> str:
    return f"one false accept in {round(1 / far):,}"


def _said(found: Embeddings) -> str:
    return f"at {_rate(found.far)} it accepts {percent_interval(found.tar)} of the pairs of one label"


def _findings(found: Embeddings) -> list[Finding]:
    said = _said(found)
    said = f"{said[:1].upper()}{said[1:]}, over {found.recognised.people:,} labels."
    _, low, high = found.tar
    if low >= 0.9:
        told = [Finding("good", said, key="recognises")]
    else:
        severity = "warning" if high < 0.5 else "note"
        advice = (
            "Compare losses and layers (lens export), and look at the pairs of the section for wrong labels."
        )
        told = [Finding(severity, said, advice=advice, key="recognises too few")]
    if found.impostor_mean > _CROWDED:
        told.append(
            Finding(
                "note",
                f"The embedding crowds: two samples of different labels have a cosine of {_cosine(found.impostor_mean)} on the mean, where directions at random have 0.",
                advice="Little of the sphere is used: train against more or harder negatives (lineament train --loss), or subtract the mean before cosines are taken.",
                key="crowds",
            )
        )
    if found.above_median > 0:
        count = round(found.above_median * len(found.alike))
        told.append(
            Finding(
                "note",
                f"{count} of the {len(found.alike)} most similar pairs of two labels are more alike than half of the pairs of one label.",
                advice="Look at them: look-alikes, one person under two labels, or the same picture twice.",
                key="strangers alike",
            )
        )
    if len(found.groups) > 1:
        worst, best = (pick(found.groups, key=lambda g: g.false_accepts) for pick in (max, min))
        if worst.low > best.high and worst.false_accepts > 2 * best.false_accepts:
            told.append(
                Finding(
                    "warning",
                    f"At one threshold for all, strangers of group {worst.name} pass for each other {percent_interval((worst.false_accepts, worst.low, worst.high))} of the time, "
                    f"of group {best.name} {percent_interval((best.false_accepts, best.low, best.high))}.",
                    advice="Train on more labels of that group, or decide by a threshold that serves the worst group.",
                    key="groups accept strangers",
                )
            )
    return told


def _genuine(unit: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each label with two samples, (pairs [n, 2], scores [n])."""
    found = []
    for label in labels.unique():
        own = (labels == label).nonzero()[:, 0]
        if len(own) > 1:
            pairs = own[torch.combinations(torch.arange(len(own)))]
            found.append((pairs, (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1)))
    return found


def _extremes(unit: Tensor, labels: Tensor) -> tuple[list[Any], list[Any]]:
    """The most similar pairs of two labels, ten, and the least similar of one, five: (row, row, score)."""
    alike: list[tuple[int, int, float]] = []
    for rows in torch.arange(len(unit)).split(512):
        scores = unit[rows] @ unit.T
        scores[(labels[rows, None] == labels) | (torch.arange(len(unit)) <= rows[:, None])] = -math.inf
        value, place = scores.flatten().topk(min(2 * _SHOWN, scores.numel()))
        at = zip(value.tolist(), place.tolist())
        alike += [(int(rows[p // len(unit)]), p % len(unit), v) for v, p in at if v > -math.inf]
    pairs, scores = (torch.cat(each) for each in zip(*_genuine(unit, labels)))
    least = scores.topk(min(_SHOWN, len(scores)), largest=False).indices
    return (
        sorted(alike, key=lambda pair: -pair[2])[: 2 * _SHOWN],
        [(int(i), int(j), float(s)) for (i, j), s in zip(pairs[least].tolist(), scores[least])],
    )


def _groups(subject: Subject, unit: Tensor, labels: Tensor, rows: Tensor, threshold: float) -> list[Group]:
    """False accepts within each group that at least eight labels are in, at one threshold."""
    if subject.samples.groups is None:
        return []
    groups, found = subject.samples.groups[rows], []
    generator = torch.Generator().manual_seed(subject.seed)
    for number in groups.unique().tolist():
        own = groups == number
        people = labels[own].unique(return_inverse=True)[1]
        n = int(people.max()) + 1
        if n < 8:
            continue
        hot = F.one_hot(people, n).double()
        above = (unit[own] @ unit[own].T > threshold).double()
        # Pairs by labels: those accepted, and all.
        accepted = hot.T @ above @ hot
        sizes = hot.sum(0)
        pairs = sizes[:, None] * sizes
        for each in (accepted, pairs):
            each.fill_diagonal_(0)
        rates = []
        for _ in range(200):
            w = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double()
            rates.append(float((w @ accepted @ w) / (w @ pairs @ w).clamp(min=1)))
        low, high = torch.tensor(rates).quantile(torch.tensor([0.025, 0.975])).tolist()
        rate = float(accepted.sum() / pairs.sum())
        found.append(Group(subject.samples.group_names[number], n, int(pairs.sum() / 2), rate, low, high))
    return found


def _tables(subject: Subject, found: Embeddings) -> list[Table]:
    def named(pairs: Sequence[tuple[int, int, float]]) -> list[list[Any]]:
        label = lambda row: subject.class_name(int(subject.targets[row]))  # noqa: E731
        at = subject.samples.index
        return [[int(at[i]), label(i), int(at[j]), label(j), _cosine(s)] for i, j, s in pairs]

    columns = ("sample", "label", "sample", "label", "cosine")
    tables = [
        Table(
            "Pairs accepted at a share of strangers accepted (FAR)",
            ("FAR", "pairs of one label (TAR)", "threshold"),
            [
                [percent(far), percent(tar), _cosine(t)]
                for far, tar, t in zip(
                    found.recognised.fars, found.recognised.tar, found.recognised.thresholds
                )
                if far * found.recognised.impostors >= 1
            ],
        ),
        Table(
            "How the samples lie on the sphere",
            ("", "value"),
            [
                *(
                    [
                        f"a mate among the {k} nearest (R@{k})" if k > 1 else "the nearest is a mate (R@1)",
                        percent(share),
                    ]
                    for k, share in found.retrieved.items()
                ),
                ["mean average precision at R", percent(found.recognised.precision)],
                ["mean cosine of two labels", _cosine(found.impostor_mean)],
                [
                    "margin: cosine of the least similar pair of one label less that of the most similar of two",
                    round(found.recognised.gap, 3),
                ],
                ["alignment: mean squared distance of pairs of one label", round(found.alignment, 3)],
                [
                    "uniformity: logarithm of the mean of exp(-2 d²) over all pairs (lower: more even)",
                    round(found.uniformity, 3),
                ],
                [f"effective rank, of {found.width} coordinates", round(found.effective_rank, 1)],
            ],
        ),
        Table(
            "The most similar pairs of two labels, by their numbers in the data", columns, named(found.alike)
        ),
        Table("The least similar pairs of one label", columns, named(found.unlike)),
    ]
    if found.groups:
        rows = [
            [g.name, g.labels, g.pairs, percent_interval((g.false_accepts, g.low, g.high))]
            for g in found.groups
        ]
        tables.append(Table("False accepts by group, at one threshold for all", ("group", "labels", "pairs of strangers", "accepted"), rows))  # fmt: skip
    return tables


def _cosine(value: float) -> float:
    """To three digits of what it lacks to 1, where that is little: two thresholds that differ also look different.

    >>> _cosine(0.51234), _cosine(0.99987654)
    (0.512, 0.999877)
    """
    return round(value, min(7, 2 + math.ceil(-math.log10(max(min(1 - value, 1), 1e-6)) + 1e-9)))


def _curve(unit: Tensor, labels: Tensor, found: Embeddings) -> Any:
    scores = unit @ unit.T
    upper = torch.ones_like(scores, dtype=torch.bool).triu(1)
    like = labels[:, None] == labels
    lowest = float(scores.min().clamp(-1, 1 - 1e-4))  # where an embedding crowds, all cosines are near 1
    bins = torch.linspace(lowest, 1, 81)
    shares = [torch.histogram(scores[upper & kind].cpu(), bins).hist for kind in (like, ~like)]
    false, true, _ = roc(scores[upper], like[upper])
    grid = torch.logspace(math.log10(1 / found.recognised.impostors), 0, 200, dtype=false.dtype)
    rates = true[torch.searchsorted(false, grid * (1 + 1e-9), right=True) - 1]

    def draw(panels: Any) -> None:
        axes, curve = panels[0]
        for values, name, colour in zip(shares, ("one label", "two labels"), ("C0", "C1")):
            axes.stairs(
                (values / values.sum()).numpy(), bins.numpy(), fill=True, alpha=0.5, color=colour, label=name
            )
        axes.axvline(found.recognised.thresholds[found.recognised.fars.index(found.far)], color="C7", lw=1)
        axes.set(xlabel="cosine of two samples", ylabel="share of pairs")
        axes.legend()
        curve.plot(grid.numpy(), rates.numpy(), color="C0")
        curve.axvline(found.far, color="C7", lw=1)
        curve.set(
            xscale="log",
            ylim=(0, 1.02),
            xlabel="share of pairs of two labels accepted",
            ylabel="of one label accepted",
        )

    return picture(
        draw, panels=(1, 2), size=(8.0, 2.8),
        caption=f"Pairs of one label and of two, by cosine, and what a threshold accepts of each (ROC); the lines are the threshold at {_rate(found.far)}.",
        alt=f"Histograms of cosines, and the receiver operating characteristic; {compact(100 * found.tar[0])} percent of pairs of one label lie beyond the threshold.",
    )  # fmt: skip


def _faces(subject: Subject, found: Embeddings) -> list[Any]:
    """The five most similar pairs of two labels and the least similar of one, side by side."""
    if not subject.images:
        return []
    columns = [*found.alike[:_SHOWN], *found.unlike[:_SHOWN]]

    def draw(axes: Any) -> None:
        for column, (i, j, s) in enumerate(columns):
            for line, row in enumerate((i, j)):
                ax = axes[line][column]
                ax.imshow(subject.display(row), cmap="gray", vmin=0, vmax=1)
                ax.set_title(subject.class_name(int(subject.targets[row]))[:12] + ("" if line else f"\n{_cosine(s)}"), fontsize=6)  # fmt: skip
                ax.set_axis_off()

    return [
        picture(
            draw, panels=(2, len(columns)), size=(0.95 * len(columns), 2.6),
            caption="One pair a column, with its cosine: first the most similar pairs of two labels, then the least similar of one.",
            alt=f"{len(columns)} pairs of samples.",
        )
    ]  # fmt: skip
