"""Whether two networks can be averaged: the loss between them, as they are and once the units are in one order."""

from __future__ import annotations

import torch
from torch import Tensor

from lineament.audit.phrases import compact, percent
from lineament.core.checks import InputError, require
from lineament.core.norms import batchnorms
from lineament.core.surgery.groups import channel_groups
from lineament.load.model_and_data import ModelAndData
from lineament.measure.alignment.profile import AlignmentOptions, alignment
from lineament.measure.alignment.reorder import barrier, permuted
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section


def averaging(a: ModelAndData, b: ModelAndData) -> Section:
    """Whether the two can be averaged, as they are and with b's units in the order of a's."""
    title = "Can the two be averaged, once their units are in one order?"
    rows = a.subset(max(64, min(512, int(2e11 / max(a.flops, 1.0)))), salt=7)
    data = list(a.batches(rows))
    example = a.inputs(rows[:2])
    try:
        require(
            a.layout == b.layout and torch.equal(a.targets, b.targets),
            "they take their inputs or number their classes differently.",
        )
        straight = barrier(a.model, b.model, data, points=3, loss=a.loss)
        groups = channel_groups(b.model, example)
        modules = dict(a.model.named_modules())
        at = [name for name in groups if isinstance(getattr(modules.get(name), "weight", None), Tensor)]
        bare = AlignmentOptions(keep=0)
        units = alignment(a.model, b.model, data, sites=at, nulls=(), blocks=2, options=bare) if at else None
        by = "weights" if units is None else "activations"
        turned = permuted(b.model, units, example, model_a=a.model, by=by)
        matched = barrier(a.model, turned, data, points=3, loss=a.loss)
    except InputError as error:
        return Section(title=title, status="skipped", sentence=f"The two are not averaged: {error}")
    ends = straight.losses[[0, -1]].mean()
    words = [f"{compact(each.height)}" for each in (straight, matched)]
    again = ", batch norms estimated anew" if batchnorms(a.model) else ""
    text = (
        f"Halfway between A and B the loss lies {words[0]} above the mean of the two ({compact(float(ends))}), and {words[1]} once B's units are in the order of A's "
        f"({len(groups.groups)} groups of channels matched, {len(rows)} samples{again})."
    )
    table = Table(
        "Halfway between the two networks",
        ("", "loss", "above the mean of the ends", "accuracy"),
        [
            (
                name,
                round(float(each.losses[1]), 4),
                round(each.height, 4),
                None if each.accuracies is None else percent(float(each.accuracies[1])),
            )
            for name, each in (("as they are", straight), ("B reordered", matched))
        ],
    )
    return Section(
        title=title,
        status="good",
        number=words[1],
        unit=f"loss above the ends halfway, after reordering ({words[0]} before)",
        sentence=text,
        tables=[table],
        method="convergent-learning",
        numbers={"before": straight.to_dict(), "after": matched.to_dict(), "groups": len(groups.groups)},
        findings=[Finding("note", text, key="barrier")],
    )
