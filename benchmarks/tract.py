"""A training step with TrAct against the plain one, and the first layer's forward and backward against the reference's formula."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.bench import Row, compare, quick
from lineament.core.checks import InputError
from lineament.core.models import logits
from lineament.learn.tract.layer import tract
from lineament.recipes.kit.networks import network, vision_transformer

SLUG = "tract"


class Unfolded(torch.autograd.Function):
    """The formula as the paper's code has it: a layer of its own on unfolded rows, an explicit inverse in its backward."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, lam: float) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.lam = lam
        return rows @ weight.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        (grad,) = grads
        count, width = rows.shape
        if count < width:
            inverse = torch.linalg.inv(rows @ rows.T / count + ctx.lam * torch.eye(count))
            made = grad.T @ inverse @ rows
        else:
            made = grad.T @ rows @ torch.linalg.inv(rows.T @ rows / count + ctx.lam * torch.eye(width))
        return (grad @ weight if ctx.needs_input_grad[0] else None), made, None


def by_formula(layer: Any, x: Tensor, lam: float = 0.1) -> Tensor:
    """The layer's output, with the reference's way back."""
    if isinstance(layer, nn.Linear):
        return Unfolded.apply(x.reshape(-1, x.shape[-1]), layer.weight, lam)  # pyright: ignore
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).mT
    out = Unfolded.apply(patches.reshape(-1, patches.shape[-1]), layer.weight.flatten(1), lam)  # pyright: ignore
    return out.view(len(x), -1, layer.out_channels).mT


def step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(logits(model(x)), y).backward()
        optimizer.step()

    return run


def rows(repeats: int = 7) -> Iterator[Row]:
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        many, few = (8, 2) if quick() else (32, 8)
        made: list[tuple[str, int, int, Callable[[], nn.Module]]] = [
            (
                f"ResNet-18 (width 64, batch {many} of 32 x 32)",
                many,
                32,
                lambda: network("resnet18", (3, 32, 32), 10, seed=0),
            ),
            (
                f"ViT-Ti (patch 16, batch {few} of 224 x 224)",
                few,
                224,
                lambda: vision_transformer(192, 12, 3, image=224, patch=16),
            ),
        ]
        for what, count, side, make in made:
            x = torch.randn(count, 3, side, side, generator=draw)
            try:
                plain = make()
            except InputError:
                continue
            changed = copy.deepcopy(plain)
            tract(changed)
            y = torch.arange(count) % 10
            yield compare(
                SLUG,
                f"a training step, {what}",
                step(changed, x, y),
                "the plain step",
                step(plain, x, y),
                target=1 / 1.05,
                repeats=repeats,
                note="the limit is 1",
            )
        layers: list[tuple[str, nn.Module, tuple[int, ...]]] = [
            (
                "3 x 3 stem (batch 128 of 32 x 32)",
                nn.Conv2d(3, 64, 3, padding=1, bias=False),
                (128, 3, 32, 32),
            ),
            ("patches of 4 (batch 128 of 32 x 32)", nn.Conv2d(3, 384, 4, 4, bias=False), (128, 3, 32, 32)),
            (
                "patches of 16 (batch 16 of 224 x 224)",
                nn.Conv2d(3, 384, 16, 16, bias=False),
                (16, 3, 224, 224),
            ),
            (
                "linear 784 to 256, fewer rows than columns (batch 128)",
                nn.Linear(784, 256, bias=False),
                (128, 784),
            ),
        ]
        for what, layer, shape in layers:
            yield from first_layer(what, layer, torch.randn(shape, generator=draw), repeats)


def first_layer(what: str, layer: nn.Module, x: Tensor, repeats: int) -> Iterator[Row]:
    changed = copy.deepcopy(layer)
    tract(changed)
    grad = torch.randn_like(layer(x))
    formula = by_formula(layer, x)

    def through(forward: Callable[[Tensor], Tensor], cotangent: Tensor) -> Callable[[], None]:
        return lambda: forward(x).backward(cotangent)

    yield compare(
        SLUG,
        f"first layer, forward and backward, {what}",
        through(changed, grad),
        "the reference's formula (unfold, explicit inverse) in PyTorch",
        through(lambda x: by_formula(layer, x), grad.reshape(formula.shape)),
        target=1.0,
        repeats=repeats,
        note="ours keeps the layer's kernels; the limit is the plain layer and one Gram matrix",
    )
    try:
        from torch_tract import TrAct  # pyright: ignore
    except ImportError:
        peer = None
    else:
        peer = through(TrAct(copy.deepcopy(layer), l=0.1), grad)
    yield compare(
        SLUG, f"first layer, forward and backward, {what}", through(changed, grad), "torch_tract", peer, target=1.0, repeats=repeats
    )  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(row)
