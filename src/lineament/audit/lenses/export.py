"""Which of its layers would you export?

A linear read-out of each place is trained on one half of the samples of each label and judged on the other: what the last layers threw away, an earlier one still has
(Xue et al., ICLR 2024, arXiv 2403.11391). Features are read as they are, and standardised, for a read-out that standardises cannot see a layer that only weighs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import percent, percent_interval, short
from lineament.audit.subject import Subject
from lineament.core.statistics.shares import wilson
from lineament.learn.projection.layers import LayersWorth, layers_worth
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain

TITLE = "Which of its layers is worth most to others?"
HELP = "what each layer is worth to a simple read-out, and which to export"
ORDER = 48
METHOD = "projection-head"
EMBEDDING = True
ON_REQUEST = True
_MOST, _CLASSES = 1000, 50


@dataclass(frozen=True)
class Export:
    """What each place is worth, and the interval of the best and of the last; ``chosen``: the place to export."""

    worth: LayersWorth
    classes: int
    chosen: str
    best: tuple[float, float, float]
    last: tuple[float, float, float]

    @property
    def thrown_away(self) -> bool:
        """Whether the last place is worth less than the best beyond their intervals."""
        return self.last[2] < self.best[1]


def applies(subject: Subject) -> str:
    if not isinstance(subject.inputs(torch.tensor([0])), Tensor):
        return "It reads networks of one input, and this one takes several."
    # Two samples to learn from and two to judge by.
    return subject.unlabelled(4) or subject.sealed


def look(subject: Subject) -> Section:
    train, test = _halves(subject)
    own = subject.targets[torch.cat([train, test])].unique()
    y = [torch.searchsorted(own, subject.targets[rows]) for rows in (train, test)]
    x = [torch.cat([subject.inputs(part).cpu() for part in subject.parts(rows)]) for rows in (train, test)]
    worth = layers_worth(
        subject.model, (x[0], y[0]), (x[1], y[1]), sites=list(dict.fromkeys((*subject.sites, ""))),
        batch_size=subject.batch_size,
    )  # fmt: skip
    layers = worth.layers
    best, last = worth.best, layers[-1]
    # Of places that are as good within the interval, the last: it is the smallest step from the output.
    intervals = {layer.site: _interval(layer.logistic, len(test)) for layer in layers}
    chosen = next(layer for layer in reversed(layers) if layer.logistic >= intervals[best.site][1])
    found = Export(worth, len(own), chosen.site or "the output", intervals[best.site], intervals[last.site])
    text = (
        f"A linear read-out of {_name(best.site)} tells {found.classes} labels apart on {percent_interval(found.best)} of {len(test):,} samples, of its output on "
        f"{percent_interval(found.last)}"
    )
    if found.thrown_away:
        finding = Finding(
            "note", f"{text}: its last layers threw away what others may need.",
            advice=f"Export {_name(chosen.site)} for other tasks: lineament.learn.export(model, layer={chosen.site!r}).", key="earlier layer is worth more",
        )  # fmt: skip
    else:
        finding = Finding("good", f"{text}: the output keeps what the layers before it know of these labels.", key="output keeps it")  # fmt: skip
    return Section(
        status=finding.severity,
        number=short(found.chosen),
        unit="is the place to export",
        sentence=f"{finding.sentence} The read-outs were trained on {len(train):,} other samples of the same labels; labels that it was never trained on may be told apart elsewhere.",
        pictures=[_by_depth(worth, intervals)],
        tables=[
            Table(
                f"Accuracy of read-outs on {len(test):,} samples, places in depth order (rank: exponential of the entropy of the principal variances)",
                ("place", "width", "linear, as it is", "linear, standardised", "10 neighbours", "rank"),
                [
                    (_name(v.site), v.width, percent(v.logistic), percent(v.logistic_standardised), percent(v.neighbours), round(v.rank, 1))
                    for v in layers
                ],
            )
        ],
        numbers=plain(found),
        findings=[finding],
    )  # fmt: skip


def _name(site: str) -> str:
    return site or "the output"


def _interval(accuracy: float, count: int) -> tuple[float, float, float]:
    return (accuracy, *wilson(round(accuracy * count), count))


def _halves(subject: Subject) -> tuple[Tensor, Tensor]:
    """Rows to learn from and to judge by: of at most 50 labels, and of each one half and the other."""
    generator = torch.Generator().manual_seed(subject.seed)
    counts = subject.targets.bincount()
    labels = (counts > 3).nonzero()[:, 0]
    labels = labels[torch.randperm(len(labels), generator=generator)[:_CLASSES]]
    each = max(4, _MOST // len(labels))
    halves: list[list[Tensor]] = [[], []]
    for label in labels.tolist():
        own = (subject.targets == label).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)[:each]]
        for half, rows in zip(halves, own.tensor_split(2)):
            half.append(rows)
    train, test = (torch.cat(half).sort().values for half in halves)
    return train, test


def _by_depth(worth: LayersWorth, intervals: dict[str, Any]) -> Any:
    names = [short(_name(layer.site)) for layer in worth.layers]

    def draw(ax: Any) -> None:
        places = list(range(len(names)))
        values = [layer.logistic for layer in worth.layers]
        errors = [[v - intervals[layer.site][1] for v, layer in zip(values, worth.layers)]]
        errors += [[intervals[layer.site][2] - v for v, layer in zip(values, worth.layers)]]
        ax.errorbar(values, places, xerr=errors, fmt="o-", color="C0", label="as it is")
        ax.plot(
            [layer.logistic_standardised for layer in worth.layers],
            places,
            "s--",
            color="C1",
            label="standardised",
        )
        ax.set_yticks(places, names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.set(xlabel="accuracy of a linear read-out")
        ax.legend()

    return picture(
        draw, size=(6.0, 1.4 + 0.32 * len(names)),
        caption="From the first place (top) to the output (bottom), with 95 % intervals over the samples judged.",
        alt="; ".join(f"{name} {percent(layer.logistic)}" for name, layer in zip(names, worth.layers)),
    )  # fmt: skip
