"""Gradient sparse autoencoders: does a selection that knows the loss keep more of the model, and what of that does its training give?

Olmo et al. 2024, arXiv 2411.10397. Planted features with a known truth, and a small language model. Beside the paper's comparison stand the controls
that it lacks: the gradient used at inference alone, random directions, shuffled gradients, a frozen random decoder, more steps.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lineament.core.checks import number, one_of, require
from lineament.recipes.gsae.claims import language_claims, planted_claims, values
from lineament.recipes.gsae.figures import draw_all
from lineament.recipes.gsae.language import Spoken, spoken
from lineament.recipes.gsae.planted import Measured, planted
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "gsae"
TITLE = "Features that Make a Difference: Leveraging Gradients for Improved Dictionary Learning"
CONTROLS = ("random", "shuffled", "frozen", "labels", "longer")


@dataclass(frozen=True)
class Config:
    """One run. The groups are the planted features, the dictionaries, and the language model (``lm``). ``jobs``: seeds at a time."""

    rows: int = 60_000
    test_rows: int = 8000
    host_epochs: int = 10
    width: int = 384
    k: int = 6
    batch_size: int = 1024
    steps: int = 600
    contexts: int = 16
    betas: tuple[float, ...] = ()
    controls: tuple[str, ...] = ("random",)
    seeds: tuple[int, ...] = (0,)
    jobs: int = 1

    language_model: str = ""
    text: str | None = None
    letters: int = 400_000
    length: int = 64
    site: str = "transformer.h.1"
    lm_epochs: int = 3
    lm_width: int = 512
    lm_k: int = 8
    lm_tokens: int = 400_000
    lm_batch: int = 1024
    lm_test_tokens: int = 10_000

    preset: str = presets(
        quick={},
        small={
            "rows": 100_000,
            "test_rows": 20_000,
            "steps": 900,
            "contexts": 64,
            "betas": (0.3, 3.0, 10.0),
            "controls": CONTROLS,
            "seeds": (0, 1, 2),
            "jobs": 2,
            "language_model": "tiny",
        },
        paper={
            "rows": 1_000_000,
            "test_rows": 100_000,
            "host_epochs": 20,
            "steps": 5000,
            "contexts": 256,
            "betas": (0.3, 3.0, 10.0),
            "controls": CONTROLS,
            "seeds": (0, 1, 2, 3, 4),
            "language_model": "gpt2",
            "letters": 2_000_000_000,
            "length": 512,
            "site": "transformer.h.7",
            "lm_width": 24_576,
            "lm_k": 32,
            "lm_tokens": 400_000_000,
            "lm_batch": 131_072,
            "lm_test_tokens": 1_000_000,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    for name in config.controls:
        one_of("controls", name, CONTROLS)
    require(len(config.seeds) > 0, "seeds: got none, expected at least one")
    number("k", config.k, low=1, high=64, integer=True)
    stages = Stages(out, config)
    number("jobs", config.jobs, low=1, integer=True)
    found = stages.each(
        "planted, seed {}",
        config.seeds,
        lambda seed: planted(config, seed),
        list[Measured],
        jobs=config.jobs,
    )
    claims = planted_claims(found)
    tables = [_planted_table(found)]
    if config.language_model:
        said = stages("language model", lambda: spoken(config, out), list[Spoken])
        claims += language_claims(said)
        tables.append(Table.of("Language model", {f.name: f.name for f in fields(Spoken)}, said))
    return Outcome(SLUG, TITLE, config.preset, asdict(config), claims, tables, draw_all(found, config, out))


def _planted_table(found: dict[int, list[Measured]]) -> Table:
    numbers = [f.name for f in fields(Measured)][2:]
    pairs = [(m.name, m.mode) for m in next(iter(found.values()))]
    return Table(
        f"Planted features, k the same for all: means of {len(found)} seed{'s' * (len(found) > 1)}",
        ["dictionary", "mode", *numbers],
        [
            [*pair, *(float(f"{statistics.mean(values(found, *pair, field)):.4g}") for field in numbers)]
            for pair in pairs
        ],
    )
