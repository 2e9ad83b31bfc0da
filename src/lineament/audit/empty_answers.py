"""A classifier that gives one answer to all, or answers by chance, follows no cue and can lose any part: such findings are no praise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lineament.audit.subject import Subject
from lineament.core.statistics.shares import wilson
from lineament.report.section import Section

# Findings that say how answers change, or do not.
EMPTY = (
    "no place", "no attribute", "group does not decide", "no column", "no simple feature", "parts used", "room to spare", "repeats itself", "repeats little", "groups alike",
)  # fmt: skip
_ONE = 0.99


def why_empty(subject: Subject) -> str:
    """Why nothing follows from answers that do not change, or ""."""
    if subject.task != "classification":
        return ""
    answers, targets, count = subject.outputs.argmax(1), subject.targets, len(subject)
    width = subject.outputs.shape[1]
    given, true = (v.bincount(minlength=width).double() / count for v in (answers, targets))
    if float(given.max()) >= _ONE:
        return "it gives one answer to all samples, or nearly all"
    low, _ = wilson(int((answers == targets).sum()), count)
    # Answers drawn as often as they are given, whatever the sample, would be right so often.
    return "it is not seen to be right more often than chance" if low <= float(given @ true) else ""


def weighed(sections: Sequence[Section], subject: Subject) -> list[Section]:
    """The sections, with a note in the place of praise that such answers would always get."""
    why = why_empty(subject)
    return [_weighed(section, why) for section in sections] if why else list(sections)


def _weighed(section: Section, why: str) -> Section:
    if not any(f.key in EMPTY for f in section.findings):
        return section
    findings = [
        replace(f, severity="note", sentence=f"{f.sentence} Nothing follows: {why}.", advice="")
        if f.key in EMPTY
        else f
        for f in section.findings
    ]
    return replace(
        section,
        status="note" if section.status == "good" else section.status,
        sentence=f"{section.sentence} Nothing follows: {why}.",
        findings=findings,
    )
