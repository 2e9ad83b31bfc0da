"""A plane against its bare forward passes, and Hessian criteria against PyHessian at the same number of products or the same tolerance.

Eigenvalues are compared twice: by PyHessian's own rule (values that change by less than the tolerance), and to the residual that its
vectors turn out to have. Its trace stops where its running mean happens to stand still, so both sides take the same probes.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.bench import Row, compare, quick
from lineament.core.curvature.eigenpairs import top_eigenpairs
from lineament.core.curvature.matrices import hessian
from lineament.core.curvature.operator import Curvature
from lineament.core.curvature.traces import trace
from lineament.measure.landscape.axes import random_axes
from lineament.measure.landscape.criteria import hessian_criteria
from lineament.measure.landscape.grids import plane
from lineament.recipes.kit.networks import network

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


def peer(
    what: str, net: nn.Module, x: Tensor, y: Tensor, steps: int, tol: float, probes: int
) -> Callable[[], Any] | None:
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
                found = {}
                if what in ("spectrum", "all"):
                    found["density"] = made.density(iter=steps, n_v=1)
                if what in ("eigenvalues", "all"):
                    found["eigenvalues"] = made.eigenvalues(maxIter=100, tol=tol, top_n=2)
                if what in ("trace", "all"):
                    found["trace"] = made.trace(maxIter=probes, tol=0.0 if what == "trace" else tol)
            finally:
                del torch.eig  # pyright: ignore[reportAttributeAccessIssue]
        for parameter in net.parameters():
            parameter.grad = None
        return found

    return run


def rows(repeats: int = 5) -> Iterator[Row]:
    torch.manual_seed(0)
    loss = F.cross_entropy
    side = 5 if quick() else 41
    problems = [
        ("perceptron 64-128-128-10, 1,000 samples", perceptron(), torch.randn(1000, 64), torch.randint(0, 10, (1000,)), side),
        ("LeNet, 256 images", lenet(), torch.randn(256, 1, 28, 28), torch.randint(0, 10, (256,)), side),
        ("ResNet-18 of width 16, 32 images", network("resnet18", (3, 32, 32), 10, seed=0, widths=16).eval(), torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,)), min(side, 11)),
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
    few = {"steps": 20, "probes": 10} if quick() else {}
    for what, net, x, y, _ in problems[: 1 if quick() else 2]:
        yield from criteria(what, net, x, y, repeats, **few)


def criteria(
    what: str,
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    repeats: int,
    steps: int = 60,
    probes: int = 60,
    tol: float = 1e-3,
) -> Iterator[Row]:
    def operator() -> Curvature:
        return hessian(net, F.cross_entropy, [(x, y)])

    def spectrum() -> Any:
        return hessian_criteria(net, F.cross_entropy, [(x, y)], steps=steps, probes=1)

    def values() -> Any:
        return top_eigenpairs(operator(), 2, which="magnitude", tol=tol, accurate="values")

    def pairs() -> Any:
        return top_eigenpairs(operator(), 2, which="magnitude", tol=loose)

    exact = top_eigenpairs(operator(), 2, which="magnitude", tol=1e-5, max_products=2000).values.double()

    def off(found: Any) -> str:
        values = torch.as_tensor(found, dtype=torch.float64)
        return f"{float(((values - exact) / exact).abs().max()):.0e}"

    loose, theirs_off, trace_off = tol, "?", "?"
    sides = {
        name: peer(name, net, x, y, steps, tol, probes)
        for name in ("spectrum", "eigenvalues", "trace", "all")
    }
    if sides["eigenvalues"] is not None and sides["trace"] is not None:
        torch.manual_seed(0)
        found, vectors = sides["eigenvalues"]()["eigenvalues"]
        theirs_off = off(found)
        flat = [torch.cat([p.reshape(-1) for p in v]) for v in vectors]
        flat = [v / v.norm() for v in flat]
        images = [operator() @ v for v in flat]
        residuals = [float((u - (u @ v) * v).norm()) for u, v in zip(images, flat)]
        loose = max(residuals) / float(exact.abs().max())
        theirs = torch.tensor(sides["trace"]()["trace"], dtype=torch.float64)
        ours = trace(operator(), probes, method="hutchinson")
        trace_off = (
            f"{ours.value:.2f} ± {ours.standard_error:.2f} and "
            f"{float(theirs.mean()):.2f} ± {float(theirs.std()) / len(theirs) ** 0.5:.2f}"
        )
    nodes = spectrum().density.nodes[0]
    ends = nodes[nodes.abs().argsort(descending=True)[:2]]

    for name, title, own, note in (
        (
            "spectrum",
            "spectrum and criteria",
            spectrum,
            f"{steps} Lanczos steps on both sides; ours orthogonalises fully",
        ),
        (
            "eigenvalues",
            f"two top eigenvalues to {tol:g}",
            values,
            f"values change by less than that on both sides; off by {off(values().values)} (ours), {theirs_off} (theirs)",
        ),
        (
            "eigenvalues",
            "two top eigenpairs to the same residual",
            pairs,
            f"to the residual of PyHessian's vectors, {loose:.0e} of the eigenvalue; values off by {off(pairs().values)} (ours)",
        ),
        (
            "trace",
            "trace",
            lambda: trace(operator(), probes, method="hutchinson"),
            f"{probes} Hutchinson probes on both sides: {trace_off}",
        ),
        (
            "all",
            "spectrum, eigenvalues and trace",
            spectrum,
            f"one Lanczos run gives all three; its two greatest eigenvalues are off by {off(ends)}",
        ),
    ):
        yield compare(
            SLUG, f"{title}, {what}", own, "PyHessian", sides[name], target=1.5, repeats=repeats, note=note
        )


if __name__ == "__main__":
    for row in rows():
        print(row)
