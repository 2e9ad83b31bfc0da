"""Which of two embeddings recognises more? True-accept rates and nearest neighbours of both, with intervals of the paired differences."""

from __future__ import annotations

import torch

from lineament.audit.phrases import percent
from lineament.load.model_and_data import ModelAndData
from lineament.measure.embeddings.pairs import recognition
from lineament.measure.embeddings.spread import Interval, recognition_change
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section

_FARS = (1e-1, 1e-2, 1e-3)


def recognised(a: ModelAndData, b: ModelAndData) -> Section:
    """Both at every rate that lets ten impostors pass, and what changes from A to B."""
    outputs = [each.outputs.float() for each in (a, b)]
    kept = torch.stack([(x.norm(dim=1) > 0) & x.isfinite().all(1) for x in outputs]).all(0)
    x, y = (each[kept] for each in outputs)
    labels = a.targets[kept]
    impostors = recognition(x, labels, _FARS[:1]).impostors
    fars = [far for far in _FARS if far * impostors >= 10] or [_FARS[0]]
    worth = [recognition(each, labels, fars) for each in (x, y)]
    change = recognition_change(x, y, labels, fars, seed=a.seed)
    rows = [
        (f"TAR at FAR {percent(far)}", percent(one), percent(two), _points(by, interval))
        for far, one, two, by, interval in zip(
            fars, worth[0].tar, worth[1].tar, change.tar, change.tar_interval
        )
    ]
    rows.append(
        (
            "nearest other sample is of the same label",
            percent(worth[0].recall),
            percent(worth[1].recall),
            _points(change.recall, change.recall_interval),
        )
    )
    low, high = change.tar_interval[-1]
    told = f"at one false accept in {round(1 / fars[-1]):,} A accepts {percent(worth[0].tar[-1])} of the pairs of one label and B {percent(worth[1].tar[-1])}"
    verdict = (
        "B recognises more"
        if low > 0
        else "A recognises more"
        if high < 0
        else "which recognises more is not resolved"
    )
    finding = Finding(
        "note",
        f"Of {worth[0].people:,} labels {verdict}: {told}, {_points(change.tar[-1], (low, high))} points.",
        key="embeddings part" if low > 0 or high < 0 else "embeddings not told apart",
    )
    lost = int((~kept).sum())
    dropped = f" {lost:,} samples that either embeds as zero are left out." if lost else ""
    return Section(
        title="Whom does either embedding recognise?",
        status="note",
        number=_points(change.tar[-1], None),
        unit=f"points of TAR from A to B, at one false accept in {round(1 / fars[-1]):,}",
        sentence=f"{finding.sentence} Intervals are over draws of labels, the same for both, of {worth[0].genuine:,} pairs of one label and {worth[0].impostors:,} of two.{dropped}",
        tables=[Table("Both embeddings", ("", "A", "B", "from A to B, points"), rows)],
        numbers={"a": worth[0], "b": worth[1], "change": change},
        findings=[finding],
    )


def _points(by: float, interval: Interval | None) -> str:
    low = "" if interval is None else f" ({100 * interval[0]:+.1f} to {100 * interval[1]:+.1f})"
    return f"{100 * by:+.1f}{low}"
