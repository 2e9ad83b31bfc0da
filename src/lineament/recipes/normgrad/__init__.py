"""NormGrad: at which layers do backpropagation saliency maps point at the object, and do they know which class was asked for?

Rebuffi, Fong, Ji, Vedaldi, CVPR 2020, arXiv 2004.02866. ``quick`` and ``small`` train a multi-label CNN on scenes of two digits among
clutter; ``paper`` is the pointing game on VOC2007 or COCO with a ResNet or VGG16 that the user brings.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.data.digit_scenes import digit_scenes
from lineament.data.samples import Samples
from lineament.explain.saliency.aggregation import combined
from lineament.explain.saliency.checks import class_sensitivity
from lineament.explain.saliency.maps import saliency
from lineament.explain.saliency.meta import meta_saliency
from lineament.explain.saliency.pointing import hits
from lineament.recipes.normgrad.claims import COMBINED, META, photograph_claims, scene_claims
from lineament.recipes.normgrad.figures import correlation_figure, picture_grid, pointing_figure
from lineament.recipes.normgrad.networks import photographs_model
from lineament.recipes.normgrad.photographs import photographs, point_on_photographs
from lineament.report.outcome import Outcome, Table

SLUG = "normgrad"
TITLE = "There and Back Again: Revisiting Backpropagation Saliency Methods"
METHODS = ["gradient", "linear_approx", "grad_cam", "norm_grad", "norm_grad_selective", "guided_backprop"]
# The ReLU behind convolution 1, 2, 4, 6 and 7 of the small network; the deepest is what it averages over space.
SITES = {"1": "2", "2": "5", "4": "12", "6": "19", "7": "23"}


@dataclass(frozen=True)
class Config:
    """One run. The first group is for every data set, the second for digit scenes, the third for photographs."""

    preset: str
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


def _preset(cls: type[Config], name: str) -> Config:
    """``"quick"`` (a minute), ``"small"`` (the table of digit scenes) or ``"paper"`` (VOC2007 test, all images)."""
    checks.one_of("preset", name, ("quick", "small", "paper"))
    if name == "quick":
        return cls(name, test_images=30, train_images=1500, epochs=5)
    if name == "small":
        return cls(name)
    return cls(name, dataset="voc", test_images=None, tolerance=15.0, meta_eps=2.5e-3)


# A field and a constructor of the same name: the class answers with the constructor, an instance with its field.
type.__setattr__(Config, "preset", classmethod(_preset))


def run(config: Config, *, out: Path) -> Outcome:
    """Run the recipe into ``out``; a killed run goes on from its last finished stage."""
    stages = Checkpoint(out / ".stages", asdict(config))
    outcome = _on_scenes if config.dataset == "digit-scenes" else _on_photographs
    return outcome(config, stages, out)


def network() -> nn.Sequential:
    """Seven 3 x 3 convolutions (12-12-24-24-48-48-48) with batch norm, three poolings, global average pooling, one linear layer."""
    parts: list[nn.Module] = []
    width = 1
    for k, channels in enumerate((12, 12, 24, 24, 48, 48, 48), start=1):
        parts += [
            nn.Conv2d(width, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True),
        ]  # fmt: skip
        parts += [nn.MaxPool2d(2)] if k in (2, 4, 6) else []
        width = channels
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def train(config: Config) -> dict[str, Tensor]:
    """The network's weights after AdamW with a one-cycle schedule on binary cross-entropy, one term for each digit."""
    scenes = digit_scenes(config.train_images, seed=config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = network()
    steps = config.epochs * -(-config.train_images // 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in progress(range(config.epochs), "training"):
        for batch in torch.randperm(config.train_images, generator=generator).split(64):
            loss = F.binary_cross_entropy_with_logits(model(scenes.inputs[batch]), scenes.targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return dict(model.state_dict())


def _on_scenes(config: Config, stages: Checkpoint, out: Path) -> Outcome:
    assert config.test_images is not None
    model = network()
    model.load_state_dict(stages.stage("train", lambda: train(config)))
    model.eval()
    scenes = digit_scenes(config.test_images, split="test", seed=config.seed)
    with torch.no_grad():
        top = model(scenes.inputs).topk(2, dim=1).indices.sort(1).values
    correct = float((top == scenes.extras["digits"].sort(1).values).all(1).double().mean())
    points = stages.stage("pointing", lambda: pointing(model, scenes, config))
    alike = stages.stage("class sensitivity", lambda: correlations(model, scenes))
    meta = stages.stage("meta", lambda: with_meta_step(model, scenes, config.meta_eps, config.tolerance))
    swept = {
        eps: stages.stage(
            f"meta {eps:g}", lambda eps=eps: with_meta_step(model, scenes, eps, config.tolerance)
        )
        for eps in config.sweep
    }
    tables = [
        Table(
            "Pointing accuracy by layer, %",
            ["method", *(f"ReLU {k}" for k in SITES), "product of four"],
            [
                [
                    m,
                    *(_percent(points["layers"][m][s]) for s in SITES.values()),
                    _percent(points["products"].get(m)),
                ]
                for m in METHODS
            ],
        ),
        Table(
            "Rank correlation of the maps of the most and the least probable class (1: the map ignores the class)",
            ["method", *(f"ReLU {k}" for k in SITES), "undefined"],
            [[m, *(alike[m][s]["mean"] for s in SITES.values()), _undefined(alike[m])] for m in METHODS],
        ),
        Table(
            f"With one step of meta-learning (eps {config.meta_eps:g})",
            ["method", "layer", "correlation", "with the step", "pointing, %", "with the step, %"],
            [
                [
                    m,
                    f"ReLU {k}",
                    alike[m][SITES[k]]["mean"],
                    meta[m][SITES[k]]["correlation"],
                    _percent(points["layers"][m][SITES[k]]),
                    _percent(meta[m][SITES[k]]["pointing"]),
                ]
                for m in META
                for k in ("6", "7")
            ],
        ),
        Table(
            "The same for other step sizes",
            [
                "method",
                "layer",
                *(f"eps {eps:g}: {what}" for eps in config.sweep for what in ("correlation", "pointing, %")),
            ],
            [
                [m, f"ReLU {k}", *(v for eps in config.sweep for v in _after_step(swept[eps][m][SITES[k]]))]
                for m in META
                for k in ("6", "7")
            ],
        ),
        Table("The classifier", ["measure", "value"], [["both digits right, test, %", _percent(correct)]]),
    ]
    figures = [pointing_figure(points["layers"], list(SITES.values()), [f"ReLU {k}" for k in SITES], out)]
    figures += [correlation_figure(alike, meta, SITES, out), picture_grid(model, scenes, SITES, out)]
    return Outcome(
        SLUG, TITLE, config.preset, asdict(config), scene_claims(points, alike, meta, SITES), tables, figures
    )


def pointing(model: nn.Module, scenes: Samples, config: Config) -> dict[str, Any]:
    """Accuracies of each method at each layer and of the product of layers 2, 4, 6, 7; two questions an image."""
    images, targets = scenes.inputs.repeat_interleave(2, 0), scenes.extras["digits"].flatten()
    masks = scenes.extras["masks"].flatten(0, 1)
    layers: dict[str, dict[str, float]] = {m: {} for m in METHODS}
    products: dict[str, float] = {}
    maps: Any = saliency(model, images, targets, site=list(SITES.values()), method=METHODS, batch_size=100)
    for m in METHODS:
        for site in SITES.values():
            layers[m][site] = _accuracy(maps[m][site], masks, config.tolerance)
    raw: Any = saliency(
        model, images, targets, site=list(SITES.values())[1:], method=COMBINED, resize=False, batch_size=100
    )
    for m in COMBINED:
        size = (images.shape[-2], images.shape[-1])
        products[m] = _accuracy(combined(list(raw[m].values()), size), masks, config.tolerance)
    return {"layers": layers, "products": products}


def correlations(model: nn.Module, scenes: Samples) -> dict[str, Any]:
    """Class sensitivity of each method at each layer: {method: {site: {"mean", "undefined"}}}."""
    found: dict[str, Any] = {}
    for m in METHODS:
        found[m] = {}
        for site in SITES.values():
            measured = class_sensitivity(model, scenes.inputs, site=site, method=m, batch_size=100)
            found[m][site] = {"mean": measured.to_dict()["mean"], "undefined": measured.undefined}
    return found


def with_meta_step(model: nn.Module, scenes: Samples, eps: float, tolerance: float) -> dict[str, Any]:
    """Pointing accuracy and class sensitivity at the last two layers after one step on each image's own question."""
    late = [SITES["6"], SITES["7"]]
    images, targets = scenes.inputs.repeat_interleave(2, 0), scenes.extras["digits"].flatten()
    options: dict[str, Any] = {"eps": eps, "site": late, "method": META}
    maps: Any = meta_saliency(model, images, targets, **options)
    found: dict[str, Any] = {m: {} for m in META}
    for m in META:
        for site in late:
            measured = class_sensitivity(
                model, scenes.inputs, explain=meta_saliency, eps=eps, site=site, method=m
            )
            hit = _accuracy(maps[m][site], scenes.extras["masks"].flatten(0, 1), tolerance)
            found[m][site] = {"pointing": hit, "correlation": measured.to_dict()["mean"]}
    return found


def _on_photographs(config: Config, stages: Checkpoint, out: Path) -> Outcome:
    others = ["gradient_sum", "guided_backprop_sum", "excitation_backprop", "contrastive_excitation_backprop"]
    model, names, usual = photographs_model(config.model_folder)
    images = photographs(config.dataset, config.data_folder, config.test_images)
    sites = list(config.layers or usual)

    def measure() -> dict[str, Any]:
        return point_on_photographs(
            model,
            names,
            images,
            sites=sites,
            methods=[*METHODS, *others],
            tolerance=config.tolerance,
            meta=META,
            meta_eps=config.meta_eps,
            joined=COMBINED,
        )

    found = stages.stage("pointing", measure)
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
    judged = photograph_claims(
        layers, {m: found[m]["product"]["all"] for m in COMBINED}, sites, type(model).__name__
    )
    return Outcome(SLUG, TITLE, config.preset, asdict(config), judged, tables, figures)


def _accuracy(maps: Tensor, masks: Tensor, tolerance: float) -> float:
    return float(hits(maps, masks, tolerance=tolerance).double().mean())


def _percent(value: float | None) -> float | None:
    return None if value is None or value != value else round(100 * value, 1)


def _after_step(cell: dict[str, Any]) -> tuple[Any, Any]:
    return cell["correlation"], _percent(cell["pointing"])


def _undefined(row: dict[str, Any]) -> int:
    return sum(cell["undefined"] for cell in row.values())
