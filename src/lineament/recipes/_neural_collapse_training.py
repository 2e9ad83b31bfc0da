"""Data, networks and training loops of the neural-collapse recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.batching import progress
from lineament.core.checks import InputError, require
from lineament.measure.collapse import collapse, collapse_metrics

# Weight decay of the feature layers and of the last one, as multiples of the baseline's.
SETTINGS = {
    "baseline": (1.0, 1.0),
    "2x last": (1.0, 2.0),
    "0 last": (1.0, 0.0),
    "2x features": (2.0, 1.0),
    "0 features": (0.0, 1.0),
}


@dataclass(frozen=True)
class Data:
    """Training images scaled to about unit size, (samples, channels, height, width), labels, and whether to augment."""

    x: Tensor
    y: Tensor
    classes: int
    augment: bool


@contextmanager
def few_threads(data: Data, device: str) -> Iterator[None]:
    """One thread for images so small that handing the work to another costs more than it saves; as before afterwards."""
    before = torch.get_num_threads()
    if device == "cpu" and data.x[0].numel() < 1000:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_data(name: str, folder: str | None) -> Data:
    """``"digits"`` (scikit-learn's, 1,300 images), or ``"cifar10"`` / ``"cifar100"`` from a folder of the user's.

    The folder holds the binary version of CIFAR (``cifar-10-batches-bin``, ``cifar-100-binary``, or their files), or
    ``train.npz`` with ``x`` (uint8 images) and ``y``.
    """
    if name == "digits":
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(0).permutation(len(labels))[:1300]
        x = torch.tensor(images[order] / 16.0, dtype=torch.float32).view(-1, 1, 8, 8)
        return Data(x, torch.tensor(labels[order]).long(), 10, False)
    folder = folder or os.environ.get("LINEAMENT_DATA")
    if not folder:
        raise InputError(
            f"data_folder: {name} needs a folder with its binary version or a train.npz; give --data-folder or set "
            "LINEAMENT_DATA, or use --data digits"
        )
    images, labels = _read(name, Path(folder))
    x = torch.from_numpy(images).float() / 255
    center, scale = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return Data((x - center) / scale, torch.from_numpy(labels).long(), 10 if name == "cifar10" else 100, True)


def _read(name: str, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (samples, 3, 32, 32) uint8 and labels."""
    head = 1 if name == "cifar10" else 2
    pattern, inner = (
        ("data_batch_*.bin", "cifar-10-batches-bin") if head == 1 else ("train.bin", "cifar-100-binary")
    )
    files = sorted(folder.glob(pattern)) or sorted((folder / inner).glob(pattern))
    if files:
        raw = np.concatenate([np.fromfile(f, dtype=np.uint8) for f in files])
        require(raw.size % (head + 3072) == 0, f"data_folder: {files[0].name} is no binary file of {name}")
        rows = raw.reshape(-1, head + 3072)
        return rows[:, head:].reshape(-1, 3, 32, 32), rows[:, head - 1].astype(np.int64)
    path = folder / "train.npz"
    require(path.is_file(), f"data_folder: {str(folder)!r} holds neither {pattern} nor train.npz")
    with np.load(path, allow_pickle=False) as stored:
        require({"x", "y"} <= set(stored.files), f"train.npz: holds {stored.files}, expected 'x' and 'y'")
        x, y = stored["x"], stored["y"].astype(np.int64)
    require(
        x.dtype == np.uint8 and x.ndim == 4 and len(x) == len(y) and 3 in (x.shape[1], x.shape[3]),
        f"train.npz: x is {x.dtype} of shape {x.shape}, expected uint8 images with 3 channels and as many y",
    )
    return np.ascontiguousarray(x if x.shape[1] == 3 else x.transpose(0, 3, 1, 2)), y


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        same = stride == 1 and inputs == outputs
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        inside = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inside + self.skip(x))


class ResNet18(nn.Module):
    """ResNet-18 for small images: a 3 x 3 stem of stride 1, no pooling before the blocks (He et al. 2016)."""

    def __init__(self, channels: int, classes: int, *, bias: bool, width: int = 64):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        widths = [width * m for m in (1, 2, 4, 8)]
        stages = []
        inputs = width
        for index, outputs in enumerate(widths):
            stages.append(
                nn.Sequential(_Block(inputs, outputs, 1 if index == 0 else 2), _Block(outputs, outputs, 1))
            )
            inputs = outputs
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class MLP(nn.Module):
    """Fully connected ReLU layers and a linear head."""

    def __init__(self, inputs: int, widths: tuple[int, ...], classes: int, *, bias: bool):
        super().__init__()
        parts: list[nn.Module] = [nn.Flatten()]
        for width in widths:
            parts += [nn.Linear(inputs, width), nn.ReLU()]
            inputs = width
        self.features = nn.Sequential(*parts)
        self.head = nn.Linear(inputs, classes, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def network(kind: str, data: Data, widths: tuple[int, ...], *, bias: bool, seed: int) -> nn.Module:
    """A freshly drawn network; PyTorch's default initialisation, from ``seed`` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "resnet18":
            return ResNet18(data.x.shape[1], data.classes, bias=bias)
        return MLP(data.x[0].numel(), widths, data.classes, bias=bias)


def loss_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Half the squared distance to the one-hot label, or cross-entropy; means over the batch."""
    if name == "ce":
        return F.cross_entropy
    return lambda scores, y: (scores - F.one_hot(y, scores.shape[1])).square().sum(1).mean() / 2


def _augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random flips and crops after padding by four."""
    flips = torch.rand(len(x), generator=generator) < 0.5
    x = torch.where(flips.to(x.device)[:, None, None, None], x.flip(3), x)
    size = x.shape[-1]
    wide = F.pad(x, (4, 4, 4, 4)).unfold(2, size, 1).unfold(3, size, 1)
    at = torch.randint(9, (2, len(x)), generator=generator).to(x.device)
    return wide[torch.arange(len(x), device=x.device), :, at[0], at[1]]


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: str,
    groups: list[dict[str, Any]],
    epochs: int,
    milestones: list[int],
    lr: float,
    batch_size: int,
    seed: int,
    augment: bool = False,
    what: str = "training",
) -> Iterator[int]:
    """SGD with momentum 0.9, the rate divided by ten at each milestone; yields each epoch's number when it is done."""
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, foreach=True)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    generator = torch.Generator().manual_seed(seed)
    objective = loss_of(loss)
    for epoch in progress(range(1, epochs + 1), what):
        model.train()
        for rows in torch.randperm(len(x), generator=generator).split(batch_size):
            rows = rows.to(x.device)
            batch = _augmented(x[rows], generator) if augment else x[rows]
            value = objective(model(batch), y[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        schedule.step()
        yield epoch


def layerwise(data: Data, *, width: int, layers: int, epochs: int, seed: int, device: str) -> dict[str, Any]:
    """NC1 and NC1~ of the input and after each new hidden layer, which is trained with its own head on the frozen ones.

    SGD, rate 0.05, momentum 0.9, weight decay 5e-4, batches of 64, cross-entropy.
    """
    x, y = data.x.flatten(1).to(device), data.y.to(device)
    found = {"nc1": [], "nc1_tilde": []}

    def measure() -> None:
        metrics = collapse_metrics(x, y, classes=data.classes)
        assert metrics.nc1 is not None
        found["nc1"].append(metrics.nc1)
        found["nc1_tilde"].append(metrics.nc1_tilde)

    measure()
    for layer in range(layers):
        model = network("mlp", Data(x, y, data.classes, False), (width,), bias=True, seed=1000 * seed + layer)
        model.to(device)
        epochs_done = fit(
            model,
            x,
            y,
            loss="ce",
            groups=[{"params": list(model.parameters()), "weight_decay": 5e-4}],
            epochs=epochs,
            milestones=[],
            lr=0.05,
            batch_size=64,
            seed=1000 * seed + layer,
            what=f"layer {layer + 1}",
        )
        for _ in epochs_done:
            pass
        with torch.no_grad():
            x = model.get_submodule("features")(x)
        measure()
    return found


def weight_decay_run(
    data: Data,
    *,
    kind: str,
    widths: tuple[int, ...],
    setting: str,
    loss: str,
    epochs: int,
    milestones: list[int],
    lr: float,
    weight_decay: float,
    batch_size: int,
    every: int,
    seed: int,
    device: str,
) -> dict[str, list[float]]:
    """One training of the weight-decay study: {"epoch", "nc1", "nc1_tilde", "nc2", "accuracy"}, the last entry at the end.

    The last layer has no bias under squared loss and one under cross-entropy, as in the paper.
    """
    model = network(kind, data, widths, bias=loss == "ce", seed=seed).to(device)
    features, last = SETTINGS[setting]
    head = list(model.get_submodule("head").parameters())
    rest = [p for name, p in model.named_parameters() if not name.startswith("head.")]
    groups = [
        {"params": rest, "weight_decay": features * weight_decay},
        {"params": head, "weight_decay": last * weight_decay},
    ]
    x, y = data.x.to(device), data.y.to(device)
    batches = [(x[i : i + 500], y[i : i + 500]) for i in range(0, len(x), 500)]
    curve: dict[str, list[float]] = {
        name: [] for name in ("epoch", "nc1", "nc1_tilde", "nc2", "nc3", "nc4", "accuracy")
    }
    for epoch in fit(
        model,
        x,
        y,
        loss=loss,
        groups=groups,
        epochs=epochs,
        milestones=milestones,
        lr=lr,
        batch_size=batch_size,
        seed=seed,
        augment=data.augment,
        what=f"{loss}, {setting}, seed {seed}",
    ):
        if epoch % every and epoch != epochs:
            continue
        metrics = collapse(model, batches, classes=data.classes, head="head", keep_bytes=2**30)["head:in"]
        model.eval()
        with torch.no_grad():
            right = sum(int((model(a).argmax(1) == b).sum()) for a, b in batches)
        curve["epoch"].append(epoch)
        curve["accuracy"].append(right / len(x))
        for name in ("nc1", "nc1_tilde", "nc2", "nc3", "nc4"):
            value = getattr(metrics, name)
            curve[name].append(float("nan") if value is None else value)
    return curve
