"""How many directions do its features use, layer by layer?

With λ the eigenvalues of the features' covariance and p = λ/Σλ: the participation ratio (Σλ)²/Σλ², and the effective rank exp(-Σ p ln p)
(Roy and Vetterli 2007; as RankMe in Garrido et al. 2022, arXiv 2210.02885), both between 1 and the number of units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lineament.audit.estimates import Estimate, halved, joined, split, without
from lineament.audit.phrases import compact, percent, short
from lineament.audit.subject import Subject
from lineament.core import shards
from lineament.core.sites.depth import tokens_of
from lineament.measure.collapse.profile import pooled
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Section
from lineament.report.text import plain

TITLE = "How many directions do its features use?"
HELP = "how many directions its features use, layer by layer"
ORDER = 40
DENSE = True
METHOD = "effective-rank"
SOURCE = ("RankMe: effective rank of learned features", 2022, "2210.02885")
_MOST = 1000


@dataclass(frozen=True)
class Dimensions:
    """Effective dimensions of a site's units, and how many never vary (silent) or nearly copy another (doubled).

    ``halves`` are the effective ranks of either half of the samples, and ``error`` is half the width of its 95 % interval.
    """

    site: str
    units: int
    samples: int
    effective_rank: float
    participation_ratio: float
    dims90: int
    silent: int
    doubled: int
    eigenvalues: Sequence[float]
    error: float = math.nan
    halves: tuple[float, ...] = ()


@dataclass(frozen=True)
class Spectrum:
    """Effective dimensions by site, in depth order; ``used_share`` of those that the last site could have; ``rows``: the samples of each half, by their numbers in the data."""

    sites: Sequence[Dimensions]
    samples: int
    used_share: float
    rows: Sequence[Sequence[int]]
    idle: float
    idle_halves: tuple[float, ...]

    @property
    def wasteful(self) -> bool:
        """Whether more than a quarter of the units never vary or copy another, on all samples and on either half."""
        return min(self.idle, *self.idle_halves) > 0.25


def applies(subject: Subject) -> str:
    if len(subject) < 8:
        return f"A spectrum of {len(subject)} samples says nothing; expected at least 8."
    return subject.sealed


def look(subject: Subject) -> Section:
    rows = subject.subset(_MOST, salt=1)
    gathered: dict[str, list[Tensor]] = {site: [] for site in subject.sites}
    for _, acts in subject.activations(rows, "spectrum"):
        for site, x in acts.items():
            gathered[site].append(pooled(tokens_of(subject.model, site, x).float()).cpu())
    features = {site: torch.cat(shards.interleaved(parts)) for site, parts in gathered.items()}
    parts = split(torch.arange(len(rows)), subject.seed)
    halves = halved(parts)
    less, again = (
        [[dimensions(x[joined(part)], site) for site, x in features.items()] for part in some]
        for some in (without(parts), halves)
    )
    layers = []
    for number, (site, x) in enumerate(features.items()):
        found = dimensions(x, site)
        spread = Estimate.of(
            lambda d: d.effective_rank,
            found,
            [some[number] for some in less],
            [half[number] for half in again],
            left_out=True,
        )
        layers.append(replace(found, error=spread.error, halves=spread.halves))
    last = layers[-1]
    share = last.effective_rank / max(min(last.units, last.samples - 1), 1)
    idle = Estimate.of(_idle, layers, less, again, left_out=True)
    found = Spectrum(
        layers,
        len(rows),
        share,
        [subject.samples.index[rows[joined(half)]].tolist() for half in halves],
        idle.value,
        idle.halves,
    )
    classes = subject.outputs.shape[1] if subject.task == "classification" else None
    of = f" of {len(subject):,}" if len(rows) < len(subject) else ""
    dims = Estimate.of(lambda ds: float(ds[-1].dims90), layers, less, again, left_out=True)
    sentence = (
        f"Over {len(rows):,}{of} samples, and again without each sixth of them, maps averaged over their positions: at the last place ({short(last.site, 40)}), {last.units} units behave like "
        f"{_estimate(last)} independent directions; {dims.words()} directions hold 90 % of the variance"
        + (f", for {classes} classes. " if classes else ". ")
    )
    total = sum(layer.units for layer in layers)
    silent, doubled = (
        Estimate.of(
            lambda ds: sum(getattr(d, kind) for d in ds) / total,  # noqa: B023
            layers,
            less,
            again,
            left_out=True,
        )
        for kind in ("silent", "doubled")
    )
    sentence += f"Of all {total} units looked at, {silent.words(percent)} never vary on these samples and {doubled.words(percent)} almost copy another (correlation above 0.95)."
    narrow = max(last.effective_rank, *last.halves) < 2 and last.units > 4
    return Section(
        status="note" if narrow or found.wasteful else "good",
        number=compact(last.effective_rank),
        unit=f"effective directions of {last.units} units, at the last place",
        sentence=sentence,
        pictures=[_figure(layers)],
        tables=[
            Table.of(
                f"Dimension by place over {len(rows):,} samples, in depth order (error: half the width of the effective rank's 95 % interval, which is what many more such samples would give)",
                {
                    "place": "site",
                    "units": "units",
                    "effective rank": "effective_rank",
                    "error": "error",
                    "participation ratio": "participation_ratio",
                    "directions for 90\u00a0%": "dims90",
                    "never vary": "silent",
                    "copies": "doubled",
                },
                layers,
            )
        ],
        numbers=plain(found),
        findings=[_finding(found)],
    )


def _idle(layers: Sequence[Dimensions]) -> float:
    """The share of all units that never vary or copy another."""
    return sum(layer.silent + layer.doubled for layer in layers) / sum(layer.units for layer in layers)


def _estimate(layer: Dimensions) -> str:
    return Estimate(layer.effective_rank, layer.halves, layer.error).words()


def _finding(found: Spectrum) -> Finding:
    last = found.sites[-1]
    text = f"At {short(last.site, 40)}, its {last.units} units span about {_estimate(last)} dimensions (over {found.samples:,} samples)"
    if found.wasteful:
        return Finding(
            "note",
            f"{text}; {percent(found.idle, 0)} of all units never vary or copy another.",
            advice="Nothing, if it is right often enough: a network with fewer channels may do as well.",
            key="units idle",
        )
    return Finding("good", f"{text}.", key="dimensions")


def dimensions(features: Tensor, site: str = "") -> Dimensions:
    """Effective dimensions of features (sample, unit), and how many units never vary or nearly copy another.

    >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) @ torch.eye(3, 6)
    >>> found = dimensions(x)
    >>> round(found.participation_ratio), found.silent, found.units
    (3, 3, 6)
    """
    x = features.double()
    n, d = x.shape
    x = x - x.mean(0)
    scale = x.square().mean(0).sqrt()
    # The smaller Gram matrix has the same eigenvalues.
    gram = (x.T @ x if d <= n else x @ x.T) / max(n - 1, 1)
    values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
    total = float(values.sum())
    alive = scale > 1e-6 * max(float(scale.max()), 1e-30)
    if total <= 1e-20:
        return Dimensions(site, d, n, 0.0, 0.0, 0, silent=d, doubled=0, eigenvalues=())
    p = values / total
    entropy = -float((p * p.clamp_min(1e-300).log()).sum())
    units = (x / scale.clamp_min(1e-30))[:, alive][:, :4096]
    close = (units.T @ units / n).abs() > 0.95
    # A unit is a copy when one before it says the same; so a pair counts once.
    doubled = int(close.tril(-1).any(1).sum())
    return Dimensions(
        site,
        d,
        n,
        effective_rank=math.exp(entropy),
        participation_ratio=total**2 / float(values.square().sum()),
        dims90=int((p.cumsum(0) < 0.9).sum()) + 1,
        silent=int((~alive).sum()),
        doubled=doubled,
        eigenvalues=p[:200].tolist(),
    )


def _figure(layers: Sequence[Dimensions]) -> Any:
    def draw(axes: Any) -> None:
        left, right = axes[0]
        places = list(range(len(layers)))
        left.barh(
            places, [layer.units for layer in layers], color="C7", alpha=0.35, height=0.7, label="units"
        )
        left.barh(
            places,
            [layer.effective_rank for layer in layers],
            color="C0",
            height=0.45,
            label="effective directions",
        )
        left.set_yticks(places, [short(layer.site) for layer in layers])
        left.set_ylim(len(layers) - 0.5, -0.5)
        left.set_xscale("log")
        left.set_xlim(left=0.8)
        left.set(xlabel="number (logarithmic)")
        left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        for number, layer in enumerate(layers):
            if layer.eigenvalues:
                shade = 0.25 + 0.75 * number / max(len(layers) - 1, 1)
                last = number == len(layers) - 1
                ranks = range(1, len(layer.eigenvalues) + 1)
                right.loglog(
                    ranks,
                    [max(v, 1e-9) for v in layer.eigenvalues],
                    color="C1" if last else "C0",
                    alpha=1 if last else shade,
                )
        right.set_ylim(bottom=1e-6)
        right.set(
            xlabel="direction, strongest first",
            ylabel="share of variance",
            title="Spectra (last place in orange)",
        )
        right.grid(True)

    return picture(
        draw,
        panels=(1, 2),
        size=(7.4, 1.9 + 0.3 * len(layers)),
        caption="Left: units and the directions they really use. Right: how the variance falls from direction to direction, one line a place; steep means few directions.",
        alt="Effective directions by place: "
        + ", ".join(
            f"{compact(layer.effective_rank)} of {layer.units} at {short(layer.site)}" for layer in layers
        )
        + ".",
    )
