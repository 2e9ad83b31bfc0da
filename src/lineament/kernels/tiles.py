"""Kernel values of many pairs, tile by tile: what is in memory at a time does not grow with the data, and halves where even that is too much.

δ = 1 - ⟨x, y⟩ comes from one matrix product a tile; pairs closer than δ = 1e-4, of which a difference of near numbers would lose digits, are computed again
from x - y.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lineament.core.batching import auto_batch
from lineament.core.checks import InputError, show

Array = np.ndarray
# A strip's (columns, δ) one by one.
Tiles = Iterator[tuple[slice, Array]]
_CLOSE = 1e-4
# Tiles that stay in a processor's cache.
_ROWS, _COLUMNS = 256, 1024
_UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}


def bytes_of(memory: Any) -> int:
    """A number of bytes from ``"1GB"``, ``"500 MB"`` or a number.

    >>> bytes_of("1.5GB")
    1500000000
    """
    text = str(memory).upper().replace(" ", "")
    digits = text.rstrip("BKMGT")
    try:
        found = float(digits) * _UNITS[text[len(digits) :]]
    except (ValueError, KeyError):
        found = 0.0
    if not 0 < found < float("inf"):
        raise InputError(f"memory: got {show(memory)}, expected a size such as '1GB' or '500MB'")
    return int(found)


class Rows:
    """Unit rows, ready to be compared with others.

    >>> rows, seen = Rows(np.eye(3)), []
    >>> rows.strips(Rows(np.eye(3)[:2]), lambda down, tiles: seen.extend(tile.shape for _, tile in tiles))
    >>> seen
    [(3, 2)]
    """

    def __init__(self, X: Array):
        self.X = np.ascontiguousarray(X)
        ones = np.ones((len(X), 1))
        # [-x, 1] · [y, 1] = 1 - ⟨x, y⟩: the difference costs no pass of its own.
        self.left, self.right = np.hstack([-self.X, ones]), np.hstack([self.X, ones])

    def __len__(self) -> int:
        return len(self.X)

    def strips(
        self,
        others: Rows,
        work: Callable[[slice, Tiles], None],
        rows: int = _ROWS,
        columns: int = _COLUMNS,
    ) -> None:
        """``work(rows, tiles)`` for one strip of rows after the other; ``tiles`` are (columns, δ), and δ is the caller's until the next of them.

        Where memory runs out, a strip is begun anew with half its rows: ``work`` must not add to what it left. Of rows with themselves the diagonal is 0.
        """
        columns = min(columns, len(others))

        def strip(start: int, stop: int) -> None:
            work(slice(start, stop), self._tiles(slice(start, stop), others, columns))

        for _ in auto_batch(strip, len(self), most=rows, memory=(work, columns)):
            pass

    def _tiles(self, down: slice, others: Rows, columns: int) -> Tiles:
        height = down.stop - down.start
        memory = np.empty(height * columns)
        for first in range(0, len(others), columns):
            across = slice(first, min(first + columns, len(others)))
            tile = memory[: height * (across.stop - first)].reshape(height, -1)
            np.matmul(self.left[down], others.right[across].T, out=tile)
            if tile.min() < _CLOSE:
                i, j = np.nonzero(tile < _CLOSE)
                for part in np.array_split(np.arange(len(i)), 1 + len(i) * self.X.shape[1] // (1 << 22)):
                    apart = self.X[down][i[part]] - others.X[across][j[part]]
                    tile[i[part], j[part]] = np.einsum("ij,ij->i", apart, apart) / 2
                if others is self:
                    own = np.arange(max(down.start, first), min(down.stop, across.stop))
                    tile[own - down.start, own - first] = 0.0
            yield across, tile


def product(
    values: Callable[..., Array], X: Rows, Y: Rows, weights: Array, ridge: float | None = None
) -> Array:
    """Σ_j k(x_i, y_j) weights_j, [rows of X, columns of weights], tile by tile.

    Args:
        ridge: added to the diagonal of rows with themselves.

    >>> double = lambda delta, out=None: 2 - 2 * delta
    >>> product(double, Rows(np.eye(2)), Rows(np.eye(2)), np.ones((2, 1))).tolist()
    [[2.0], [2.0]]
    """
    found = np.zeros((len(X), weights.shape[1]))

    def summed(down: slice, tiles: Tiles) -> None:
        found[down] = 0.0
        memory = np.empty((down.stop - down.start) * min(_COLUMNS, len(Y)))
        for across, tile in tiles:
            found[down] += values(tile, memory[: tile.size].reshape(tile.shape)) @ weights[across]

    X.strips(Y, summed)
    return found if ridge is None else found + ridge * weights


class Preconditioner:
    """A multiple of (K + ridge)⁻¹, nearly, from some columns of K: exact on the directions of their largest eigenvalues, a multiple of the identity on the others.

    Nyström's approximation of K with the shift that keeps it stable, as Frangella, Tropp and Udell 2023 (arXiv 2110.02820) use it.

    Args:
        columns: [n, k], those of K (without ridge) at ``chosen`` [k].

    >>> K = np.array([[2.0, 1.0], [1.0, 2.0]])
    >>> np.allclose(Preconditioner(K, np.arange(2), 0.5)(K + 0.5 * np.eye(2)), 1.5 * np.eye(2))
    True
    """

    def __init__(self, columns: Array, chosen: Array, ridge: float):
        shift = 1e-14 * math.sqrt(len(columns)) * float(np.linalg.norm(columns))
        inner = columns[chosen].copy()
        np.fill_diagonal(inner, inner.diagonal() + shift)
        values, vectors = np.linalg.eigh((inner + inner.T) / 2)
        kept = values > shift / 2
        half = columns @ (vectors[:, kept] / np.sqrt(values[kept]))
        # Of half halfᵀ: the eigenvalues, and the eigenvectors through its small product with itself.
        values, vectors = np.linalg.eigh(half.T @ half)
        kept = values > 1e-10 * values[-1]
        self.values, self.vectors = values[kept], half @ (vectors[:, kept] / np.sqrt(values[kept]))
        self.factors = 1 - (self.values[0] + ridge) / (self.values + ridge)

    def __call__(self, r: Array) -> Array:
        return r - self.vectors @ (self.factors[:, None] * (self.vectors.T @ r))


def conjugate_gradients(
    multiply: Callable[[Array], Array],
    targets: Array,
    *,
    tolerance: float = 1e-10,
    most: int = 60,
    nearly: Callable[[Array], Array] | None = None,
) -> tuple[Array, Array, int]:
    """Solve K a = targets for all columns at once.

    Args:
        nearly: a :class:`Preconditioner`.

    Returns:
        (a, the residual of each column as a share of its target, passes).

    >>> K = np.array([[2.0, 1.0], [1.0, 2.0]])
    >>> a, left, passes = conjugate_gradients(lambda p: K @ p, np.array([[1.0], [0.0]]))
    >>> a[:, 0].round(4).tolist(), passes
    ([0.6667, -0.3333], 2)
    """
    a = np.zeros_like(targets)
    r = targets.copy()
    z = nearly(r) if nearly else r
    p = z.copy()
    of = lambda u, v: np.einsum("ij,ij->j", u, v)  # noqa: E731
    size, left = of(r, z), of(r, r)
    whole = np.maximum(left, 1e-300)
    passes = 0
    while passes < most and bool((left > tolerance**2 * whole).any()):
        K_p = multiply(p)
        step = size / np.maximum(of(p, K_p), 1e-300)
        a += step * p
        r -= step * K_p
        z = nearly(r) if nearly else r
        now, left = of(r, z), of(r, r)
        p = z + now / np.maximum(size, 1e-300) * p
        size, passes = now, passes + 1
    return a, np.sqrt(left / whole), passes
