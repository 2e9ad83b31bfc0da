"""Does it decide by an attribute that is easy to extract: one that the user names by groups, or one that every sample has?

Hermann, Mobahi, Fel, Mozer (ICLR 2024, arXiv 2310.16228) ask whether a network relies on what is available more than the best rule would. With groups, reliance is
measured where the group's vote and the label disagree. Without, simple attributes (brightness, colours, border, corners, a text's length) are ranked by how often answers
follow them when two samples exchange them; how well an attribute predicts the label is a fact of the data and proves nothing of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import percent
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.models import frozen
from lineament.core.statistics.shares import Interval
from lineament.measure.shortcuts.suspects import IMAGE_ATTRIBUTES, Suspect, Suspects, suspects_of
from lineament.measure.shortcuts.votes import LABEL, Conflict, GroupBias, bias_of_answers
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

TITLE = "Does it take a shortcut?"
HELP = "whether it decides by an easy attribute: a group, brightness, colour, border or corners"
ORDER = 24
METHOD = "shortcut-learning"
_MOST, _PAIRS, _SHOWN = 1000, 300, 4
_NUMBERS = 10**8  # numbers of the inputs that are held at once


@dataclass(frozen=True)
class Shortcuts:
    """What answers follow among the simple attributes (``suspects``, on ``rows`` of the data), and of the user's groups."""

    suspects: Suspects | None
    groups: GroupBias | None
    rows: list[int]

    def to_dict(self) -> dict[str, Any]:
        return {
            "suspects": None if self.suspects is None else self.suspects.to_dict(),
            "groups": None if self.groups is None else self.groups.to_dict(),
            "rows": self.rows,
        }


def applies(subject: Subject) -> str:
    if subject.task != "classification":
        return f"An attribute's vote is a class; this network answers with {'several labels' if subject.task == 'multi-label' else 'real values'}."
    if not _has_attributes(subject) and not _has_groups(subject):
        return "Its inputs are neither images nor token ids, so that it has no simple attributes to exchange; name some by groups."
    if len(subject) < 16:
        return f"{len(subject)} samples cannot tell what an attribute predicts; expected at least 16."
    return ""


def look(subject: Subject) -> Section:
    groups = bias_of_answers(subject.outputs.argmax(1), subject.samples) if _has_groups(subject) else None
    rows, tried = torch.empty(0, dtype=torch.long), None
    if _has_attributes(subject):
        one = subject.inputs(torch.tensor([0])).numel()
        passes = 1 + 2 * len(IMAGE_ATTRIBUTES) * _PAIRS / _MOST
        rows = subject.subset(
            min(subject.affordable(6e12, passes, most=_MOST, least=64), max(64, _NUMBERS // one)), salt=11
        )
        pairs = max(32, min(_PAIRS, len(rows)))
        extras = {n: v[rows] for n, v in subject.samples.extras.items() if n in ("file_size", "aspect_ratio")}
        tried = suspects_of(
            lambda x: _answers(subject, x), subject.inputs(rows), subject.targets[rows],
            numbers=extras, pairs=pairs, seed=subject.seed,
        )  # fmt: skip
    if tried is None and _group(groups) is None:
        nothing = "Its inputs have no simple attributes to exchange."
        return Section(status="skipped", sentence=" ".join([*_group_sentences(groups), nothing]))
    found = Shortcuts(tried, groups, rows.tolist())
    findings = [*_group_findings(groups), *_suspect_findings(tried)]
    number, unit = _headline(found)
    return Section(
        status="warning"
        if any(f.severity == "warning" for f in findings)
        else "note"
        if any(f.severity == "note" for f in findings)
        else "good",
        number=number,
        unit=unit,
        sentence=" ".join([*_group_sentences(groups), *_suspect_sentences(tried)]),
        pictures=[*([_bars(tried)] if tried else []), *_turned(subject, rows, tried)],
        tables=[*_group_tables(subject, groups), *([_table(tried)] if tried else [])],
        numbers=plain(found),
        findings=findings,
    )


def _has_groups(subject: Subject) -> bool:
    groups = subject.samples.groups
    return groups is not None and len(groups.unique()) > 1


def _has_attributes(subject: Subject) -> bool:
    first = subject.inputs(torch.tensor([0]))
    # Several inputs, and sequences of several lengths, have no counterpart in one another.
    if not isinstance(first, Tensor) or subject.samples.lengths is not None:
        return False
    return subject.images or (first.ndim == 2 and not first.is_floating_point())


def _answers(subject: Subject, inputs: Tensor) -> Tensor:
    """The network's class for inputs as it takes them, in batches of the size that it needs."""

    def answers(part: Tensor) -> Tensor:
        x = part
        if subject.fixed_batch and len(part) < subject.batch_size:
            x = torch.cat([part, part[-1:].expand(subject.batch_size - len(part), *part.shape[1:])])
        outputs = subject.model(x)
        outputs = getattr(outputs, "logits", outputs)
        return outputs.reshape(len(x), -1)[: len(part)].float().argmax(1).cpu()

    with frozen(subject.model), torch.no_grad():
        return torch.cat(shards.each(inputs.split(subject.batch_size), answers, "answers"))


def _group(groups: GroupBias | None) -> Conflict | None:
    """The group against the label, where it says something of the class and disagrees with it somewhere."""
    if groups is None or not groups.attributes[0].predictive or not groups[groups.attributes[0].name].samples:
        return None
    return groups[groups.attributes[0].name]


def _headline(found: Shortcuts) -> tuple[str, str]:
    conflict = _group(found.groups)
    if conflict is not None and conflict.reliance[1] > 0:
        return percent(conflict.with_attribute, 0), "of answers go with the group where it misleads"
    if found.suspects is not None and found.suspects.tried and found.suspects.tried[0].followed is not None:
        first = found.suspects.tried[0]
        assert first.followed is not None
        return percent(first.followed[0], 0), f"of answers follow the {first.name} of another sample"
    if conflict is not None:
        return percent(conflict.with_attribute, 0), "of answers go with the group where it misleads"
    return "–", "nothing could be exchanged"


def _interval(x: Interval) -> str:
    return f"{percent(x[0])} ({percent(x[1])} to {percent(x[2])})"


def _signed(x: Interval) -> str:
    value, low, high = (f"{v:+.2f}".replace("-", "−") for v in x)
    return f"{value} ({low} to {high})"


def _group_sentences(groups: GroupBias | None) -> list[str]:
    if groups is None:
        return []
    name, conflict = groups.attributes[0], _group(groups)
    if conflict is None:
        why = (
            "says no more of the class than the commonest class does"
            if not name.predictive
            else "never votes for another class than the label"
        )
        return [f"On these samples the group {why}, so that it cannot be told from the label's own evidence."]
    return [
        f"A group's vote is its likeliest class among {groups.reference} (right for {_interval(name.predictivity)}, the commonest class for {percent(name.chance)}). On the {conflict.samples:,} samples in "
        f"{conflict.cells} cells (group and label) where the two disagree, {percent(conflict.with_attribute)} of answers go with the group and {percent(conflict.with_other)} with the label, cells counting "
        f"alike: a reliance of {_signed(conflict.reliance)}, where 1 is the group alone and −1, the best rule's, the label alone."
    ]


def _group_findings(groups: GroupBias | None) -> list[Finding]:
    conflict = _group(groups)
    if conflict is None:
        return []
    told = f"where group and label disagree ({conflict.samples:,} samples in {conflict.cells} cells), {percent(conflict.with_attribute)} of answers go with the group and {percent(conflict.with_other)} with the label (reliance {_signed(conflict.reliance)}, the best rule's is −1)"
    if conflict.reliance[1] > 0:
        return [
            Finding(
                "warning",
                f"It decides by the group more than by what is asked: {told}.",
                advice="Take training samples in which the group goes with another class, or weigh the samples of such cells more; then train and audit again.",
                key="group decides",
            )
        ]
    return [Finding("good", f"It does not decide by the group: {told}.", key="group does not decide")]


def _suspect_sentences(found: Suspects | None) -> list[str]:
    if found is None:
        return []
    if not len(found.receivers):
        return list(found.notes)
    n = found.tried[0].samples
    said = f"{len([s for s in found.tried if s.pairs])} simple attributes were exchanged between {len(found.receivers)} pairs of samples that are answered differently, and each was asked how well it alone gives the label of {n:,} samples (trees, on samples that they were not fitted to)."
    if found.deciding:
        said += (
            " Answers follow "
            + "; ".join(
                f"{s.name}: {_interval(s.followed)}, against {percent(s.control[0])} with the same change from a sample answered alike"
                for s in found.deciding
                if s.followed and s.control
            )
            + "."
        )
    else:
        first = found.tried[0]
        assert first.excess is not None
        said += f" Answers follow none of them (the most: {first.name}, {_interval(first.excess)} beyond the control)."
    only = [s for s in found.tried if s.predictive and not s.decides]
    if only:
        said += " " + _only(only)
    return [said + " Attributes that count only together, and shapes, were not tried."]


def _only(suspects: list[Suspect]) -> str:
    best = max(suspects, key=lambda s: s.predicts[0])
    others = f" (and {len(suspects) - 1} more, see the table)" if len(suspects) > 1 else ""
    return f"In these data {best.name} alone gives {_interval(best.predicts)} of labels, the commonest class {percent(best.chance)}{others}; this network was not seen to use it."


def _suspect_findings(found: Suspects | None) -> list[Finding]:
    if found is None or not len(found.receivers):
        return []
    if not found.deciding:
        names = ", ".join(s.name for s in found.tried if s.pairs)
        return [
            Finding(
                "good",
                f"Answers follow no simple attribute when {len(found.receivers)} pairs of samples exchange it: {names}.",
                key="no attribute",
            )
        ]
    return [
        Finding(
            "warning",
            f"It relies on the {s.name} of the sample: a shortcut, unless that is what you ask about. Giving samples the {s.name} of one that is answered otherwise turns {_interval(s.followed)} of {s.pairs} answers into that "
            f"one's; the same from a sample answered alike, {percent(s.control[0])}. Alone it gives {percent(s.predicts[0])} of labels, the commonest class {percent(s.chance)}; where it gives the wrong one, the network is right for "
            f"{percent(s.where_wrong[0])} of {s.wrong}, elsewhere for {percent(s.where_right[0])}.",
            advice=f"Vary the {s.name} within each class of the training data (or make it alike in all), train again and audit again.",
            key="attribute decides",
        )
        for s in found.deciding[:2]
        if s.followed and s.control
    ]


def _table(found: Suspects) -> Table:
    return Table(
        f"Simple attributes, those that answers follow most first ({found.tried[0].samples:,} samples, {len(found.receivers)} pairs; 95 % intervals)",
        ("attribute", "alone gives the label", "commonest class", "right where it does", "right where it does not", "answers that follow it", "control", "beyond the control"),
        [
            (
                s.name,
                _interval(s.predicts),
                percent(s.chance),
                _interval(s.where_right) if s.wrong < s.samples else "–",
                _interval(s.where_wrong) if s.wrong else "–",
                _interval(s.followed) if s.followed else "cannot be exchanged",
                percent(s.control[0]) if s.control else "–",
                _interval(s.excess) if s.excess else "–",
            )
            for s in found.tried
        ],
    )  # fmt: skip


def _group_tables(subject: Subject, groups: GroupBias | None) -> list[Table]:
    if groups is None:
        return []
    rows = [
        (
            printable(c.values[0], limit=20),
            printable(subject.class_name(c.label), limit=20),
            c.samples,
            _interval(c.accuracy),
        )
        for c in sorted(groups.cells, key=lambda c: c.accuracy[0])[:40]
    ]
    return [Table("By group and class, the worst first", ("group", LABEL, "samples", "right"), rows)]


def _bars(found: Suspects) -> Picture:
    shown = [s for s in found.tried if s.followed is not None]

    def draw(ax: Any) -> None:
        at = range(len(shown))
        for shift, colour, label, values in (
            (-0.2, "C0", "answers that follow it", [s.followed for s in shown]),
            (0.2, "C7", "control", [s.control for s in shown]),
        ):
            middle = [100 * v[0] for v in values if v]
            ends = [[100 * (v[0] - v[1]) for v in values if v], [100 * (v[2] - v[0]) for v in values if v]]
            ax.barh([k + shift for k in at], middle, height=0.36, xerr=ends, color=colour, label=label)
        ax.plot(
            [100 * s.predicts[0] for s in shown],
            list(at),
            "|",
            color="C1",
            markersize=14,
            label="labels that it alone gives",
        )
        ax.set_yticks(list(at), [s.name for s in shown])
        ax.set(xlim=(0, 100), xlabel="% of pairs, and of labels")
        ax.invert_yaxis()
        ax.legend(loc="lower right", fontsize=8)

    return picture(
        draw,
        size=(7.0, 1.2 + 0.36 * len(shown)),
        caption="How many answers follow each attribute when two samples exchange it, beside the same change from a sample answered alike; orange: how well the attribute alone gives the label, which is a fact of the data.",
        alt="Answers that follow: "
        + ", ".join(
            f"{s.name} {percent(s.followed[0], 0)} (control {percent(s.control[0], 0)})"
            for s in shown
            if s.followed and s.control
        )
        + ".",
    )


def _turned(subject: Subject, rows: Tensor, found: Suspects | None) -> list[Picture]:
    """Images that turned with the attribute that decides most."""
    if found is None or not found.deciding or not subject.images:
        return []
    name = found.deciding[0].name
    change = IMAGE_ATTRIBUTES[name][1]
    assert change is not None
    x, giver = (subject.inputs(rows[at]) for at in (found.receivers, found.givers))
    mixed = change(x, giver)
    said, lent, now = (_answers(subject, images) for images in (x, giver, mixed))
    at = ((now == lent) & (said != lent)).nonzero().flatten()[:_SHOWN]
    if not len(at):
        return []
    low, high = (
        min(float(x[at].min()), float(giver[at].min())),
        max(float(x[at].max()), float(giver[at].max())),
    )

    def draw(axes: Any) -> None:
        for column, k in enumerate(at.tolist()):
            lines = ((x, said, "it says"), (giver, lent, "it says"), (mixed, now, "now it says"))
            for line, (images, answers, word) in enumerate(lines):
                ax = axes[line, column]
                shown = ((images[k].float().cpu() - low) / max(high - low, 1e-12)).clamp(0, 1)
                shown = shown[:3].movedim(0, -1) if len(shown) >= 3 else shown[0]
                ax.imshow(shown.numpy(), cmap="gray", vmin=0, vmax=1)
                ax.set(xticks=[], yticks=[])
                ax.set_title(f"{word} {printable(subject.class_name(int(answers[k])), limit=14)}", fontsize=8)

    return [
        picture(
            draw,
            kind="png",
            panels=(3, len(at)),
            size=(1.5 * len(at) + 0.4, 5.4),
            caption=f"Images (top) that get the {name} of another (middle), as the network is given them; its answers to all three (the first pairs whose answer turned).",
            alt=f"{len(at)} images whose answer becomes another image's when they get its {name}.",
        )
    ]
