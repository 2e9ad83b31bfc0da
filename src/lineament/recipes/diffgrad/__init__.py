"""diffGrad: does an Adam with friction find better minima, in one dimension and in networks, and what does the friction do?

Dubey et al., IEEE TNNLS 2020, arXiv 1909.11015. Every comparison has the control that the paper lacks: Adam at half the rate. ``quick`` and
``small`` train a small CNN on digits, ``paper`` is ResNet-50 on CIFAR.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import number, require
from lineament.recipes.diffgrad import runs
from lineament.recipes.diffgrad.figures import draw_all
from lineament.recipes.kit.presets import presets
from lineament.report.outcome import Claim, Outcome, Table

SLUG = "diffgrad"
TITLE = "diffGrad: An Optimization Method for Convolutional Neural Networks"

Key = tuple[str, int, str]  # activation, batch size, optimizer
Results = dict[Key, list[dict[str, Any]]]


@dataclass(frozen=True)
class Config:
    """One run. The groups are the functions of one variable, the data, the training and the timing."""

    function_lr: float = 0.1
    function_steps: int = 299

    data: Literal["digits", "cifar10", "cifar100"] = "digits"
    data_folder: str | None = None
    device: str = "auto"

    network: Literal["cnn", "resnet50"] = "cnn"
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
            "optimizers": tuple(runs.OPTIMIZERS),
            "seeds": (0, 1, 2, 3, 4),
            "timing_sizes": (1000, 10_000, 100_000, 1_000_000, 10_000_000),
            "timing_compiled": True,
        },
        paper={
            "data": "cifar10",
            "network": "resnet50",
            "activations": ("relu", "leaky_relu", "elu", "selu"),
            "optimizers": tuple(runs.OPTIMIZERS),
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
    runs.known(config.optimizers, config.activations)
    for name in ("seeds", "batch_sizes", "optimizers", "activations", "timing_sizes"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    for name in ("epochs", "track_every", "function_steps"):
        number(name, getattr(config, name), low=1, integer=True)
    data = runs.data_of(config.data, config.data_folder)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = Checkpoint(out / ".stages", asdict(config))
    walks = stages.stage("functions", lambda: walks_of(config))
    found: Results = {}
    for key in itertools.product(config.activations, config.batch_sizes, config.optimizers):
        found[key] = [
            stages.stage(
                f"{', '.join(map(str, key))}, seed {seed}",
                lambda key=key, seed=seed: runs.train(
                    data,
                    kind=config.network,
                    activation=key[0],
                    optimizer_name=key[2],
                    lr=config.lr,
                    epochs=config.epochs,
                    milestones=config.milestones,
                    batch_size=key[1],
                    track_every=config.track_every,
                    seed=seed,
                    device=device,
                ),
            )
            for seed in config.seeds
        ]
    timing = stages.stage("timing", lambda: runs.step_times(config.timing_sizes, config.timing_compiled))
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        [*function_claims(walks), *training_claims(found, config)],
        _tables(walks, found, timing),
        draw_all(walks, found, timing, out),
    )


def walks_of(config: Config) -> dict[str, Any]:
    """{function: {optimizer: positions and mean friction}}."""
    return {
        name: {
            who: runs.walk(function.slope, who, config.function_lr, config.function_steps)
            for who in runs.WALKERS
        }
        for name, function in runs.FUNCTIONS.items()
    }


def function_claims(walks: dict[str, Any]) -> list[Claim]:
    """Predicates: within .02 of the global minimum at the end, or not."""
    claims, won = [], {}
    for name in ("F1", "F2", "F3"):
        ends = {who: each["x"][-1] for who, each in walks[name].items()}
        there = {who: abs(x - runs.FUNCTIONS[name].minimum) < 0.02 for who, x in ends.items()}
        observed = ", ".join(f"{who} {x:.5f}" for who, x in ends.items())
        holds = there["diffGrad"] and not there["Adam"]
        both = there["diffGrad"] and there["Adam"]
        claims.append(
            Claim(
                f"{name}: from x = -1 diffGrad stays in the basin of the global minimum and Adam does not",
                f"diffGrad ends at {runs.FUNCTIONS[name].minimum:g}, Adam elsewhere (figure)",
                observed,
                holds,
                ""
                if holds
                else "Adam ends there too"
                if both
                else "diffGrad does not end there with these settings",
            )
        )
        if holds:
            won[name] = (there["Adam (half the rate)"], ends["Adam (half the rate)"])
    holds = bool(won) and not any(there for there, _ in won.values())
    claims.append(
        Claim(
            "Where diffGrad wins, the friction is why: Adam at half the rate loses there too",
            "the friction avoids the overshoot (no such control in the paper)",
            ", ".join(f"{name}: Adam at half the rate ends at {x:.5f}" for name, (_, x) in won.items())
            or "no win",
            holds,
            ""
            if holds
            else "half the rate is enough: the friction was near 1/2 on the whole way"
            if won
            else "there is no win to explain",
        )
    )
    return claims


def training_claims(found: Results, config: Config) -> list[Claim]:
    """Predicates: a greater mean test accuracy in every setting; friction's mean against fixed bounds."""
    settings = list(itertools.product(config.activations, config.batch_sizes))
    accuracy = {key: statistics.mean(r["accuracy"] for r in each) for key, each in found.items()}
    loss = {key: statistics.mean(r["losses"][-1] for r in each) for key, each in found.items()}
    friction = {
        key: statistics.mean(statistics.mean(r["friction"]["mean"]) for r in each)
        for key, each in found.items()
        if each[0]["friction"]["mean"]
    }
    there = set(config.optimizers)
    claims = []
    if "diffGrad" not in there:
        return claims

    def label(setting: tuple[str, int]) -> str:
        parts = [setting[0]] if len(config.activations) > 1 else []
        parts += [f"batch {setting[1]}"] if len(config.batch_sizes) > 1 else []
        return ", ".join(parts) + ": " if parts else ""

    def beside(values: dict[Key, float], one: str, other: str, form: str) -> str:
        return "; ".join(
            f"{label(s)}{format(values[(*s, one)], form)} against {format(values[(*s, other)], form)}"
            for s in settings
        )

    for rival in (*runs.RIVALS, "Adam (half the rate)"):
        if rival not in there:
            continue
        holds = all(accuracy[(*s, "diffGrad")] > accuracy[(*s, rival)] for s in settings)
        claims.append(
            Claim(
                f"diffGrad's test accuracy exceeds {rival}'s",
                "higher (table; its figures could not be obtained)"
                if rival in runs.RIVALS
                else "not compared in the paper",
                beside(accuracy, "diffGrad", rival, ".4f"),
                holds,
                "" if holds else _why(rival),
            )
        )
    if "Adam (half the rate)" in there:
        half = "Adam (half the rate)"
        apart = {s: abs(loss[(*s, "diffGrad")] / loss[(*s, half)] - 1) for s in settings}
        holds = min(apart.values()) > 0.05
        claims.append(
            Claim(
                "diffGrad trains otherwise than Adam at half the rate: final losses differ by more than 5 %",
                "implied: the friction adapts each step",
                beside(loss, "diffGrad", half, ".5f"),
                holds,
                ""
                if holds
                else f"the mean friction was {min(friction[(*s, 'diffGrad')] for s in settings):.4f}: half the rate it is",
            )
        )
    values = [friction[(*s, "diffGrad")] for s in settings]
    holds = min(values) > 0.51
    claims.append(
        Claim(
            "The friction adapts: its mean over coordinates and steps is above 0.51",
            "between 1/2 and 1, by how fast the gradient changes",
            ", ".join(f"{label(s)}{v:.4f}" for s, v in zip(settings, values)),
            holds,
            ""
            if holds
            else f"between steps a coordinate's gradient changes by about {4 * (min(values) - 0.5):.1g} (sigmoid(d) is 1/2 + d/4 there)",
        )
    )
    if {"diffGrad (loss x 1000)", "diffGrad (loss / 1000)"} <= there:
        triples = [
            [friction[(*s, f"diffGrad{how}")] for how in (" (loss / 1000)", "", " (loss x 1000)")]
            for s in settings
        ]
        holds = all(c - b < 0.01 and b - a < 0.01 for a, b, c in triples)
        claims.append(
            Claim(
                "Like Adam, the method does not depend on the loss's scale: the mean friction moves by less than 0.01",
                "Adam's invariance is not claimed for diffGrad; users assume it",
                "; ".join(
                    f"{label(s)}/ 1000, 1, x 1000: " + ", ".join(f"{v:.5f}" for v in t)
                    for s, t in zip(settings, triples)
                ),
                holds,
                ""
                if holds
                else "sigmoid(|dg|) has a unit: the loss's scale decides between Adam's rate and half of it",
            )
        )
    return claims


def _why(rival: str) -> str:
    if rival == "Adam (half the rate)":
        return "the two are the same method where the friction is 1/2"
    if rival in ("Adam", "AMSGrad"):
        return "at half Adam's step the network is trained less in the same epochs"
    return "not at this scale, with one customary rate for each method"


def _tables(walks: dict[str, Any], found: Results, timing: dict[str, Any]) -> list[Table]:
    rows = []
    for (activation, batch, name), each in found.items():
        accuracies = [r["accuracy"] for r in each]
        spread = statistics.stdev(accuracies) if len(each) > 1 else None
        means = [statistics.mean(r["friction"]["mean"]) for r in each if r["friction"]["mean"]]
        rows.append(
            [
                *(activation, batch, name, statistics.mean(accuracies), spread),
                statistics.mean(r["losses"][-1] for r in each),
                statistics.mean(r["first"] for r in each),
                statistics.mean(means) if means else None,
            ]
        )
    return [
        Table(
            "Functions of one variable: where each ends, from x = -1",
            ["function", "global minimum", *runs.WALKERS, "diffGrad's mean friction"],
            [
                [
                    name,
                    runs.FUNCTIONS[name].minimum,
                    *(e["x"][-1] for e in each.values()),
                    each["diffGrad"]["friction"],
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
            ["parameters", *timing["seconds"]],
            [
                [
                    size,
                    *(times[i] / timing["seconds"]["Adam, fused"][i] for times in timing["seconds"].values()),
                ]
                for i, size in enumerate(timing["sizes"])
            ],
        ),
    ]
