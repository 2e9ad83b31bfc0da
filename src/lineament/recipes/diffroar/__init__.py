"""DiffROAR: do input gradients mark what a network uses, and does adversarial training change that?

Shah, Jain, Netrapalli, NeurIPS 2021, arXiv 2102.12781. ``quick`` and ``small`` are BlockMNIST (on MNIST where it is found, else on scikit-learn's
digits) and the simplified data of the theorem; ``paper`` is CIFAR-10 with a ResNet-50, or a folder of images with a ResNet-18.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from lineament.core.checks import require
from lineament.explain.faithfulness.input_gradients import attribution
from lineament.explain.faithfulness.retraining import FRACTIONS, DiffROAR
from lineament.recipes.diffroar import figures
from lineament.recipes.diffroar.claims import Described, Simplified, claims, tables
from lineament.recipes.diffroar.experiments import (
    MODELS,
    PLACEMENTS,
    Demonstration,
    simplified,
)
from lineament.recipes.diffroar.photographs import on_photographs
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.report.outcome import Outcome

SLUG = "diffroar"
TITLE = "Do Input Gradients Highlight Discriminative Features?"
SIMPLIFIED: tuple[str, ...] = ("linear", "wide", "robust", "everywhere")
OTHER_KINDS = ("loss_predicted", "softmax_predicted", "logit_predicted x input")


@dataclass(frozen=True)
class Config:
    """One run. The groups are: all data sets, BlockMNIST (``widths`` also for ``network="mlp"``), the simplified data, photographs."""

    dataset: Literal["blockmnist", "cifar10", "images"] = "blockmnist"
    data_folder: str | None = None
    fractions: tuple[float, ...] = (1.0, 0.5, 0.2, 0.1, 0.05)
    level: float = 0.1
    runs: int = 3
    jobs: int = 2
    seed: int = 0

    data: Literal["auto", "mnist", "digits"] = "auto"
    train_images: int = 6000
    test_images: int = 1000
    widths: tuple[int, ...] = (256, 256)
    epochs: int = 12
    retrain_epochs: int = 10
    batch_size: int = 100
    lr: float = 1e-3
    eps: float | None = None
    attack_steps: int = 5
    controls: bool = True

    blocks: int = 10
    points: int = 2000
    wide: int = 2000
    simple_epochs: int = 60
    robust_width: int = 512
    robust_epochs: int = 200

    network: Literal["resnet18", "resnet50", "mlp"] = "resnet50"
    network_width: int = 64
    image_size: int = 112
    photograph_epochs: int = 150
    photograph_lr: float = 0.1
    attacks: tuple[str, ...] = ("l2 0.25", "l2 0.5", "l2 1.0", "linf 8/255")
    device: str = "auto"

    preset: str = presets(
        quick={
            "fractions": (1.0, 0.2, 0.1),
            "runs": 2,
            "train_images": 2000,
            "test_images": 500,
            "widths": (128, 128),
            "epochs": 10,
            "retrain_epochs": 8,
            "controls": False,
            "robust_width": 256,
            "robust_epochs": 60,
        },
        small={},
        paper={"dataset": "cifar10", "fractions": FRACTIONS, "runs": 5, "level": 0.1, "batch_size": 128},
    )


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    require(config.runs > 0, f"runs: got {config.runs}, expected at least 1")
    require(
        config.level in config.fractions,
        f"level: got {config.level}, expected one of the fractions {config.fractions}: the claims are judged there",
    )
    stages = Stages(out, config)
    if config.dataset != "blockmnist":
        judgements, made, judged = on_photographs(config, stages)
        return Outcome(
            SLUG, TITLE, config.preset, asdict(config), judgements, made, [figures.curves(judged, out)]
        )
    demo = Demonstration(config)
    pairs = [(kind, placement) for placement in PLACEMENTS for kind in MODELS]
    models = {
        (kind, placement): demo.model(
            stages(f"{kind} {placement}", lambda p=placement, k=kind: demo.train(p, k), dict[str, Tensor])
        )
        for kind, placement in pairs
    }
    seen = {
        pair: stages(f"describe {pair[0]} {pair[1]}", lambda p=pair: demo.describe(models[p], p[1]), Described) for pair in pairs
    }  # fmt: skip
    explained = {kind: attribution(models[kind, "random"]) for kind in MODELS}
    judged = stages.each(
        "diffroar {}",
        MODELS,
        lambda kind: demo.judge(explained[kind], config.fractions, config.runs),
        DiffROAR,
    )
    demonstration = sum(stages.seconds.values())
    noise = attribution(models["standard", "random"], "random", seed=config.seed)
    judged["random"] = stages(
        "diffroar random", lambda: demo.judge(noise, (1.0, config.level), config.runs), DiffROAR
    )
    others = _controls(config, demo, models, stages) if config.controls else {}
    theory = stages.each("simplified {}", SIMPLIFIED, lambda name: simplified(config, name), Simplified)
    seconds = {
        "BlockMNIST: four models, their gradients, DiffROAR of two": demonstration,
        "everything": sum(stages.seconds.values()),
    }
    drawn = [
        figures.curves(judged, out),
        figures.heat_maps(models, demo.data, out),
        figures.theorem(theory, config.blocks, out),
    ]
    judgements = claims(config, seen, judged, theory, others)
    made = tables(config, demo.source, demo.attack.eps, seen, judged, theory, others, seconds)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), judgements, made, drawn)


def _controls(config: Config, demo: Demonstration, models: dict, stages: Stages) -> dict[str, DiffROAR]:
    """What one wants to know besides: other gradients, another fill, and labels that mean nothing; one run each."""
    found = {"shuffled": stages("shuffled labels", demo.shuffled, DiffROAR)}
    for kind in MODELS:
        model = models[kind, "random"]
        tries = {
            name: (attribution(model, name.removesuffix(" x input"), times_input=name.endswith("x input")), "zero")
            for name in OTHER_KINDS
        }  # fmt: skip
        for name, (explain, fill) in {**tries, "mean fill": (attribution(model), "mean")}.items():
            found[f"{kind}|{name}"] = stages(
                f"{kind} {name}", lambda e=explain, f=fill: demo.judge(e, (config.level,), 1, f), DiffROAR
            )
    return found
