"""Dataset condensation with contrastive signals: does matching gradients summed over classes keep what tells them apart, where all share something irrelevant?

Lee et al., ICML 2022, arXiv 2202.02916. To digits, one of a few textures is added, the same for all classes; sets are condensed class by class, summed, and summed after a
warm-up, each at the best of equally many step sizes, which is chosen on held-out training pictures that judge nothing else. ``others`` are data as they are: ``"faces"`` (ORL, 7 of
10 pictures of each person for training) is the fine-grained set.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from lineament.core.checks import number, require
from lineament.recipes.dcc.claims import all_claims
from lineament.recipes.dcc.experiments import OTHERS, Trial, check_others, told_of, trial_of
from lineament.recipes.dcc.figures import draw_all
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "dcc"
TITLE = "Dataset Condensation with Contrastive Signals"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the data, the learning, and the judging."""

    data: Literal["digits", "mnist", "cifar10", "faces"] = "digits"
    data_folder: str | None = None
    side: int = 8
    amplitude: float = 2.0
    textures: int = 3
    controls: tuple[str, ...] = ()
    control_seeds: int = 1
    seeds: tuple[int, ...] = (0, 1)
    others: tuple[str, ...] = ()
    other_outer: int = 8
    other_rates: tuple[float, ...] = (1.0, 3.0)
    most: int = 200

    per_class: int = 1
    width: int = 16
    depth: int = 2
    outer: int = 10
    inner: int = 5
    epochs: int = 3
    batch: int = 16
    rates: tuple[float, ...] = (0.3, 1.0)

    networks: int = 3
    choosing: int = 3
    training: int = 60

    preset: str = presets(
        quick={},
        small={
            "controls": ("none", "independent", "shuffled"), "seeds": (0, 1, 2, 3, 4), "side": 16, "amplitude": 4.0, "outer": 32, "networks": 8, "choosing": 8,
            "training": 120, "others": ("faces",), "other_outer": 8,
        },
        paper={
            "data": "cifar10", "side": 32, "amplitude": 0.0, "seeds": (0, 1, 2, 3, 4), "per_class": 10, "width": 128, "depth": 3,
            "outer": 1000, "inner": 10, "epochs": 50, "batch": 256, "rates": (0.1, 0.3, 1.0), "networks": 20, "choosing": 5, "training": 300,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished seed."""
    for name in ("seeds", "rates", "other_rates"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    for name in (
        "per_class",
        "outer",
        "inner",
        "networks",
        "choosing",
        "training",
        "control_seeds",
        "other_outer",
        "most",
    ):
        number(name, getattr(config, name), low=1, integer=True)
    for name, known in (("controls", ("none", "independent", "shuffled")), ("others", OTHERS)):
        given = getattr(config, name)
        require(set(given) <= set(known), f"{name}: got {', '.join(given)}, expected of {', '.join(known)}")
    check_others(config)
    stages = Stages(out, config)
    trials: dict[str, list[Trial]] = {}
    for setting in ("shared", *config.others, *config.controls):
        each = stages.each(
            f"{told_of(setting)}, seed {{}}",
            config.seeds[: config.control_seeds] if setting in config.controls else config.seeds,
            lambda s, n=setting: trial_of(config, n, s),
            Trial,
        )
        trials[setting] = list(each.values())
    tables = [_table(setting, each) for setting, each in trials.items()]
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), all_claims(trials), tables, draw_all(trials, out)
    )


def _table(setting: str, trials: list[Trial]) -> Table:
    rows = []
    for name in trials[0].accuracy:
        each = torch.stack([t.accuracy[name].mean() for t in trials])
        rates = ", ".join(f"{t.rate[name]:g}" for t in trials if name in t.rate)
        error = float(each.std() / len(each) ** 0.5) if len(each) > 1 else float("nan")
        rows.append([name, 100 * float(each.mean()), 100 * error, rates])
    return Table(
        f"Test accuracy in %, {len(trials)} seeds, {told_of(setting)}",
        ["trained on", "accuracy", "standard error over seeds", "step size of each seed"],
        rows,
    )


__all__ = ["Config", "run"]
