"""Understanding visual feature reliance through the lens of complexity: which features are simple, when are they learned, where do they flow?

Fel, Bethune, Lampinen, Serre, Hermann, NeurIPS 2024, arXiv 2407.06076. ``quick`` trains a residual network on coloured digits, ``small`` on CIFAR-10
where it is found (else on the digits, with three seeds), ``paper`` is the scale of a GPU: CIFAR-10, ResNet-18, a checkpoint an epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lineament.core.checks import InputError, require
from lineament.data.coloured_digits import coloured_digits
from lineament.data.photographs import Standardise, read_photographs
from lineament.data.samples import Samples
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.kit.threads import few_threads
from lineament.recipes.vinfo_complexity.claims import Study, Suspects, claims_of
from lineament.recipes.vinfo_complexity.figures import draw_all
from lineament.recipes.vinfo_complexity.study import planted, study
from lineament.report.outcome import Outcome, Table

SLUG = "vinfo-complexity"
TITLE = "Understanding Visual Feature Reliance through the Lens of Complexity"


@dataclass(frozen=True)
class Config:
    """One run.

    ``features``: atoms of the dictionary; ``top``: the share of them that counts as the most important; ``noise``: of the robustness; ``copies`` of
    each digit; ``images``: of CIFAR-10, 0 for all.
    """

    data: Literal["coloured-digits", "cifar10", "auto"] = "coloured-digits"
    data_folder: str | None = None
    copies: int = 2
    images: int = 0
    device: str = "auto"
    seeds: tuple[int, ...] = (0,)

    network: str = "resnet14"
    width: int = 8
    epochs: int = 10
    lr: float = 0.1
    weight_decay: float = 5e-4
    batch_size: int = 64

    features: int = 20
    top: float = 0.1
    ridge: float = 1e-3
    pool: int = 2
    noise: float = 0.1
    draws: int = 20
    noise_images: int = 200

    preset: str = presets(
        quick={},
        small={"data": "auto", "seeds": (0, 1, 2), "copies": 3, "images": 6000, "epochs": 8, "width": 8},
        paper={
            "data": "cifar10", "seeds": (0, 1, 2), "network": "resnet18", "width": 64, "epochs": 90, "batch_size": 128, "features": 500,
            "top": 0.01, "draws": 100, "noise_images": 2000,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    require(
        config.epochs >= 2,
        f"epochs: got {config.epochs}, expected at least 2 (the first and the last are compared)",
    )
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    stages = Stages(out, config)
    train, test = load_data(config)
    with few_threads(train.inputs, device):
        found = stages.each(
            "seed {}",
            config.seeds,
            lambda seed: study(config, train.to(device), test.to(device), seed),
            Study,
        )
        suspects = stages("planted", lambda: planted(config.seeds[0]), Suspects)
    runs = list(found.values())
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(runs, suspects), _tables(config, runs, suspects, train),
        draw_all(runs, out),
    )  # fmt: skip


def load_data(config: Config) -> tuple[Samples, Samples]:
    """Training and test images, in [0, 1] for digits, standardised for CIFAR-10."""
    name = config.data
    if name != "coloured-digits":
        try:
            parts = [
                read_photographs("cifar10", split, data_folder=config.data_folder, count=count)
                for split, count in (("train", config.images), ("test", config.images // 3))
            ]
            scale = Standardise(parts[0].inputs)
            train, test = (
                Samples(scale(part.inputs), part.targets, part.classes, source=part.source) for part in parts
            )
            return train, test
        except InputError:
            if name == "cifar10":
                raise
    return coloured_digits("train", copies=config.copies), coloured_digits("test", copies=config.copies)


def _tables(config: Config, runs: Sequence[Study], suspects: Suspects, data: Samples) -> list[Table]:
    seeds = [f"seed {seed}" for seed in config.seeds]
    measured = list(runs[0].numbers)
    tables = [
        Table(
            f"Measured ({data.source}, {config.network} of width {config.width}, {config.epochs} epochs, {config.features} features)",
            ["what", *seeds],
            [[name, *(run.numbers[name] for run in runs)] for name in measured],
        ),
        Table(
            "Controls",
            ["what", *seeds],
            [[name, *(run.controls[name] for run in runs)] for name in runs[0].controls],
        ),
        Table(
            "Mean information by site: what a linear read-out explains of the features, held out",
            ["site", *seeds],
            [[site, *(float(run.curves[at].mean()) for run in runs)] for at, site in enumerate(runs[0].sites)],
        ),
        Table(
            "Shortcut suspects: read with R² >= 0.8 at the first site, and removing them costs >= 5 points",
            ["network", "accuracy", "features", "suspects", "costliest suspect, points"],
            [
                ["trained with the planted mark", suspects.accuracy[0], suspects.features, suspects.found[0], suspects.cost[0]],
                ["trained without it (false suspects)", suspects.accuracy[1], suspects.features, suspects.found[1], suspects.cost[1]],
            ],
        ),
    ]  # fmt: skip
    return tables
