"""A plane against its bare forward passes, and Hessian criteria against PyHessian at the same number of products or tolerance."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.bench import Row, compare
from lineament.core.curvature import hessian, top_eigenpairs
from lineament.measure.hessian_criteria import hessian_criteria
from lineament.measure.landscape import plane
from lineament.measure.landscape_axes import random_axes
from lineament.recipes._networks import ResNet18

SLUG = "loss-landscape"


def lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    ).eval()  # fmt: skip


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    ).eval()


def peer(what: str, net: nn.Module, x: Tensor, y: Tensor, steps: int, tol: float) -> Callable[[], Any] | None:
    try:
        package = importlib.import_module("pyhessian")
    except ImportError:
        return None

    def eig(matrix: Tensor, eigenvectors: bool = True) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # It calls torch.eig, which PyTorch has removed; the small matrix is symmetric, so that eigh serves.
            torch.eig = eig  # pyright: ignore[reportAttributeAccessIssue]
            try:
                made = package.hessian(net, nn.CrossEntropyLoss(), data=(x, y), cuda=False)
                found = []
                if "spectrum" in what or what == "all":
                    found.append(made.density(iter=steps, n_v=1))
                if "eigenvalues" in what or what == "all":
                    found.append(made.eigenvalues(maxIter=100, tol=tol, top_n=2))
                if what == "all":
                    found.append(made.trace(maxIter=100, tol=tol))
            finally:
                del torch.eig  # pyright: ignore[reportAttributeAccessIssue]
        for parameter in net.parameters():
            parameter.grad = None
        return found

    return run


def rows(repeats: int = 5) -> Iterator[Row]:
    torch.manual_seed(0)
    loss = F.cross_entropy
    problems = [
        ("perceptron 64-128-128-10, 1,000 samples", perceptron(), torch.randn(1000, 64), torch.randint(0, 10, (1000,)), 41),
        ("LeNet, 256 images", lenet(), torch.randn(256, 1, 28, 28), torch.randint(0, 10, (256,)), 41),
        ("ResNet-18 of width 16, 32 images", ResNet18(3, 10, bias=True, width=16).eval(), torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,)), 11),
    ]  # fmt: skip
    for what, net, x, y, side in problems:

        def ours(net=net, x=x, y=y, side=side) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return plane(net, loss, [(x, y)], random_axes(net), steps=side)

        def forwards(net=net, x=x, y=y, side=side) -> None:
            with torch.no_grad():
                for _ in range(side * side):
                    loss(net(x), y).item()

        yield compare(
            SLUG, f"a plane of {side} x {side}, {what}", ours, "its forward passes", forwards, target=1 / 1.1,
            repeats=min(3, repeats), note="the limit is 1; drawing the two axes is included",
        )  # fmt: skip
    steps, tol = 60, 1e-3
    for what, net, x, y, _ in problems[:2]:

        def spectrum(net=net, x=x, y=y) -> Any:
            return hessian_criteria(net, loss, [(x, y)], steps=steps, probes=1)

        def eigenvalues(net=net, x=x, y=y) -> Any:
            return top_eigenpairs(hessian(net, loss, [(x, y)]), 2, which="magnitude", tol=tol)

        def everything(net=net, x=x, y=y) -> Any:
            return hessian_criteria(net, loss, [(x, y)], steps=steps, probes=1)

        exact = top_eigenpairs(
            hessian(net, loss, [(x, y)]), 2, which="magnitude", tol=1e-5, max_products=2000
        ).values
        nodes = everything().density.nodes[0]
        ends = nodes[nodes.abs().argsort(descending=True)[:2]]
        off = float(((ends - exact.double()) / exact.double()).abs().max())

        for name, own, note in (
            (
                "spectrum and criteria",
                spectrum,
                f"{steps} Lanczos steps on both sides; ours orthogonalises fully",
            ),
            (
                "two top eigenvalues",
                eigenvalues,
                "ours stops by the residual, theirs by the value's change: ours is the stricter",
            ),
            (
                "all",
                everything,
                f"one Lanczos run gives all three; its two greatest eigenvalues are off by {off:.0e}",
            ),
        ):
            yield compare(
                SLUG, f"{'spectrum, eigenvalues and trace' if name == 'all' else name}, {what}", own, "PyHessian",
                peer(name, net, x, y, steps, tol), target=1.5, repeats=repeats, note=note,
            )  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(row)
