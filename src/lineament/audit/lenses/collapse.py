"""How far have its features collapsed to one point per class, layer by layer?

Neural collapse (Papyan et al. 2020; Tirer et al. 2022, arXiv 2210.16658): NC1~ is the variance within classes in units of that
between them, NC2 the distance of the class means from a simplex, NC4 how often the network differs from the nearest class mean. All samples
are measured, and again without each sixth of them, whose differences give the errors, and on either half of each class.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from lineament.audit.estimates import Estimate, halved, joined, split, without
from lineament.audit.phrases import compact, percent, short
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.sites.depth import tokens_of
from lineament.core.statistics.shares import wilson
from lineament.measure.collapse.metrics import CollapseMeter
from lineament.measure.collapse.profile import collapse, pooled
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain

TITLE = "How does it hold its classes, layer by layer?"
HELP = "how far its features have collapsed to one point per class, layer by layer"
ORDER = 30
METHOD = "neural-collapse"
# Fewer samples a class than this: a class mean is its samples' own.
_FEW = 10


@dataclass(frozen=True)
class Layer:
    """Neural collapse at one site; ``None`` where it cannot be measured.

    ``halves`` are NC1~ of either half of the samples, and ``error`` is half the width of its 95 % interval.
    """

    site: str
    nc1_tilde: float
    error: float
    halves: tuple[float, ...]
    nc1: float | None
    nc2: float | None
    nc3: float | None
    nc4: float | None
    cdnv: float | None
    nearest_mean_accuracy: float | None
    agreement: float | None


@dataclass(frozen=True)
class Collapse:
    """Neural collapse by site, in depth order; ``few``: too few samples a class to tell; ``rows``: the samples of each half, by their numbers in the data."""

    sites: Sequence[Layer]
    head: str | None
    samples: int
    classes: int
    few: bool
    rows: Sequence[Sequence[int]]


def applies(subject: Subject) -> str:
    if subject.task != "classification":
        return f"Neural collapse is about one class a sample; this network answers with {'several labels' if subject.task == 'multi-label' else 'real values'}."
    if subject.samples.targets.bincount().max() < 2:
        return "Every class has a single sample, so that there is no spread within classes to measure."
    return subject.sealed


def look(subject: Subject) -> Section:
    present, labels = torch.unique(subject.targets, return_inverse=True)
    every = len(present) == subject.outputs.shape[1]
    # Classes without a sample have no mean; the others are numbered anew, and NC3, which needs all, is left out.
    numbered = replace(subject, samples=replace(subject.samples, targets=labels))
    rows = torch.arange(len(subject))
    parts = split(rows, subject.seed, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        found = collapse(subject.model, numbered.batches(rows), sites=list(subject.sites))
        again = _parts(subject, parts, labels)
        layers = []
        for site, m in found.metrics.items():
            meters = [part[site] for part in again]
            spread = Estimate.of(
                lambda some: m.nc1_tilde if some is None else reduce(add, some).compute().nc1_tilde,  # noqa: B023
                None,
                without(meters),
                halved(meters),
                left_out=True,
            )
            layers.append(
                Layer(
                    site,
                    m.nc1_tilde,
                    spread.error,
                    spread.halves,
                    m.nc1,
                    m.nc2,
                    m.nc3 if every else None,
                    m.nc4 if every else None,
                    m.cdnv,
                    m.nearest_mean_accuracy,
                    None if m.nc4 is None or not every else 1 - m.nc4,
                )
            )
    each = len(labels) / len(present)
    measured = Collapse(
        layers,
        found.head,
        found.samples,
        len(present),
        each < _FEW,
        [subject.samples.index[joined(half)].tolist() for half in halved(parts)],
    )
    last, first = layers[-1], layers[0]
    value = last.nc1_tilde
    sentence = (
        f"Over {found.samples:,} samples of {len(present)} classes{', and again without each sixth of them' if parts else ''}: at the last place looked at ({short(last.site, 40)}), features "
        f"{_how(last)}: their variance within classes is {_estimate(last)} times that between class means ({_estimate(first)} at the first, {short(first.site, 40)}). "
    )
    if last.nearest_mean_accuracy is not None:
        low, high = wilson(round(last.nearest_mean_accuracy * found.samples), found.samples)
        sentence += (
            f"The nearest class mean alone would be right for {percent(last.nearest_mean_accuracy)} of these samples, whose own means they are (95 % interval of samples like "
            f"these {percent(low)} to {percent(high)}). "
        )
    if measured.few:
        sentence += f"With {compact(each)} samples a class, each sample is much of its own class's mean, which makes classes look tighter and the nearest mean righter than they are. "
    if not every:
        sentence += f"Only {len(present)} of {subject.outputs.shape[1]} classes occur in the data, so NC3 and NC4 are left out. "
    return Section(
        status=_finding(measured).severity,
        number=compact(value),
        unit="variance within classes / between them, at the last place",
        sentence=sentence.strip(),
        pictures=[_by_depth(layers)],
        tables=[
            Table(
                f"Neural collapse by place over {found.samples:,} samples, in depth order (NC1~: variance within / between classes; error: half the width of its 95 % interval, which is what many more such samples would give; NC1: the same, direction by direction; "
                "NC2: distance of the class means from a simplex; NC4: answers that are not the nearest class mean)",
                ("place", "NC1~", "error", "NC1", "NC2", "NC4", "nearest mean right"),
                [
                    (
                        layer.site,
                        _finite(layer.nc1_tilde),
                        _finite(layer.error),
                        _finite(layer.nc1),
                        _finite(layer.nc2),
                        None if layer.nc4 is None else percent(layer.nc4),
                        None if layer.nearest_mean_accuracy is None else percent(layer.nearest_mean_accuracy),
                    )
                    for layer in layers
                ],
            )
        ],
        numbers=plain(measured),
        findings=[_finding(measured)],
    )


def _parts(subject: Subject, parts: Sequence[Tensor], labels: Tensor) -> list[dict[str, CollapseMeter]]:
    """What each part of the samples gives at each site, to be added."""
    meters = [{site: CollapseMeter(scatter=False) for site in subject.sites} for _ in parts]
    if not parts:
        return meters
    part_of = torch.empty(len(labels), dtype=torch.long)
    for number, part in enumerate(parts):
        part_of[part] = number
    for at, acts in subject.activations(torch.arange(len(labels)), "collapse, part by part"):
        for site, features in acts.items():
            vectors, which = pooled(tokens_of(subject.model, site, features)), part_of[at]
            for number in which.unique().tolist():
                mine = which == number
                meters[number][site].update(vectors[mine.to(vectors.device)], labels[at][mine])
    return [{site: shards.merged(meter) for site, meter in part.items()} for part in meters]


_KINDS = (
    (0.1, "have all but collapsed to one point per class"),
    (0.7, "form clear clusters, one per class"),
    (2.0, "overlap: samples of a class differ about as much from each other as the classes do"),
    (math.inf, "are spread far more within classes than between them"),
)


def _how(layer: Layer) -> str:
    """What the number means, and what else it would on a half of the samples."""
    kinds = [
        next((text for limit, text in _KINDS if v < limit), _KINDS[-1][1])
        for v in (layer.nc1_tilde, *layer.halves)
    ]
    other = next((kind for kind in kinds[1:] if kind != kinds[0]), None)
    return kinds[0] if other is None else f"{kinds[0]}, or on a half of the samples {other}"


def _estimate(layer: Layer) -> str:
    return Estimate(layer.nc1_tilde, layer.halves, layer.error).words()


def _finding(found: Collapse) -> Finding:
    if found.few:
        few = "There are too few samples of each class to tell how tightly it holds them."
        return Finding("note", few, advice="Audit more samples of each class.", key="too few a class")
    last = found.sites[-1]
    value = last.nc1_tilde
    if not math.isfinite(value):
        return Finding(
            "warning",
            "At the last place its features are the same for every class.",
            advice="Make sure that its inputs differ and are scaled as in training; a network that answers the same to all has to be trained anew.",
            key="features alike",
        )
    near = last.nearest_mean_accuracy
    right = "" if near is None else f"; the nearest class mean is right for {percent(near)}"
    # Of the kinds that the halves and all samples say, the loosest.
    worst = max(value, *last.halves) if last.halves else value
    spread = f"(variance within classes {_estimate(last)} times that between, over {found.samples:,} samples){right}."
    if worst < 0.1:
        text = f"It holds each class as nearly one point {spread}"
    elif worst < 0.7:
        text = f"It holds each class as a cluster of its own {spread}"
    elif value < 0.7:
        text = f"It holds each class as a cluster of its own, but not on each half of the samples {spread}"
    else:
        text = f"Its classes overlap at the last place {spread}"
    if worst < 0.7:
        return Finding("good", text, key="classes apart")
    advice = "Nothing, if it is right often enough; otherwise train it longer, or a larger one."
    return Finding("note", text, advice=advice, key="classes overlap")


def _by_depth(layers: Sequence[Layer]) -> Any:
    def draw(axes: Any) -> None:
        left, right = axes[0]
        places = list(range(len(layers)))
        spreads = [layer.nc1_tilde for layer in layers]
        values = [v if math.isfinite(v) and v > 0 else math.nan for v in spreads]
        left.plot(values, places, "o-", color="C0")
        if any(math.isfinite(v) for v in values):
            left.set_xscale("log")
        left.set_yticks(places, [short(layer.site) for layer in layers])
        left.set(xlabel="variance within / between classes", title="Collapse (left is tighter)")
        near = [layer.nearest_mean_accuracy for layer in layers]
        near = [math.nan if v is None else v for v in near]
        right.plot(near, places, "o-", color="C2")
        right.set_yticks(places, [])
        right.set(xlim=(0, 1.03), xlabel="right by the nearest class mean", title="Separation")
        right.xaxis.set_major_formatter(lambda v, _: f"{100 * v:.0f} %")
        for ax in (left, right):
            ax.set_ylim(len(layers) - 0.5, -0.5)
            ax.grid(axis="y")

    return picture(
        draw,
        panels=(1, 2),
        size=(7.0, 1.5 + 0.32 * len(layers)),
        caption="From the first place (top) to the last (bottom), maps averaged over their positions. Training pulls each class together; the further to the left, the tighter.",
        alt=f"Within-class over between-class variance by place, from {compact(layers[0].nc1_tilde)} at the first to "
        f"{compact(layers[-1].nc1_tilde)} at the last.",
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
