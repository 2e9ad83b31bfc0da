"""NormGrad: at which layers do backpropagation saliency maps point at the object, and do they know which class was asked for?

Rebuffi, Fong, Ji, Vedaldi, CVPR 2020, arXiv 2004.02866. ``quick`` and ``small`` train a multi-label CNN on scenes of two digits among
clutter; ``paper`` is the pointing game on VOC2007 or COCO with a ResNet or VGG16 that the user brings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from lineament.data.digit_scenes import digit_scenes
from lineament.data.samples import Samples
from lineament.explain.saliency.aggregation import combined
from lineament.explain.saliency.checks import Similarity
from lineament.explain.saliency.maps import saliency
from lineament.explain.saliency.meta import meta_saliency
from lineament.explain.saliency.pointing import hits
from lineament.recipes.kit.networks import network
from lineament.recipes.kit.presets import presets
from lineament.recipes.kit.stages import Stages
from lineament.recipes.normgrad.claims import (
    COMBINED,
    META,
    AfterStep,
    Correlations,
    Pointing,
    photograph_claims,
    scene_claims,
)
from lineament.recipes.normgrad.figures import correlation_figure, picture_grid, pointing_figure
from lineament.recipes.normgrad.networks import photographs_model
from lineament.recipes.normgrad.photographs import photographs, point_on_photographs
from lineament.report.outcome import Outcome, Table
from lineament.train.callbacks import Schedule
from lineament.train.loop import fit

SLUG = "normgrad"
TITLE = "There and Back Again: Revisiting Backpropagation Saliency Methods"
METHODS = ["gradient", "linear_approx", "grad_cam", "norm_grad", "norm_grad_selective", "guided_backprop"]
ON_PHOTOGRAPHS = [
    "gradient_sum",
    "guided_backprop_sum",
    "excitation_backprop",
    "contrastive_excitation_backprop",
]
# The ReLU behind convolution 1, 2, 4, 6 and 7 of the small network; the deepest is what it averages over space.
SITES = {"1": "features.2", "2": "features.5", "4": "features.12", "6": "features.19", "7": "features.23"}
LATE = ("6", "7")


@dataclass(frozen=True)
class Config:
    """One run. The first group is for every data set, the second for digit scenes, the third for photographs."""

    preset: str = presets(
        quick={"test_images": 30, "train_images": 1500, "epochs": 5, "sweep": ()},
        small={},
        paper={"dataset": "voc", "test_images": None, "tolerance": 15.0, "meta_eps": 2.5e-3},
    )
    dataset: Literal["digit-scenes", "voc", "coco"] = "digit-scenes"
    test_images: int | None = 150
    tolerance: float = 2.0
    seed: int = 0

    train_images: int = 3000
    epochs: int = 8
    meta_eps: float = 2.5e-4
    sweep: tuple[float, ...] = (2.5e-5, 2.5e-3)

    data_folder: str | None = None
    model_folder: str = "resnet50-multilabel"
    layers: tuple[str, ...] | None = None


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    stages = Stages(out, config)
    outcome = _on_scenes if config.dataset == "digit-scenes" else _on_photographs
    return outcome(config, stages, out)


def trained(config: Config) -> dict[str, Tensor]:
    """The network's weights after AdamW with a one-cycle schedule on binary cross-entropy, one term for each digit."""
    scenes = digit_scenes(config.train_images, seed=config.seed)
    model = network("cnn7", (1, 48, 48), 10, seed=config.seed)
    schedule = Schedule(lambda o, total: OneCycleLR(o, max_lr=1e-2, total_steps=total), by="step")
    fit(
        model, scenes, optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=1e-2), epochs=config.epochs,
        loss=F.binary_cross_entropy_with_logits, callbacks=[schedule], seed=config.seed,
    )  # fmt: skip
    return dict(model.state_dict())


def _on_scenes(config: Config, stages: Stages, out: Path) -> Outcome:
    assert config.test_images is not None
    model = network("cnn7", (1, 48, 48), 10, seed=config.seed)
    model.load_state_dict(stages("train", lambda: trained(config), dict[str, Tensor]))
    model.eval()
    scenes = digit_scenes(config.test_images, split="test", seed=config.seed)
    with torch.no_grad():
        top = model(scenes.inputs).topk(2, dim=1).indices.sort(1).values
    correct = float((top == scenes.extras["digits"].sort(1).values).all(1).double().mean())
    points = stages("pointing", lambda: pointing(model, scenes, config.tolerance), Pointing)
    alike = stages("class sensitivity", lambda: correlations(model, scenes), Correlations)
    steps = stages.each(
        "meta {:g}", (config.meta_eps, *config.sweep), lambda eps: after_step(model, scenes, eps, config.tolerance), AfterStep
    )  # fmt: skip
    meta = steps[config.meta_eps]
    cells = [(m, f"ReLU {k}", SITES[k]) for m in META for k in LATE]
    relus = [f"ReLU {k}" for k in SITES]
    kinds = [f"eps {eps:g}: {what}" for eps in config.sweep for what in ("correlation", "pointing, %")]
    tables = [
        Table(
            "Pointing accuracy by layer, %",
            ["method", *relus, "product of four"],
            [[m, *map(_percent, points.layers[m].values()), _percent(points.products.get(m))] for m in METHODS],
        ),
        Table(
            "Rank correlation of the maps of the most and the least probable class (1: the map ignores the class)",
            ["method", *relus, "undefined"],
            [[m, *alike.mean[m].values(), alike.undefined[m]] for m in METHODS],
        ),
        Table(
            f"With one step of meta-learning (eps {config.meta_eps:g})",
            ["method", "layer", "correlation", "with the step", "pointing, %", "with the step, %"],
            [
                [m, k, alike.mean[m][s], meta.correlation[m][s], _percent(points.layers[m][s]), _percent(meta.pointing[m][s])]
                for m, k, s in cells
            ],
        ),
        Table(
            "The same for other step sizes",
            ["method", "layer", *kinds],
            [
                [m, k, *(v for e in config.sweep for v in (steps[e].correlation[m][s], _percent(steps[e].pointing[m][s])))]
                for m, k, s in cells
            ],
        ),
        Table("The classifier", ["measure", "value"], [["both digits right, test, %", _percent(correct)]]),
    ]  # fmt: skip
    if not config.sweep:
        del tables[3]
    figures = [
        pointing_figure(points.layers, list(SITES.values()), relus, out),
        correlation_figure(alike, meta, SITES, out),
        picture_grid(model, scenes, SITES, out),
    ]
    judged = scene_claims(points, alike, meta, SITES)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), judged, tables, figures)


def _questions(scenes: Samples) -> tuple[Tensor, Tensor]:
    """Two questions an image: where is this digit, and where is the other?"""
    return scenes.inputs.repeat_interleave(2, 0), scenes.extras["digits"].flatten()


def pointing(model: nn.Module, scenes: Samples, tolerance: float) -> Pointing:
    """Accuracies of each method at each layer and of the product of layers 2, 4, 6, 7."""
    images, targets = _questions(scenes)
    sites, size = list(SITES.values()), (images.shape[-2], images.shape[-1])
    maps: Any = saliency(model, images, targets, site=sites, method=METHODS, batch_size=100)
    raw: Any = saliency(model, images, targets, site=sites[1:], method=COMBINED, resize=False, batch_size=100)
    return Pointing(
        {m: {s: _accuracy(maps[m][s], scenes, tolerance) for s in sites} for m in METHODS},
        {m: _accuracy(combined(list(raw[m].values()), size), scenes, tolerance) for m in COMBINED},
    )


def correlations(
    model: nn.Module, scenes: Samples, explain: Callable[..., Any] = saliency, methods: list[str] = METHODS,
    sites: tuple[str, ...] = tuple(SITES.values()), **options: Any,
) -> Correlations:  # fmt: skip
    """How alike each method's maps of the most and of the least probable class are, at each layer; all from as few backward passes as can be."""
    with torch.no_grad():
        output = model(scenes.inputs)
    most, least = (
        explain(model, scenes.inputs, each, site=list(sites), method=methods, batch_size=100, **options)
        for each in (output.argmax(1), output.argmin(1))
    )
    found = {m: {s: Similarity.of(most[m][s], least[m][s]) for s in sites} for m in methods}
    return Correlations(
        {m: {s: each.to_dict()["mean"] for s, each in row.items()} for m, row in found.items()},
        {m: sum(each.undefined for each in row.values()) for m, row in found.items()},
    )


def after_step(model: nn.Module, scenes: Samples, eps: float, tolerance: float) -> AfterStep:
    """Pointing accuracy and class sensitivity at the last two layers after one step on each image's own question."""
    late = tuple(SITES[k] for k in LATE)
    maps: Any = meta_saliency(model, *_questions(scenes), eps=eps, site=list(late), method=META)
    alike = correlations(model, scenes, meta_saliency, META, late, eps=eps)
    return AfterStep(
        {m: {s: _accuracy(maps[m][s], scenes, tolerance) for s in late} for m in META}, alike.mean
    )


def _on_photographs(config: Config, stages: Stages, out: Path) -> Outcome:
    model, names, usual = photographs_model(config.model_folder)
    images = photographs(config.dataset, config.data_folder, config.test_images)
    sites = list(config.layers or usual)

    def measure() -> dict[str, dict[str, dict[str, float]]]:
        return point_on_photographs(
            model, names, images, sites=sites, methods=[*METHODS, *ON_PHOTOGRAPHS], tolerance=config.tolerance, meta=META,
            meta_eps=config.meta_eps, joined=COMBINED,
        )  # fmt: skip

    found = stages("pointing", measure, dict[str, dict[str, dict[str, float]]])
    tables = [
        Table(
            f"Pointing accuracy by layer, {part} images, %",
            ["method", *sites, "product"],
            [[m, *(_percent(found[m][s][part]) for s in (*sites, "product"))] for m in found],
        )
        for part in ("all", "difficult")
    ]
    layers = {m: {s: found[m][s]["all"] for s in sites} for m in found}
    figures = [pointing_figure({m: layers[m] for m in METHODS}, sites, sites, out)]
    products = {m: found[m]["product"]["all"] for m in COMBINED}
    judged = photograph_claims(layers, products, sites, type(model).__name__)
    return Outcome(SLUG, TITLE, config.preset, asdict(config), judged, tables, figures)


def _accuracy(maps: Tensor, scenes: Samples, tolerance: float) -> float:
    return float(hits(maps, scenes.extras["masks"].flatten(0, 1), tolerance=tolerance).double().mean())


def _percent(value: float | None) -> float | None:
    return None if value is None or value != value else round(100 * value, 1)
