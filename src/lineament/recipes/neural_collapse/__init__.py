"""Perturbation analysis of neural collapse: what happens near the collapsed point, in theory and in training.

Tirer, Huang, Niles-Weed, ICML 2023, arXiv 2210.16658. Three parts: NC1 falls with depth when layers are trained one by one;
weight decay of the feature layers moves collapse more than that of the last one; the theory's curves and spectra. ``quick`` and
``small`` run on scikit-learn's digits with a perceptron, ``paper`` is ResNet-18 on CIFAR.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.checks import require
from lineament.data.augmentation import flip_and_crop
from lineament.data.digits import digit_images
from lineament.data.photographs import Standardise, read_photographs
from lineament.data.samples import Samples
from lineament.measure.collapse.central_path import central_path
from lineament.measure.collapse.metrics import collapse_metrics
from lineament.measure.collapse.near_collapse import PerturbationMap, block_spectrum, cross_norm, map_spectrum
from lineament.measure.collapse.profile import collapse
from lineament.measure.collapse.ufm import UFM, minimise
from lineament.recipes.kit.networks import network
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.kit.threads import few_threads
from lineament.recipes.neural_collapse.claims import (
    LOSSES,
    Collapsed,
    Depth,
    Near,
    Theory,
    decay_claims,
    depth_claims,
    theory_claims,
)
from lineament.recipes.neural_collapse.figures import draw_all
from lineament.report.outcome import Outcome, Table
from lineament.train.callbacks import Augment, Schedule
from lineament.train.loop import fit

SLUG = "neural-collapse"
TITLE = "Perturbation Analysis of Neural Collapse"
# Weight decay of the feature layers and of the last one, as multiples of the baseline's.
SETTINGS = {
    "baseline": (1.0, 1.0),
    "2x last": (1.0, 2.0),
    "0 last": (1.0, 0.0),
    "2x features": (2.0, 1.0),
    "0 features": (0.0, 1.0),
}


@dataclass(frozen=True)
class Config:
    """One run. The groups are the data, the layer-wise training, the weight-decay study and the theory."""

    data: Literal["digits", "cifar10", "cifar100"] = "digits"
    data_folder: str | None = None
    device: str = "auto"

    layers: int = 4
    layer_width: int = 256
    layer_epochs: int = 30
    layer_seeds: tuple[int, ...] = (0,)

    network: Literal["mlp", "resnet18"] = "mlp"
    widths: tuple[int, ...] = (256, 256, 128)
    losses: tuple[str, ...] = ("mse",)
    seeds: tuple[int, ...] = (0,)
    epochs: int = 100
    milestones: tuple[int, ...] = (50, 75)
    lr: float = 0.1
    weight_decay: float = 5e-4
    batch_size: int = 128

    lambda_w: float = math.sqrt(2)
    lambda_h: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5)
    beta: float = 100.0
    theory_seed: int = 0

    preset: str = presets(
        quick={},
        small={
            "layers": 6, "layer_epochs": 40, "layer_seeds": (0, 1),
            "losses": ("mse", "ce"), "seeds": (0, 1),
            "epochs": 150, "milestones": (75, 112), "lr": 0.05, "batch_size": 64,
        },
        paper={
            "data": "cifar10", "layers": 10, "layer_width": 1024, "layer_epochs": 100, "layer_seeds": (0, 1, 2),
            "network": "resnet18", "losses": ("mse", "ce"), "seeds": (0, 1, 2),
            "epochs": 160, "milestones": (40, 80, 120), "lr": 0.05,
        },
    )  # fmt: skip


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    unknown = sorted(set(config.losses) - set(LOSSES))
    require(not unknown, f"losses: got {unknown}, expected 'mse' and 'ce'")
    data, device = load_data(config), config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    stages = Stages(out, config)
    data = data.to(device)
    with few_threads(data.inputs, device):
        depth = stages.each(
            "layers, seed {}", config.layer_seeds, lambda seed: layerwise(config, data, seed), Depth
        )
        ends = {
            loss: {setting: _decay_runs(stages, config, data, loss, setting) for setting in SETTINGS}
            for loss in config.losses
        }
    theory = stages("theory", lambda: theory_panel(config), Theory)
    found = list(depth.values())
    claims = [*depth_claims(found), *theory_claims(theory)]
    for loss in config.losses:
        claims += decay_claims(loss, ends[loss])
    tables, figures = _tables(config, found, ends, theory), draw_all(found, ends, theory, config, out)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), claims, tables, figures)


def load_data(config: Config) -> Samples:
    """1,300 of scikit-learn's digits, or CIFAR's training images, standardised."""
    if config.data == "digits":
        digits = digit_images()
        return digits[np.random.default_rng(0).permutation(len(digits))[:1300]]
    found = read_photographs(config.data, data_folder=config.data_folder)
    return replace(found, inputs=Standardise(found.inputs)(found.inputs))


def layerwise(config: Config, data: Samples, seed: int) -> Depth:
    """NC1 and NC1~ of the input and after each new hidden layer, which is trained with its own head on the frozen ones."""
    x, y, classes = data.inputs.flatten(1), data.targets, len(data.classes)
    found = [collapse_metrics(x, y, classes=classes)]
    for layer in range(config.layers):
        own = 1000 * seed + layer
        model = network("mlp", x.shape[1:], classes, seed=own, widths=config.layer_width).to(x.device)
        fit(
            model, (x, y), epochs=config.layer_epochs, batch_size=64, seed=own, name=f"layer {layer + 1}",
            optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4),
        )  # fmt: skip
        with torch.no_grad():
            x = model.features(x)
        found.append(collapse_metrics(x, y, classes=classes))
    return Depth([float(m.nc1 or 0) for m in found], [m.nc1_tilde for m in found])


def weight_decay_run(config: Config, data: Samples, loss: str, setting: str, seed: int) -> Collapsed:
    """One training of the weight-decay study. The last layer has a bias under cross-entropy only, as in the paper."""
    widths = config.widths if config.network == "mlp" else None
    model = network(
        config.network, data.inputs.shape[1:], len(data.classes), seed=seed, widths=widths, head_bias=loss == "ce"
    ).to(data.inputs.device)  # fmt: skip
    groups = [
        {"params": part.parameters(), "weight_decay": times * config.weight_decay}
        for part, times in zip((model.features, model.head), SETTINGS[setting])
    ]
    steps = Schedule(lambda sgd, _: torch.optim.lr_scheduler.MultiStepLR(sgd, list(config.milestones)))
    augment = [Augment(flip_and_crop)] if data.inputs.shape[1] == 3 else []
    fit(
        model, data.pair, loss=_half_square if loss == "mse" else F.cross_entropy, epochs=config.epochs, batch_size=config.batch_size,
        optimizer=torch.optim.SGD(groups, lr=config.lr, momentum=0.9), callbacks=[*augment, steps], seed=seed,
        name=f"{loss}, {setting}, seed {seed}",
    )  # fmt: skip
    batches = list(zip(data.inputs.split(500), data.targets.split(500)))
    metrics = collapse(model, batches, classes=len(data.classes), head="head", keep_bytes=2**30)["head:in"]
    model.eval()
    with torch.no_grad():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    numbers = [getattr(metrics, name) for name in ("nc1", "nc1_tilde", "nc2", "nc3", "nc4")]
    return Collapsed(*(math.nan if n is None else n for n in numbers), accuracy=right / len(data))


def _half_square(scores: Tensor, y: Tensor) -> Tensor:
    """Half the squared distance to the one-hot label, a mean over the batch."""
    return (scores - F.one_hot(y, scores.shape[1])).square().sum(1).mean() / 2


def _decay_runs(stages: Stages, config: Config, data: Samples, loss: str, setting: str) -> Collapsed:
    """The mean over seeds."""
    measure: Callable[[int], Collapsed] = lambda seed: weight_decay_run(config, data, loss, setting, seed)  # noqa: E731
    runs = stages.each(f"{loss}, {setting}, seed {{}}", config.seeds, measure, Collapsed).values()
    return Collapsed(*(sum(getattr(r, f.name) for r in runs) / len(runs) for f in fields(Collapsed)))


def theory_panel(config: Config) -> Theory:
    """Flow, minimisers along β, spectra and the first-order map; K = 4 classes, n = 10, d = 10 as in the paper."""
    classes, samples, d = 4, 10, 10
    generator = torch.Generator().manual_seed(config.theory_seed)
    H0 = torch.randn(d, classes * samples, generator=generator, dtype=torch.float64)
    means = torch.randn(d, classes, generator=generator, dtype=torch.float64)
    problem = UFM(classes, samples, lambda_w=0.5, lambda_h=0.1)
    H0 = problem.spread(means) + 0.7 * H0
    path = central_path(problem, H0, torch.linspace(0, 6, 61))
    betas = torch.logspace(-1, 4, 21, dtype=torch.float64).tolist()
    traces = [problem.traces(minimise(problem, H0, beta).H) for beta in betas]

    near, errors = [], []
    for lambda_h in config.lambda_h:
        model = UFM(classes, samples, config.lambda_w, lambda_h)
        _, star = model.collapsed(d, generator=generator)
        expansion = PerturbationMap(model, star, beta=config.beta, method="expansion")
        exact = PerturbationMap(model, star, beta=config.beta)
        near.append(
            Near(
                lambda_h,
                torch.linalg.svdvals(expansion.block(0, 0)),
                block_spectrum(model, d, config.beta).expanded(),
                torch.linalg.svdvals(expansion.block(0, 1))[:2].tolist(),
                cross_norm(model, config.beta),
                torch.linalg.eigvalsh(exact.dense()).flip(0),
                map_spectrum(model, d, config.beta).expanded(),
            )
        )
        change = torch.randn(star.shape, generator=generator, dtype=torch.float64)
        change *= 1e-4 / change.norm()
        moved = minimise(model, star + change, config.beta).H - star
        errors.append(float((exact @ change - moved).norm() / moved.norm()))
    ratios = [within / between for within, between in traces]
    curves = (path.times, path.nc1_tilde, path.scaled_within, path.scaled_between)
    return Theory(*curves, betas, ratios, near, errors)


def _tables(
    config: Config, depth: list[Depth], ends: dict[str, dict[str, Collapsed]], theory: Theory
) -> list[Table]:
    tables = [
        Table(
            "Layer-wise training",
            ["metric, seed", "input", *(f"layer {k + 1}" for k in range(config.layers))],
            [
                [f"{shown}, seed {seed}", *getattr(run, name)]
                for name, shown in (("nc1_tilde", "NC1~"), ("nc1", "NC1"))
                for seed, run in zip(config.layer_seeds, depth)
            ],
        )
    ]
    for loss, found in ends.items():
        tables.append(
            Table(
                f"Weight decay study, {LOSSES[loss]} (mean of {len(config.seeds)} seeds)",
                ["setting", "NC1~", "NC1", "NC2", "NC3", "NC4", "training accuracy"],
                [[s, e.nc1_tilde, e.nc1, e.nc2, e.nc3, e.nc4, e.accuracy] for s, e in found.items()],
            )
        )
    rows = [
        [n.lambda_h, float(n.block[0]), float(n.block[-1]), float(n.block_closed[-1]), n.cross[0], n.cross_closed]
        for n in theory.near
    ]  # fmt: skip
    title = f"Diagonal block at collapse (K=4, d=10, n=10, beta={config.beta:g}, lW={config.lambda_w:.4g})"
    columns = [
        "lH",
        "largest",
        "smallest",
        "smallest, closed form",
        "cross block",
        "cross block, closed form",
    ]
    return [*tables, Table(title, columns, rows)]
