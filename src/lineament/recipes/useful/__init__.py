"""USEFUL: changing the training data's distribution to reduce simplicity bias, with its theory, controls and ablations.

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv 2404.17768. ``quick`` and ``small`` run the two-layer theory and digits that a
bright pixel gives away in nine of ten images; ``paper`` is CIFAR-10 with ResNet-18 for 200 epochs. Every method of a seed starts from the same
weights and, where it selects, from the same early training.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from lineament.core.batching import progress
from lineament.core.checks import number
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.useful.claims import claims_of
from lineament.recipes.useful.data import load_data, long_tailed, mislabelled
from lineament.recipes.useful.figures import draw_all
from lineament.recipes.useful.theory import Theory, theory_panel
from lineament.recipes.useful.training import Early, Final, early, final, parsed
from lineament.report.outcome import Outcome, Table

SLUG = "useful"
TITLE = "Changing the Training Data Distribution to Reduce Simplicity Bias Improves In-distribution Generalization"


@dataclass(frozen=True)
class Config:
    """One run. The groups are the data, the training, the method and the theory.

    ``separating=0`` finds the epoch by the rule; ``train=0`` takes all examples; ``imbalance`` is the ratio of the largest class to the smallest,
    ``rebalance`` weighs classes equally; ``weights`` is a safetensors file to fine-tune from.
    """

    data: Literal["pixel-digits", "digits", "cifar10", "cifar100", "npz"] = "pixel-digits"
    data_folder: str | None = None
    train: int = 0
    label_noise: float = 0.0
    imbalance: float = 1.0
    rebalance: bool = False
    device: str = "auto"

    network: str = "tiny-cnn"
    width: int = 16
    weights: str | None = None
    epochs: int = 30
    batch_size: int = 32
    lr: float = 0.02
    milestones: tuple[float, ...] = (0.5, 0.75)
    weight_decay: float = 5e-4
    flip_and_crop: bool = False
    mixup: float = 0.0
    sam_rho: float = 0.05
    asam_rho: float = 0.5
    sharpness_batches: int = 2

    methods: tuple[str, ...] = ("sgd", "sgd+random", "sgd+useful", "sam", "sam+useful")
    separating: int = 4
    output: Literal["softmax", "logits", "features"] = "softmax"
    factor: int = 2
    jtt_factor: int = 6
    seeds: tuple[int, ...] = (0,)

    theory_samples: int = 500
    theory_slow: tuple[float, ...] = (0.6, 0.4)
    theory_alpha: float = 0.9
    theory_steps: int = 400
    theory_rho: float = 0.1
    theory_seeds: tuple[int, ...] = (0,)

    preset: str = presets(
        quick={},
        small={
            "methods": (
                *("sgd", "sgd+steps", "sgd+random", "sgd+useful", "sgd+useful3", "sgd+upweight"),
                *("sgd+quantile", "sgd+misclassified", "sgd+eiil", "sgd+jtt"),
                *("sam", "sam+useful", "asam", "asam+useful"),
            ),
            "seeds": (0, 1, 2, 3, 4, 5),
            "theory_slow": (0.6, 0.4, 0.2),
            "theory_steps": 1200,
            "theory_seeds": (0, 1, 2),
        },
        paper={
            "data": "cifar10",
            "network": "resnet18",
            "width": 64,
            "epochs": 200,
            "batch_size": 128,
            "lr": 0.1,
            "flip_and_crop": True,
            "sam_rho": 0.1,
            "asam_rho": 1.0,
            "methods": (
                *("sgd", "sgd+steps", "sgd+random", "sgd+useful", "sgd+useful3", "sgd+upweight"),
                *("sgd+quantile", "sgd+misclassified", "sgd+eiil", "sgd+jtt", "sgd+ta", "sgd+useful+ta"),
                *("sam", "sam+random", "sam+useful", "sam+ta", "sam+useful+ta", "asam", "asam+useful"),
            ),
            "separating": 8,
            "seeds": (0, 1, 2),
            "theory_slow": (0.6, 0.4, 0.2),
            "theory_steps": 1200,
            "theory_seeds": (0, 1, 2),
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished epoch."""
    methods = {name: parsed(name) for name in config.methods}
    number("separating", config.separating, low=0, high=config.epochs, integer=True)
    number("factor", config.factor, low=1, integer=True)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    first = load_data(config.data, config.data_folder, train=config.train, seed=0)
    stages = Stages(out, config)
    theory = stages("theory", lambda: theory_panel(config), Theory)
    found: dict[str, list[Final]] = {name: [] for name in config.methods}
    selected: list[Early] = []
    for seed in progress(config.seeds, "seeds"):
        # Digits are drawn anew for each seed; the images of a folder are the same.
        digits = config.data in ("pixel-digits", "digits")
        data = load_data(config.data, None, train=config.train, seed=seed) if digits else first
        data = mislabelled(long_tailed(data, config.imbalance, seed), config.label_noise, seed)
        kinds = sorted({m.trivial for m in methods.values() if m.selects})
        select = partial(early, config, data, seed, device)
        each = stages.each(f"early, seed {seed}, {{}}", kinds, select, Early)
        selected += list(each.values())[:1]
        for name, method in methods.items():
            train = partial(
                final, name, config, data, each.get(method.trivial), seed, device, stages.checkpoint
            )
            found[name].append(stages(f"{name}, seed {seed}", train, Final))
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        claims_of(config, theory, selected, found),
        tables(config, theory, selected, found),
        draw_all(config, theory, selected, found, out),
    )


def tables(
    config: Config, theory: Theory, selected: list[Early], found: dict[str, list[Final]]
) -> list[Table]:
    """The theory's trainings, the early selections, the methods."""
    rows: list[list[Any]] = []
    for slow, ways in theory.walks.items():
        for way, walks in ways.items():
            row: list[Any] = [slow, way]
            for index, mark in enumerate(theory.marks):
                at = torch.stack([w.alignments[mark - 1] for w in walks]).mean(0).tolist()
                row += [*at, statistics.fmean(w.accuracy[index] for w in walks)]
            rows.append(row)
    marks = [f"{what}, t={m}" for m in theory.marks for what in ("fast", "slow", "test accuracy")]
    title = f"Two-layer theory (mean of {len(config.theory_seeds)} seeds; alignments)"
    made = [Table(title, ["beta_d", "run", *marks], rows)]
    if selected:
        names = [k for k in ("recall", "precision", "noisy_selected") if getattr(selected[0], k) is not None]
        made.append(
            Table(
                "Early selection by seed",
                ["seed", "separating epoch", "selected", *names, "seconds"],
                [
                    [s, e.epoch, float(e.masks["clusters"].double().mean()), *(getattr(e, k) for k in names), e.seconds]
                    for s, e in zip(config.seeds, selected)
                ],
            )
        )  # fmt: skip
    groups = max((len(r.groups) for trained in found.values() for r in trained), default=0)
    further = {
        "steps": "steps", "lambda_max": "lambda_max", "bulk": "lambda_1/lambda_5", "l1": "L1 of weights",
        "forgetting": "forgetting", "first_learned": "first learned", "learned": "learned",
    }  # fmt: skip
    rows = []
    for name, trained in found.items():

        def mean(field: str, of: list[Final] = trained) -> float:
            return statistics.fmean(getattr(r, field) for r in of)

        errors = [r.test for r in trained]
        rows.append(
            [
                name,
                mean("test"),
                statistics.stdev(errors) if len(errors) > 1 else None,
                *(statistics.fmean(r.groups[g] for r in trained) for g in range(groups)),
                mean("train"),
                100 * mean("selected"),
                mean("seconds") / mean("seconds", found["sgd"]) if "sgd" in found else None,
                *(mean(field) for field in further),
            ]
        )
    head = ["method", "test error %", "sd", *(f"group {g} error %" for g in range(groups)), "train error %"]
    title = f"Methods (mean of {len(config.seeds)} seeds; time without the early training)"
    made.append(Table(title, [*head, "selected %", "time / sgd", *further.values()], rows))
    return made
