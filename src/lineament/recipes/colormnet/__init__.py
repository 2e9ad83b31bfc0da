"""ColorMNet: does a memory of frames keep a film's colours steadier than handing them on from frame to frame?

Yang et al., ECCV 2024, arXiv 2404.06251. Tiny networks are trained on generated films whose colours only the exemplar can tell, and judged on others: memory with
and without local attention, recurrence, and what needs no network: a table from grey to colour, colours copied by position, grey. ``davis`` trains them on, with real films of which two at a time are
left out and judged.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lineament.core.checks import number, require
from lineament.recipes.colormnet.claims import all_claims, error_over, mean_over
from lineament.recipes.colormnet.davis import PAIR, Filmed, davis_films, left_out
from lineament.recipes.colormnet.experiments import SPANS, VARIANTS, Coloured, Learned, coloured, learned
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
    choosing: int = 3
    size: int = 64
    data_folder: str | None = None
    device: str = "auto"

    encoder: Literal["resnet", "fusion"] = "resnet"
    frames: int = 4
    epochs: int = 4
    steps: int = 15
    batch_size: int = 2
    rates: tuple[float, ...] = (2e-3,)
    seeds: tuple[int, ...] = (0,)
    davis: int = 0
    davis_steps: int = 40

    long: int = 60

    preset: str = presets(
        quick={},
        small={
            "films": 200, "unseen": 16, "frames": 4, "epochs": 4, "steps": 60, "batch_size": 4, "rates": (3e-4, 1e-3, 2e-3), "davis": 8, "davis_steps": 60, "long": 200,
        },
        paper={
            "films": 2000, "unseen": 40, "size": 128, "encoder": "fusion", "frames": 8, "epochs": 40, "steps": 500, "batch_size": 4, "rates": (1e-3, 2e-3, 4e-3),
            "seeds": (0, 1, 2), "davis": 8, "davis_steps": 2000, "long": 200,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished seed."""
    least = {
        "films": 2,
        "unseen": 2,
        "choosing": 1,
        "frames": 2,
        "epochs": 1,
        "steps": 1,
        "long": 20,
        "davis": 0,
        "davis_steps": 1,
    }
    for name, low in least.items():
        number(name, getattr(config, name), low=low, integer=True)
    for name in ("seeds", "rates"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    require(
        config.size % 16 == 0 and config.size >= 32,
        f"size: got {config.size}, expected a multiple of 16 of at least 32",
    )
    if config.davis:
        count = len(davis_films(config.data_folder, config.size))
        require(
            config.davis % PAIR == 0 and config.davis <= count,
            f"davis: got {config.davis} sequences to judge, expected an even number of at most {count}",
        )
    stages = Stages(out, config)
    keys = [(seed, name) for seed in config.seeds for name in VARIANTS]
    trained = stages.each("seed {0[0]}, {0[1]}", keys, lambda k: learned(config, k[1], k[0]), Learned)
    by_seed = {seed: {name: trained[seed, name] for name in VARIANTS} for seed in config.seeds}
    found = stages.each("films of seed {}", config.seeds, lambda s: coloured(config, s, by_seed[s]), Coloured)
    pairs = range(config.davis // PAIR)
    real = stages.each(
        "DAVIS, pair {}", pairs, lambda k: left_out(config, k, by_seed[config.seeds[0]]), Filmed
    )
    films, sequences = list(found.values()), list(real.values())
    tables = [_rates(by_seed), *_tables(films, list(by_seed.values()), config)]
    tables += [_real(sequences)] if sequences else []
    claims = all_claims(films, sequences, config)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), claims, tables, draw_all(films, out))


def _rates(by_seed: dict[int, dict[str, Learned]]) -> Table:
    rows = [
        [
            name,
            seed,
            ", ".join(f"{rate}: {value:.2f}" for rate, value in held.by_rate.items()),
            f"{held.rate:g}",
        ]
        for seed, each in by_seed.items()
        for name, held in each.items()
    ]
    return Table(
        "Step sizes, by films that judge nothing else",
        ["how", "seed", "PSNR in dB of each step size", "chosen"],
        rows,
    )


def _tables(found: list[Coloured], networks: list[dict[str, Learned]], config: Config) -> list[Table]:
    films = config.unseen * len(found)
    kinds = {"own": "in which grey says which surface it is", "shared": "in which two shapes share a grey"}
    tables = []
    for kind, what in kinds.items():
        rows = []
        for name in getattr(found[0], kind):
            means = [mean_over(found, kind, name, span) for span in SPANS]
            loss = statistics.mean(n[name].loss for n in networks) if name in VARIANTS else None
            rows.append([name, *means, error_over(found, kind, name), loss])
        tables.append(
            Table(
                f"PSNR in dB of the chroma of {films} unseen films {what}",
                ["how", *(f"frames {span}" for span in SPANS), "standard error over films", "training loss"],
                rows,
            )
        )
    return tables


def _real(found: list[Filmed]) -> Table:
    names = [name for pair in found for name in pair.sequences]
    rows = []
    for way in found[0].decibels:
        each = [statistics.mean(film) for pair in found for film in pair.decibels[way]]
        rows.append([way, *each, statistics.mean(each), statistics.stdev(each) / len(each) ** 0.5])
    return Table(
        "PSNR in dB of the chroma of DAVIS sequences that were left out, two at a time",
        ["how", *names, "mean", "standard error over sequences"],
        rows,
    )


__all__ = ["Config", "run"]
