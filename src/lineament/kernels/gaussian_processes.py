"""Deep kernels as functions of two sets of rows, and as a scikit-learn ``Kernel`` for Gaussian processes, SVC and KernelRidge."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal

import numpy as np
from sklearn.gaussian_process.kernels import Kernel

from lineament.core.checks import number, one_of
from lineament.kernels.sphere import SphereMap, rows_of
from lineament.kernels.table import LogTable
from lineament.kernels.tiles import Rows, Tiles

Array = np.ndarray


def ntk(
    X: Any, Y: Any = None, *, activation: Any = "relu", depth: int = 3, sphere: Any = "normalize"
) -> Array:
    """The tangent kernel K_L of an infinitely wide network between rows of X and of Y (or X), [n, m].

    Args:
        activation: as for :func:`~lineament.kernels.dual_of`. depth: layers.
        sphere: ``"normalize"``, ``"split"`` or ``None``, see :class:`~lineament.kernels.sphere.SphereMap`; negative cosines count as 0.

    >>> ntk(np.eye(2), depth=1, activation="square").round(6).tolist()
    [[3.0, 0.0], [0.0, 3.0]]
    """
    return _matrix(X, Y, LogTable(activation, depth, "ntk"), sphere)


def nngp(
    X: Any, Y: Any = None, *, activation: Any = "relu", depth: int = 3, sphere: Any = "normalize"
) -> Array:
    """The kernel Σ_L of the Gaussian process that an infinitely wide network is; see :func:`ntk`.

    >>> nngp(np.eye(2), depth=1).round(6).tolist()
    [[1.0, 0.31831], [0.31831, 1.0]]
    """
    return _matrix(X, Y, LogTable(activation, depth, "nngp"), sphere)


def psi(X: Any, Y: Any = None, *, activation: Any = "erf", sphere: Any = "normalize") -> Array:
    """Koenigs' function ψ, the limit of both kernels at infinite depth up to a factor; infinite for equal rows.

    >>> psi(np.eye(2)).tolist()
    [[inf, 0.0], [0.0, inf]]
    """
    return _matrix(X, Y, LogTable(activation, math.inf), sphere)


class InfiniteKernel(Kernel):
    """K_L or Σ_L as a scikit-learn kernel, divided by its value at equal rows; it has no parameters to be tuned by gradients.

    >>> from sklearn.svm import SVC
    >>> X, y = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) % 2
    >>> X[y == 1] += 2
    >>> bool(SVC(kernel=InfiniteKernel("relu", 2)).fit(X, y).score(X, y) > 0.8)
    True
    """

    def __init__(
        self,
        activation: Any = "relu",
        depth: int = 3,
        kernel: Literal["nngp", "ntk"] = "ntk",
        sphere: Any = "normalize",
    ):
        self.activation = activation
        self.depth = depth
        self.kernel = kernel
        self.sphere = sphere

    def __call__(self, X: Any, Y: Any = None, eval_gradient: bool = False) -> Any:
        number("depth", self.depth, low=1, integer=True)
        table = LogTable(self.activation, self.depth, self.kernel)  # pyright: ignore
        found = _matrix(X, Y, table, self.sphere, scaled=True)
        return (found, np.empty((*found.shape, 0))) if eval_gradient else found

    def diag(self, X: Any) -> Array:
        """1 for each row."""
        return np.ones(len(X))

    def is_stationary(self) -> bool:
        """No: it depends on angles, not on differences."""
        return False

    def __repr__(self) -> str:
        return f"InfiniteKernel({self.activation!r}, depth={self.depth}, kernel={self.kernel!r})"


def _matrix(X: Any, Y: Any, table: LogTable, sphere: Any, *, scaled: bool = False) -> Array:
    if sphere is not None:
        one_of("sphere", sphere, ("normalize", "split"))
    X = rows_of("X", X)
    mapping = SphereMap.fitted(sphere, X)
    rows = Rows(mapping(X))
    others = rows if Y is None else Rows(mapping(rows_of("Y", Y, X)))
    found = np.empty((len(rows), len(others)))
    shift = table.at_one if scaled else 0.0
    negative = np.zeros(len(rows), dtype=np.int64)

    def filled(down: slice, tiles: Tiles) -> None:
        negative[down] = 0
        for across, tile in tiles:
            negative[down] += (tile > 1 + 1e-9).sum(1)
            found[down, across] = np.exp(table(np.clip(tile, 0, 1)) - shift)

    rows.strips(others, filled)
    if negative.any():
        warnings.warn(
            f"{100 * negative.sum() / found.size:.2g} % of the pairs have negative cosines, which count as 0; sphere='split' has none",
            stacklevel=3,
        )
    return found
