"""The class head against pytorch-metric-learning's and against its own matrix products; sampled classes; verification.

Forward and backward in float32. Of a batch of B, C classes and d dimensions a step is three products of B x C x d: 6 B C d operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lineament.bench import Row, compare, quick
from lineament.losses.class_head import ClassHead
from lineament.losses.margins import ArcFace, CosFace, Elastic
from lineament.measure.embeddings.pairs import pair_rates, recognition
from lineament.measure.embeddings.verification import fold_accuracy

SLUG = "elasticface"


def batch(n: int, classes: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(n, d, generator=generator).requires_grad_(),
        torch.randint(classes, (n,), generator=generator),
    )


def stepper(loss: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    def step() -> None:
        x.grad = None
        loss.zero_grad(set_to_none=True)
        loss(x, y).backward()

    return step


def products(x: Tensor, weight: Tensor) -> Callable[[], Any]:
    """The three matrix products of a step, and nothing else."""
    x, weight = x.detach(), weight.detach()

    def step() -> None:
        logits = x @ weight.T
        logits @ weight
        logits.T @ x

    return step


def peers(classes: int, d: int) -> dict[str, Callable[[], nn.Module] | None]:
    try:
        from pytorch_metric_learning import losses
    except ImportError:
        return {"CosFace": None, "ArcFace": None}
    return {
        "CosFace": lambda: losses.CosFaceLoss(classes, d, margin=0.35, scale=64),
        "ArcFace": lambda: losses.ArcFaceLoss(classes, d, margin=28.6, scale=64),
    }


def copied_folds(x: np.ndarray, same: np.ndarray) -> float:
    """The evaluation that most face code copies: for each fold 400 thresholds, one after the other, on the nine others and again on its own."""
    distance = np.sum(np.square(x[0::2] - x[1::2]), 1)
    thresholds, rows, found = np.arange(0, 4, 0.01), np.arange(len(same)), []

    def rates(threshold: float, distance: np.ndarray, same: np.ndarray) -> tuple[float, float, float]:
        predicted = np.less(distance, threshold)
        tp = np.sum(np.logical_and(predicted, same))
        fp = np.sum(np.logical_and(predicted, np.logical_not(same)))
        tn = np.sum(np.logical_and(np.logical_not(predicted), np.logical_not(same)))
        fn = np.sum(np.logical_and(np.logical_not(predicted), same))
        return tp / (tp + fn), fp / (fp + tn), (tp + tn) / len(distance)

    for test in np.array_split(rows, 10):
        train = np.setdiff1d(rows, test)
        accuracies = [rates(t, distance[train], same[train])[2] for t in thresholds]
        curve = [rates(t, distance[test], same[test])[:2] for t in thresholds]
        best = thresholds[int(np.argmax(accuracies))]
        found.append(rates(best, distance[test], same[test])[2])
        assert len(curve) == len(thresholds)
    return float(np.mean(found))


def triangle(x: Tensor, size: int = 512) -> None:
    """The products of every pair once, in tiles that stay in the cache: the fastest form of several that were tried."""
    room = torch.empty(size * size)
    for start in range(0, len(x), size):
        one = x[start : start + size]
        for other in range(start, len(x), size):
            two = x[other : other + size]
            torch.mm(one, two.T, out=room[: len(one) * len(two)].view(len(one), len(two)))


def rows(repeats: int = 3) -> Iterator[Row]:
    classes, d = (8000, 128) if quick() else (85_742, 512)
    theirs = peers(classes, d)
    stepper(ClassHead(8, 4), *batch(8, 8, 4))()  # what PyTorch loads at a first step
    for n, target in ((512, 1.8), (128, 2.3)):
        n = n // 4 if quick() else n
        x, y = batch(n, classes, d)
        for name, margin in (("CosFace", CosFace()), ("ArcFace", ArcFace())):
            make = theirs[name]
            yield compare(
                SLUG, f"class head, {name}, {classes:,} classes, d {d}, batch {n}", stepper(ClassHead(classes, d, margin), x, y),
                f"pytorch-metric-learning {name}Loss", make and stepper(make(), x, y), target=target, repeats=repeats,
                note="three matrix products are the limit",
            )  # fmt: skip
    head, (x, y) = ClassHead(classes, d, Elastic("arc")), batch(n, classes, d)
    yield compare(
        SLUG, f"class head, ElasticFace-Arc, {classes:,} classes, d {d}, batch {n}", stepper(head, x, y),
        "its three matrix products alone", products(x, head.weight), target=0.8, repeats=repeats,
        note="1 is the limit",
    )  # fmt: skip

    def trained(sample: float) -> Callable[[], Any]:
        made = ClassHead(classes, d, CosFace(), sample=sample, sparse=sample < 1)
        optimizer, step = torch.optim.SGD(made.parameters(), 0.1), stepper(made, x, y)

        def both() -> None:
            step()
            optimizer.step()

        return both

    yield compare(
        SLUG, f"step with a tenth of {classes:,} classes sampled, SGD, batch {n}", trained(0.1), "our step with all classes",
        trained(1.0), target=5.0, repeats=repeats, note="a tenth of the products, and drawing the classes",
    )  # fmt: skip
    pairs = 600 if quick() else 6000
    generator = torch.Generator().manual_seed(0)
    unit = nn.functional.normalize(torch.randn(2 * pairs, 128, generator=generator), dim=1)
    same = torch.randint(2, (pairs,), generator=generator).bool()
    people = torch.arange(2000 if quick() else 20_000) // 10
    for width in (64, 512):
        many = torch.randn(len(people), width, generator=generator)
        for what, ours, target in (
            ("exact TAR at 1e-3", lambda x=many: pair_rates(x, people, [1e-3]), 0.7),
            ("exact TAR at 1e-2 and 1e-3", lambda x=many: pair_rates(x, people), 0.7),
            ("exact TAR, R@1 and mAP@R", lambda x=many: recognition(x, people), None),
        ):
            yield compare(
                SLUG, f"{what} over all pairs of {len(people):,} embeddings, d {width}", ours,
                "the products of every pair once, in tiles", lambda x=many: triangle(x), target=target, repeats=repeats,
                note="no matrix of all pairs is kept",
            )  # fmt: skip
    yield compare(
        SLUG, f"ten folds of {pairs:,} pairs", lambda: fold_accuracy(unit, same), "the copied protocol (400 thresholds in a loop, NumPy)",
        lambda: copied_folds(unit.numpy(), same.numpy()), target=200.0, repeats=repeats,
    )  # fmt: skip


if __name__ == "__main__":
    for row in rows():
        print(row)
