"""Scores of the kernel machine y' K⁻¹ k(x), where kernels are e^(-1000) and only their ratios can be told.

Radhakrishnan, Belkin, Uhler 2022, arXiv 2204.14126, section 1.2.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.spatial.distance import pdist
from sklearn.gaussian_process.kernels import Matern

from lineament.core.checks import InputError, number, one_of, require, show
from lineament.kernels.recursion import log_nngp, log_ntk
from lineament.kernels.sphere import SphereMap, rows_of

Array = np.ndarray


def half_squares(X: Array, Y: Array) -> Array:
    """|x - y|² / 2, which is 1 - cos of unit rows, by differences where they are close, [n, m].

    >>> half_squares(np.eye(2), np.eye(2)).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    size = np.square(X).sum(1)[:, None] / 2 + np.square(Y).sum(1) / 2
    delta = np.clip(size - X @ Y.T, 0, None)
    close = np.argwhere(delta < 1e-4 * size)
    for part in np.array_split(close, max(1, len(close) // 100_000)):
        i, j = part.T
        delta[i, j] = np.square(X[i] - Y[j]).sum(1) / 2
    return delta


def kernel_scores(
    activation: Any,
    depth: int,
    X: Array,
    y: Array,
    Z: Array,
    *,
    kernel: Literal["nngp", "ntk"] = "nngp",
    ridge: float = 0.0,
) -> tuple[Array, Array]:
    """y' (K + ridge)⁻¹ k(z) for each row of Z: its sign-carrying factor, and the logarithm of what multiplies it.

    Args:
        X, Z: unit rows with cosines that are not negative. y: [n] or [n, classes].
        ridge: added to the diagonal, in units of K(1).

    Returns:
        (factor [m] or [m, classes], log [m]); the score is ``factor * exp(log)``.

    Raises:
        InputError: K is singular: two equal rows, or too little depth without a ridge.

    >>> factor, log = kernel_scores("square", 4, np.eye(2), np.array([1.0, -1.0]), np.array([[0.8, 0.6]]))
    >>> np.sign(factor).tolist(), (log / np.log(0.8)).round(6).tolist()
    ([1.0], [16.0])
    """
    one_of("kernel", kernel, ("nngp", "ntk"))
    number("ridge", ridge, low=0)
    X, y, Z = _asked(X, y, Z)
    X, Z = (SphereMap.fitted(None, X)(rows) for rows in (X, Z))
    logs = log_nngp if kernel == "nngp" else log_ntk
    top = float(logs(activation, depth, delta=np.zeros(())))
    inside = np.minimum(half_squares(X, X), 1)
    np.fill_diagonal(inside, 0.0)
    matrix = np.exp(logs(activation, depth, delta=inside) - top)
    np.fill_diagonal(matrix, 1 + ridge)
    try:
        weights = cho_solve(cho_factor(matrix, lower=True), y)
    except LinAlgError as error:
        raise InputError(
            f"ridge: the kernel matrix of {len(X)} points is singular at depth {depth} (two equal points, or an activation that makes all "
            f"alike); expected a ridge above {ridge:g}, or more depth"
        ) from error
    across = logs(activation, depth, delta=np.minimum(half_squares(Z, X), 1)) - top
    shift = across.max(1)
    require(bool(np.isfinite(shift).all()), "Z: a row is orthogonal to all of X, so that its kernel is zero")
    return np.exp(across - shift[:, None]) @ weights, shift


def _asked(X: Any, y: Any, Z: Any) -> tuple[Array, Array, Array]:
    """Rows, a target for each of them, and rows as wide as they are."""
    X, y = rows_of("X", X), np.asarray(y)
    require(
        y.shape[:1] == X.shape[:1], f"y: got {show(y)}, expected one target for each of {len(X)} rows of X"
    )
    return X, y, rows_of("Z", Z, X)


def hilbert_scores(X: Array, y: Array, Z: Array, exponent: float) -> Array:
    """Σ y r^-d / Σ r^-d of the Euclidean distances r: the Hilbert kernel rule. A point of X has its own label.

    >>> hilbert_scores(np.eye(2), np.array([1.0, -1.0]), np.eye(2), 2.0).tolist()
    [1.0, -1.0]
    """
    number("exponent", exponent, low=0, open_low=True)
    X, y, Z = _asked(X, y, Z)
    with np.errstate(divide="ignore"):
        log = -exponent / 2 * np.log(2 * half_squares(Z, X))
    top = log.max(1, keepdims=True)
    weights = np.where(np.isinf(top), np.isinf(log), np.exp(log - np.where(np.isinf(top), 0, top)))
    return weights @ y / weights.sum(1)


def laplace_scores(
    X: Array, y: Array, Z: Array, *, bandwidth: float | None = None, ridge: float = 0.0
) -> Array:
    """y' (K + ridge)⁻¹ k(z) of the Laplace kernel exp(-r / bandwidth) of Euclidean distances r, which has a network's smoothness but no depth.

    Args:
        X, Z: rows [n, features], [m, features]. y: [n] or [n, classes].
        bandwidth: by default the median distance of the rows of X (of the first 1,000).
        ridge: added to the diagonal, which is 1; without it a point of X has its own label.

    Returns:
        [m] or [m, classes].

    Raises:
        InputError: a bandwidth that is not positive, a negative ridge, or two equal rows without a ridge.

    >>> laplace_scores(np.eye(2), np.array([1.0, -1.0]), np.eye(2)).round(9).tolist()
    [1.0, -1.0]
    """
    X, y, Z = _asked(X, y, Z)
    if bandwidth is None:
        bandwidth = float(np.median(pdist(X[:1000]))) if len(X) > 1 else 1.0
    number("bandwidth", bandwidth, low=0, open_low=True)
    number("ridge", ridge, low=0)
    kernel = Matern(bandwidth, nu=0.5)
    matrix = np.asarray(kernel(X))
    matrix.flat[:: len(X) + 1] = 1 + ridge
    try:
        factor = cho_factor(matrix, lower=True, overwrite_a=True)
    except LinAlgError as error:
        raise InputError(
            f"ridge: the Laplace kernel of {len(X)} points is singular (two equal points, or a bandwidth of {bandwidth:g} that is far too wide); "
            f"expected a ridge above {ridge:g}"
        ) from error
    return np.asarray(kernel(Z, X)) @ cho_solve(factor, y)


def nearest(X: Array, y: Array, Z: Array) -> Array:
    """The label of each row's nearest neighbour in X; the first of equals.

    >>> nearest(np.eye(2), np.array([3, 5]), np.eye(2)).tolist()
    [3, 5]
    """
    return y[half_squares(Z, X).argmin(1)]
