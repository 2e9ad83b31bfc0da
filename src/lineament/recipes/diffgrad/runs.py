"""Functions, data, networks, optimizers and training loops of the diffgrad recipe."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.batching import progress
from lineament.core.checks import require, suggest
from lineament.data.augmentation import flip_and_crop
from lineament.data.digits import digit_images
from lineament.data.photographs import Standardise, read_photographs
from lineament.optim import DiffGrad


class Function(NamedTuple):
    """A function of one variable, its derivative, and where its minimum is."""

    value: Callable[[float], float]
    slope: Callable[[float], float]
    minimum: float


def _f2(x: float) -> float:
    return -40 * x - 35.15 if x <= -0.9 else x**3 + x * math.sin(8 * x) + 0.85


def _f3(x: float) -> float:
    x = abs(x) if x > -0.5 else x
    return x * x if abs(x) > 0.5 or x == -0.5 else 0.75 - x if x > 0.4 else 0.875 * x


def _f3_slope(x: float) -> float:
    if x <= -0.5 or x > 0.5:
        return 2 * x
    return 1.0 if x <= -0.4 else -0.875 if x <= 0 else 0.875 if x <= 0.4 else -1.0


FUNCTIONS = {
    "F1": Function(
        lambda x: (x + 0.3) ** 2 if x <= 0 else (x - 0.2) ** 2 + 0.05,
        lambda x: 2 * x + 0.6 if x <= 0 else 2 * x - 0.4,
        -0.3,
    ),
    "F2": Function(
        _f2,
        lambda x: -40.0 if x <= -0.9 else 8 * x * math.cos(8 * x) + math.sin(8 * x) + 3 * x * x,
        -0.6429,
    ),
    # The authors' notebook forgets the factor 8 of the inner derivative.
    "F2, released derivative": Function(
        _f2, lambda x: -40.0 if x <= -0.9 else x * math.cos(8 * x) + math.sin(8 * x) + 3 * x * x, -0.6429
    ),
    "F3": Function(_f3, _f3_slope, 0.0),
}
WALKERS = {"diffGrad": (1.0, None), "Adam": (1.0, 1.0), "Adam (half the rate)": (0.5, 1.0)}


def walk(slope: Callable[[float], float], who: str, lr: float, steps: int) -> dict[str, Any]:
    """Positions from x = -1, and the mean friction; the notebooks' betas (.95, .999)."""
    share, fixed = WALKERS[who]
    w = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
    optimizer = DiffGrad([w], share * lr, (0.95, 0.999), fixed_friction=fixed, track_friction=True)
    xs, xis = [-1.0], []
    for _ in range(steps):
        w.grad = torch.tensor(slope(xs[-1]), dtype=torch.float64)
        optimizer.step()
        xs.append(w.item())
        xis.append(optimizer.friction_summary().mean)
    return {"x": xs, "friction": statistics.mean(xis)}


# name -> (make(params, lr), scale of the loss). The rates of methods without Adam's units are customary ones: the paper names none.
OPTIMIZERS: dict[str, tuple[Callable[[Any, float], torch.optim.Optimizer], float]] = {
    "SGDM": (lambda p, lr: torch.optim.SGD(p, 10 * lr, momentum=0.9), 1),
    "AdaGrad": (lambda p, lr: torch.optim.Adagrad(p, 10 * lr), 1),
    "AdaDelta": (lambda p, lr: torch.optim.Adadelta(p, 1000 * lr), 1),
    "RMSProp": (lambda p, lr: torch.optim.RMSprop(p, lr), 1),
    "AMSGrad": (lambda p, lr: torch.optim.Adam(p, lr, amsgrad=True), 1),
    "Adam": (lambda p, lr: torch.optim.Adam(p, lr), 1),
    "Adam (half the rate)": (lambda p, lr: torch.optim.Adam(p, lr / 2), 1),
    "diffGrad": (DiffGrad, 1),
    "diffGrad (version 1)": (lambda p, lr: DiffGrad(p, lr, version=1), 1),
    "diffGrad (version 2)": (lambda p, lr: DiffGrad(p, lr, version=2), 1),
    "diffGrad (loss x 1000)": (DiffGrad, 1000),
    "diffGrad (loss / 1000)": (DiffGrad, 1e-3),
}
RIVALS = ("SGDM", "AdaGrad", "AdaDelta", "RMSProp", "AMSGrad", "Adam")
_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "selu": nn.SELU}


def known(names: tuple[str, ...], activations: tuple[str, ...]) -> None:
    """Refuse optimizers and activations that are not there."""
    for what, given, there in (("optimizers", names, OPTIMIZERS), ("activations", activations, _ACTIVATIONS)):
        for name in given:
            require(name in there, f"{what}: got {name!r}, which is not a choice{suggest(name, there)}")


class Data(NamedTuple):
    """Training and test images as the network takes them, labels, and whether to flip and crop."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    augment: bool


def data_of(name: str, folder: str | None) -> Data:
    """scikit-learn's digits (60 % for training), or CIFAR-10 / CIFAR-100 from the user's folder, standardised by channel."""
    if name == "digits":
        x, y = digit_images().pair
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        train, test = order[: len(x) * 6 // 10], order[len(x) * 6 // 10 :]
        return Data(x[train], y[train], x[test], y[test], False)
    train, test = (read_photographs(name, split, data_folder=folder) for split in ("train", "test"))
    standardise = Standardise(train.inputs)
    return Data(standardise(train.inputs), train.targets, standardise(test.inputs), test.targets, True)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, act: Callable[[], nn.Module]):
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            *(nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width), act()),
            *(nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), act()),
            *(nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        )
        self.skip = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.act = act()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.skip(x))


def network(kind: str, classes: int, channels: int, activation: str, seed: int) -> nn.Module:
    """``"cnn"`` (conv 16, conv 32, pool, 64, classes) or ``"resnet50"`` for small images (He et al. 2016), from ``seed`` alone."""
    act = _ACTIVATIONS[activation]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "cnn":
            return nn.Sequential(
                *(nn.Conv2d(channels, 16, 3, padding=1), act(), nn.Conv2d(16, 32, 3, padding=1), act()),
                *(nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(64), act(), nn.Linear(64, classes)),
            )
        layers: list[nn.Module] = [
            nn.Conv2d(channels, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            act(),
        ]
        inputs = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(count):
                layers.append(_Bottleneck(inputs, width, stride if index == 0 else 1, act))
                inputs = 4 * width
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def train(
    data: Data,
    *,
    kind: str,
    activation: str,
    optimizer_name: str,
    lr: float,
    epochs: int,
    milestones: tuple[int, ...],
    batch_size: int,
    track_every: int,
    seed: int,
    device: str,
) -> dict[str, Any]:
    """One training with cross-entropy: test accuracy, each epoch's mean loss, the first 60 steps' mean loss, frictions."""
    make, scale = OPTIMIZERS[optimizer_name]
    classes = int(data.y.max()) + 1
    net = network(kind, classes, data.x.shape[1], activation, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the lazy layer draws at its first forward
        net(data.x[:2])
    net.to(device)
    x, y = data.x.to(device), data.y.to(device)
    optimizer = make(net.parameters(), lr)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(milestones))
    generator = torch.Generator().manual_seed(seed)
    frictional = isinstance(optimizer, DiffGrad)
    losses: list[float] = []
    first: list[Tensor] = []
    friction: dict[str, list[float]] = {"step": [], "mean": [], "low": [], "high": []}
    step = 0
    for _ in progress(range(epochs), f"{optimizer_name}, seed {seed}"):
        net.train()
        total = torch.zeros((), device=device)
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            rows = rows.to(device)
            loss = F.cross_entropy(
                net(flip_and_crop(x[rows], generator) if data.augment else x[rows]), y[rows]
            )
            optimizer.zero_grad()
            (loss * scale).backward()
            tracked = frictional and step % track_every == 0
            if frictional:
                optimizer.param_groups[0]["track_friction"] = tracked
            optimizer.step()
            if tracked:
                summary = optimizer.friction_summary()  # pyright: ignore[reportAttributeAccessIssue]
                for name, value in (
                    ("step", step),
                    ("mean", summary.mean),
                    ("low", summary.quantiles[0.05]),
                    ("high", summary.quantiles[0.95]),
                ):
                    friction[name].append(float(value))
            total += loss.detach() * len(rows)
            if step < 60:
                first.append(loss.detach())
            step += 1
        schedule.step()
        losses.append(float(total) / len(x))
    net.eval()
    with torch.no_grad():
        right = sum(
            int((net(a.to(device)).argmax(1).cpu() == b).sum())
            for a, b in zip(data.test_x.split(500), data.test_y.split(500))
        )
    return {
        "accuracy": right / len(data.test_y),
        "losses": losses,
        "first": float(torch.stack(first).mean()),
        "friction": friction,
    }


def step_times(sizes: tuple[int, ...], compiled: bool, repeats: int = 7) -> dict[str, Any]:
    """Median seconds of a step on one tensor of each size, by way to run it; run in turn, so that drift falls on all alike."""
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
        running = {}
        for name, make in makers.items():
            w = nn.Parameter(torch.zeros(size))
            w.grad = torch.full_like(w, 1e-3)
            optimizer = make([w])
            try:
                optimizer.step()
            except RuntimeError as error:
                warnings.warn(f"{name} is left out: {error}", stacklevel=2)
                continue
            running[name] = optimizer
        times: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(repeats):
            for name, optimizer in running.items():
                start = time.perf_counter()
                optimizer.step()
                times[name].append(time.perf_counter() - start)
        for name in makers:
            found[name].append(statistics.median(times[name]) if name in times else float("nan"))
    return {"sizes": list(sizes), "seconds": found}
