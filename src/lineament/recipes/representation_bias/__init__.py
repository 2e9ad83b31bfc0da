"""Representation bias: of features that a network computes equally well, which fill its representation, and whom does that mislead?

Lampinen, Chan, Hermann, TMLR 2024, arXiv 2405.05847. Perceptrons on random bits learn an easy and a hard feature; all seeds of a condition are trained as one program. Controls:
untrained networks, a shuffled feature, two easy features, one feature alone.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from lineament.core.checks import number, one_of, require
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.representation_bias.claims import claims_of
from lineament.recipes.representation_bias.figures import draw_all
from lineament.recipes.representation_bias.training import CONDITIONS, Measured, condition, mean
from lineament.report.outcome import Outcome, Table

SLUG = "representation-bias"
TITLE = "Learned feature representations are biased by complexity, learning order, position, and more"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the data, the networks and their training, and the samples that measure."""

    block: int = 8
    noise: int = 8

    conditions: tuple[str, ...] = (
        *("easy and parity-3", "easy and xor", "two easy"),
        *("parity-3, easy alone", "parity-3, hard alone", "untrained"),
    )
    widths: tuple[int, ...] = (128, 64, 64)
    steps: int = 1000
    batch_size: int = 128
    lr: float = 2e-3
    seeds: int = 4

    samples: int = 4096
    patterns: int = 300

    preset: str = presets(
        quick={},
        small={
            "conditions": tuple(CONDITIONS),
            "steps": 2000,
            "seeds": 8,
        },
        paper={
            "conditions": tuple(CONDITIONS),
            "widths": (256, 128, 64, 64),
            "steps": 10_000,
            "lr": 1e-3,
            "seeds": 16,
            "samples": 8192,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished condition."""
    for name in config.conditions:
        one_of("conditions", name, CONDITIONS)
    require(len(config.conditions) > 0, "conditions: got none, expected at least one")
    for name in ("steps", "seeds", "batch_size", "samples", "patterns"):
        number(name, getattr(config, name), low=1, integer=True)
    stages = Stages(out, config)
    found = {
        name: stages(name, lambda name=name: condition(config, name), list[Measured])
        for name in config.conditions
    }
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), claims_of(found), _tables(found), draw_all(found, out)
    )


def _tables(found: dict[str, list[Measured]]) -> list[Table]:
    rows = []
    for name, each in found.items():
        for k, feature in enumerate(each[0].features):
            values = [m.r2[k] for m in each]
            rows.append(
                [
                    name, feature, len(each), mean(m.accuracy[k] for m in each), mean(values),
                    _deviation(values), mean(m.density[k] for m in each), mean(m.decodable[k] for m in each),
                    mean(m.components[k] for m in each), mean(m.shuffled for m in each),
                ]
            )  # fmt: skip
    columns = ["condition", "feature", "seeds", "accuracy", "variance explained", "sd", "density", "decodable", "components for 95 %", "shuffled control"]  # fmt: skip
    return [
        Table(
            "Features in the last hidden layer (means over seeds, on samples not trained on)", columns, rows
        )
    ]


def _deviation(values: list[float]) -> float:
    middle = mean(values)
    return (sum((v - middle) ** 2 for v in values) / max(len(values) - 1, 1)) ** 0.5
