"""Iterative feature merging: how many different features do networks hold, and what is a network worth without its repetition?

Chen, Zhou, Yan, ICLR 2024, arXiv 2310.06756. Merging is compared at equal sizes with removal (L1, L2, random), random merging, merging by correlation
and k-means folding, each also with the same repair; and with the merged size trained anew. ``quick`` and ``small`` train perceptrons on digits,
``paper`` VGG or ResNet on CIFAR.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lineament.core.checks import number, require
from lineament.recipes.ifm.claims import Results, all_claims
from lineament.recipes.ifm.experiments import Depth, Net, Trial, depth_of, net_of, trial_of
from lineament.recipes.ifm.figures import draw_all
from lineament.recipes.kit.image_sets import image_sets
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome, Table

SLUG = "ifm"
TITLE = "Going Beyond Neural Network Feature Similarity: The Network Feature Complexity and Its Interpretation Using Category Theory"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the data, the networks and their training, and what is measured of them."""

    data: Literal["digits", "mnist", "cifar10"] = "digits"
    data_folder: str | None = None
    device: str = "auto"

    network: Literal["mlp", "vgg19", "resnet18"] = "mlp"
    widths: tuple[int, ...] = (64, 256)
    layers: int = 2
    decays: tuple[float, ...] = (1e-4, 2e-3)
    lr: float = 0.1
    epochs: int = 20
    milestones: tuple[int, ...] = ()
    seeds: tuple[int, ...] = (0, 1)

    betas: tuple[float, ...] = (0.01, 0.03, 0.05, 0.1, 0.15, 0.2, 0.3)
    beta: float = 0.1
    share: float = 0.25
    depth: int = 5
    depth_width: int = 96
    ranked: int = 4
    draws: int = 3

    preset: str = presets(
        quick={},
        small={"widths": (64, 256, 512), "epochs": 60, "seeds": (0, 1, 2), "ranked": 8, "draws": 5},
        paper={
            "data": "cifar10",
            "network": "vgg19",
            "widths": (64, 128, 256),
            "decays": (1e-4, 5e-4),
            "epochs": 160,
            "milestones": (80, 120),
            "seeds": (0, 1, 2),
            "ranked": 8,
            "draws": 5,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished network."""
    for name in ("widths", "decays", "seeds", "betas"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    for name in ("epochs", "depth", "ranked", "draws"):
        number(name, getattr(config, name), low=1, integer=True)
    require(
        0 < config.share <= 0.3,
        f"share: got {config.share}, expected a share of the parameters of at most 0.3, as the claim says",
    )
    require(
        all(0 <= b < 1 for b in (*config.betas, config.beta)),
        "betas: expected numbers of at least 0 and below 1",
    )
    data = image_sets(config.data, config.data_folder)
    stages = Stages(out, config)
    found: Results = {}
    for width, decay in itertools.product(config.widths, config.decays):
        name = f"width {width}, decay {decay:g}, seed {{}}"
        each = stages.each(
            name, config.seeds, lambda seed, w=width, d=decay: net_of(config, data, w, d, seed), Net
        )
        found[width, decay] = list(each.values())
    width, decay = max(config.widths), max(config.decays)
    trials = list(
        stages.each(
            "sizes, seed {}", config.seeds, lambda s: trial_of(config, data, width, decay, s), Trial
        ).values()
    )
    deep = list(
        stages.each(
            "depth, seed {}", range(config.ranked), lambda s: depth_of(config, data, s), Depth
        ).values()
    )
    claims = all_claims(found, trials, deep, config)
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        claims,
        _tables(found, trials, deep, config),
        draw_all(found, trials, deep, config, out),
    )


def _tables(found: Results, trials: list[Trial], deep: list[Depth], config: Config) -> list[Table]:
    mean = statistics.mean
    return [
        Table(
            f"Channels left at beta {config.beta:g}, and what the merged network is worth (means of {len(config.seeds)} seeds)",
            ["width", "weight decay", "test accuracy", "channels left", "parameters left", "merged", "by the paper's rule", "untrained: channels left"],
            [
                [
                    width, decay, mean(n.accuracy for n in each), mean(n.channels for n in each), mean(n.parameters for n in each),
                    mean(n.merged for n in each), mean(n.published for n in each), mean(n.untrained for n in each),
                ]
                for (width, decay), each in found.items()
            ],
        ),
        Table(
            f"Test accuracy at {mean(t.parameters for t in trials):.3f} of the parameters, every layer of the same size (means of {len(trials)} seeds)",
            ["how", "accuracy", "with repair"],
            [
                [how, mean(t.accuracy[how] for t in trials), mean(t.repaired[how] for t in trials) if how in trials[0].repaired else None]
                for how in trials[0].accuracy
            ],
        ),
        Table(
            "Channels fed by another's weights: the share of answers that stay",
            ["seed", "in the merged groups", "in random groups of the same sizes"],
            [[seed, t.swapped, t.random] for seed, t in zip(config.seeds, trials)],
        ),
        Table(
            f"Share of channels left by depth at beta {config.beta:g}",
            ["seed", "test accuracy", *(f"layer {k + 1}" for k in range(len(deep[0].shares)))],
            [[seed, d.accuracy, *d.shares] for seed, d in enumerate(deep)],
        ),
    ]  # fmt: skip
