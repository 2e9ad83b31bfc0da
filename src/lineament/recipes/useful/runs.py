"""The trainings of the useful recipe: one early selection a seed, then every method from the same initial weights.

A method is named by its parts: ``sgd``, ``sam`` or ``asam``, then any of ``+useful`` (or another partition), ``+steps`` (as many steps
as the upsampled training, on the original data) and ``+ta`` (TrivialAugment).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import one_of, require
from lineament.core.curvature.eigenpairs import top_eigenpairs
from lineament.core.curvature.matrices import hessian
from lineament.data.augmentation import flip_and_crop, trivial_augment
from lineament.learn.useful.early_outputs import outputs_of
from lineament.learn.useful.learning_order import learning_order
from lineament.learn.useful.resampling import find_slow, trainer
from lineament.learn.useful.slow_examples import select_slow
from lineament.optim import ASAM, SAM
from lineament.recipes.kit.networks import Network, network
from lineament.recipes.useful.data import Data
from lineament.train.callbacks import Augment, ExampleWeights, Measure, MixUp, Rows, Schedule
from lineament.train.loop import fit

OPTIMIZERS = ("sgd", "sam", "asam")
# The partition, and how its examples are used: copies each, or a weight of the loss.
PARTS = {
    "useful": ("clusters", "copies"),
    "useful3": ("clusters", "copies"),
    "upweight": ("clusters", "weight"),
    "random": ("random", "copies"),
    "quantile": ("quantile", "copies"),
    "misclassified": ("misclassified", "copies"),
    "eiil": ("eiil", "copies"),
    "jtt": ("misclassified", "copies"),
    "steps": ("", ""),
    "ta": ("", ""),
}
_WATCHED = 1000


@dataclass(frozen=True)
class Recipe:
    """A method's name taken apart."""

    optimizer: str
    partition: str = ""
    steps: bool = False
    trivial: bool = False


def parsed(name: str) -> Recipe:
    """``"sam+useful+ta"`` taken apart; InputError names the nearest part."""
    first, *parts = name.split("+")
    one_of("methods", first, OPTIMIZERS)
    for part in parts:
        one_of("methods", part, PARTS)
    partitions = [p for p in parts if PARTS[p][0]]
    require(len(partitions) <= 1, f"methods: got {name!r}, expected at most one way to select examples")
    require(
        not ("steps" in parts and partitions),
        f"methods: got {name!r}, but steps is a control without selection",
    )
    return Recipe(first, partitions[0] if partitions else "", "steps" in parts, "ta" in parts)


def _network(config: Any, data: Data, seed: int) -> Network:
    widths = {"mlp": (config.width, config.width), "vit-s": 6 * config.width}.get(
        config.network, config.width
    )
    return network(
        config.network,
        data.train.inputs.shape[1:],
        data.classes,
        seed=seed,
        widths=widths,
        weights=config.weights,
    )


def _loader(x: Tensor, y: Tensor, data: Data) -> list[tuple[Tensor, Tensor]]:
    return [(data.prepared(x[i : i + 500]), y[i : i + 500]) for i in range(0, len(x), 500)]


def _training(recipe: Recipe, config: Any, data: Data, seed: int) -> dict[str, Any]:
    """The options of a training by this method."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        base = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay, foreach=True
        )
        if recipe.optimizer == "sgd":
            return base
        kind, rho = (SAM, config.sam_rho) if recipe.optimizer == "sam" else (ASAM, config.asam_rho)
        return kind(base, rho=rho, model=model)

    def schedule(optimizer: torch.optim.Optimizer, epochs: int) -> Any:
        milestones = sorted({max(1, round(share * epochs)) for share in config.milestones})
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        if config.flip_and_crop:
            x = flip_and_crop(x, generator)
        if recipe.trivial:
            x = trivial_augment(x, generator)
        return data.prepared(x)

    require(
        not recipe.trivial or data.train.inputs.dtype == torch.uint8,
        "methods: TrivialAugment (+ta) needs uint8 images; the digits are floating",
    )
    mixed = [MixUp(config.mixup)] if config.mixup else []
    callbacks = [Schedule(schedule), Augment(augment), *mixed]
    return {"optimizer": optimizer, "batch_size": config.batch_size, "seed": seed, "callbacks": callbacks}


def early(config: Any, data: Data, seed: int, device: str, trivial: bool) -> dict[str, Any]:
    """Stages 1 and 2: the masks of every partition, the separating epoch, and how long that took."""
    start = time.perf_counter()
    model = _network(config, data, seed)
    model.to(device)
    options = _training(Recipe("sgd", trivial=trivial), config, data, seed)
    fit = trainer(data.train, name=f"early training, seed {seed}", **options)
    loader = _loader(data.train.inputs, data.train.targets, data)
    seen: dict[str, Any] = {}

    def kept(model: nn.Module, rows: Tensor, epochs: int) -> Any:
        for epoch, error in enumerate(fit(model, rows, epochs), 1):
            seen[str(epoch)] = {k: v.clone() for k, v in model.state_dict().items()}
            yield error

    found = find_slow(
        model, kept, loader, epochs=config.epochs, separating=config.separating or "auto", seed=seed, output=config.output,
        site="head:in" if config.output == "features" else None,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    initial = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(seen[str(found.epoch)])
    scores, labels, _ = outputs_of(model, loader, recalibrate=found.epoch < 3)
    model.load_state_dict(initial)
    masks = {"clusters": found.selection.mask}
    for by in ("random", "quantile", "misclassified", "eiil"):
        masks[by] = select_slow(scores, labels, by=by, like=found.selection, seed=seed).mask
    answer: dict[str, Any] = {
        "epoch": found.epoch,
        "errors": list(found.errors),
        "masks": masks,
        "seconds": seconds,
    }
    answer["class_shares"] = (
        found.selection.counts[:, 1] / found.selection.counts[:, 0].clamp(min=1)
    ).tolist()
    groups = data.train.groups
    if groups is not None and bool((groups == 1).any()):
        slow = found.selection.mask
        answer["recall"] = float(slow[groups == 1].double().mean())
        answer["precision"] = float((groups == 1)[slow].double().mean())
    if "noisy" in data.train.extras:
        answer["noisy_selected"] = float(found.selection.mask[data.train.extras["noisy"]].double().mean())
    return answer


def final(
    name: str, config: Any, data: Data, found: dict[str, Any] | None, seed: int, device: str, run: Checkpoint
) -> dict[str, Any]:
    """Stage 3 for one method: test error (also by group), and what else the paper measures."""
    recipe = parsed(name)
    count = len(data.train.targets)
    rows, weights, epochs = torch.arange(count), None, config.epochs
    selected = 0.0
    if recipe.partition or recipe.steps:
        assert found is not None
        by, way = PARTS[recipe.partition] if recipe.partition else ("clusters", "steps")
        mask = found["masks"][by]
        selected = float(mask.double().mean())
        factor = {"useful3": 3, "jtt": config.jtt_factor}.get(recipe.partition, config.factor)
        if way == "copies":
            rows = torch.cat([rows, rows[mask].repeat(factor - 1)]).sort().values
        elif way == "weight":
            weights = 1 + (factor - 1) * mask.double()
        else:
            epochs = round(epochs * (1 + (config.factor - 1) * selected))
    if config.rebalance:
        have = torch.bincount(data.train.targets[rows], minlength=data.classes)
        share = have.max() / have[data.train.targets].double().clamp(min=1)
        weights = share if weights is None else weights * share
    model = _network(config, data, seed)
    model.to(device)
    watched = _loader(data.train.inputs[:_WATCHED], data.train.targets[:_WATCHED], data)

    def right(net: nn.Module) -> Tensor:
        scores, labels, _ = outputs_of(net, watched)
        return scores.argmax(1) == labels

    options = _training(recipe, config, data, seed)
    weigh = [] if weights is None else [ExampleWeights(weights)]
    options["callbacks"] = [Rows(rows), *weigh, *options["callbacks"], Measure(right=right)]
    start = time.perf_counter()
    done = fit(model, data.train, epochs=epochs, checkpoint=run, name=f"{name}, seed {seed}", **options)
    seconds = time.perf_counter() - start
    scores, labels, _ = outputs_of(model, _loader(*data.test.pair, data))
    wrong = scores.argmax(1) != labels
    order = learning_order(torch.stack(done.curve("right")))
    curvature = hessian(model, F.cross_entropy, _on(watched[: config.sharpness_batches], device))
    top = top_eigenpairs(curvature, 5, tol=1e-2, max_products=150).values
    answer: dict[str, Any] = {
        "test": 100 * float(wrong.double().mean()),
        "train": 100 * (1 - done.curve("accuracy")[-1]),
        "seconds": seconds,
        "steps": epochs * -(-len(rows) // config.batch_size),
        "selected": selected,
        "lambda_max": float(top[0]),
        "bulk": float(top[0] / top[4]),
        "l1": sum(float(p.detach().abs().sum()) for p in model.parameters()),
        "forgetting": float(order.forgetting.double().mean()),
        "first_learned": float(order.first_learned.double().mean()),
        "learned": float(order.learned.double().mean()),
    }
    if data.test.groups is not None:
        by_group = [
            100 * float(wrong[data.test.groups == g].double().mean()) for g in data.test.groups.unique()
        ]
        answer["groups"] = by_group
    return answer


def _on(loader: list[tuple[Tensor, Tensor]], device: str) -> list[tuple[Tensor, Tensor]]:
    return [(x.to(device), y.to(device)) for x, y in loader]
