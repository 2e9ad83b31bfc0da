"""Collapse metrics over a loader against the forwards alone, and the metrics against the d x d pseudo-inverse recipe."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lineament.bench import Row, compare
from lineament.measure.collapse.metrics import collapse_metrics
from lineament.measure.collapse.profile import collapse
from lineament.recipes.kit.networks import network

SLUG = "neural-collapse"


def covariance_ratio(x: Tensor, y: Tensor, classes: int) -> float:
    """tr(S_W pinv(S_B)) / K as the peer computes it: one pass for the means, one for S_W, and a d x d pseudo-inverse."""
    means = (
        torch.zeros(classes, x.shape[1]).index_add_(0, y, x) / torch.bincount(y, minlength=classes)[:, None]
    )
    within = torch.zeros(x.shape[1], x.shape[1])
    for k in range(classes):
        centred = x[y == k] - means[k]
        within += centred.T @ centred
    spread = means - means.mean(0)
    between = spread.T @ spread / classes
    return float(torch.trace(within / len(x) @ torch.linalg.pinv(between, hermitian=True))) / classes


def rows(repeats: int = 7) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = network("resnet18", (3, 32, 32), 10, seed=0, widths=32).eval()
    loader = [(torch.randn(64, 3, 32, 32, generator=generator), torch.arange(64) % 10) for _ in range(4)]

    def forwards() -> None:
        with torch.no_grad():
            for x, _ in loader:
                net(x)

    sites = ["features.2", *(f"features.{k}" for k in (4, 6, 8, 10)), "head:in"]
    for what, chosen in (("the head's input", None), ("six sites", sites)):
        yield compare(
            SLUG,
            f"collapse metrics over a loader, {what} (ResNet-18 of width 32, 32 x 32 images)",
            lambda chosen=chosen: collapse(net, loader, sites=chosen),
            "the forwards alone",
            forwards,
            target=1 / 1.1,
            repeats=repeats,
            note="the limit is 1; one pass of forwards gives NC1 to NC4",
        )

    classes, width, count = 100, 512, 20_000
    y = torch.arange(count) % classes
    x = (
        torch.randn(count, width, generator=generator)
        + 2 * torch.randn(classes, width, generator=generator)[y]
    )
    try:
        from neural_collapse.accumulate import CovarAccumulator, MeanAccumulator  # pyright: ignore
        from neural_collapse.measure import covariance_ratio as theirs  # pyright: ignore
    except ImportError:
        peer = None
    else:

        def peer() -> float:
            means = MeanAccumulator(classes, width, "cpu")
            means.accumulate(x, y)
            average, center = means.compute()
            within = CovarAccumulator(classes, width, "cpu", average)
            within.accumulate(x, y, average)
            return float(theirs(within.compute(), average, center))

    yield compare(
        SLUG,
        f"every metric of features in memory ({count:,} x {width}, {classes} classes)",
        lambda: collapse_metrics(x, y),
        "neural-collapse, NC1 alone",
        peer,
        target=1.0,
        repeats=repeats,
        note="ours: thin singular value decomposition, no d x d matrix",
    )
    yield compare(
        SLUG,
        f"every metric of features in memory ({count:,} x {width}, {classes} classes)",
        lambda: collapse_metrics(x, y),
        "NC1 alone by S_W and a d x d pseudo-inverse, in PyTorch",
        lambda: covariance_ratio(x, y, classes),
        target=1.0,
        repeats=repeats,
        note="ours: thin singular value decomposition, no d x d matrix; the limit is one read of the features",
    )


if __name__ == "__main__":
    for row in rows():
        print(row)
