"""How well does it name the class of every pixel, for which classes, and up to their edges?

The intersection over union of each class (the Jaccard index) and its mean over classes, from the pixels of all images together; the share of pixels that
are right, of all and of those within two pixels of an edge between classes. Images vary as wholes, so that intervals are over images: by leaving each
out in turn (the jackknife). For the hardest class, the gradient of its mean logit over its own pixels shows which pixels of the image decide them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.audit.estimates import jackknife
from lineament.audit.phrases import percent, percent_interval
from lineament.audit.subject import Subject
from lineament.core.batching import progress
from lineament.core.checks import InputError
from lineament.explain.saliency.maps import saliency
from lineament.explain.saliency.regions import over_region
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

TITLE = "Which pixels are right?"
HELP = "of a network that answers for every pixel: intersection over union by class, and accuracy at edges"
ORDER = 21
METHOD = "intersection over union"
SOURCE = ("Fully convolutional networks for semantic segmentation", 2014, "1411.4038")
OPTIONAL = True
DENSE = True
_EDGE, _SHOWN, _MAPPED = 2, 20, 12
Interval = tuple[float, float, float]


@dataclass(frozen=True)
class Region:
    """A class: its intersection over union with a 95 % interval, and the share of pixels that are of it."""

    name: str
    iou: Interval
    share: float


@dataclass(frozen=True)
class Reach:
    """Where the gradient of the hardest class's logit over its own pixels lies: the share on those pixels, over images, and the share that they are."""

    name: str
    inside: Interval
    area: float
    images: int


@dataclass(frozen=True)
class Pixels:
    """Mean intersection over union of the classes that occur, and the shares of pixels that are right: of all, and near edges.

    ``edge_pixels`` is the share of pixels that are near an edge, ``ignored`` that of labels outside the classes, which count nowhere.
    """

    miou: Interval
    accuracy: Interval
    edges: Interval | None
    inside: Interval | None
    edge_pixels: float
    ignored: float
    majority: float
    images: int
    classes: Sequence[Region]
    reach: Reach | None = None

    @property
    def poor(self) -> bool:
        """Whether it may be no better than always naming the most frequent class."""
        return self.accuracy[1] <= self.majority


def applies(subject: Subject) -> str:
    return (
        ""
        if subject.unit == "pixel"
        else f"It gives an answer for each {subject.unit}, and none for each pixel."
    )


def look(subject: Subject) -> Section:
    targets, width = subject.targets, int(subject.width)
    counts, right = [], []
    for rows in progress(list(torch.arange(len(subject)).split(64)), "comparing pixels"):
        y, said = targets[rows].flatten(1), subject.outputs[rows].long().flatten(1)
        known = (y >= 0) & (y < width)
        pairs = torch.where(known, y * width + said, width * width)
        counts.append(torch.stack([torch.bincount(p, minlength=width * width + 1)[:-1] for p in pairs]))
        near = edges(targets[rows]).flatten(1)
        hit = (said == y) & known
        # Per image: right and all, of all pixels, near edges, and elsewhere.
        parts = [known, known & near, known & ~near]
        right.append(torch.stack([torch.stack([(hit & p).sum(1), p.sum(1)], 1) for p in parts], 1))
    confusion = torch.cat(counts).double().reshape(-1, width, width)
    hits = torch.cat(right).double()
    total = confusion.sum(0)
    present = total.sum(1) > 0
    accuracy, near, inside = (jackknife(hits[:, k], lambda s: s[..., 0] / s[..., 1]) for k in range(3))
    pixels = float(total.sum())
    found = Pixels(
        jackknife(confusion, lambda c: _iou(c)[..., present].mean(-1)),
        accuracy,
        near if float(hits[:, 1, 1].sum()) else None,
        inside if float(hits[:, 2, 1].sum()) else None,
        float(hits[:, 1, 1].sum()) / pixels,
        1 - pixels / targets.numel(),
        float(total.sum(1).max()) / pixels,
        len(subject),
        [
            Region(
                subject.class_name(k),
                jackknife(confusion, lambda c, k=k: _iou(c)[..., k]),
                float(total[k].sum()) / pixels,
            )
            for k in present.nonzero()[:, 0].tolist()
        ],
    )
    worst = min(found.classes, key=lambda region: region.iou[0])
    hardest = next(k for k in present.nonzero()[:, 0].tolist() if subject.class_name(k) == worst.name)
    chosen, maps = _decided_by(subject, hardest)
    found = replace(found, reach=_reach(subject, hardest, chosen, maps))
    sentence = (
        f"Over {found.images} images, intersection over union is {percent_interval(found.miou)} on average over {len(found.classes)} classes (95 % intervals, over images), the least for "
        f"“{printable(worst.name, limit=60)}”, {percent_interval(worst.iou)}. {percent_interval(found.accuracy)} of pixels are right; naming the most frequent class everywhere would be right for {percent(found.majority)}."
    )
    if found.edges is not None and found.inside is not None:
        sentence += f" Within {_EDGE} pixels of an edge ({percent(found.edge_pixels)} of pixels) {percent_interval(found.edges)} are right, elsewhere {percent_interval(found.inside)}."
    if found.reach is not None:
        sentence += f" The gradient of its mean logit over its own pixels lies on them for {percent_interval(found.reach.inside)} (of its absolute value, over {found.reach.images} images); they are {percent(found.reach.area)} of those images."
    if found.ignored:
        sentence += f" {percent(found.ignored)} of pixels have a label that is none of the {width} classes, and count nowhere."
    return Section(
        status="warning" if found.poor else "note" if found.miou[0] < 0.5 else "good",
        number=percent(found.miou[0]),
        unit="mean intersection over union",
        sentence=sentence,
        pictures=[_bars(found), *([_maps(subject, hardest, chosen, maps)] if len(chosen) else [])],
        tables=[
            Table(
                "By class" + (f", the {_SHOWN} hardest" if len(found.classes) > _SHOWN else ""),
                ("class", "intersection over union", "95 % interval", "share of pixels"),
                [
                    (
                        r.name,
                        percent(r.iou[0]),
                        f"{percent(r.iou[1])} to {percent(r.iou[2])}",
                        percent(r.share),
                    )
                    for r in sorted(found.classes, key=lambda r: r.iou[0])[:_SHOWN]
                ],
            )
        ],
        numbers=plain(found),
        findings=[_finding(found)],
    )


def _decided_by(subject: Subject, k: int) -> tuple[Tensor, Tensor]:
    """Images that hold a class, and of each how much every pixel of it moves the class's mean logit over the class's own pixels."""
    if subject.fixed_batch or subject.outputs.shape[1:] != subject.targets.shape[1:]:
        return torch.empty(0, dtype=torch.long), torch.empty(0)
    region = subject.targets == k
    chosen = region.flatten(1).any(1).nonzero()[:, 0][:_MAPPED]
    maps = []
    try:
        for row in progress(chosen.tolist(), "what decides the hardest class"):
            x = subject.inputs(torch.tensor([row]))
            with over_region(subject.model, region[row].to(x.device)):
                maps.append(saliency(subject.model, x, k, site=":in", method="gradient")[0, 0].float().cpu())
    except (InputError, RuntimeError):  # no image, or gradients cannot pass
        return chosen[:0], torch.empty(0)
    return chosen, torch.stack(maps)


def _reach(subject: Subject, k: int, chosen: Tensor, maps: Tensor) -> Reach | None:
    region = (subject.targets[chosen] == k).flatten(1)
    total = maps.flatten(1).sum(1) if len(chosen) else torch.zeros(0)
    if len(chosen) < 2 or region.shape != maps.flatten(1).shape or not bool((total > 0).all()):
        return None
    share = ((maps.flatten(1) * region).sum(1) / total).double()
    inside = jackknife(torch.stack([share, torch.ones_like(share)], 1), lambda s: s[..., 0] / s[..., 1])
    return Reach(subject.class_name(k), inside, float(region.double().mean()), len(chosen))


def edges(labels: Tensor) -> Tensor:
    """Where a label map (image, height, width) has another class within two pixels, up, down or to a side.

    >>> edges(torch.tensor([[[0, 0, 0, 0, 1, 1, 1, 1]]]))[0, 0].long().tolist()
    [0, 0, 1, 1, 1, 1, 0, 0]
    """
    x = labels[:, None].float()
    window = 2 * _EDGE + 1
    high, low = (F.max_pool2d(sign * x, window, stride=1, padding=_EDGE) for sign in (1, -1))
    return (high != -low)[:, 0]


def _iou(confusion: Tensor) -> Tensor:
    """Intersection over union of each class, from true rows and named columns; 0 where a class is neither there nor named."""
    both = confusion.diagonal(dim1=-2, dim2=-1)
    either = confusion.sum(-1) + confusion.sum(-2) - both
    return both / either.clamp_min(1)


def _finding(found: Pixels) -> Finding:
    told = f"Its mean intersection over union is {percent_interval(found.miou)} over {found.images} images, and {percent(found.accuracy[0])} of pixels are right"
    if found.poor:
        return Finding(
            "warning",
            f"{told}, which may be no better than naming the most frequent class everywhere ({percent(found.majority)}).",
            advice="Make sure first that images reach it as they did in training and that class numbers mean the same to both.",
            key="pixels no better than the majority",
        )
    return Finding("good" if found.miou[0] >= 0.5 else "note", f"{told}.", key="pixels")


def _maps(subject: Subject, k: int, chosen: Tensor, maps: Tensor) -> Picture:
    count = min(4, len(chosen))

    def draw(axes: Any) -> None:
        for column in range(count):
            image, region = subject.display(int(chosen[column])), subject.targets[chosen[column]] == k
            for ax, shown in zip(axes[:, column], (image, maps[column])):
                ax.imshow(shown.numpy(), cmap="gray" if ax is axes[0, column] else "inferno")
                ax.contour(region.float().numpy(), levels=[0.5], colors="C0", linewidths=1)
                ax.set_axis_off()

    name = printable(subject.class_name(k), limit=40)
    return picture(
        draw,
        kind="png",
        panels=(2, count),
        size=(1.6 * count + 0.4, 3.6),
        caption=f"Images with “{name}” (outlined), and below how much each pixel moves the class's mean logit over the outlined pixels (bright: much).",
        alt=f"{count} images with the pixels of “{name}” outlined, and the gradient that decides them.",
    )


def _bars(found: Pixels) -> Picture:
    shown = sorted(found.classes, key=lambda r: r.iou[0])[:_SHOWN]

    def draw(ax: Any) -> None:
        places = list(range(len(shown)))
        ax.barh(places, [100 * r.iou[0] for r in shown], color="C0", height=0.6)
        ax.set_yticks(places, [printable(r.name, limit=24) for r in shown])
        ax.set_ylim(len(shown) - 0.5, -0.5)
        ax.set(xlabel="intersection over union, %", xlim=(0, 100))

    return picture(
        draw,
        size=(6.4, 1.2 + 0.3 * len(shown)),
        caption="Intersection over union by class, the hardest first.",
        alt="Bars by class: "
        + ", ".join(f"{percent(r.iou[0], 0)} for {printable(r.name, limit=24)}" for r in shown[:6])
        + ".",
    )
