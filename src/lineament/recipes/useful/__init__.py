"""USEFUL: changing the training data's distribution to reduce simplicity bias, with its theory, controls and ablations.

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv 2404.17768. ``quick`` and ``small`` run the two-layer theory and digits that a
bright pixel gives away in nine of ten images; ``paper`` is CIFAR-10 with ResNet-18 for 200 epochs. Every method of a seed starts from the same
weights and, where it selects, from the same early training.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import number
from lineament.data.fast_slow_patches import fast_slow_patches
from lineament.learn.useful.two_layer_theory import (
    alignment_recursion,
    cubic_network,
    fast_free_weights,
    train_cubic,
    upsampled_share,
)
from lineament.recipes.kit.presets import presets
from lineament.recipes.useful import runs
from lineament.recipes.useful.claims import claims_of
from lineament.recipes.useful.data import load_data, long_tailed, mislabelled
from lineament.recipes.useful.figures import draw_all
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
    recipes = {name: runs.parsed(name) for name in config.methods}
    number("separating", config.separating, low=0, high=config.epochs, integer=True)
    number("factor", config.factor, low=1, integer=True)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    first = load_data(config.data, config.data_folder, train=config.train, seed=0)
    stages = Checkpoint(out / ".stages", asdict(config))
    theory = stages.stage("theory", lambda: theory_panel(config))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in config.methods}
    early: list[dict[str, Any]] = []
    for seed in progress(config.seeds, "seeds"):
        # Digits are drawn anew for each seed; the images of a folder are the same.
        digits = config.data in ("pixel-digits", "digits")
        data = load_data(config.data, None, train=config.train, seed=seed) if digits else first
        data = mislabelled(long_tailed(data, config.imbalance, seed), config.label_noise, seed)
        masks: dict[bool, dict[str, Any]] = {}
        for trivial in sorted({r.trivial for r in recipes.values() if r.partition or r.steps}):
            masks[trivial] = stages.stage(
                f"early, seed {seed}, {trivial}",
                lambda data=data, seed=seed, trivial=trivial: runs.early(config, data, seed, device, trivial),
            )
        early += [e for trivial, e in masks.items() if not trivial or False not in masks]
        for name, recipe in recipes.items():
            found[name].append(
                stages.stage(
                    f"{name}, seed {seed}",
                    lambda name=name, data=data, seed=seed, recipe=recipe, masks=masks: runs.final(
                        name, config, data, masks.get(recipe.trivial), seed, device, stages
                    ),
                )
            )
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        claims_of(config, theory, early, found),
        tables(config, theory, early, found),
        draw_all(config, theory, early, found, out),
    )


def theory_panel(config: Config) -> dict[str, Any]:
    """The two-layer network by GD, SAM and with fast-free examples twice: alignments and test accuracy; and the recursion without noise."""
    marks = [m for m in (200, 400, 1200) if m <= config.theory_steps] or [config.theory_steps]
    panel: dict[str, Any] = {"marks": marks, "runs": {}}
    for slow in config.theory_slow:
        for seed in config.theory_seeds:
            options: dict[str, Any] = {"slow": slow, "alpha": config.theory_alpha}
            data = fast_slow_patches(config.theory_samples, seed=2 * seed, **options)
            test = fast_slow_patches(2000, seed=2 * seed + 1, **options)
            W = 0.1 * torch.randn(
                20, 50, generator=torch.Generator().manual_seed(seed + 100), dtype=torch.float64
            )
            settings: dict[str, dict[str, Any]] = {
                "GD": {},
                "SAM": {"rho": config.theory_rho},
                "GD, fast-free x2": {"weights": fast_free_weights(data.extras["has_fast"])},
            }
            for name, setting in settings.items():
                paths, accuracy, start = [], [], W
                for steps in (b - a for a, b in zip([0, *marks], marks)):
                    path = train_cubic(start, *data.pair, steps=steps, lr=0.1, **setting)
                    start = path.W
                    paths.append(path.alignments)
                    accuracy.append(
                        float((cubic_network(start, test.inputs).sign() == test.targets).double().mean())
                    )
                panel["runs"].setdefault(f"{slow:g}|{name}", []).append(
                    {"alignments": torch.cat(paths), "accuracy": accuracy}
                )
    panel["recursion"] = _recursion_error(config.theory_alpha)
    return panel


def _recursion_error(alpha: float) -> dict[str, float]:
    """The largest difference between a noise-free training and the recursion of its alignments, plain and upsampled."""
    found = {}
    for name, factor in (("GD", 1), ("GD, fast-free x2", 2)):
        data = fast_slow_patches(200, dims=6, slow=0.5, alpha=alpha, noise=0.0, seed=1)
        W = 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        weights = fast_free_weights(data.extras["has_fast"], factor)
        path = train_cubic(W, *data.pair, steps=300, lr=0.1, weights=weights)
        share = upsampled_share(float(data.extras["has_fast"].double().mean()), factor)
        a, b = alignment_recursion(W[:, 0], W[:, 1], steps=300, lr=0.1, fast=1.0, slow=0.5, alpha=share)
        last = torch.stack([a[-1], b[-1]], 1)
        found[name] = float((path.W[:, :2] - last).abs().max())
    return found


def tables(
    config: Config,
    theory: dict[str, Any],
    early: list[dict[str, Any]],
    found: dict[str, list[dict[str, Any]]],
) -> list[Table]:
    marks = theory["marks"]
    rows = []
    for key, trained in theory["runs"].items():
        slow, name = key.split("|")
        row: list[Any] = [slow, name]
        for index, mark in enumerate(marks):
            at = torch.stack([r["alignments"][mark - 1] for r in trained]).mean(0)
            row += [float(at[0]), float(at[1]), statistics.fmean(r["accuracy"][index] for r in trained)]
        rows.append(row)
    columns = [
        "beta_d",
        "run",
        *(f"{what}, t={m}" for m in marks for what in ("fast", "slow", "test accuracy")),
    ]
    made = [Table(f"Two-layer theory (mean of {len(config.theory_seeds)} seeds; alignments)", columns, rows)]
    if early:
        names = [k for k in ("recall", "precision", "noisy_selected") if k in early[0]]
        made.append(
            Table(
                "Early selection by seed",
                ["seed", "separating epoch", "selected", *names, "seconds"],
                [
                    [
                        s,
                        e["epoch"],
                        float(e["masks"]["clusters"].double().mean()),
                        *(e[k] for k in names),
                        e["seconds"],
                    ]
                    for s, e in zip(config.seeds, early)
                ],
            )
        )
    base = found.get("sgd")
    groups = max((len(r.get("groups", ())) for trained in found.values() for r in trained), default=0)
    fields = ("steps", "lambda_max", "bulk", "l1", "forgetting", "first_learned", "learned")
    rows = []
    for name, trained in found.items():
        errors = [r["test"] for r in trained]
        time = statistics.fmean(r["seconds"] for r in trained)
        relative = time / statistics.fmean(r["seconds"] for r in base) if base else None
        rows.append(
            [
                name,
                statistics.fmean(errors),
                statistics.stdev(errors) if len(errors) > 1 else None,
                *(statistics.fmean(r["groups"][g] for r in trained) for g in range(groups)),
                statistics.fmean(r["train"] for r in trained),
                100 * statistics.fmean(r["selected"] for r in trained),
                relative,
                *(statistics.fmean(r[f] for r in trained) for f in fields),
            ]
        )
    head = ["method", "test error %", "sd", *(f"group {g} error %" for g in range(groups)), "train error %"]
    words = [
        "steps",
        "lambda_max",
        "lambda_1/lambda_5",
        "L1 of weights",
        "forgetting",
        "first learned",
        "learned",
    ]
    made.append(
        Table(
            f"Methods (mean of {len(config.seeds)} seeds; time without the early training)",
            [*head, "selected %", "time / sgd", *words],
            rows,
        )
    )
    return made
