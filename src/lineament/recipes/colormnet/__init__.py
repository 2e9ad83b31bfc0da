"""ColorMNet: does a memory of frames keep a film's colours steadier than handing them on from frame to frame?

Yang et al., ECCV 2024, arXiv 2404.06251. Tiny networks are trained on generated films whose colours only the exemplar can tell, and judged on others: memory with
and without local attention, recurrence, and what needs no network: a table from grey to colour, colours copied by position, grey.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lineament.core.checks import number, require
from lineament.recipes.colormnet.claims import all_claims, mean_over
from lineament.recipes.colormnet.experiments import SPANS, Coloured, coloured
from lineament.recipes.colormnet.figures import draw_all
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "colormnet"
TITLE = "ColorMNet: A Memory-based Deep Spatial-Temporal Feature Propagation Network for Video Colorization"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the films, the networks and their training, and the long film."""

    films: int = 40
    unseen: int = 6
    size: int = 64
    device: str = "auto"

    encoder: Literal["resnet", "fusion"] = "resnet"
    frames: int = 4
    epochs: int = 4
    steps: int = 15
    batch_size: int = 2
    lr: float = 2e-3
    seeds: tuple[int, ...] = (0,)

    long: int = 60

    preset: str = presets(
        quick={},
        small={"films": 200, "unseen": 12, "frames": 5, "epochs": 5, "steps": 50, "batch_size": 4, "long": 200},
        paper={
            "films": 2000, "unseen": 40, "size": 128, "encoder": "fusion", "frames": 8, "epochs": 40, "steps": 500, "batch_size": 4, "seeds": (0, 1, 2),
            "long": 200,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished seed."""
    for name, low in (("films", 2), ("unseen", 2), ("frames", 2), ("epochs", 1), ("steps", 1), ("long", 20)):
        number(name, getattr(config, name), low=low, integer=True)
    require(len(config.seeds) > 0, "seeds: got none, expected at least one")
    require(
        config.size % 16 == 0 and config.size >= 32,
        f"size: got {config.size}, expected a multiple of 16 of at least 32",
    )
    stages = Stages(out, config)
    found = list(stages.each("seed {}", config.seeds, lambda s: coloured(config, s), Coloured).values())
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), all_claims(found, config), _tables(found, config), draw_all(found, out)
    )  # fmt: skip


def _tables(found: list[Coloured], config: Config) -> list[Table]:
    films = config.unseen * len(found)
    kinds = {"own": "in which grey says which surface it is", "shared": "in which two shapes share a grey"}
    return [
        Table(
            f"PSNR in dB of the chroma of {films} unseen films {what}",
            ["how", *(f"frames {span}" for span in SPANS), "standard error over films", "training loss"],
            [
                [name, *(mean_over(found, kind, name, span) for span in SPANS), _error([v for f in found for v in f.films[kind][name]]), statistics.mean(f.loss[name] for f in found) if name in found[0].loss else None]
                for name in getattr(found[0], kind)
            ],
        )
        for kind, what in kinds.items()
    ]  # fmt: skip


def _error(values: list[float]) -> float:
    """The standard error of a mean."""
    return statistics.stdev(values) / len(values) ** 0.5


__all__ = ["Config", "run"]
