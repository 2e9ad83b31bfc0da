"""Shortcut learning: how much more than the best rule do networks rely on the feature that is easier to extract?

Hermann, Mobahi, Fel, Mozer, ICLR 2024, arXiv 2310.16228. Two latents of set predictivity and availability, as vectors and as the grey levels of two objects;
linear and nonlinear networks, kernels and the closed form beside the optimum. Every trained network is given at its best validation epoch and at its last.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lineament.core.checks import number, one_of, require
from lineament.measure.shortcuts.sweep import Trial
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.shortcut_learning.claims import claims_of
from lineament.recipes.shortcut_learning.figures import draw_all
from lineament.recipes.shortcut_learning.training import (
    MODELS,
    Found,
    KernelBias,
    closed_forms,
    footprint_trial,
    kernel_biases,
    remedy,
    summary,
    sweep,
)
from lineament.report.outcome import Outcome, Table

SLUG = "shortcut-learning"
TITLE = "On the Foundations of Shortcut Learning"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the latents, the networks on vectors, kernels, pixel footprints, and remedies."""

    core: float = 0.9
    shortcut: tuple[float, ...] = (0.7, 0.85, 0.9)
    ratios: tuple[float, ...] = (1.0, 8.0, 64.0)
    correlation: float = 0.6
    dims: int = 100
    samples: int = 1600
    seeds: int = 3

    models: tuple[str, ...] = ("linear", "relu x1")
    epochs: int = 12
    short_epochs: int = 10

    kernel_samples: int = 300
    kernel_seeds: int = 2
    ridges: tuple[float, ...] = (1e-2, 1.0)

    factors: tuple[float, ...] = (1.0, 4.0)
    footprint_shortcut: tuple[float, ...] = (0.9,)
    footprint_network: Literal["strided-cnn", "resnet18"] = "strided-cnn"
    footprint_size: int = 32
    footprint_base: int = 5
    footprint_samples: int = 1600
    footprint_epochs: int = 5
    footprint_seeds: int = 1
    device: str = "auto"

    remedies: tuple[str, ...] = ()
    remedy_seeds: int = 2

    preset: str = presets(
        quick={},
        small={
            "samples": 3200,
            "seeds": 10,
            "models": ("linear", "relu x1", "relu x4"),
            "epochs": 30,
            "short_epochs": 20,
            "kernel_samples": 500,
            "kernel_seeds": 4,
            "footprint_samples": 3200,
            "footprint_epochs": 12,
            "footprint_seeds": 10,
            "remedies": ("adam", "sam", "useful"),
            "remedy_seeds": 3,
        },
        paper={
            "shortcut": (0.6, 0.7, 0.8, 0.85, 0.9),
            "ratios": (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0),
            "samples": 3200,
            "seeds": 10,
            "models": tuple(MODELS),
            "epochs": 100,
            "short_epochs": 20,
            "kernel_samples": 3200,
            "kernel_seeds": 5,
            "factors": (1.0, 2.0, 3.0, 4.0, 5.0),
            "footprint_shortcut": (0.7, 0.8, 0.85, 0.9),
            "footprint_network": "resnet18",
            "footprint_size": 224,
            "footprint_base": 20,
            "footprint_samples": 3200,
            "footprint_epochs": 100,
            "footprint_seeds": 5,
            "remedies": ("adam", "sam", "useful"),
            "remedy_seeds": 10,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    for name in config.models:
        one_of("models", name, MODELS)
    for name in (
        "seeds",
        "kernel_seeds",
        "footprint_seeds",
        "remedy_seeds",
        "epochs",
        "short_epochs",
        "footprint_epochs",
    ):
        number(name, getattr(config, name), low=1, integer=True)
    for name in ("shortcut", "ratios", "models", "factors", "ridges", "footprint_shortcut"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    stages = Stages(out, config)
    closed = stages("closed form", lambda: closed_forms(config), dict[str, list[float]])
    trials = {
        name: stages(f"networks, {name}", lambda name=name: sweep(config, name), list[Trial])
        for name in config.models
    }
    short = stages("linear, too short", lambda: sweep(config, "linear", short=True), list[Trial])
    swapped = stages("latents exchanged", lambda: sweep(config, "relu x1", swapped=True), list[Trial])
    kernels = stages("kernels", lambda: kernel_biases(config), list[KernelBias])
    cells = [
        (factor, rho, seed)
        for rho in config.footprint_shortcut
        for factor in config.factors
        for seed in range(config.footprint_seeds)
    ]
    images = stages.each("footprint {}", cells, lambda cell: footprint_trial(config, *cell), Trial)
    mends = [(how, seed) for how in config.remedies for seed in range(config.remedy_seeds)]
    remedies = stages.each("remedy {}", mends, lambda cell: remedy(config, *cell), Trial)
    found = Found(closed, trials, short, swapped, kernels, list(images.values()), list(remedies.values()))
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(found, config), _tables(found, config), draw_all(found, config, out)
    )  # fmt: skip


_COLUMNS = ["setting", "seeds", "bias, best epoch", "sd", "bias, last epoch", "sd", "with shortcut", "with core", "validation accuracy", "best rule's", "best rule's reliance", "training loss"]  # fmt: skip


def _tables(found: Found, config: Config) -> list[Table]:
    tables = [
        Table(f"Networks on vectors: {name}", _COLUMNS, summary(trials))
        for name, trials in found.trials.items()
    ]
    tables += [
        Table("The linear network, trained too short (rate 1e-3)", _COLUMNS, summary(found.short)),
        Table(
            "relu x1, with the core latent amplified instead of the shortcut",
            _COLUMNS,
            summary(found.swapped),
        ),
        Table("Images, by the disc's size over the square's", _COLUMNS, summary(found.images)),
        Table(
            "The closed linear solution (least squares), mean bias by setting",
            ["setting", "seeds", "mean bias", "largest |bias|"],
            [
                [name, len(each), sum(each) / len(each), max(map(abs, each))]
                for name, each in found.closed.items()
            ],
        ),
        Table(
            "Kernel ridge at the same relative ridge, mean bias",
            ["kernel", "ridge", "setting", "seeds", "mean bias", "sd"],
            [[k.kernel, k.ridge, k.setting, config.kernel_seeds, k.bias, k.sd] for k in found.kernels],
        ),
    ]
    if found.remedies:
        tables.append(
            Table("Other trainings of relu x1 at the largest ratio", _COLUMNS, summary(found.remedies))
        )
    return tables
