"""Read-outs of 1,000 targets against scikit-learn, one target at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from sklearn.linear_model import LogisticRegression, RidgeCV

from lineament.bench import Row, compare
from lineament.core.readouts import logistic, ridge

SLUG = "core-readouts"
TARGETS = 1000


def rows(repeats: int = 7) -> Iterator[Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 256, generator=generator)
    y = x @ torch.randn(256, TARGETS, generator=generator) + 10 * torch.randn(
        2000, TARGETS, generator=generator
    )
    penalties = [0.1, 1.0, 10.0, 100.0, 1000.0]
    few = 3

    def ridge_loop() -> None:
        for t in range(few):
            RidgeCV(penalties).fit(x.numpy(), y[:, t].numpy())

    yield compare(
        SLUG,
        f"ridge, {TARGETS:,} targets, 5 penalties by leave-one-out (2,000 x 256)",
        lambda: ridge(x, y, penalties),
        "scikit-learn RidgeCV, a loop over targets",
        ridge_loop,
        target=50.0,
        repeats=repeats,
        scale=TARGETS / few,
        note=f"the loop is timed on {few} targets and scaled; ours is bound by 5 products of 2,000 x 256 x 1,000",
    )
    yield compare(
        SLUG,
        f"ridge, {TARGETS:,} targets against one",
        lambda: ridge(x, y, penalties),
        "the same call with one target, 1,000 times",
        lambda: ridge(x, y[:, :1], penalties),
        repeats=repeats,
        scale=TARGETS,
        note="one decomposition serves all targets",
    )
    labels = (y > 0).long()

    def logistic_loop() -> None:
        for t in range(few):
            LogisticRegression(C=0.01, tol=1e-6, max_iter=1000).fit(x.numpy(), labels[:, t].numpy())

    yield compare(
        SLUG,
        f"logistic, {TARGETS:,} binary targets (2,000 x 256)",
        lambda: logistic(x, labels, 100.0, tolerance=1e-6),
        "scikit-learn LogisticRegression (lbfgs), a loop over targets",
        logistic_loop,
        target=5.0,
        repeats=repeats,
        scale=TARGETS / few,
        note=f"the loop is timed on {few} targets and scaled",
    )


if __name__ == "__main__":
    for row in rows():
        print(row)
