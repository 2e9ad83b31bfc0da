"""Gradient inversion over the feature domains of a generator: how much of a picture can be rebuilt from its gradient, and does searching features help?

Fang et al., ICCV 2023, arXiv 2308.04699. A prior is trained on public pictures, and pictures that it has not seen are audited: by GIFD, its ablations and its
rivals, each at the best of equally many step sizes, chosen on further pictures, and with as many passes through the audited network.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lineament.core.checks import number, one_of, require
from lineament.privacy.defences import defence_of
from lineament.recipes.gifd.claims import all_claims
from lineament.recipes.gifd.experiments import (
    ATTACKS,
    MLP_ATTACKS,
    Trial,
    attacks_of,
    further_of,
    scales_of,
    trial_of,
)
from lineament.recipes.gifd.figures import draw_all
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

_WHERE = {
    "in": ("digits like those of the prior", "people whom the prior has not seen (it knows 30)"),
    "out": ("digits unlike those of the prior (0 to 4 known, 5 to 9 audited)", "people whom the prior has not seen (it knows 10)"),
    "bangla": ("Bangla digits, of which the prior has seen none", ""),
}  # fmt: skip
SLUG = "gifd"
TITLE = "GIFD: A Generative Gradient Inversion Method with Feature Domain Optimization"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the pictures, the prior, the messages, and the search; ``scales`` are step sizes to choose from, as multiples of each attack's default,
    by as many pictures as ``tuning`` says."""

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
    batches: tuple[int, ...] = (2,)

    attacks: tuple[str, ...] = ("gifd", "no ball", "latent", "ig")
    scales: tuple[float, ...] = (1.0,)
    tuning: int = 2
    steps: int = 40
    restarts: int = 1
    radius: float = 0.04

    preset: str = presets(
        quick={},
        small={
            "pictures": 16, "seeds": (0, 1), "prior_steps": 800, "defences": ("none", "prune=90", "noise=0.005"), "domains": ("in", "out"),
            "batches": (4, 8), "attacks": ATTACKS, "scales": (0.3, 1.0, 3.0), "tuning": 6,
        },
        paper={
            "data": "faces", "side": 32, "pictures": 16, "seeds": (0, 1, 2, 3, 4), "code": 64, "width": 128, "prior_steps": 8000,
            "defences": ("none", "noise=0.01", "clip=4", "prune=90", "soteria=80"), "domains": ("in", "out"), "batches": (4, 8),
            "attacks": ATTACKS, "scales": (0.1, 0.3, 1.0, 3.0), "tuning": 8, "steps": 1000, "restarts": 4,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished seed."""
    for name in ("seeds", "defences", "domains", "scales"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    for name in ("pictures", "tuning", "steps", "restarts", "prior_steps"):
        number(name, getattr(config, name), low=1, integer=True)
    require(
        config.pictures > 1, "pictures: got 1, expected at least 2, so that another's message can be tried"
    )
    for domain in config.domains:
        one_of("domains", domain, tuple(_WHERE))
    require(
        "bangla" not in config.domains or config.data != "faces",
        "domains: got 'bangla' with faces, expected data = 'digits' or 'mnist' with it",
    )
    for attack in config.attacks:
        one_of("attacks", attack, ATTACKS)
    require(
        {"gifd", "no ball", "latent"} <= set(config.attacks),
        f"attacks: got {', '.join(config.attacks)}, expected gifd, no ball and latent among them",
    )
    for batch in config.batches:
        number("batches", batch, low=1, integer=True)
        require(
            config.pictures % batch == 0 and config.pictures > batch,
            f"batches: got {batch}, expected numbers below pictures = {config.pictures} that divide it",
        )
    stages = Stages(out, config)
    trials: dict[str, list[Trial]] = {}
    chosen: dict[str, dict[str, dict[str, float]]] = {}
    for domain in config.domains:
        chosen[domain] = stages.each(
            f"domain {domain}, step sizes for {{}}", config.defences, lambda d, o=domain: scales_of(config, o, d), dict[str, float]
        )  # fmt: skip
        each = stages.each(
            f"domain {domain}, seed {{}}", config.seeds, lambda s, d=domain: trial_of(config, d, s, chosen[d]), Trial
        )  # fmt: skip
        trials[domain] = list(each.values())
    plain = chosen[config.domains[0]][config.defences[0]]
    further = list(stages.each("batches, labels and priors, seed {}", config.seeds, lambda s: further_of(config, s, plain), Trial).values())  # fmt: skip
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        all_claims(trials, further, config),
        [
            *(_table(domain, each, chosen[domain], config) for domain, each in trials.items()),
            _further(further, config),
        ],
        draw_all(trials, config, out),
    )


def _table(domain: str, trials: list[Trial], chosen: dict[str, dict[str, float]], config: Config) -> Table:
    where = _WHERE[domain][config.data == "faces"]
    scales = {f"{defence_of(d)} | {a}": scale for d, each in chosen.items() for a, scale in each.items()}
    mean = float(torch.cat([t.without for t in trials]).mean())
    people = bool(trials[0].people)
    left = (
        ""
        if set(attacks_of(config)) == set(config.attacks)
        else "; ggl needs the package cma and is left out"
    )
    return Table(
        f"PSNR in dB of {len(trials) * config.pictures} pictures, {where}, each attack at the best of {len(config.scales)} step sizes (as a multiple of its default, chosen "
        f"on {config.tuning} other pictures); the mean public picture has {mean:.1f}{left}",
        ["defence", "attack", "step size", "PSNR", "standard error", "against another's picture", "named among the audited", "labels right", *(("person first",) if people else ())],
        [[*name.split(" | "), scales[name], *_numbers(trials, name), *([_person(trials, name)] if people else [])] for name in trials[0].psnr],
    )  # fmt: skip


def _person(trials: list[Trial], name: str) -> str:
    """Shares of guesses that show their person, by the own and by another's message."""
    own, other, _ = torch.stack([t.people[name] for t in trials]).mean(0).tolist()
    return f"{100 * own:.0f} % ({100 * other:.0f} %)"


def _further(trials: list[Trial], config: Config) -> Table:
    return Table(
        f"PSNR in dB of {len(trials) * config.pictures} pictures from undefended messages: of several pictures, with a prior that has seen the audited, and of a network that begins "
        f"with a linear layer ({', '.join(MLP_ATTACKS)})",
        ["messages", "attack", "PSNR", "standard error", "against another's picture", "named among the audited", "labels right"],
        [[*name.split(" | "), *_numbers(trials, name)] for name in trials[0].psnr],
    )  # fmt: skip


def _numbers(trials: list[Trial], name: str) -> list[float | None]:
    told = torch.cat([t.psnr[name] for t in trials])
    wrong = [t.wrong[name] for t in trials if name in t.wrong]
    return [
        float(told.mean()), float(told.std() / len(told) ** 0.5), float(torch.cat(wrong).mean()) if wrong else None,
        float(torch.stack([t.named[name] for t in trials]).mean()), float(torch.stack([t.labels[name] for t in trials]).mean()),
    ]  # fmt: skip


__all__ = ["ATTACKS", "Config", "run"]
