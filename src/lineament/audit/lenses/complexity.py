"""How hard are its features, and does it decide by one that is simple?

Fel, Bethune, Lampinen, Serre, Hermann (NeurIPS 2024, arXiv 2407.06076): a feature is simple where a linear read-out finds it in early layers already. Features are
a non-negative factorisation of what the head reads. Some feature always ranks first, so a suspect is told by absolute thresholds: it is read at the first place, and
answers change without it. Accuracy would not do, which rises where a shortcut that misleads is taken away.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lineament.audit.patch_exchange import Window
from lineament.audit.phrases import compact, percent, short
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.checks import require
from lineament.core.sites.activations import patch
from lineament.core.sites.depth import tokens_of
from lineament.core.statistics.shares import wilson
from lineament.dictionaries.factorisations import nmf, semi_nmf
from lineament.measure.complexity.features import grid_of, pooled, positions
from lineament.measure.complexity.importance import Splice, importance
from lineament.measure.complexity.readouts import ReadoutMoments
from lineament.measure.complexity.vinformation import Complexity, Residuals
from lineament.report.figures import picture, shades
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.text import plain, printable

TITLE = "How hard are its features, and does a simple one decide?"
HELP = "where in the network each feature becomes readable, and whether a simple one decides"
ORDER = 46
METHOD = "vinfo-complexity"
# A suspect: R² at the first place, and the share of answers that change without it, whose 95 % intervals lie above these.
READ, COST = 0.8, 0.05
_FEATURES, _SAMPLES, _FORWARDS = 24, 900, 4e11
_WIDTH, _WIDEST = (
    2048,
    4096,
)  # numbers that are read of a place: maps are averaged to the first, and what is wider than the second is left out
_RIDGE = 0.3  # relative to standardised activations, where a place has as many as there are samples or more; in proportion where it has fewer
_STRONGEST = 0.1  # of the samples
_IMPORTANT, _SHOWN, _IMAGES = 5, 3, 5


@dataclass(frozen=True)
class Feature:
    """One feature; ``changed``: of the answers to the samples on which it is strongest, with its 95 % interval; ``None`` where it was not removed."""

    number: int
    complexity: float
    error: float
    information: Sequence[float]
    information_errors: Sequence[float]
    importance: float
    changed: tuple[float, float, float] | None
    accuracy_lost: float | None
    strongest: Sequence[int]

    @property
    def read(self) -> float:
        """The lower end of R² at the first place."""
        return self.information[0] - 1.96 * self.information_errors[0]

    @property
    def suspect(self) -> bool:
        return self.read >= READ and self.changed is not None and self.changed[1] >= COST

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "suspect": self.suspect}


@dataclass(frozen=True)
class Spectrum:
    """All features that vary, simplest first, over the samples ``rows``; ``important``: the numbers of the most important."""

    sites: Sequence[str]
    fitted_on: int
    judged_on: int
    features: Sequence[Feature]
    important: Sequence[int]
    rows: Sequence[int]

    @property
    def suspects(self) -> list[Feature]:
        """Those without which most answers change first."""
        return sorted((f for f in self.features if f.suspect), key=lambda f: -(f.changed or (0,))[0])

    @property
    def mean(self) -> float:
        return sum(f.complexity for f in self.features) / len(self.features)

    def readable(self, feature: Feature) -> str:
        """The first place where it is read."""
        return next((site for site, r in zip(self.sites, feature.information) if r >= READ), "nowhere")

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "mean": self.mean, "suspects": [f.number for f in self.suspects]}


def applies(subject: Subject) -> str:
    if subject.task != "classification":
        return "It asks which features decide between classes; this network answers otherwise."
    if len(subject) < 60:
        return f"Read-outs are fitted on some samples and judged on others; {len(subject)} are too few."
    if not isinstance(subject.inputs(torch.tensor([0])), Tensor):
        return "It takes networks with one input."
    if len(subject.sites) == 1:
        return f"It compares places, and this network has but one, {short(subject.sites[0], 40)}."
    return subject.sealed


def look(subject: Subject) -> Section:
    rows = subject.subset(subject.affordable(_FORWARDS, 12, _SAMPLES, least=60), salt=13)
    x, every, grids = _gathered(subject, rows)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(subject.seed))
    known, held = order[: 2 * len(rows) // 3], order[2 * len(rows) // 3 :]
    width = min(_FEATURES, x.shape[1] - 1, len(known) // 4)
    factorise: Any = nmf if bool((x >= 0).all()) else semi_nmf
    dictionary = factorise(x[known], width, site=list(every)[-1], iterations=100, seed=subject.seed)
    z = dictionary.encode(x)
    moments = ReadoutMoments()
    moments.update({site: v[known] for site, v in every.items()}, z[known])
    widest = max(v.shape[1] for v in every.values())
    readouts = moments.readouts(_RIDGE * min(1.0, widest / len(known)))
    residuals = Residuals(readouts)
    residuals.update({site: v[held] for site, v in every.items()}, z[held])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of features that never vary, which are left out
        read = residuals.compute()[0]
    require(len(read.order) > 0, "No feature of what its head reads varies over these samples.")
    first = read.sites[0]
    energy = readouts.weights[first][0].square() * every[first].double().var(0)[:, None]
    maps = {}
    if subject.images and first in grids:
        maps = {i: energy[:, i].unflatten(0, (-1, *grids[first])).sum(0) for i in read.order.tolist()}
    weights = importance(subject.model, list(subject.batches(rows)), dictionary).values
    features = _features(subject, rows, z, dictionary, read, weights)
    important = [f.number for f in sorted(features, key=lambda f: -f.importance)[:_IMPORTANT]]
    found = Spectrum(read.sites, len(known), len(held), features, important, rows.tolist())
    return _section(subject, found, maps)


def _gathered(subject: Subject, rows: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, tuple[int, int]]]:
    """What passes at the last place, averaged over positions; what read-outs see of each place, and the grid of those that are maps."""
    every: dict[str, list[Tensor]] = {}
    whole: dict[str, list[Tensor]] = {}
    grids: dict[str, tuple[int, int]] = {}
    batches: list[dict[str, tuple[Tensor, Tensor, tuple[int, int] | None]]] = []
    for _, acts in subject.activations(rows, "features by depth"):
        batches.append({})
        for site, passed in acts.items():
            value = tokens_of(subject.model, site, passed)
            if value.ndim < 2 or not value.is_floating_point():
                continue
            deep, grid = positions(site, value), grid_of(value)
            if deep.shape[2] > _WIDEST:
                continue
            side = max(1, int((_WIDTH / deep.shape[2]) ** (1 / max(len(grid), 1))))
            seen = pooled(site, value, 1 if subject.samples.lengths is not None else side).float().cpu()
            shape = (min(side, grid[0]), min(side, grid[1])) if len(grid) == 2 else None
            batches[-1][site] = seen, deep.mean(1).float().cpu(), shape
    for batch in shards.interleaved(batches):
        for site, (seen, mean, shape) in batch.items():
            every.setdefault(site, []).append(seen)
            whole.setdefault(site, []).append(mean)
            if shape is not None:
                grids[site] = shape
    require(bool(every), f"What passes at its places is wider than {_WIDEST:,} numbers, more than read-outs can be fitted to; name other sites.")  # fmt: skip
    back = torch.cat(subject.parts(rows)).argsort()
    joined = {site: torch.cat(parts)[back] for site, parts in every.items()}
    return torch.cat(whole[list(every)[-1]])[back], joined, grids


def _features(
    subject: Subject, rows: Tensor, z: Tensor, dictionary: Any, read: Complexity, weights: Tensor
) -> list[Feature]:
    before = subject.answer(rows)
    splice = Splice(subject.model, dictionary)
    splice.look(subject.inputs(subject.parts(rows)[0]))
    weight = None
    if splice.head is not None and len(splice.head[0]) == before.shape[1]:
        weight = splice.head[0].float().cpu()
    answers, right = before.argmax(1), before.argmax(1) == subject.targets[rows]
    strong = max(10, round(_STRONGEST * len(rows)))
    found = []
    for number in read.order.tolist():
        top = z[:, number].argsort(descending=True, stable=True)[:strong]
        changed, lost = None, None
        if weight is not None:
            now = (before - z[:, number, None] * (weight @ dictionary.atoms[number])).argmax(1)
        elif (
            float(read.information[0, number]) >= READ
        ):  # each costs a forward: of those that may be suspects
            with patch(subject.model, {splice.site: partial(_without, splice, number)}):
                now = subject.answer(rows).argmax(1)
        else:
            now = None
        if now is not None:
            hits = int((now != answers)[top].sum())
            changed = (hits / len(top), *wilson(hits, len(top)))
            lost = float(right.float().mean() - (now == subject.targets[rows]).float().mean())
        found.append(
            Feature(
                number, float(read.complexity[number]), float(read.errors[number]), read.information[:, number].tolist(),
                read.information_errors[:, number].tolist(), float(weights[number]), changed, lost, rows[top].tolist(),
            )
        )  # fmt: skip
    return found


def _without(splice: Splice, number: int, value: Tensor) -> Tensor:
    """The activations less one feature, at every position."""
    x = splice.rows(value)
    z = splice.dictionary.encode(x.mean(1, keepdim=True))[..., number, None]
    return value - splice.placed((z * splice.dictionary.atoms[number]).expand_as(x), value)


def _section(subject: Subject, found: Spectrum, maps: dict[int, Tensor]) -> Section:
    first, last = short(found.sites[0], 40), short(found.sites[-1], 40)
    suspects, features = found.suspects, found.features
    early = sum(f.read >= READ for f in features)
    places = {f.number: _place(subject, maps[f.number]) for f in suspects if f.number in maps}
    sentence = (
        f"{len(features)} features of {last} were found on {found.fitted_on:,} samples, and linear read-outs of them from each of {len(found.sites)} places fitted on the same; on {found.judged_on:,} "
        f"others their complexity K, 1 less the R² averaged over the places, is {compact(found.mean)} on average, from {compact(features[0].complexity)} (standard error {compact(features[0].error)}) "
        f"to {compact(features[-1].complexity)} ({compact(features[-1].error)}). {early or 'None'} of them {'are' if early > 1 else 'is'} read from {first} already (R² of {READ} or more, the lower end of the 95 % interval)"
    )
    if suspects:
        top = suspects[0]
        assert top.changed is not None
        sentence += (
            f", and {len(suspects)} of these {'decides' if len(suspects) == 1 else 'decide'}: without feature {top.number}, {_interval(top.changed)} of the answers change to the "
            f"{len(top.strongest)} samples on which it is strongest. A suspect need not be a shortcut: the pictures show what it answers to."
        )
    elif early:
        most = max((f.changed or (0.0,))[0] for f in features if f.read >= READ)
        sentence += f", and none decides: without one of these at most {percent(most)} of the answers change to the samples on which it is strongest, and the interval reaches below {percent(COST, 0)}."
    else:
        sentence += ", so that none is suspected of being a shortcut."
    return Section(
        status="note" if suspects else "good",
        number=compact(found.mean),
        unit="mean complexity K of its features (0: read everywhere, 1: nowhere)",
        sentence=sentence,
        pictures=[_curves(found), *_pictures(subject, found, maps)],
        tables=[_table(subject, found, places)],
        numbers=plain({**found.to_dict(), "places": {str(n): [w, s] for n, (w, s) in places.items()}}),
        findings=[_finding(subject, found, places)],
    )  # fmt: skip


def _place(subject: Subject, energy: Tensor) -> tuple[Window, float]:
    """The window, three tenths of the image's sides, that holds most of what a read-out reads, and its share."""
    height, width = subject.inputs(torch.tensor([0])).shape[-2:]
    tall, wide = energy.shape
    size = (math.ceil(0.3 * tall), math.ceil(0.3 * wide))
    sums = torch.nn.functional.avg_pool2d(energy[None], size, stride=1)[0] * (size[0] * size[1])
    at = int(sums.argmax())
    y, x = divmod(at, sums.shape[1])
    window = Window(
        y * height // tall, x * width // wide, math.ceil(size[0] * height / tall), math.ceil(size[1] * width / wide)
    )  # fmt: skip
    return window, float(sums.max() / energy.sum().clamp_min(1e-30))


def _interval(x: tuple[float, float, float]) -> str:
    return f"{percent(x[0])} ({percent(x[1])} to {percent(x[2])})"


def _finding(subject: Subject, found: Spectrum, places: dict[int, tuple[Window, float]]) -> Finding:
    first = short(found.sites[0], 40)
    if not found.suspects:
        return Finding(
            "good",
            f"None of {len(found.features)} features is both read linearly at {first} already and decisive for the samples on which it is strongest.",
            key="no simple feature",
        )
    top, count = found.suspects[0], len(found.suspects)
    shown = "pictures" if subject.images else "strongest samples"
    assert top.changed is not None
    where = ""
    if top.number in places:
        size = subject.inputs(torch.tensor([0])).shape[-2:]
        window, share = places[top.number]
        where = f" {percent(share, 0)} of what reads it comes from {window.where(*size)}."
    return Finding(
        "note",
        f"It decides by {count} feature{'s' if count > 1 else ''} as simple as a linear read-out of {first}: suspects of a shortcut. Feature {top.number} is read there with R² {top.information[0]:.2f}, and without it "
        f"{_interval(top.changed)} of the answers to the {len(top.strongest)} samples on which it is strongest change.{where}",
        advice=f"Look at what the {shown} of each suspect have in common. If it is not what you ask about, vary it within each class of the training data, train again and audit again.",
        key="simple feature decides",
    )  # fmt: skip


def _table(subject: Subject, found: Spectrum, places: dict[int, tuple[Window, float]]) -> Table:
    size = subject.inputs(torch.tensor([0])).shape[-2:]
    rows = []
    for f in found.features:
        classes = Counter(int(subject.targets[row]) for row in f.strongest)
        most = ", ".join(
            f"{printable(subject.class_name(c), limit=20)} ({n})" for c, n in classes.most_common(3)
        )
        marks = (("important", f.number in found.important), ("suspect", f.suspect))
        told = ", ".join(word for word, holds in marks if holds)
        if f.number in places:
            told += f", {percent(places[f.number][1], 0)} read from {places[f.number][0].where(*size)}"
        rows.append(
            (
                f.number, f.complexity, f.error, f"{f.information[0]:.2f} ± {1.96 * f.information_errors[0]:.2f}", found.readable(f), f.importance,
                "not tried" if f.changed is None else _interval(f.changed), "–" if f.accuracy_lost is None else percent(f.accuracy_lost), most, told,
            )
        )  # fmt: skip
    return Table(
        f"Features, the simplest first ({found.judged_on:,} samples; answers that change: to the {len(found.features[0].strongest)} of {len(found.rows):,} samples on which each is strongest)",
        ("feature", "K", "± s.e.", "R² at the first place", f"R² of {READ} from", "importance", "answers that change without it", "accuracy lost", "classes of its strongest samples", ""),
        rows,
    )  # fmt: skip


def _curves(found: Spectrum) -> Picture:
    important, suspects = set(found.important), {f.number for f in found.suspects}

    def colour(f: Feature) -> str:
        return "C1" if f.number in suspects else "C0" if f.number in important else "C7"

    def draw(axes: Any) -> None:
        ax, other = axes[0]
        for at, f in enumerate(found.features):
            ax.errorbar(at, f.complexity, 1.96 * f.error, fmt="o", color=colour(f), markersize=4)
            faint = 1.0 if colour(f) != "C7" else 0.4
            other.plot(range(len(found.sites)), f.information, color=colour(f), alpha=faint, marker=".")
        ax.set(xlabel="features, the simplest first", ylabel="complexity K", xticks=[])
        other.axhline(READ, color="C7", linestyle=":")
        other.set_xticks(
            range(len(found.sites)), [short(s, 16) for s in found.sites], rotation=30, ha="right"
        )
        other.set(ylabel="R² of a linear read-out", ylim=(-0.1, 1.02))

    worst, best = found.features[-1], found.features[0]
    return picture(
        draw,
        panels=(1, 2),
        size=(7.6, 3.4),
        caption=f"Left: complexity of each feature with its 95 % interval; blue: the {len(important)} most important, orange: simple and decisive. Right: how well each is read from each place, on samples that the read-outs were not fitted on.",
        alt=f"{len(found.features)} features from K {compact(best.complexity)} to {compact(worst.complexity)}; {len(suspects)} simple and decisive.",
    )  # fmt: skip


def _pictures(subject: Subject, found: Spectrum, maps: dict[int, Tensor]) -> list[Picture]:
    """The strongest images of the suspects, the simplest and the hardest, and where the first place is read for each."""
    if not subject.images:
        return []
    chosen = {f.number: (f, "suspect") for f in found.suspects[:_SHOWN]}
    for f, what in ((found.features[0], "simplest"), *((f, "hardest") for f in found.features[:-_SHOWN:-1])):
        chosen.setdefault(f.number, (f, what))
    lines = list(chosen.values())
    images = {f.number: subject.inputs(torch.tensor(f.strongest[:_IMAGES])).float().cpu() for f, _ in lines}
    low, high = min(float(x.min()) for x in images.values()), max(float(x.max()) for x in images.values())

    def draw(axes: Any) -> None:
        for line, (f, what) in enumerate(lines):
            for column in range(_IMAGES + 1):
                ax = axes[line, column]
                ax.set(xticks=[], yticks=[])
                if column < len(images[f.number]):
                    shown = ((images[f.number][column] - low) / max(high - low, 1e-12)).clamp(0, 1)
                    ax.imshow((shown[:3].movedim(0, -1) if len(shown) >= 3 else shown[0]).numpy(), cmap="gray", vmin=0, vmax=1)  # fmt: skip
                elif column == _IMAGES and f.number in maps:
                    ax.imshow(maps[f.number].cpu().numpy(), cmap=shades(ax, "C1"))
                    ax.set_title("read here", fontsize=8)
                else:
                    ax.axis("off")
            axes[line, 0].set_ylabel(f"{what}\n{f.number}: K {f.complexity:.2f}", fontsize=8)

    told = "; ".join(f"feature {f.number}, {what}, K {compact(f.complexity)}" for f, what in lines)
    return [
        picture(
            draw,
            kind="png",
            panels=(len(lines), _IMAGES + 1),
            size=(1.15 * (_IMAGES + 1) + 0.6, 1.25 * len(lines) + 0.2),
            caption=f"A line a feature: the images on which it is strongest, as the network is given them, and where in {short(found.sites[0], 30)} a linear read-out reads it.",
            alt=f"Strongest images of {told}.",
        )
    ]  # fmt: skip
