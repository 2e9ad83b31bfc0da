"""Curvature products against a gradient, PyHessian and curvlinops, on a small ResNet and a block as wide as GPT-2's.

Every product here is a fresh one: graph and product, as PyHessian's constructor and curvlinops' ``@`` pay for. Only the
spectral density keeps its graph on both sides. Peers get the attention kernel that they need.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.bench import Row, compare, quick
from lineament.core.curvature.density import spectral_density
from lineament.core.curvature.matrices import hessian
from lineament.core.gradients import unflatten

SLUG = "core-curvature"


class Residual(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        stride = after // before
        self.first = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.other = nn.BatchNorm2d(after)
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.other(self.second(F.relu(self.norm(self.first(x)))))
        return F.relu(y + self.short(x))


def resnet8() -> nn.Module:
    """ResNet-8 for 32 x 32 pictures, 75,000 weights."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        *(Residual(a, b) for a, b in ((16, 16), (16, 32), (32, 64))),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


class Block(nn.Module):
    """One pre-norm block of GPT-2's width (768, 12 heads) and a head of 1,000 tokens, classes second."""

    def __init__(self, width: int = 768, heads: int = 12, tokens: int = 1000):
        super().__init__()
        self.heads = heads
        self.before, self.between, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, tokens, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in self.qkv(self.before(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.out(mixed)
        x = x + self.down(F.gelu(self.up(self.between(x)), approximate="tanh"))
        return self.head(self.after(x)).transpose(1, 2)


def problems() -> Iterator[tuple[str, nn.Module, Tensor, Tensor]]:
    torch.manual_seed(0)
    n, texts = (16, 1) if quick() else (64, 4)
    yield f"ResNet-8, {n} pictures", resnet8(), torch.randn(n, 3, 32, 32), torch.randint(0, 10, (n,))
    x, y = torch.randn(texts, 64, 768), torch.randint(0, 1000, (texts, 64))
    yield f"GPT-2 block, {texts} x 64 tokens", Block(), x, y


def peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def pyhessian_product(net: nn.Module, x: Tensor, y: Tensor, vector: Tensor) -> Callable[[], Any] | None:
    if peer("pyhessian") is None:
        return None
    package, utils = peer("pyhessian"), peer("pyhessian.utils")
    parts = unflatten(vector, list(net.parameters()))

    def run() -> Any:
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = package.hessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
            found = utils.hessian_vector_product(made.gradsH, made.params, parts)
        for parameter in net.parameters():
            parameter.grad = None
        return found

    return run


def curvlinops_product(net: nn.Module, x: Tensor, y: Tensor, vector: Tensor) -> Callable[[], Any] | None:
    package = peer("curvlinops")
    if package is None:
        return None
    with sdpa_kernel(SDPBackend.MATH):
        operator = package.HessianLinearOperator(
            net, nn.CrossEntropyLoss(), list(net.parameters()), [(x, y)], check_deterministic=False
        )

    def run() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return operator @ vector

    return run


def pyhessian_density(net: nn.Module, data: list[Any], steps: int, probes: int) -> Any:
    package = peer("pyhessian")
    if package is None:
        return None
    given = {"data": data[0]} if len(data) == 1 else {"dataloader": data}

    def eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # It calls torch.eig, which PyTorch has removed; the small matrix is symmetric, so that eigh serves.
            torch.eig = eig  # pyright: ignore[reportAttributeAccessIssue]
            try:
                made = package.hessian(net, nn.CrossEntropyLoss(), **given, cuda=False)
                found = made.density(iter=steps, n_v=probes)
            finally:
                del torch.eig  # pyright: ignore[reportAttributeAccessIssue]
        for parameter in net.parameters():
            parameter.grad = None
        return found

    return run


def rows(repeats: int = 7) -> Iterator[Row]:
    """The rows of `lineament bench core-curvature`."""
    loss = F.cross_entropy
    for name, net, x, y in problems():
        parameters = list(net.parameters())
        size = sum(p.numel() for p in parameters)
        vector, block = torch.randn(size), torch.randn(size, 8)
        data = [(x, y)]

        def product(net=net, data=data, vector=vector) -> Tensor:
            return hessian(net, loss, data, cache_bytes=0) @ vector

        def gradient(net=net, x=x, y=y, parameters=parameters) -> Any:
            return torch.autograd.grad(loss(net(x), y), parameters)

        def eight(net=net, data=data, block=block) -> Tensor:
            return hessian(net, loss, data) @ block

        what = f"Hessian-vector product, {name}"
        floor = "the least is 3 gradients' arithmetic: one for the graph, two for the product"
        theirs = pyhessian_product(net, x, y, vector)
        yield compare(SLUG, what, product, "PyHessian", theirs, target=1.0, repeats=repeats, note=floor)
        theirs = curvlinops_product(net, x, y, vector)
        yield compare(SLUG, what, product, "curvlinops", theirs, target=1.0, repeats=repeats, note=floor)
        yield compare(
            SLUG, what, product, "one gradient", gradient, target=1 / 4.5, repeats=repeats, note=floor
        )
        yield compare(
            SLUG,
            f"a block of 8 vectors, {name}",
            eight,
            "one product",
            product,
            target=1 / 5,
            repeats=max(3, repeats // 2),
            note="the least arithmetic is 17 gradients against 3, which is 0.18",
        )
    _, net, x, y = next(problems())
    steps, probes, part = *((8, 1) if quick() else (20, 2)), len(x) // 4
    for what, data in {
        f"one batch of {len(x)} pictures": [(x, y)],
        f"a loader of 4 x {part} pictures": list(zip(x.split(part), y.split(part))),
    }.items():
        yield compare(
            SLUG,
            f"spectral density, {probes} x {steps} products, ResNet-8, {what}",
            lambda data=data: spectral_density(hessian(net, loss, data), steps=steps, probes=probes),
            "PyHessian",
            pyhessian_density(net, data, steps, probes),
            target=1.5,
            repeats=min(3, repeats),
            note="the least is two gradients' arithmetic for each product",
        )


if __name__ == "__main__":
    for row in rows():
        print(row)
