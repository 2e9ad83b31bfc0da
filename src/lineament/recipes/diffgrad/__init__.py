"""diffGrad: does an Adam with friction find better minima, in one dimension and in networks, and what does the friction do?

Dubey et al., IEEE TNNLS 2020, arXiv 1909.11015. Every comparison has the control that the paper lacks: Adam at half the rate. ``quick`` and
``small`` train a small CNN on digits, ``paper`` is ResNet-50 on CIFAR.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lineament.core.checks import number, one_of, require
from lineament.recipes.diffgrad.claims import Results, function_claims, training_claims
from lineament.recipes.diffgrad.figures import draw_all
from lineament.recipes.diffgrad.functions import FUNCTIONS, WALKERS, Walk, walks_of
from lineament.recipes.diffgrad.training import OPTIMIZERS, Timing, Training, data_of, step_times, train
from lineament.recipes.kit.networks import ACTIVATIONS
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "diffgrad"
TITLE = "diffGrad: An Optimization Method for Convolutional Neural Networks"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the functions of one variable, the data, the training and the timing."""

    function_lr: float = 0.1
    function_steps: int = 299

    data: Literal["digits", "cifar10", "cifar100"] = "digits"
    data_folder: str | None = None
    device: str = "auto"

    network: Literal["two-conv", "resnet50"] = "two-conv"
    activations: tuple[str, ...] = ("relu",)
    optimizers: tuple[str, ...] = (
        *("Adam", "Adam (half the rate)", "diffGrad"),
        *("diffGrad (loss x 1000)", "diffGrad (loss / 1000)"),
    )
    lr: float = 1e-3
    epochs: int = 15
    milestones: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = (64,)
    track_every: int = 1
    seeds: tuple[int, ...] = (0,)

    timing_sizes: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    timing_compiled: bool = False

    preset: str = presets(
        quick={},
        small={
            "optimizers": tuple(OPTIMIZERS),
            "seeds": (0, 1, 2, 3, 4),
            "timing_sizes": (1000, 10_000, 100_000, 1_000_000, 10_000_000),
            "timing_compiled": True,
        },
        paper={
            "data": "cifar10",
            "network": "resnet50",
            "activations": ("relu", "leaky_relu", "elu", "selu"),
            "optimizers": tuple(OPTIMIZERS),
            "epochs": 100,
            "milestones": (80,),
            "batch_sizes": (32, 64, 128),
            "track_every": 50,
            "seeds": (0, 1, 2),
            "timing_sizes": (1000, 10_000, 100_000, 1_000_000, 10_000_000, 100_000_000),
            "timing_compiled": True,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished training."""
    for name, known in (("optimizers", OPTIMIZERS), ("activations", ACTIVATIONS)):
        for value in getattr(config, name):
            one_of(name, value, known)
    for name in ("seeds", "batch_sizes", "optimizers", "activations", "timing_sizes"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    for name in ("epochs", "track_every", "function_steps"):
        number(name, getattr(config, name), low=1, integer=True)
    data = data_of(config.data, config.data_folder)
    stages = Stages(out, config)
    walks = stages(
        "functions", lambda: walks_of(config.function_lr, config.function_steps), dict[str, dict[str, Walk]]
    )
    found: Results = {}
    for key in itertools.product(config.activations, config.batch_sizes, config.optimizers):
        name = ", ".join(map(str, key)) + ", seed {}"
        trained = stages.each(
            name, config.seeds, lambda seed, key=key: train(config, data, key, seed), Training
        )
        found[key] = list(trained.values())
    timing = stages("timing", lambda: step_times(config.timing_sizes, config.timing_compiled), Timing)
    claims = [*function_claims(walks), *training_claims(found, config)]
    tables = _tables(walks, found, timing)
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims, tables, draw_all(walks, found, timing, out)
    )


def _tables(walks: dict[str, dict[str, Walk]], found: Results, timing: Timing) -> list[Table]:
    rows = []
    for (activation, batch, name), each in found.items():
        accuracies = [r.accuracy for r in each]
        spread = statistics.stdev(accuracies) if len(each) > 1 else None
        means = [statistics.mean(r.friction.mean) for r in each if r.friction.mean]
        rows.append(
            [
                *(activation, batch, name, statistics.mean(accuracies), spread),
                statistics.mean(r.losses[-1] for r in each),
                statistics.mean(r.first for r in each),
                statistics.mean(means) if means else None,
            ]
        )
    return [
        Table(
            "Functions of one variable: where each ends, from x = -1",
            ["function", "global minimum", *WALKERS, "diffGrad's mean friction"],
            [
                [
                    name,
                    FUNCTIONS[name].minimum,
                    *(e.x[-1] for e in each.values()),
                    each["diffGrad"].friction,
                ]
                for name, each in walks.items()
            ],
        ),
        Table(
            f"Training (means of {len(next(iter(found.values())))} seeds)",
            [
                "activation",
                "batch",
                "optimizer",
                "test accuracy",
                "sd",
                "final loss",
                "loss, first 60 steps",
                "mean friction",
            ],
            rows,
        ),
        Table(
            "A step's time relative to Adam, fused",
            ["parameters", *timing.seconds],
            [
                [
                    size,
                    *(times[i] / timing.seconds["Adam, fused"][i] for times in timing.seconds.values()),
                ]
                for i, size in enumerate(timing.sizes)
            ],
        ),
    ]
