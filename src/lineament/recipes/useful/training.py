"""The trainings of the useful recipe: one early selection a seed, then every method from the same initial weights.

A method is named by its parts: ``sgd``, ``sam`` or ``asam``, then any of ``+useful`` (or another partition), ``+steps`` (as many steps
as the upsampled training, on the original data) and ``+ta`` (TrivialAugment).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
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
from lineament.recipes.kit.networks import network
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
class Method:
    """A method's name taken apart."""

    optimizer: str
    partition: str = ""
    steps: bool = False
    trivial: bool = False

    @property
    def selects(self) -> bool:
        """Whether it needs the early selection."""
        return bool(self.partition) or self.steps


@dataclass(frozen=True)
class Early:
    """Stages 1 and 2: the separating epoch, the errors until then, what each partition selects, and how good the selection is."""

    epoch: int
    errors: list[float]
    masks: dict[str, Tensor]
    seconds: float
    class_shares: list[float]
    recall: float | None = None
    precision: float | None = None
    noisy_selected: float | None = None


@dataclass(frozen=True)
class Final:
    """Stage 3 for one method: errors in per cent (``groups`` of the test data apart), and what else the paper measures."""

    test: float
    train: float
    seconds: float
    steps: int
    selected: float
    lambda_max: float
    bulk: float
    l1: float
    forgetting: float
    first_learned: float
    learned: float
    groups: list[float]


def parsed(name: str) -> Method:
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
    return Method(first, partitions[0] if partitions else "", "steps" in parts, "ta" in parts)


def early(config: Any, data: Data, seed: int, device: str, trivial: bool) -> Early:
    """Find the slow examples of every partition."""
    start = time.perf_counter()
    model = _network(config, data, seed, device)
    options = _options(Method("sgd", trivial=trivial), config, data, seed)
    fit = trainer(data.train, name=f"early training, seed {seed}", **options)
    seen = data.prepared_train
    weights: list[dict[str, Tensor]] = []

    def kept(model: nn.Module, rows: Tensor, epochs: int) -> Iterator[float]:
        for error in fit(model, rows, epochs):
            weights.append({k: v.clone() for k, v in model.state_dict().items()})
            yield error

    found = find_slow(
        model, kept, seen, epochs=config.epochs, separating=config.separating or "auto", seed=seed, output=config.output,
        site="head:in" if config.output == "features" else None,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    model.load_state_dict(weights[found.epoch - 1])
    scores, labels, _ = outputs_of(model, seen, recalibrate=found.epoch < 3)
    slow, groups = found.selection.mask, data.train.groups
    others = ("random", "quantile", "misclassified", "eiil")
    select = {by: select_slow(scores, labels, by=by, like=found.selection, seed=seed).mask for by in others}
    known = groups is not None and bool((groups == 1).any())
    noisy = data.train.extras.get("noisy")
    return Early(
        epoch=found.epoch,
        errors=list(found.errors),
        masks={"clusters": slow, **select},
        seconds=seconds,
        class_shares=(found.selection.counts[:, 1] / found.selection.counts[:, 0].clamp(min=1)).tolist(),
        recall=_share(slow[groups == 1]) if known else None,
        precision=_share((groups == 1)[slow]) if known else None,
        noisy_selected=None if noisy is None else _share(slow[noisy]),
    )


def final(
    name: str, config: Any, data: Data, found: Early | None, seed: int, device: str, checkpoint: Checkpoint
) -> Final:
    """Train by one method, and measure."""
    method = parsed(name)
    rows, weights, epochs, selected = _shown(method, config, data, found)
    model = _network(config, data, seed, device)
    watched = tuple(part[:_WATCHED] for part in data.prepared_train)

    def right(net: nn.Module) -> Tensor:
        scores, labels, _ = outputs_of(net, watched)
        return scores.argmax(1) == labels

    options = _options(method, config, data, seed)
    weigh = [] if weights is None else [ExampleWeights(weights)]
    options["callbacks"] = [Rows(rows), *weigh, *options["callbacks"], Measure(right=right)]
    start = time.perf_counter()
    done = fit(
        model, data.train, epochs=epochs, checkpoint=checkpoint, name=f"{name}, seed {seed}", **options
    )
    seconds = time.perf_counter() - start
    scores, labels, _ = outputs_of(model, (data.prepared(data.test.inputs), data.test.targets))
    wrong, groups = scores.argmax(1) != labels, data.test.groups
    order = learning_order(torch.stack(done.curve("right")))
    some = [tuple(part[k : k + 500].to(device) for part in watched) for k in range(0, len(watched[1]), 500)]
    top = top_eigenpairs(
        hessian(model, F.cross_entropy, some[: config.sharpness_batches]), 5, tol=1e-2, max_products=150
    ).values
    return Final(
        test=100 * _share(wrong),
        train=100 * (1 - done.history[-1].to_dict()["accuracy"]),
        seconds=seconds,
        steps=epochs * -(-len(rows) // config.batch_size),
        selected=selected,
        lambda_max=float(top[0]),
        bulk=float(top[0] / top[4]),
        l1=sum(float(p.detach().abs().sum()) for p in model.parameters()),
        forgetting=float(order.forgetting.double().mean()),
        first_learned=float(order.first_learned.double().mean()),
        learned=float(order.learned.double().mean()),
        groups=[] if groups is None else [100 * _share(wrong[groups == g]) for g in groups.unique()],
    )


def _shown(
    method: Method, config: Any, data: Data, found: Early | None
) -> tuple[Tensor, Tensor | None, int, float]:
    """The rows and weights that a method trains on, for how many epochs, and the share that was selected."""
    rows, weights, epochs, selected = torch.arange(len(data.train)), None, config.epochs, 0.0
    if method.selects:
        assert found is not None
        by, way = PARTS[method.partition] if method.partition else ("clusters", "steps")
        mask = found.masks[by]
        selected = _share(mask)
        factor = {"useful3": 3, "jtt": config.jtt_factor}.get(method.partition, config.factor)
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
    return rows, weights, epochs, selected


def _options(method: Method, config: Any, data: Data, seed: int) -> dict[str, Any]:
    """The options of a training by this method."""

    def optimizer(model: nn.Module) -> torch.optim.Optimizer:
        base = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=0.9, weight_decay=config.weight_decay, foreach=True
        )
        if method.optimizer == "sgd":
            return base
        kind, rho = (SAM, config.sam_rho) if method.optimizer == "sam" else (ASAM, config.asam_rho)
        return kind(base, rho=rho, model=model)

    def schedule(optimizer: torch.optim.Optimizer, epochs: int) -> Any:
        milestones = sorted({max(1, round(share * epochs)) for share in config.milestones})
        return torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)

    def augment(x: Tensor, generator: torch.Generator) -> Tensor:
        x = flip_and_crop(x, generator) if config.flip_and_crop else x
        return data.prepared(trivial_augment(x, generator) if method.trivial else x)

    require(
        not method.trivial or data.train.inputs.dtype == torch.uint8,
        "methods: TrivialAugment (+ta) needs uint8 images; the digits are floating",
    )
    mixed = [MixUp(config.mixup)] if config.mixup else []
    callbacks = [Schedule(schedule), Augment(augment), *mixed]
    return {"optimizer": optimizer, "batch_size": config.batch_size, "seed": seed, "callbacks": callbacks}


def _network(config: Any, data: Data, seed: int, device: str) -> nn.Module:
    widths = {"mlp": (config.width, config.width), "vit-s": 6 * config.width}.get(
        config.network, config.width
    )
    shape = data.train.inputs.shape[1:]
    return network(config.network, shape, data.classes, seed=seed, widths=widths, weights=config.weights).to(
        device
    )


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())
