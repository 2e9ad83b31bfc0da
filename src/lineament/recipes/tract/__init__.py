"""TrAct: the first layer steps on its outputs, and training needs fewer epochs.

Petersen, Borgelt, Ermon, NeurIPS 2024, arXiv 2410.23970. Digits whose contrast varies from image to image, where the paper's argument applies
(quick); their ablations, and CIFAR-10 with a small ResNet and a ViT (small); CIFAR-10 with ResNet-18 and the paper's ViT (paper).
"""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lineament.core.checks import require
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.kit.threads import few_threads
from lineament.recipes.tract import training
from lineament.recipes.tract.claims import (
    NAMES,
    ORDINARY,
    Best,
    Curve,
    Digits,
    Pair,
    ablation_claims,
    cifar_claims,
    digit_claims,
    mean,
    speed_up,
)
from lineament.recipes.tract.figures import draw_all
from lineament.report.outcome import Outcome, Table

SLUG = "tract"
TITLE = "TrAct: Making First-layer Pre-Activations Trainable"
# What changes against SGD on standardised digits with varied contrast: options of the data, and of the training.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "same contrast for all": ({"contrast": False}, {}),
    "Adam": ({}, {"optimizer": "adam"}),
    "Adam, same contrast for all": ({"contrast": False}, {"optimizer": "adam"}),
    "SGD for the first weight, Adam for the rest": ({}, {"optimizer": "adam", "first_rate": 0.1}),
    "pixels in [0, 1], not standardised": ({"scale": "unit"}, {}),
    "each image standardised (patch normalisation)": ({"scale": "image"}, {}),
    "layer norm before and behind (DualPatchNorm)": ({}, {"kind": "dual-norm"}),
    "whitened (ZCA)": ({"scale": "zca"}, {}),
    "K-FAC in TrAct's place": ({}, {"kfac": True}),
}
RATES = {"sgd": (1.0, 0.5, 0.3, 0.1, 0.03), "adam": (0.03, 0.01, 0.003, 0.001)}
BYTE_RATES = (0.3, 0.1, 0.03, 0.01, 1e-3, 1e-4, 1e-5)
# Optimizer, learning rate and label smoothing of each network on CIFAR-10.
TRAINED = {
    "resnet": ("sgd", 0.08, 0.0),
    "resnet18": ("sgd", 0.08, 0.0),
    "vit": ("adam", 1e-3, 0.1),
    "vit-paper": ("adam", 1e-3, 0.1),
}


@dataclass(frozen=True)
class Config:
    """One run: the digits, their ablations, CIFAR."""

    lams: tuple[float, ...] = (0.05, 0.1, 0.2)
    lengths: tuple[int, ...] = (2, 4, 8, 16)
    seeds: int = 3

    ablation_lengths: tuple[int, ...] = ()
    ablation_seeds: int = 3

    photographs: Literal["cifar10", "cifar100"] = "cifar10"
    networks: tuple[str, ...] = ()
    epochs: tuple[int, ...] = (4, 8)
    cifar_lams: tuple[float, ...] = (0.1,)
    cifar_seeds: int = 1
    train_images: int = 3000
    test_images: int = 2000
    batch_size: int = 64
    data_folder: str | None = None
    device: str = "auto"

    preset: str = presets(
        quick={},
        small={
            "lams": (0.05, 0.1, 0.2, 0.8),
            "lengths": (2, 4, 8, 16, 32),
            "seeds": 6,
            "ablation_lengths": (4, 16),
            "networks": ("resnet", "vit"),
        },
        paper={
            "lams": (0.05, 0.1, 0.2, 0.8),
            "lengths": (2, 4, 8, 16, 32),
            "seeds": 6,
            "ablation_lengths": (4, 16),
            "ablation_seeds": 6,
            "networks": ("resnet18", "vit-paper"),
            "epochs": (100, 200, 400, 800),
            "cifar_lams": (0.05, 0.1, 0.2),
            "cifar_seeds": 5,
            "train_images": 0,
            "test_images": 0,
            "batch_size": 128,
        },
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    unknown = sorted(set(config.networks) - set(TRAINED))
    require(not unknown, f"networks: got {unknown}, expected some of {sorted(TRAINED)}")
    require(
        0.1 in config.lams and 4 in config.lengths, "lams and lengths: the claims need 0.1 and 4 among them"
    )
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Before any work: data that is missing is said at once.
    photographs = (
        training.cifar(config.photographs, config.data_folder, config.train_images, config.test_images)
        if config.networks
        else None
    )
    stages = Stages(out, config)
    with few_threads(training.digits(0).x, "cpu"):
        digits = stages("digits", lambda: digit_study(config), Digits)
        control = stages("control", lambda: huge_lambda(config, digits), list[float])
        variants = VARIANTS if config.ablation_lengths else ()
        ablations = stages.each("ablation {}", variants, lambda name: ablation(config, name), dict[str, Pair])
        raw = (
            stages("bytes", lambda: bytes_study(config), dict[str, Best]) if config.ablation_lengths else None
        )
    curves, tops = (
        ({}, {}) if photographs is None else cifar_study(config, photographs.to(device), stages, device)
    )
    claims = [
        *digit_claims(digits, control, config),
        *ablation_claims(digits, ablations, raw),
        *cifar_claims(curves, config),
    ]
    return Outcome(
        SLUG,
        TITLE,
        config.preset,
        asdict(config),
        claims,
        _tables(digits, ablations, raw, curves, tops, config),
        draw_all(digits, ablations, curves, config, out),
    )


def one(
    epochs: int,
    rate: float,
    seed: int,
    lam: float | None,
    *,
    kind: str = "mlp",
    data: Any = None,
    **options: Any,
) -> float:
    """Test accuracy of one training on digits."""
    split = training.digits(seed, **(data or {}))
    net = training.network(kind, seed)
    return training.train(net, split, epochs=epochs, rate=rate, lam=lam, seed=seed, **options)[-1]


def best(epochs: int, rates: tuple[float, ...], seeds: int, lam: float | None, **options: Any) -> Best:
    """The rate with the best mean accuracy over seeds, and its accuracies."""
    found = {rate: [one(epochs, rate, seed, lam, **options) for seed in range(seeds)] for rate in rates}
    rate = max(found, key=lambda r: mean(found[r]))
    return Best(rate, found[rate])


def digit_study(config: Config) -> Digits:
    """Ordinary training at its best rate and TrAct at the same, by length; besides, lambda 0.1 at the rate that is best for it."""
    ordinary, own = (
        {str(e): best(e, RATES["sgd"], config.seeds, lam) for e in config.lengths} for lam in (None, 0.1)
    )
    rates = {e: b.rate for e, b in ordinary.items()}
    accuracies = {ORDINARY: {e: b.accuracies for e, b in ordinary.items()}}
    for lam in config.lams:
        accuracies[f"{lam:g}"] = {
            e: [one(int(e), rate, seed, lam) for seed in range(config.seeds)] for e, rate in rates.items()
        }
    return Digits(rates, accuracies, own)


def huge_lambda(config: Config, digits: Digits) -> list[float]:
    """Four epochs with lambda = 1e4 and the first weight's rate multiplied by it: ordinary training by another way."""
    rate = digits.rates["4"]
    return [one(4, rate, seed, 1e4, first_rate=1e4 * rate) for seed in range(config.seeds)]


def ablation(config: Config, name: str) -> dict[str, Pair]:
    """By length, with lambda 0.1, at the rate best for ordinary training."""
    data, options = VARIANTS[name]
    rates = RATES[options.get("optimizer", "sgd")]
    plain = {k: v for k, v in options.items() if k != "kfac"}
    found = {}
    for epochs in config.ablation_lengths:
        usual = best(epochs, rates, config.ablation_seeds, None, data=data, **plain)
        seeds = range(config.ablation_seeds)
        changed = [one(epochs, usual.rate, seed, 0.1, data=data, **options) for seed in seeds]
        found[str(epochs)] = Pair(usual.rate, usual.accuracies, changed)
    return found


def bytes_study(config: Config) -> dict[str, Best]:
    """Pixels in [0, 255]: ordinary training and each lambda after 4 epochs, each at its own best rate."""
    arms: dict[str, float | None] = {ORDINARY: None, **{f"{lam:g}": lam for lam in config.lams}}
    return {
        name: best(4, BYTE_RATES, config.ablation_seeds, lam, data={"scale": "bytes"})
        for name, lam in arms.items()
    }


def cifar_study(
    config: Config, data: training.Split, stages: Stages, device: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """{network: {"ordinary" or lam: {length: [test accuracy by epoch, by seed]}}}, and the same of the last epoch's top-5 accuracies."""
    curves: dict[str, Any] = {}
    tops: dict[str, Any] = {}
    for kind, lam, epochs in itertools.product(config.networks, (None, *config.cifar_lams), config.epochs):
        arm = ORDINARY if lam is None else f"{lam:g}"
        found = stages.each(
            f"{kind}, {arm}, {epochs} epochs, seed {{}}",
            range(config.cifar_seeds),
            lambda seed, kind=kind, lam=lam, epochs=epochs: photograph_run(
                config, data, device, kind, lam, epochs, seed
            ),
            Curve,
        ).values()
        curves.setdefault(kind, {}).setdefault(arm, {})[str(epochs)] = [c.accuracies for c in found]
        tops.setdefault(kind, {}).setdefault(arm, {})[str(epochs)] = [c.top5 for c in found]
    return curves, tops


def photograph_run(
    config: Config, data: training.Split, device: str, kind: str, lam: float | None, epochs: int, seed: int
) -> Curve:
    """One training on CIFAR."""
    optimizer, rate, smoothing = TRAINED[kind]
    model = training.network(kind, seed, 10 if config.photographs == "cifar10" else 100).to(device)
    accuracies = training.train(
        model, data, epochs=epochs, rate=rate, lam=lam, seed=seed, optimizer=optimizer,
        smoothing=smoothing, batch_size=config.batch_size, augment=True,
    )  # fmt: skip
    return Curve(accuracies, training.top_accuracy(model, data.test_x, data.test_y, top=5))


def _shown(values: list[float]) -> str:
    return f"{mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def _own(digits: Digits, epochs: int) -> tuple[float, str]:
    own = digits.own[str(epochs)]
    return own.rate, _shown(own.accuracies)


def _tables(
    digits: Digits,
    ablations: dict[str, dict[str, Pair]],
    raw: dict[str, Best] | None,
    curves: dict[str, Any],
    tops: dict[str, Any],
    config: Config,
) -> list[Table]:
    arms = list(digits.accuracies)
    tables = [
        Table(
            f"Digits of varied contrast: test accuracy, %, mean ± deviation of {config.seeds} seeds",
            [
                "epochs",
                "rate",
                *(a if a == ORDINARY else f"lambda {a}" for a in arms),
                "own rate",
                "lambda 0.1 at it",
            ],
            [
                [
                    e,
                    digits.rates[str(e)],
                    *(_shown(digits.accuracies[a][str(e)]) for a in arms),
                    *_own(digits, e),
                ]
                for e in config.lengths
            ],
        )
    ]
    if ablations:
        tables.append(
            Table(
                f"What else could be done, lambda 0.1: test accuracy, %, {config.ablation_seeds} seeds",
                ["variant", "epochs", "rate", "ordinary", "TrAct"],
                [
                    [n, int(e), f.rate, _shown(f.ordinary), _shown(f.tract)]
                    for n, by in ablations.items()
                    for e, f in by.items()
                ],
            )
        )
    if raw is not None:
        tables.append(
            Table(
                "Pixels in [0, 255], not standardised, 4 epochs, each at its own best rate",
                ["training", "rate", "test accuracy, %"],
                [[arm, found.rate, _shown(found.accuracies)] for arm, found in raw.items()],
            )
        )
    ends = {"digits of varied contrast": digits.accuracies}
    for kind, found in curves.items():
        ends[f"{NAMES[config.photographs]}, {kind}"] = {
            a: {e: [c[-1] for c in runs] for e, runs in by.items()} for a, by in found.items()
        }
        tables.append(
            Table(
                f"{NAMES[config.photographs]}, {kind}: test accuracy, top-1 and top-5, %, {config.cifar_seeds} seed(s)",
                ["epochs", *(a if a == ORDINARY else f"lambda {a}" for a in found)],
                [
                    [
                        e,
                        *(
                            f"{_shown([c[-1] for c in found[a][str(e)]])}; {_shown(tops[kind][a][str(e)])}"
                            for a in found
                        ),
                    ]
                    for e in config.epochs
                ],
            )
        )
    tables.append(
        Table(
            "Speed-up: epochs of ordinary training over those with TrAct at equal accuracy",
            ["data", "lambda", "by length (epochs with TrAct: speed-up)"],
            [
                [what, arm, _speed_ups(by[ORDINARY], by[arm])]
                for what, by in ends.items()
                for arm in by
                if arm != ORDINARY
            ],
        )
    )
    return tables


def _speed_ups(ordinary: dict[str, list[float]], ours: dict[str, list[float]]) -> str:
    means = [{int(e): mean(values) for e, values in by.items()} for by in (ordinary, ours)]
    shortest, longest = min(means[0]), max(means[0])
    words = []
    for e, ratio in speed_up(*means).items():
        shown = (
            f"{ratio:.1f}"
            if 0 < ratio < math.inf
            else f"> {longest / e:.1f}"
            if ratio
            else f"< {shortest / e:.1f}"
        )
        words.append(f"{e}: {shown}")
    return ", ".join(words)
