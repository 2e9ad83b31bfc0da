"""Data and one training of the tract recipe: digits whose contrast varies, and CIFAR."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.models import logits
from lineament.data.augmentation import flip_and_crop
from lineament.data.digits import digit_images
from lineament.data.photographs import Standardise, read_photographs
from lineament.learn.tract.layer import tract
from lineament.recipes.kit.networks import network as of_kit
from lineament.recipes.kit.networks import vision_transformer
from lineament.train.callbacks import Augment, Schedule, Validation
from lineament.train.loop import fit


@dataclass(frozen=True)
class Split:
    """Training and test inputs as the network takes them, and labels."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: str) -> Split:
        return Split(*(t.to(device) for t in (self.x, self.y, self.test_x, self.test_y)))


def digits(seed: int, *, contrast: bool = True, scale: str = "standard") -> Split:
    """scikit-learn's digits, half for training, flattened; with ``contrast`` every image has a contrast and brightness of its own.

    Args:
        contrast: multiply each image by 10^U(-1, 0) and add a brightness U(0, 1) (1 - contrast).
        scale: ``"standard"`` (mean 0, deviation 1 over all training pixels), ``"unit"`` ([0, 1]), ``"bytes"`` ([0, 255]), ``"image"``
            (each image to mean 0, deviation 1: the paper's patch normalisation, the image being one patch) or ``"zca"`` (whitened).
    """
    draw = torch.Generator().manual_seed(seed)
    x, y = digit_images().pair
    x = x.flatten(1)
    if contrast:
        factor = 10 ** -torch.rand(len(x), 1, generator=draw)
        x = x * factor + torch.rand(len(x), 1, generator=draw) * (1 - factor)
    order = torch.randperm(len(x), generator=draw)
    train, test = order[: len(x) // 2], order[len(x) // 2 :]
    if scale == "bytes":
        x = 255 * x
    elif scale == "image":
        x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    elif scale in ("standard", "zca"):
        x = (x - x[train].mean()) / x[train].std()
    if scale == "zca":
        values, vectors = torch.linalg.eigh(torch.cov(x[train].T))
        x = (x - x[train].mean(0)) @ (vectors * (values + 0.1).rsqrt()) @ vectors.T
    return Split(x[train], y[train], x[test], y[test])


def cifar(name: str, folder: str | None, images: int, test_images: int, seed: int = 0) -> Split:
    """``"cifar10"`` or ``"cifar100"``, standardised by channel; so many of the training and test images, 0 for all."""
    train = read_photographs(name, "train", data_folder=folder, count=images, seed=seed)
    test = read_photographs(name, "test", data_folder=folder)[: test_images or None]
    standardise = Standardise(train.inputs)
    return Split(standardise(train.inputs), train.targets, standardise(test.inputs), test.targets)


class DualNorm(nn.Module):
    """DualPatchNorm: a layer norm before and one behind the first layer, with affine parameters."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.before, self.first, self.after = (
            nn.LayerNorm(inputs),
            nn.Linear(inputs, width),
            nn.LayerNorm(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.first(self.before(x)))


def network(kind: str, seed: int, classes: int = 10) -> nn.Module:
    """``"mlp"`` (64-64-10), ``"dual-norm"`` (the same with DualPatchNorm), ``"resnet"``, ``"resnet18"``, ``"vit"`` or ``"vit-paper"``."""
    if kind == "mlp":
        return of_kit("mlp", (64,), classes, widths=64, seed=seed)
    if kind in ("resnet", "resnet18"):
        return of_kit("small-resnet" if kind == "resnet" else kind, (3, 32, 32), classes, seed=seed)
    if kind == "dual-norm":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return nn.Sequential(DualNorm(64, 64), nn.ReLU(), nn.Linear(64, classes))
    # The paper's network for CIFAR: 7 layers, 12 heads, width 384.
    width, layers, heads = (384, 7, 12) if kind == "vit-paper" else (96, 2, 3)
    return vision_transformer(width, layers, heads, classes=classes, seed=seed)


def first_weight(model: nn.Module) -> nn.Parameter:
    """The weight of the first linear or convolution layer."""
    layer = next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    assert isinstance(layer.weight, nn.Parameter)
    return layer.weight


def optimizers(
    name: str, model: nn.Module, rate: float, first_rate: float | None = None
) -> list[torch.optim.Optimizer]:
    """``"sgd"`` (momentum 0.9) or ``"adam"``; with ``first_rate`` the first weight has SGD at that rate, whatever the others have."""
    kind: Any = functools.partial(torch.optim.SGD, momentum=0.9) if name == "sgd" else torch.optim.Adam
    if first_rate is None:
        return [kind(model.parameters(), lr=rate)]
    first = first_weight(model)
    rest = [p for p in model.parameters() if p is not first]
    return [torch.optim.SGD([first], lr=first_rate, momentum=0.9), kind(rest, lr=rate)]


def train(
    model: nn.Module,
    data: Split,
    *,
    epochs: int,
    rate: float,
    lam: float | None,
    seed: int,
    optimizer: str = "sgd",
    first_rate: float | None = None,
    batch_size: int = 64,
    smoothing: float = 0.0,
    augment: bool = False,
    kfac: bool = False,
) -> list[float]:
    """Test accuracies in per cent after each epoch; ``lam=None`` is ordinary training.

    The rate falls to zero along a cosine. ``kfac`` preconditions the first layer by both Kronecker factors with damping ``lam`` instead.
    """
    changes: list[Any] = [Augment(flip_and_crop)] if augment else []
    if kfac:
        changes.append(KroneckerFactors(model, lam or 0.1))
    elif lam is not None:
        # The layer norm before it is trainable; that it is named says that this is meant.
        changes.append(
            tract(model, lam=lam, layer="0.first" if isinstance(next(model.children()), DualNorm) else None)
        )
    cosine = Schedule(torch.optim.lr_scheduler.CosineAnnealingLR, by="step")
    with warnings.catch_warnings():
        # Unusual scales of the input are what some of the runs are about.
        warnings.filterwarnings("ignore", message="layer .*(mean square|outside the paper)")
        done = fit(
            model, (data.x, data.y), optimizer=lambda net: optimizers(optimizer, net, rate, first_rate), epochs=epochs,
            batch_size=batch_size, loss=functools.partial(F.cross_entropy, label_smoothing=smoothing), seed=seed,
            callbacks=[*changes, cosine, Validation((data.test_x, data.test_y), batch_size=500)],
        )  # fmt: skip
    return [100 * accuracy for accuracy in done.curve("validation_accuracy")]


@torch.no_grad()
def top_accuracy(model: nn.Module, x: Tensor, y: Tensor, top: int) -> float:
    """Per cent of labels among the ``top`` highest scores."""
    model.eval()
    right = 0
    for a, b in zip(x.split(500), y.split(500)):
        right += int((logits(model(a)).topk(top, 1).indices == b[:, None]).sum())
    return 100 * right / len(y)


class KroneckerFactors:
    """K-FAC of the first linear layer: grad <- (GᵀG N + lam)⁻¹ grad (XᵀX / N + lam)⁻¹, running means over 20 batches, rescaled to the
    size that TrAct's gradient has, so that the same rates make sense. A callback."""

    def __init__(self, model: nn.Module, lam: float):
        self.layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
        self.lam, self.steps = lam, 0
        self.factors: dict[str, Any] = {}
        self._x = torch.empty(0)

    def __enter__(self) -> KroneckerFactors:
        self.handle = self.layer.register_forward_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self.handle.remove()

    def _see(self, _: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            self._x = args[0].detach()
            output.register_hook(lambda g: self._add(output=g.T @ g * len(g)))

    def _add(self, **fresh: Tensor) -> None:
        for name, value in fresh.items():
            self.factors[name] = 0.95 * self.factors.get(name, 0.0) + 0.05 * value

    @torch.no_grad()
    def on_gradients(self, run: Any) -> None:
        self._add(input=self._x.T @ self._x / len(self._x))
        self.steps += 1
        correction = 1 - 0.95**self.steps
        inverse = {}
        for name, factor in self.factors.items():
            inverse[name] = torch.linalg.inv(factor / correction + self.lam * torch.eye(len(factor)))
        grad = self.layer.weight.grad
        assert grad is not None
        tracted = grad @ inverse["input"]
        full = inverse["output"] @ tracted
        grad.copy_(full * (tracted.norm() / full.norm().clamp_min(1e-20)))
