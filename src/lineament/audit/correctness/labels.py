"""How often single labels are right, where a sample may have several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from lineament.audit.correctness.confidence import Calibration, calibration, confidence_findings, reliability
from lineament.audit.correctness.shares import Share, mean_share, share, share_bars, share_table
from lineament.audit.phrases import percent
from lineament.audit.subject import Subject
from lineament.report.section import Finding, Section
from lineament.report.text import plain


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


def of_labels(subject: Subject) -> Section:
    targets, chance = subject.targets > 0.5, subject.outputs.double().sigmoid()
    right = (chance > 0.5) == targets
    groups = subject.samples.groups
    found = Labels(
        mean_share("all", right),
        share("all labels", right.all(1)),
        majority=float(torch.maximum(targets.double().mean(0), 1 - targets.double().mean(0)).mean()),
        labels=[share(subject.class_name(k), right[:, k]) for k in range(right.shape[1])],
        groups=[
            mean_share(subject.samples.group_names[g], right[groups == g])
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
            *([share_bars(found.groups, "group")] if len(found.groups) > 1 else []),
            share_bars(found.labels, "label"),
            reliability(known),
        ],
        tables=[
            *([share_table("By group", "group", found.groups)] if found.groups else []),
            share_table(
                "By label" + (", the 20 hardest" if len(found.labels) > 20 else ""), "label", found.labels
            ),
        ],
        numbers=plain(found),
        findings=[
            *confidence_findings(known),
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
