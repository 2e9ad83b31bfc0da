"""Boosted networks against the reference package `gbnn`, all stages against its staged scores, and the batched search against separate fits.

A fit of a few units is nearly all calls: an evaluation of the objective is some 90,000 operations (2 us) in 200 us.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
from sklearn.datasets import load_diabetes, load_digits, load_iris
from sklearn.preprocessing import StandardScaler

from lineament.bench import Row, compare, quick
from lineament.learn import GBNNClassifier, GBNNRegressor, search

SLUG = "gbnn"


def rows(repeats: int = 3) -> Iterator[Row]:
    warnings.filterwarnings("ignore")
    X, y = load_diabetes(return_X_y=True)
    X = StandardScaler().fit_transform(X)
    units, iterations = (10, 50) if quick() else (50, 200)
    made = {
        "total_units": units,
        "units_per_step": 1,
        "learning_rate": 0.1,
        "subsample": 0.5,
        "random_state": 0,
    }
    peer = _peer(units, iterations)
    theirs = None if peer is None else lambda: peer().fit(X, y)
    equal = lambda: GBNNRegressor(**made, tol=0.0, max_iter=iterations).fit(X, y)  # noqa: E731
    fast = lambda: GBNNRegressor(**made, solver="varpro", max_iter=12).fit(X, y)  # noqa: E731
    error = lambda net: float(np.sqrt(np.mean((net.predict(X) - y) ** 2)))  # noqa: E731
    told = f"training RMSE {error(equal()):.1f} (L-BFGS), {error(fast()):.1f} (varpro)"
    if peer is not None:
        reference = peer()
        reference.fit(X, y)
        told += f", {error(reference):.1f} (gbnn)"
    yield compare(
        SLUG,
        f"fit, lbfgs, {iterations} iterations, diabetes",
        equal,
        "gbnn 0.0.2",
        theirs,
        target=2.0,
        repeats=repeats,
        note=told,
    )
    yield compare(
        SLUG, "fit, varpro, diabetes", fast, "gbnn 0.0.2", theirs, target=8.0, repeats=repeats, note=told
    )
    D, d = load_digits(return_X_y=True)
    D = StandardScaler().fit_transform(D)
    net = GBNNClassifier(20 if quick() else 100, 1, max_iter=5, random_state=0).fit(D[:500], d[:500])

    def separate() -> None:
        for m in range(1, net.network_.parts + 1):
            net.truncate(m).predict(D)

    yield compare(
        SLUG,
        "all stages at once, digits",
        lambda: list(net.staged_predict(D)),
        "a prediction a stage",
        separate,
        target=10.0,
        repeats=repeats,
    )
    A, a = load_iris(return_X_y=True)
    outer, inner = (3, 3) if quick() else (10, 10)
    grid = {"learning_rate": [0.1, 0.5], "total_units": [8], "units_per_step": [2], "subsample": [0.5]}
    fits = outer * (inner * 2 + 1)

    def alone() -> None:
        for _ in range(max(1, fits // 10)):
            GBNNClassifier(8, 2, 0.1, 0.5, solver="varpro", max_iter=8, random_state=0).fit(A[:120], a[:120])

    yield compare(
        SLUG, f"nested {outer} x {inner} search, iris", lambda: search(A, a, grid, outer=outer, inner=inner), "the same fits one by one (a tenth timed)",
        alone, target=15.0, repeats=repeats, scale=fits / max(1, fits // 10),
    )  # fmt: skip


def _peer(units: int, iterations: int):
    """The reference's regressor, or ``None``."""
    try:
        from gbnn import GNEGNERegressor as Peer  # pyright: ignore
    except ImportError:
        return None
    return lambda: Peer(
        total_nn=units,
        num_nn_step=1,
        eta=0.1,
        solver="lbfgs",
        subsample=0.5,
        tol=0.0,
        max_iter=iterations,
        random_state=0,
        activation="logistic",
    )
