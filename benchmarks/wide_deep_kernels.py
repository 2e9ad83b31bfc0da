"""Infinitely deep classification against brute-force 1-NN and the element-wise recursion; finite depth by tiles.

One matrix product gives all distances of a tile; the kernel is two look-ups a pair. The bound of ψ is that product, which 1-NN needs, too.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Iterator

import numpy as np
import torch

from lineament.bench import Row, compare, quick
from lineament.kernels import InfiniteClassifier, InfiniteRegressor, optimal_dual

SLUG = "wide-deep-kernels"


def rows_of(count: int, width: int, seed: int) -> np.ndarray:
    X = np.random.default_rng(seed).dirichlet(np.ones(width), count)
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def elementwise(X: torch.Tensor, y: torch.Tensor, Z: torch.Tensor, depth: int = 100) -> torch.Tensor:
    """The sign at finite depth as the paper's code has it: the NNGP recursion on the whole matrix, layer by layer, unsolved."""
    K = (Z @ X.T).clamp(0, 1)
    q = 2 ** (-8 / 2)
    for _ in range(depth):
        K = q * K + (1 - 2 * q) * K**2 + q * K**3
        K = K / K.amax(1, keepdim=True)
    return K @ y


def rows(repeats: int = 3) -> Iterator[Row]:
    from sklearn.neighbors import KNeighborsClassifier

    n, m = (4000, 500) if quick() else (50_000, 10_000)
    X, Z = rows_of(n, 65, 0), rows_of(m, 65, 1)
    y = (X[:, 0] > X[:, 1]).astype(int)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    net = InfiniteClassifier(dimension=8, sphere=None).fit(X, y)
    one = KNeighborsClassifier(1, algorithm="brute").fit(X, y)
    net.predict(Z)
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    yield compare(
        SLUG, f"psi, n = {n:,}, {m:,} queries, 65 features", lambda: net.predict(Z), "scikit-learn brute 1-NN", lambda: one.predict(Z),
        target=1 / 5, repeats=repeats,
        note=f"the bound is one matrix product of both; {more:.2f} GB more at its peak",
    )  # fmt: skip
    few = min(m, 500)
    tensors = [torch.from_numpy(v) for v in (X, 2.0 * y - 1, Z[:few])]
    some = Z[:few]
    yield compare(
        SLUG, f"infinite depth, n = {n:,}, {few:,} queries", lambda: net.predict(some), "element-wise, depth 100 (torch, float64)",
        lambda: elementwise(*tensors), target=50.0, repeats=repeats, note="depth is free once the function of one number is tabulated",
    )  # fmt: skip
    size = 500 if quick() else 2000
    A, B = X[:size], Z[:size]
    targets = (A[:, 0] - A[:, 1])[:, None]

    def deep() -> None:
        InfiniteRegressor("erf", 50, "ntk", sphere=None, ridge=1e-6).fit(A, targets).predict(B)

    yield compare(
        SLUG, f"NTK, depth 50, n = {size:,}, fit and predict", deep, "element-wise recursion of both kernels (float64)",
        lambda: _recursion(A, targets, B), repeats=repeats, note="neural-tangents no longer imports on current JAX; the peer is its formula layer by layer in NumPy",
    )  # fmt: skip
    big = 1500 if quick() else 6000
    ask = {"sphere": None, "ridge": 1e-6}

    def tiled() -> InfiniteClassifier:
        return InfiniteClassifier(optimal_dual(8), 60, memory="24MB", **ask).fit(X[:big], y[:big])

    passes = tiled()
    yield compare(
        SLUG, f"finite depth by tiles, n = {big:,}", tiled, "the same by Cholesky of the dense matrix",
        lambda: InfiniteClassifier(optimal_dual(8), 60, memory="4GB", **ask).fit(X[:big], y[:big]), repeats=1, warmup=0,
        note=f"{passes.passes_} passes of tiles (at most 30), residual {passes.residual_:.1g}, in 24 MB beside {16 * big**2 / 1e9:.2f} GB",
    )  # fmt: skip


def _recursion(A: np.ndarray, y: np.ndarray, B: np.ndarray, depth: int = 50) -> np.ndarray:
    whole = math.asin(2 / 3)

    def kernel(xi: np.ndarray) -> np.ndarray:
        s, k = xi, xi.copy()
        for _ in range(depth):
            slope = 2 / 3 / np.sqrt(1 - (2 / 3 * s) ** 2) / whole
            s = np.arcsin(2 / 3 * s) / whole
            k = s + k * slope
        return k

    K = kernel(np.clip(A @ A.T, 0, 1))
    top = K.max()
    return kernel(np.clip(B @ A.T, 0, 1)) / top @ np.linalg.solve(K / top + 1e-6 * np.eye(len(K)), y)
