"""How well does it answer for every token: which words does it tag right, or which hidden words does it know?

The share of labelled tokens that are right, and each class's F1; where tags mark the beginnings and insides of phrases (B-, I-), the F1 of whole
phrases, their words and class (Ramshaw and Marcus 1995). Of a masked language model, how often its first guess is the hidden token, and the perplexity:
how many tokens it hesitates between. The tokens of a text depend on each other, so that intervals are over texts: by leaving each out in turn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.audit.estimates import jackknife
from lineament.audit.phrases import compact, percent, percent_interval
from lineament.audit.subject import Subject
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

TITLE = "Which tokens are right?"
HELP = "of a network that answers for every token: tags by class and by phrase, or hidden words"
ORDER = 22
METHOD = "F1 of phrases"
SOURCE = ("Text chunking using transformation-based learning", 1995, "cmp-lg/9505040")
OPTIONAL = True
DENSE = True
_SHOWN = 20
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Tag:
    """A class: precision, recall, F1 with its 95 % interval, and how many labelled tokens are of it."""

    name: str
    precision: float
    recall: float
    f1: Interval
    tokens: int


@dataclass(frozen=True)
class Tags:
    """The share of labelled tokens that are right, and of the most frequent class; F1 by class, their mean, and that of phrases.

    Of a masked model ``loss`` is the mean over the hidden tokens, in nats, and ``perplexity`` its exponential.
    """

    accuracy: Interval
    majority: float
    macro_f1: Interval | None
    phrase_f1: Interval | None
    phrases: int
    loss: float | None
    perplexity: float | None
    tokens: int
    texts: int
    classes: Sequence[Tag]
    confused: Sequence[tuple[str, str, int]]

    @property
    def poor(self) -> bool:
        """Whether it may be no better than always naming the most frequent class."""
        return self.accuracy[1] <= self.majority

    @property
    def hidden(self) -> bool:
        return self.loss is not None


def applies(subject: Subject) -> str:
    return (
        ""
        if subject.unit == "token"
        else f"It gives an answer for each {subject.unit}, and none for each token."
    )


def look(subject: Subject) -> Section:
    found = _found(subject)
    what = "hidden tokens" if found.hidden else "labelled tokens"
    sentence = (
        f"{percent_interval(found.accuracy)} of {found.tokens:,} {what} in {found.texts:,} texts are right (95 % intervals, over texts); naming the most frequent "
        f"everywhere would be right for {percent(found.majority)}."
    )
    if found.loss is not None and found.perplexity is not None:
        sentence += f" The mean loss is {compact(found.loss)} nats, a perplexity of {compact(found.perplexity)}: it hesitates as between so many tokens alike."
    if found.phrase_f1 is not None:
        sentence += f" Of {found.phrases:,} phrases, taken whole with their class, F1 is {percent_interval(found.phrase_f1)}."
    if found.macro_f1 is not None and len(found.classes) > 1:
        worst = min(found.classes, key=lambda tag: tag.f1[0])
        sentence += f" F1 is {percent_interval(found.macro_f1)} on average over {len(found.classes)} classes, the least for “{printable(worst.name, limit=60)}”, {percent_interval(worst.f1)}."
    return Section(
        status="warning" if found.poor else "note" if found.accuracy[0] < 0.5 else "good",
        number=percent(found.accuracy[0]),
        unit=f"of {what} are right",
        sentence=sentence,
        pictures=[_bars(found)],
        tables=[_by_class(found), *_confusions(found)],
        numbers=plain(found),
        findings=[_finding(found, what)],
    )


def _found(subject: Subject) -> Tags:
    known, width = subject.known, int(subject.width)
    said = subject.outputs.long()
    y = subject.targets.where(known, width)
    right = (said == y) & known
    counts = torch.bincount(y[known], minlength=width)
    present = counts.nonzero()[:, 0]
    # Of a vocabulary the most frequent tokens only: F1 of one that occurs twice says nothing.
    hidden = _hidden(subject)
    shown = counts.argsort(descending=True, stable=True)[: min(len(present), _SHOWN)] if hidden else present
    # Per text, of each class: both, said and true.
    each = torch.stack(
        [
            torch.stack([(right & (y == k)).sum(1), ((said == k) & known).sum(1), (y == k).sum(1)], 1)
            for k in shown.tolist()
        ],
        1,
    ).double()
    totals = each.sum(0)
    classes = [
        Tag(
            _name(subject, int(k)),
            float(both / max(named, 1)),
            float(both / max(true, 1)),
            jackknife(each[:, place], _f1),
            int(true),
        )
        for place, (k, (both, named, true)) in enumerate(zip(shown, totals.tolist()))
    ]
    phrases = _phrases(subject, y, said, known)
    loss = None
    if hidden:
        losses, many = subject.answered(torch.arange(len(subject)))[1].double(), known.sum(1)
        loss = float((losses * many).sum() / many.sum())
    wrong = known & ~right
    pairs, often = torch.unique(y[wrong] * width + said[wrong], return_counts=True)
    most = often.argsort(descending=True, stable=True)[:10]
    return Tags(
        jackknife(torch.stack([right.sum(1), known.sum(1)], 1).double(), lambda s: s[..., 0] / s[..., 1]),
        float(counts.max() / counts.sum()),
        None if hidden else jackknife(each, lambda s: _f1(s).mean(-1)),
        None if phrases is None or not float(phrases[:, 2].sum()) else jackknife(phrases, _f1),
        0 if phrases is None else int(phrases[:, 2].sum()),
        loss,
        None if loss is None else math.exp(min(loss, 700.0)),
        int(known.sum()),
        len(subject),
        classes,
        [
            (_name(subject, int(pairs[k]) // width), _name(subject, int(pairs[k]) % width), int(often[k]))
            for k in most
        ],
    )


def _f1(counts: Tensor) -> Tensor:
    """2 both / (said + true), of counts (..., 3)."""
    return 2 * counts[..., 0] / (counts[..., 1] + counts[..., 2]).clamp_min(1)


def _hidden(subject: Subject) -> bool:
    """Whether the targets are tokens that were hidden."""
    mask = getattr(subject.tokenizer, "mask_token_id", None)
    return (
        mask is not None
        and not subject.classes
        and bool((subject.samples.inputs[subject.known] == mask).all())
    )


def _name(subject: Subject, number: int) -> str:
    if _hidden(subject):
        return subject.tokenizer.decode([number]).strip() or str(number)
    return subject.class_name(number)


def _phrases(subject: Subject, y: Tensor, said: Tensor, known: Tensor) -> Tensor | None:
    """Of each text how many phrases are found whole, named, and there; ``None`` where tags do not mark phrases."""
    names = subject.classes
    if not any(name[:2] == "B-" for name in names) or any(
        name != "O" and name[:2] not in ("B-", "I-") for name in names
    ):
        return None
    rows = []
    for row, other, some in zip(y, said, known):
        true, named = (phrases([names[k] for k in tags[some].tolist()]) for tags in (row, other))
        rows.append([len(true & named), len(named), len(true)])
    return torch.tensor(rows).double()


def phrases(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(start, end, class) of the phrases that B- and I- tags mark; an I- behind another class begins one.

    >>> sorted(phrases(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
    [(0, 2, 'PER'), (3, 4, 'LOC'), (4, 5, 'LOC')]
    """
    found, start, kind = set(), 0, ""
    for place, tag in enumerate([*tags, "O"]):
        if kind and (tag[:2] != "I-" or tag[2:] != kind):
            found.add((start, place, kind))
            kind = ""
        if not kind and tag != "O":
            start, kind = place, tag[2:]
    return found


def _finding(found: Tags, what: str) -> Finding:
    told = f"{percent_interval(found.accuracy)} of {found.tokens:,} {what} in {found.texts:,} texts are right"
    if found.phrase_f1 is not None:
        told += f", and of whole phrases F1 is {percent_interval(found.phrase_f1)}"
    if found.poor:
        return Finding(
            "warning",
            f"{told}, which may be no better than naming the most frequent everywhere ({percent(found.majority)}).",
            advice="Make sure first that the tokenizer is its own and that class numbers mean the same to both.",
            key="tokens no better than the majority",
        )
    return Finding("good" if found.accuracy[0] >= 0.5 else "note", f"{told}.", key="tokens right")


def _by_class(found: Tags) -> Table:
    ranked = sorted(found.classes, key=lambda tag: tag.f1[0])[:_SHOWN]
    title = (
        f"The {len(ranked)} most frequent tokens"
        if found.hidden
        else "By class" + (f", the {_SHOWN} hardest" if len(found.classes) > _SHOWN else "")
    )
    return Table(
        title,
        ("class" if not found.hidden else "token", "F1", "95 % interval", "precision", "recall", "tokens"),
        [
            (
                tag.name,
                percent(tag.f1[0]),
                f"{percent(tag.f1[1])} to {percent(tag.f1[2])}" if math.isfinite(tag.f1[1]) else "–",
                percent(tag.precision),
                percent(tag.recall),
                tag.tokens,
            )
            for tag in ranked
        ],
    )


def _confusions(found: Tags) -> list[Table]:
    return (
        [Table("What it says instead, most often", ("is", "said", "tokens"), list(found.confused))]
        if found.confused
        else []
    )


def _bars(found: Tags) -> Picture:
    shown = sorted(found.classes, key=lambda tag: tag.f1[0])[:_SHOWN]

    def draw(ax: Any) -> None:
        places = list(range(len(shown)))
        ax.barh(places, [100 * tag.f1[0] for tag in shown], color="C0", height=0.6)
        ax.set_yticks(places, [printable(tag.name, limit=24) for tag in shown])
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.set(xlabel="F1, %", xlim=(0, 100))

    which = "of the most frequent hidden tokens" if found.hidden else "by class"
    return picture(
        draw,
        size=(6.4, 1.2 + 0.3 * len(shown)),
        caption=f"F1 {which}, the hardest first.",
        alt=f"Bars of F1 {which}: "
        + ", ".join(f"{percent(tag.f1[0], 0)} for {printable(tag.name, limit=24)}" for tag in shown[:6])
        + ".",
    )
