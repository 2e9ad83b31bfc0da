"""One training of the recipe, with the friction on the way, and the time of a step."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lineament.data.augmentation import flip_and_crop
from lineament.data.digits import digit_images
from lineament.data.photographs import Standardise, read_photographs
from lineament.data.samples import Samples
from lineament.optim.diffgrad import DiffGrad
from lineament.recipes.diffgrad.functions import HALF
from lineament.recipes.kit.networks import network
from lineament.recipes.kit.threads import few_threads
from lineament.train.callbacks import Augment, Schedule, Validation
from lineament.train.loop import fit

# name -> (make(params, lr), scale of the loss). The rates of methods without Adam's units are customary ones: the paper names none.
OPTIMIZERS: dict[str, tuple[Callable[[Any, float], torch.optim.Optimizer], float]] = {
    "SGDM": (lambda p, lr: torch.optim.SGD(p, 10 * lr, momentum=0.9), 1),
    "AdaGrad": (lambda p, lr: torch.optim.Adagrad(p, 10 * lr), 1),
    "AdaDelta": (lambda p, lr: torch.optim.Adadelta(p, 1000 * lr), 1),
    "RMSProp": (lambda p, lr: torch.optim.RMSprop(p, lr), 1),
    "AMSGrad": (lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True), 1),
    "Adam": (lambda p, lr: torch.optim.Adam(p, lr), 1),
    HALF: (lambda p, lr: torch.optim.Adam(p, lr / 2), 1),
    "diffGrad": (DiffGrad, 1),
    "diffGrad (version 1)": (lambda p, lr: DiffGrad(p, lr, version=1), 1),
    "diffGrad (version 2)": (lambda p, lr: DiffGrad(p, lr, version=2), 1),
    "diffGrad (loss x 1000)": (DiffGrad, 1000),
    "diffGrad (loss / 1000)": (DiffGrad, 1e-3),
}
RIVALS = ("SGDM", "AdaGrad", "AdaDelta", "RMSProp", "AMSGrad", "Adam")


@dataclass(frozen=True)
class Frictions:
    """The friction at some steps of a training: its mean and its 5 % and 95 % quantiles over coordinates."""

    step: list[int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """Test accuracy, each epoch's mean loss, the first 60 steps' mean loss, frictions (of diffGrad)."""

    accuracy: float
    losses: list[float]
    first: float
    friction: Frictions


@dataclass(frozen=True)
class Timing:
    """Seconds of a step on one tensor of each size, by way to run it."""

    sizes: list[int]
    seconds: dict[str, list[float]]


class _Watch:
    """Collects the losses of the first steps and, every so many steps, the friction."""

    def __init__(self, every: int):
        self.every, self.first, self.friction = every, [], Frictions()

    def on_batch(self, run: Any, batch: Any) -> None:
        self.tracked = isinstance(run.optimizer, DiffGrad) and run.step % self.every == 0
        if isinstance(run.optimizer, DiffGrad):
            run.optimizer.param_groups[0]["track_friction"] = self.tracked

    def on_step(self, run: Any) -> None:
        if run.step <= 60:
            self.first.append(run.value)
        if self.tracked:
            found = run.optimizer.friction_summary()
            self.friction.step.append(run.step - 1)
            self.friction.mean.append(found.mean)
            self.friction.low.append(found.quantiles[0.05])
            self.friction.high.append(found.quantiles[0.95])


def data_of(name: str, folder: str | None) -> tuple[Samples, Samples]:
    """Training and test images: scikit-learn's digits (60 % for training), or CIFAR from the user's folder, standardised by channel."""
    if name == "digits":
        found = digit_images()
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
        return found[order[: len(found) * 6 // 10]], found[order[len(found) * 6 // 10 :]]
    train, test = (read_photographs(name, split, data_folder=folder) for split in ("train", "test"))
    standardise = Standardise(train.inputs)
    return Samples(standardise(train.inputs), train.targets), Samples(standardise(test.inputs), test.targets)


def train(config: Any, data: tuple[Samples, Samples], key: tuple[str, int, str], seed: int) -> Training:
    """One training with cross-entropy of an activation, a batch size and an optimizer."""
    (activation, batch_size, name), (samples, test) = key, data
    make, scale = OPTIMIZERS[name]
    classes = int(samples.targets.max()) + 1
    net = network(config.network, samples.inputs.shape[1:], classes, seed=seed, activation=activation)
    device = config.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    watch = _Watch(config.track_every)
    schedule = Schedule(lambda o, _: torch.optim.lr_scheduler.MultiStepLR(o, list(config.milestones)))
    augment = [Augment(flip_and_crop)] if config.data != "digits" else []
    with few_threads(samples.inputs, device):
        done = fit(
            net.to(device), samples, optimizer=lambda net: make(net.parameters(), config.lr), epochs=config.epochs,
            batch_size=batch_size, loss=lambda z, y: scale * F.cross_entropy(z, y), seed=seed,
            callbacks=[*augment, watch, schedule, Validation(test, batch_size=500)],
        )  # fmt: skip
    return Training(
        accuracy=done.curve("validation_accuracy")[-1],
        losses=[loss / scale for loss in done.curve("loss")],
        first=statistics.mean(watch.first) / scale,
        friction=watch.friction,
    )


def step_times(sizes: tuple[int, ...], compiled: bool, repeats: int = 7) -> Timing:
    """Medians; the ways are run in turn, so that drift falls on all alike."""
    makers: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "Adam, loop": lambda p: torch.optim.Adam(p, foreach=False),
        "Adam, foreach": lambda p: torch.optim.Adam(p, foreach=True),
        "Adam, fused": lambda p: torch.optim.Adam(p, fused=True),
        "diffGrad, eager": lambda p: DiffGrad(p),
        "diffGrad, foreach": lambda p: DiffGrad(p, foreach=True),
    }
    if compiled:
        makers["diffGrad, compiled"] = lambda p: DiffGrad(p, compiled=True)
    found: dict[str, list[float]] = {name: [] for name in makers}
    for size in sizes:
        times: dict[str, list[float]] = {name: [] for name in makers}
        running = {}
        for name, make in makers.items():
            w = nn.Parameter(torch.zeros(size))
            w.grad = torch.full_like(w, 1e-3)
            optimizer = make([w])
            try:
                optimizer.step()
            except RuntimeError as error:
                warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                times[name].append(float("nan"))
                continue
            running[name] = optimizer
        for _ in range(repeats):
            for name, optimizer in running.items():
                start = time.perf_counter()
                optimizer.step()
                times[name].append(time.perf_counter() - start)
        for name, each in times.items():
            found[name].append(statistics.median(each))
    return Timing(list(sizes), found)
