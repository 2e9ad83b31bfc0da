"""ModHiFi: which of a layer's inputs rebuild its outputs, and what is left of a network without the others, or without the best of one class?

Kashyap et al., NeurIPS 2025, arXiv 2511.19566. Pruning and unlearning from forwards on generated images alone, beside every criterion with the same repairs,
the same sizes trained anew, a muted head and a network that was trained without the class. ``quick`` and ``small`` train on digits, ``paper`` on CIFAR-10.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from lineament.core.checks import number, require
from lineament.recipes.kit.image_sets import image_sets
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.modhifi.claims import Classes, Results, all_claims, arm
from lineament.recipes.modhifi.figures import draw_all
from lineament.recipes.modhifi.language import ARMS as TOLD
from lineament.recipes.modhifi.language import REMOVED, Spoken, spoken
from lineament.recipes.modhifi.networks import trained
from lineament.recipes.modhifi.pruning import ARMS, Trial, trial_of
from lineament.recipes.modhifi.unlearning import Unlearned, mean, unlearned
from lineament.report.outcome import Outcome, Table

SLUG = "modhifi"
TITLE = "ModHiFi: Identifying High Fidelity predictive components for Model Modification"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the images, the networks and their training, pruning, unlearning, and the language model."""

    data: Literal["digits", "mnist", "cifar10"] = "digits"
    data_folder: str | None = None
    samples: int = 60_000
    device: str = "auto"

    networks: tuple[str, ...] = ("cnn", "small-resnet")
    width: int = 16
    epochs: int = 12
    batch_size: int = 64
    lr: float = 0.05
    seeds: tuple[int, ...] = (0,)

    calibration: int = 200
    shares: tuple[float, ...] = (0.5,)
    noise: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)

    forget: tuple[int, ...] = (3,)
    forget_shares: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    relearning: int = 50
    shadows: int = 0

    text: str | None = None
    bytes: int = 300_000
    length: int = 64
    lm_width: int = 64
    lm_layers: int = 2
    lm_steps: int = 100

    preset: str = presets(
        quick={"networks": ("cnn",)},
        small={
            "width": 64, "calibration": 400, "shares": (0.5, 0.25), "forget": (3, 8), "bytes": 1_000_000, "length": 128, "lm_steps": 400,
        },
        paper={
            "data": "cifar10", "networks": ("vgg19", "resnet50"), "width": 64, "epochs": 200, "batch_size": 128, "lr": 0.1, "seeds": (0, 1, 2),
            "calibration": 2000, "shares": (0.5, 0.75, 0.25), "forget": (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), "relearning": 500, "shadows": 8,
            "bytes": 1_000_000, "length": 256, "lm_width": 256, "lm_layers": 4, "lm_steps": 4000,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished network, class or text."""
    for name in ("networks", "seeds", "shares", "noise", "forget", "forget_shares"):
        require(len(getattr(config, name)) > 0, f"{name}: got none, expected at least one")
    for name in ("epochs", "width", "calibration", "samples", "relearning", "lm_steps"):
        number(name, getattr(config, name), low=1, integer=True)
    require(
        config.shadows == 0 or config.shadows >= 3,
        f"shadows: got {config.shadows}, expected 0 (no attack), or 3 and more networks of each kind",
    )
    for name in ("shares", "forget_shares"):
        require(
            all(0 < s < 1 for s in getattr(config, name)),
            f"{name}: got {getattr(config, name)}, expected shares above 0 and below 1",
        )
    train, test = image_sets(config.data, config.data_folder)
    train = train[: config.samples]
    data = train, test
    classes = set(train.targets.tolist())
    require(
        set(config.forget) <= classes, f"forget: got {config.forget}, expected classes of {sorted(classes)}"
    )
    stages = Stages(out, config)
    net_of = functools.cache(lambda name, seed: trained(config, train, name, seed))
    found: Results = {}
    gone: Classes = {}
    for name in config.networks:
        each = stages.each(
            f"{name}, seed {{}}",
            config.seeds,
            lambda s, n=name: trial_of(config, data, net_of(n, s), s),
            Trial,
        )
        found[name] = list(each.values())
    for name in config.networks:
        each = stages.each(
            f"{name} without class {{}}",
            config.forget,
            lambda c, n=name: unlearned(config, data, net_of(n, config.seeds[0]), n, c),
            Unlearned,
        )
        gone[name] = list(each.values())
    texts = list(stages.each("text, seed {}", config.seeds, lambda s: spoken(config, s), Spoken).values())
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        all_claims(found, gone, texts, config),
        _tables(found, gone, texts, config),
        draw_all(found, gone, texts, config, out),
    )


def _tables(found: Results, gone: Classes, texts: list[Spoken], config: Config) -> list[Table]:
    mean_of = statistics.mean
    return [
        Table(
            f"Test accuracy of pruned networks, no training after (means of {len(config.seeds)} seeds)",
            ["network", "channels kept", "parameters left", "whole network", "criterion", "repairs", "accuracy"],
            [
                [name, share, mean_of(t.parameters[f"{share:g}"] for t in each), mean_of(t.accuracy for t in each), c, r, arm(each, share, c, r)]
                for name, each in found.items()
                for share, (c, r) in itertools.product(config.shares, ARMS)
            ],
        ),
        Table(
            "A class taken out: accuracy on the class and on the others",
            ["network", "classes", "what", "on the class", "on the others"],
            [
                [name, len(each), what, *mean(rows)]
                for name, each in gone.items()
                for what, rows in [
                    ("whole network", [u.before for u in each]),
                    *((f"saliency, {s:g} of the pairs", [u.shares[f"{s:g}"] for u in each]) for s in sorted(config.forget_shares)),
                    ("random, as many pairs as suffice", [u.random for u in each]),
                    ("the head alone", [u.head for u in each]),
                    ("trained without it", [u.retrained for u in each]),
                ]
            ],
        ),
        Table(
            f"Perplexity of a byte of the language model (means of {len(texts)} seeds; whole {mean_of(t.whole for t in texts):.3f})",
            ["width removed", "criterion", "repair", "perplexity"],
            [
                [removed, c, r, mean_of(t.pruned[f"{removed:g} | {c} | {r}"] for t in texts)]
                for removed, (c, r) in itertools.product(REMOVED, TOLD)
            ],
        ),
    ]  # fmt: skip


__all__ = ["Config", "run"]
