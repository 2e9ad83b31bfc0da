"""Unified embedding: does one table for all features beat a table each, and is it the sharing or the look-ups?

Coleman et al., NeurIPS 2023, arXiv 2305.12102. MovieLens 100K where it is there, else generated features; budgets of rows down to 4 % of the vocabulary. Controls that the paper
lacks: as many look-ups on both sides, features summed before the reader, one salt for all, a split by time, renumbered ids. The preset "paper" is its own
comparison, see :mod:`~lineament.recipes.unified_embedding.full_scale`.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lineament.core.checks import number, one_of, require
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.unified_embedding.claims import Found, aucs, claims_of
from lineament.recipes.unified_embedding.full_scale import LABELS, SETTINGS, at_full_scale
from lineament.recipes.unified_embedding.training import (
    Angles,
    Score,
    angles,
    data_of,
    measured_collisions,
    sizes_of,
    train,
)
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure, Outcome, Table

SLUG = "unified-embedding"
TITLE = "Unified Embedding: Battle-Tested Feature Representations for Web-Scale ML Systems"
SCHEMES = ("collisionless", "separate 1x16", "separate 2x8", "unified 1x16", "unified 2x8", "unified 4x4")
CONTROLS = {
    "summed": (("unified 2x8, summed", "random"), ("separate 2x8, summed", "random")),
    "one salt": (("unified 2x8, one salt", "random"),),
    "time": (("unified 2x8", "time"), ("separate 2x8", "time")),
    "shuffled": (("unified 2x8", "shuffled"),),
}


@dataclass(frozen=True)
class Config:
    """One run. The groups are the data, the schemes, the controls, the readers' angles, and steps and rate at full scale (``None``: the data's own)."""

    data: str = "auto"
    data_folder: str | None = None
    labels: str = "without 3"
    generated: int = 120_000

    schemes: tuple[str, ...] = ("separate 1x16", "separate 2x8", "unified 1x16", "unified 2x8")
    fractions: tuple[float, ...] = (0.21,)
    epochs: int = 3
    seeds: int = 2

    controls: tuple[str, ...] = ("summed",)
    control_fraction: float = 0.21

    angle_fractions: tuple[float, ...] = (0.2,)
    angle_epochs: int = 2

    steps: int | None = None
    rate: float = 2e-4

    preset: str = presets(
        quick={},
        small={
            "schemes": SCHEMES[:5],
            "fractions": (0.42, 0.21, 0.1, 0.04),
            "seeds": 5,
            "controls": tuple(CONTROLS),
            "angle_epochs": 8,
        },
        paper={
            "data": "movielens-1m",
            "schemes": ("collisionless", "separate", "unified"),
            "fractions": (),
            "seeds": 5,
            "controls": (),
            "angle_fractions": (),
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished training."""
    one_of("data", config.data, ("auto", *SETTINGS))
    one_of("labels", config.labels, LABELS)
    if config.data != "auto":
        return at_full_scale(config, out, SLUG, TITLE)
    for field, known in (("schemes", SCHEMES), ("controls", CONTROLS)):
        for name in getattr(config, field):
            one_of(field, name, known)
    for name in ("epochs", "seeds", "angle_epochs", "generated"):
        number(name, getattr(config, name), low=1, integer=True)
    for fraction in (*config.fractions, *config.angle_fractions, config.control_fraction):
        number("fractions", fraction, low=0, open_low=True)
    require(len(config.fractions) > 0, "fractions: got none, expected at least one")
    data, stages, seeds = data_of(config), Stages(out, config), range(config.seeds)
    found = Found(sizes_of(data))
    for scheme in config.schemes:
        for fraction in config.fractions[:1] if scheme == "collisionless" else config.fractions:
            label = f"{scheme}, {fraction:g}, seed {{}}"
            each = stages.each(
                label, seeds, lambda s, n=scheme, f=fraction: train(n, f, data, config, s), Score
            )
            found.scores[scheme, fraction] = list(each.values())
    for control in config.controls:
        for scheme, how in CONTROLS[control]:
            label = f"control {scheme}, {how}, seed {{}}"
            each = stages.each(
                label, seeds, lambda s, n=scheme, h=how: train(n, config.control_fraction, data, config, s, how=h), Score
            )  # fmt: skip
            found.controls[scheme, how] = list(each.values())
    total = sum(found.sizes)
    for rows in (0, *(round(f * total) for f in config.angle_fractions)):
        each = stages.each(
            f"angles, {rows} rows, seed {{}}",
            seeds,
            lambda s, r=rows: angles(r or None, data, config, s),
            Angles,
        )
        found.angles[rows] = list(each.values())
    for rows in {round(f * total) for f in config.fractions}:
        found.collisions[rows] = stages(
            f"collisions, {rows} rows", lambda r=rows: measured_collisions(found.sizes, r, 20), list[float]
        )
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(found, config), _tables(found, config, data.source), _figures(found, config, out)
    )  # fmt: skip


def _tables(found: Found, config: Config, source: str) -> list[Table]:
    def row(name: str, fraction: Any, each: list[Score]) -> list[Any]:
        spread = statistics.stdev(aucs(each)) if len(each) > 1 else None
        return [name, fraction, statistics.mean(aucs(each)), spread, statistics.mean(s.loss for s in each)]

    columns = ["AUC", "sd", "log-loss"]
    return [
        Table(
            f"{source}: AUC on the test samples (means of {config.seeds} seeds)",
            ["scheme", "rows / vocabulary", *columns],
            [
                row(scheme, None if scheme == "collisionless" else f, each)
                for (scheme, f), each in found.scores.items()
            ],
        ),
        Table(
            f"Controls at {config.control_fraction:g}",
            ["scheme", "split and ids", *columns],
            [row(scheme, how, each) for (scheme, how), each in found.controls.items()],
        ),
        Table(
            "Angles between the readers of a one-layer model, degrees",
            ["rows", "mean of all pairs", "the two largest features"],
            [
                [
                    "collisionless" if r == 0 else r,
                    statistics.mean(a.mean for a in each),
                    statistics.mean(a.largest for a in each),
                ]
                for r, each in found.angles.items()
            ],
        ),
    ]


def _figures(found: Found, config: Config, out: Path) -> list[Figure]:
    names = [n for n in config.schemes if n != "collisionless"]
    lines = {
        n: [(f, statistics.mean(aucs(found.scores[n, f]))) for f in sorted(config.fractions)] for n in names
    }
    flat = [statistics.mean(aucs(e)) for (n, _), e in found.scores.items() if n == "collisionless"]

    def draw(ax: Any) -> None:
        for name, line in lines.items():
            style = "o-" if name.startswith("unified") else "s--"
            ax.plot(*zip(*line), style, label=name)
        if flat:
            ax.axhline(flat[0], color="C7", linewidth=1, label="collisionless")
        ax.set(xscale="log", xlabel="rows of width 16, as a share of the vocabulary", ylabel="AUC")
        ax.legend(fontsize=7)

    said = "; ".join(
        f"{name}: " + ", ".join(f"{f:g} {v:.3f}" for f, v in line) for name, line in lines.items()
    )
    shown = picture(
        draw,
        caption="AUC by the rows of the tables: separate tables, and one for all.",
        alt=f"Lines of AUC by rows. {said}.",
    )
    return [save(shown, out, "auc")]
