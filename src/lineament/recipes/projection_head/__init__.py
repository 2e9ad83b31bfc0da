"""Projection heads: what does a head throw away, and is it the training, the width or the read-out?

Xue, Gan, Ni, Joshi, Mirzasoleiman, ICLR 2024, arXiv 2403.11391. A linear network against its closed form; digits trained by parity and read out by digit; views that drop
the digit; digits with a mark, by group. Controls that the paper lacks: an untrained head of the same shape, principal components of the head's rank, both read-outs.
The preset "paper" is a ResNet-50 with heads on the user's folder, see :mod:`~lineament.recipes.projection_head.full_scale`.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lineament.core.checks import number, one_of
from lineament.recipes.kit.picture_folders import PictureFolders
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.projection_head.claims import Found, claims_of, values
from lineament.recipes.projection_head.full_scale import at_full_scale
from lineament.recipes.projection_head.training import (
    KINDS,
    Groups,
    Pair,
    Probed,
    Weights,
    by_parity,
    dropped_digit,
    linear_weights,
    worst_group,
)
from lineament.report.figures import picture, save
from lineament.report.outcome import Figure, Outcome, Table

SLUG = "projection-head"
TITLE = "Investigating the Benefits of Projection Head for Representation Learning"


@dataclass(frozen=True)
class Config(PictureFolders):
    """One run. The groups are the linear network, parity, dropped digits, marked digits, and a folder of photographs, whose ResNet is that of
    :class:`~lineament.recipes.kit.picture_folders.PictureFolders`.

    Attributes:
        data: ``"digits"``, or ``"images"``: ``train`` and ``val`` in ``data_folder``, perhaps with sub-folders in the classes.
        weights: a folder with a ResNet as transformers saves it, to start from. rate, decay, batch_size, temperature: of its training.
        crop: the share of a picture that is seen. probe_samples: so many pictures of each part are read out from, as many of each sub-folder at most.
    """

    data: Literal["digits", "images"] = "digits"
    linear_steps: int = 20_000

    kinds: tuple[str, ...] = ("SL, MLP head", "SCL, no head", "SCL, MLP head", "SCL, fixed head")
    kappa: float = 1.2
    epochs: int = 60
    drops: tuple[float, ...] = (0.0, 0.5)
    view_epochs: int = 20
    group_epochs: int = 20
    mlp_hidden: int = 256
    seeds: int = 2

    data_folder: str | None = None
    weights: str | None = None
    rate: float = 1e-3
    decay: float = 1e-3
    batch_size: int = 32
    temperature: float = 0.5
    crop: tuple[float, float] = (0.7, 1.0)
    probe_samples: int = 20_000

    preset: str = presets(
        quick={},
        small={
            "kinds": tuple(KINDS),
            "epochs": 150,
            "drops": (0.0, 0.5, 1.0),
            "view_epochs": 60,
            "group_epochs": 40,
            "mlp_hidden": 2048,
            "seeds": 5,
        },
        paper={
            "data": "images",
            "kinds": (
                *KINDS,
                "SCL, linear head",
                "SCL, identity head",
                "SimCLR, no head",
                "SimCLR, MLP head",
            ),
            "kappa": 1.05,
            "epochs": 100,
            "mlp_hidden": 2048,
            "seeds": 5,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished training, on a folder of photographs from its last finished epoch."""
    if one_of("data", config.data, ("digits", "images")) == "images":
        return at_full_scale(config, out, SLUG, TITLE)
    for name in config.kinds:
        one_of("kinds", name, KINDS)
    for name in ("linear_steps", "epochs", "view_epochs", "group_epochs", "mlp_hidden", "seeds"):
        number(name, getattr(config, name), low=1, integer=True)
    for drop in config.drops:
        number("drops", drop, low=0, high=1)
    stages, seeds = Stages(out, config), range(config.seeds)
    found = Found(stages("linear network", lambda: linear_weights(config.linear_steps), Weights))
    for name in config.kinds:
        each = stages.each(
            f"{name}, seed {{}}", seeds, lambda seed, n=name: by_parity(n, config, seed), Probed
        )
        found.kinds[name] = list(each.values())
    for drop in config.drops:
        each = stages.each(
            f"drop {drop}, seed {{}}", seeds, lambda seed, d=drop: dropped_digit(d, config, seed), Pair
        )
        found.drops[drop] = list(each.values())
    groups = stages.each("groups, seed {}", seeds, lambda seed: worst_group(config, seed), Groups)
    found.groups = list(groups.values())
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        claims_of(found),
        _tables(found, config),
        _figures(found, out),
    )


_SIDES = ("before", "after", "untrained", "components")


def _tables(found: Found, config: Config) -> list[Table]:
    rows: list[Any] = []
    for name, each in found.kinds.items():
        for side in _SIDES:
            numbers = [values(each, side, what) for what in ("fine_standardised", "fine", "coarse")]
            spread = statistics.stdev(numbers[0]) if len(each) > 1 else None
            rows.append([name, side, *map(statistics.mean, numbers), spread])
    w = found.weights
    pairs = [(f"drop {drop:g}", each) for drop, each in found.drops.items()]
    for name, how in (("dfr", "DFR"), ("standardised", "DFR, standardised"), ("mlp", "DFR-MLP")):
        pairs.append((f"worst group, {how}", [getattr(each, name) for each in found.groups]))
    return [
        Table(
            f"Digits trained by parity: accuracy of a logistic read-out (means of {config.seeds} seeds)",
            [
                "training",
                "features",
                "digit, standardised",
                "digit, as it is",
                "parity, as it is",
                "sd of the first",
            ],
            rows,
        ),
        Table(
            "A linear network: weights by a feature's strength",
            ["strength", "before the head", "closed form", "after the head", "closed form"],
            [list(row) for row in zip(w.strength, w.before, w.before_theory, w.after, w.after_theory)],
        ),
        Table(
            "Views that drop the digit, and digits with a mark",
            ["setting", "before the head", "after the head"],
            [
                [name, statistics.mean(p.before for p in e), statistics.mean(p.after for p in e)]
                for name, e in pairs
            ],
        ),
    ]


def _figures(found: Found, out: Path) -> list[Figure]:
    w = found.weights

    def weights(ax: Any) -> None:
        for name, ours, theory, colour in (
            ("before", w.before, w.before_theory, "C0"),
            ("after", w.after, w.after_theory, "C1"),
        ):
            ax.plot(w.strength, ours, "o", color=colour, label=f"{name} the head")
            ax.plot(w.strength, theory, "-", color=colour, linewidth=1)
        ax.set(xscale="log", xlabel="strength of the feature", ylabel="weight")
        ax.legend()

    names = list(found.kinds)

    def fine(ax: Any) -> None:
        for k, side in enumerate(_SIDES):
            means = [statistics.mean(values(found.kinds[name], side, "fine_standardised")) for name in names]
            ax.bar([x + 0.2 * k - 0.3 for x in range(len(names))], means, 0.2, label=side)
        ax.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=7)
        ax.set(ylabel="digit read out (standardised)")
        ax.legend(fontsize=7)

    said = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{side} {statistics.mean(values(found.kinds[name], side, 'fine_standardised')):.3f}"
            for side in _SIDES
        )
        for name in names
    )
    largest = max(abs(a - b) for a, b in zip(w.before + w.after, w.before_theory + w.after_theory))
    figures = [
        save(
            picture(
                weights,
                caption="Weights of features by their strength in a trained linear network (dots), and the closed form (lines).",
                alt=f"Weights against strength; the largest distance from the closed form is {largest:.4f}.",
            ),
            out,
            "weights",
        )
    ]
    if names:
        shown = picture(
            fine,
            size=(6.4, 3.0),
            caption="Digits read out of networks trained by parity, means over seeds.",
            alt=f"Bars. {said}.",
        )
        figures.append(save(shown, out, "fine"))
    return figures
