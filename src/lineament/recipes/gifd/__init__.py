"""Gradient inversion over the feature domains of a generator: how much of a picture can be rebuilt from its gradient, and does searching features help?

Fang et al., ICCV 2023, arXiv 2308.04699. A prior is trained on public pictures, and pictures that it has not seen are audited, one a message: by GIFD, by GIFD
without its balls, by a search of the code alone and by a search of pixels, all with equally many gradients of the audited network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lineament.core.checks import number, require
from lineament.recipes.gifd.claims import all_claims
from lineament.recipes.gifd.experiments import ATTACKS, Trial, trial_of
from lineament.recipes.gifd.figures import draw_all
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "gifd"
TITLE = "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the pictures, the prior, the messages, and the search."""

    data: Literal["digits", "mnist", "faces"] = "digits"
    data_folder: str | None = None
    side: int = 16
    pictures: int = 6
    seeds: tuple[int, ...] = (0,)

    code: int = 16
    width: int = 32
    prior_steps: int = 400

    defences: tuple[str, ...] = ("none", "prune=90")
    domains: tuple[str, ...] = ("in",)

    steps: int = 40
    restarts: int = 1
    radius: float = 0.04

    preset: str = presets(
        quick={},
        small={
            "pictures": 16, "seeds": (0, 1), "prior_steps": 800, "defences": ("none", "prune=90", "noise=0.005"), "domains": ("in", "out"),
        },
        paper={
            "data": "faces", "side": 32, "pictures": 16, "seeds": (0, 1, 2, 3, 4), "code": 64, "width": 128, "prior_steps": 8000,
            "defences": ("none", "noise=0.01", "clip=4", "prune=90", "soteria=80"), "domains": ("in", "out"), "steps": 1000, "restarts": 4,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished seed."""
    for name in ("seeds", "defences", "domains"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    for name in ("pictures", "steps", "restarts", "prior_steps"):
        number(name, getattr(config, name), low=1, integer=True)
    require(
        config.pictures > 1, "pictures: got 1, expected at least 2, so that another's message can be tried"
    )
    require(
        set(config.domains) <= {"in", "out"},
        f"domains: got {', '.join(config.domains)}, expected 'in', 'out' or both",
    )
    stages = Stages(out, config)
    trials: dict[str, list[Trial]] = {}
    for domain in config.domains:
        each = stages.each(
            f"domain {domain}, seed {{}}", config.seeds, lambda s, d=domain: trial_of(config, d, s), Trial
        )
        trials[domain] = list(each.values())
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        all_claims(trials, config),
        [_table(domain, each, config) for domain, each in trials.items()],
        draw_all(trials, config, out),
    )


def _table(domain: str, trials: list[Trial], config: Config) -> Table:
    count = len(trials) * config.pictures
    where = (
        "people or digits like those of the prior"
        if domain == "in"
        else "digits or people unlike those of the prior"
    )
    rows = []
    for name in trials[0].psnr:
        told = torch.cat([t.psnr[name] for t in trials])
        wrong = torch.cat([t.wrong[name] for t in trials])
        rows.append(
            [
                *name.split(" | "), float(told.mean()), float(told.std() / count**0.5), float(wrong.mean()),
                float(torch.stack([t.named[name] for t in trials]).mean()), float(torch.stack([t.labels[name] for t in trials]).mean()),
            ]
        )  # fmt: skip
    mean = float(torch.cat([t.without for t in trials]).mean())
    return Table(
        f"PSNR in dB of {count} pictures of {where}; the mean public picture has {mean:.1f}",
        ["defence", "attack", "PSNR", "standard error", "against another's picture", "named among the audited", "labels right"],
        rows,
    )  # fmt: skip


__all__ = ["ATTACKS", "Config", "run"]
