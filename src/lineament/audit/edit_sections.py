"""The sections of an edit's page: what a smaller network costs, overall and by class, and what is left of a class; shares stand with their intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.audit.edit_doubts import NONE, SEARCHED, counted, flattered, harm, pays, price, shares_tried
from lineament.audit.edit_subject import EditSubject, name_of
from lineament.audit.phrases import mean_interval, percent, percent_interval
from lineament.core.models import called, decided, device_of, frozen, logits
from lineament.core.results import plain
from lineament.core.statistics.shares import Interval, paired_difference, share
from lineament.edit.forgetting import Forgotten, Knowledge
from lineament.edit.pruned import Pruned
from lineament.edit.targets import Timing
from lineament.edit.unlearning import Unlearned
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section

WAS, NOW, NORMS, CHANCE = "as it was", "pruned", "norms alone, no repair", "by chance, the same repairs"


@dataclass(frozen=True)
class Score:
    """What a network is worth on the measuring half.

    ``value``: perplexity of texts, accuracy of classes, else the mean squared distance from the own answers; ``each``: [samples], whether it is right, or the loss in nats, or the distance.
    """

    value: float
    each: Tensor

    def change(self, before: Score) -> Interval:
        """From another network on the same samples, with its 95 % interval: the difference of accuracies, or how many times the perplexity."""
        if self.each.dtype == torch.bool:
            return paired_difference(self.each, before.each)
        mean, low, high = (math.exp(min(v, 700)) for v in mean_interval(self.each - before.each))
        return mean, low, high


def score(subject: EditSubject, model: nn.Module) -> Score:
    """A network on the measuring half."""
    if subject.tokenizer is not None:
        found = []
        for batch in subject.halves[1]:
            ids = batch["input_ids"].to(device_of(model))
            with frozen(model), torch.no_grad():
                scores = logits(model(input_ids=ids))[:, :-1].float()
            lost = F.cross_entropy(scores.transpose(1, 2), ids[:, 1:], reduction="none")
            found.append(lost.double().mean(1).cpu())
        each = torch.cat(found)
        return Score(math.exp(min(float(each.mean()), 700)), each)
    answers = _answers(model, subject.halves[1])
    if subject.labels is None:
        each = (answers - _answers(subject.model, subject.halves[1])).square().flatten(1).mean(1)
        return Score(float(each.mean()), each)
    each = decided(answers) == subject.labels[1].cpu()
    return Score(float(each.double().mean()), each)


def _answers(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    found = []
    for batch in batches:
        with frozen(model), torch.no_grad():
            found.append(logits(called(model, batch)).float().cpu())
    return torch.cat(found)


def pruned_section(
    subject: EditSubject, found: Pruned, scores: Mapping[str, Score], times: Timing
) -> Section:
    """What the smaller network costs, beside channels that were chosen otherwise."""
    unit = "perplexity" if subject.tokenizer is not None else "accuracy" if subject.labels is not None else ""
    was, now = scores[WAS], scores[NOW]
    changes = {} if not unit else {name: each.change(was) for name, each in scores.items() if name != WAS}
    what, told, rows = _worth(unit, scores, changes)
    others = [_shown(unit, scores[name]) for name in (CHANCE, NORMS)]
    text = (
        f"With {percent(found.share, 0)} of the parameters and {found.flops[1] / max(found.flops[0], 1):.2f} times the operations, {told}; as many channels taken out by chance "
        f"with the same repairs give {others[0]}, by their norms without repair {others[1]}. {times.sentence}"
    )
    doubt = subject.doubt or (flattered(changes[NOW]) if unit == "accuracy" else NONE)
    lost = (
        was.value - now.value
        if unit == "accuracy"
        else now.value / max(was.value, 1e-12) - 1
        if unit
        else now.value
    )
    # Less accuracy within chance is no warning, and no praise.
    chance = unit == "accuracy" and changes[NOW][2] >= 0
    much = lost > (0.02 if unit else 0.1)
    severity = (
        "warning"
        if doubt or (much and not chance)
        else "note"
        if much or not _knows(subject, was)
        else "good"
    )
    text = f"{doubt.sentence} {text}".strip()
    return Section(
        "network",
        "What does the smaller network cost?",
        severity,
        percent(found.share, 0),
        "of the parameters left",
        text,
        numbers={
            "scores": {name: each.value for name, each in scores.items()},
            "intervals": {name: list(share(each.each)[1:]) for name, each in scores.items()} if unit == "accuracy" else {},
            "changes": plain(changes),
            "unit": unit or "squared distance",
            "seconds": list(times.seconds),
            "times as fast": list(times.parts),
        },
        method="modhifi",
        tables=[
            Table(f"{what} on the half that did not calibrate, {len(was.each)} {'sequences' if unit == 'perplexity' else 'samples'}", *rows),
            Table("Channels", ["group", "before", "after", "share"], [[name, *size, size[1] / size[0]] for name, size in found.sizes.items()]),
            Table("Share of each layer's output lost", ["layer", "channels gone", "after compensation"], [[n, *lost] for n, lost in found.errors.items()]),
        ],
        findings=[Finding(severity, text, "network", doubt.advice)],
    )  # fmt: skip


def _shown(unit: str, one: Score) -> str:
    return percent(one.value) if unit == "accuracy" else f"{one.value:.2f}" if unit else f"{one.value:.3g}"


def _worth(
    unit: str, scores: Mapping[str, Score], changes: Mapping[str, Interval]
) -> tuple[str, str, tuple[list[str], list[list[Any]]]]:
    """What is measured, what became of it in words, and the columns and rows of all networks."""
    was, now = scores[WAS], scores[NOW]
    if unit == "accuracy":
        change, low, high = changes[NOW]
        told = (
            f"accuracy is {percent_interval(share(now.each))} where it was {percent_interval(share(was.each))} of {len(was.each)} samples that did not calibrate, "
            f"a change of {100 * change:+.1f} points (95 % interval {100 * low:+.1f} to {100 * high:+.1f})"
        )
        rows = [
            [name, percent_interval(share(one.each)), _points(changes[name]) if name in changes else None]
            for name, one in scores.items()
        ]
        return "Accuracy", told, (["network", "accuracy (95 % interval)", "change in points (95 % interval)"], rows)  # fmt: skip
    if unit == "perplexity":
        times, low, high = changes[NOW]
        told = f"perplexity is {now.value:.2f} where it was {was.value:.2f}, {times:.3f} times as high (95 % interval {low:.3f} to {high:.3f}, {len(was.each)} sequences that did not calibrate)"
        rows = [[name, one.value, *changes.get(name, [None] * 3)] for name, one in scores.items()]
        return "Perplexity", told, (["network", "perplexity", "times as it was", "from", "to"], rows)
    told = f"the squared distance from the own answers is {now.value:.3g}"
    rows = [[name, one.value] for name, one in scores.items()]
    return (
        "Squared distance from the own answers",
        told,
        (["network", "squared distance from the own answers"], rows),
    )


def _points(change: Interval) -> str:
    """A change of shares in points, with its interval."""
    mean, low, high = (f"{100 * v:+.1f}" for v in change)
    return f"{mean} ({low} to {high})"


def _knows(subject: EditSubject, was: Score) -> bool:
    """Whether there was much to lose: classes are answered at least halfway from always naming the most frequent one to always right."""
    if subject.labels is None:
        return True
    labels = subject.labels[1].cpu()
    return was.value >= (1 + float(labels.bincount().max()) / len(labels)) / 2


def classes_section(subject: EditSubject, before: Tensor, after: Tensor) -> Section:
    """Which classes pay; ``before`` and ``after`` tell which samples of the measuring half are right."""
    assert subject.labels is not None
    labels = subject.labels[1].cpu()
    present = labels.unique().tolist()
    rows, changes = [], []
    for number in present:
        there = labels == number
        change = paired_difference(after[there], before[there])
        changes.append(change)
        rows.append(
            [name_of(subject, number), int(there.sum()), *(percent_interval(share(x[there])) for x in (before, after)), _points(change)]
        )  # fmt: skip
    at = min(range(len(rows)), key=lambda at: changes[at][0])
    there, name = labels == present[at], rows[at][0]
    was, now = (float(x[there].double().mean()) for x in (before, after))
    text = f"The class that changes most for the worse is {name}: right in {percent(now)} where it was {percent(was)} (of {int(there.sum())} samples; {100 * changes[at][0]:+.1f} points, {100 * changes[at][1]:+.1f} to {100 * changes[at][2]:+.1f})."
    table = Table("Accuracy by class, with 95 % intervals", ["class", "samples", "before", "after", "change in points"], rows)  # fmt: skip
    told = pays(before[there], after[there], len(rows))
    findings = [Finding("warning", text, "classes", "Compare classes before you use it, or take fewer channels out.", key="class pays")] if told else []  # fmt: skip
    numbers = [
        [
            name_of(subject, number),
            int((labels == number).sum()),
            *(float(x[labels == number].double().mean()) for x in (before, after)),
        ]
        for number in present
    ]
    return Section(
        "classes", "Which classes pay?", "warning" if told else "note", f"{100 * (now - was):+.1f}", f"points for class {name}", text,
        numbers={"classes": numbers}, tables=[table], findings=findings,
    )  # fmt: skip


def forgotten_section(
    subject: EditSubject,
    name: str,
    found: Unlearned,
    told: Forgotten,
    head: Knowledge,
    counts: tuple[int, int],
    calibrating: tuple[int, int],
) -> Section:
    """What is left of a class; ``counts`` and ``calibrating``: samples of the class and of the others that measured, and that the edit saw."""
    harmed, advice = harm(told, head)
    severity = "warning" if told.verdict == "kept" or harmed or subject.doubt else "note"
    text = " ".join(part for part in (subject.doubt.sentence, harmed, told.sentence, price(found)) if part)
    if told.verdict == "kept" and not harmed and found.before is not None and not found.reached:
        advice = SEARCHED
    probed = min(counts)  # half of as many of either kind
    rows = [
        [what, counted(one.forget, counts[0]), counted(one.retain, counts[1]), counted(max(one.probe.values()), probed), "not within the steps" if one.samples is None else one.samples]
        for what, one in ((WAS, told.before), ("edited", told.after), ("head alone: the class is never answered", head))
    ]  # fmt: skip
    columns = ["network", "answered, the class", "right, the others", "linear probe of the class", "samples to learn it again"]  # fmt: skip
    title = f"On {counts[0]} samples of the class and {counts[1]} others that the edit did not see, with 95 % intervals"
    return Section(
        "forgotten",
        "Was the class forgotten?",
        severity,
        percent(told.after.forget),
        f"of class {name} still answered",
        text,
        numbers={"verdict": told.verdict, "edit": found.to_dict(), "before": plain(told.before), "after": plain(told.after), "head": plain(head)},
        method="modhifi",
        tables=[Table(title, columns, rows), *shares_tried(found, *calibrating)],
        findings=[Finding(severity, text, "forgotten", subject.doubt.advice if subject.doubt else advice, key=told.verdict)],
    )  # fmt: skip
