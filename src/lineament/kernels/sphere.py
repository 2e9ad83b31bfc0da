"""From any data to the positive part of a sphere, where the theory of deep kernels lives: cosines that are not negative.

Radhakrishnan, Belkin, Uhler 2022, arXiv 2204.14126, sections 1 and 5.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from lineament.core.checks import InputError, one_of, require, show

Array = np.ndarray
Sphere = Literal["cap", "split", "normalize"]


def rows_of(what: str, given: Any, like: Array | None = None) -> Array:
    """Rows [n, features] of finite numbers; as wide as those of ``like``.

    >>> rows_of("X", [[1, 2]]).tolist()
    [[1.0, 2.0]]
    """
    try:
        found = np.asarray(given, dtype=float)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: got {show(given)}, expected rows [n, features] of numbers") from error
    require(found.ndim == 2 and found.size > 0, f"{what}: got {show(given)}, expected rows [n, features]")
    bad = np.flatnonzero(~np.isfinite(found).all(1))
    require(not len(bad), f"{what}: row {bad[:1].tolist()} has NaN or infinity, expected finite numbers")
    require(
        like is None or found.shape[1] == like.shape[1],
        f"{what}: rows of {found.shape[1]} numbers, expected {0 if like is None else like.shape[1]} as X has",
    )
    return found


@dataclass(frozen=True)
class SphereMap:
    """How rows become unit rows; :meth:`fitted` learns it from training rows.

    ``"cap"``: x, centred and scaled so that the training rows lie within 1/√2, becomes (x, √(1 - |x|²)), all of whose cosines are at least 0; distances keep
    their order near by. A row beyond that is moved to the edge. ``"split"``: [relu(x), relu(-x)] / |x|. ``"normalize"``: x / |x|, whose cosines may be
    negative. ``None``: rows are unit rows already.

    >>> X = np.array([[0.0, 0.0], [3.0, 4.0]])
    >>> SphereMap.fitted("cap", X)(X).round(4).tolist()
    [[-0.4243, -0.5657, 0.7071], [0.4243, 0.5657, 0.7071]]
    """

    kind: Sphere | None
    centre: Array
    scale: float

    @classmethod
    def fitted(cls, kind: Sphere | None, X: Array) -> SphereMap:
        """The map that suits these rows."""
        if kind is not None:
            one_of("sphere", kind, ("cap", "split", "normalize"))
        if kind != "cap":
            return cls(kind, np.zeros(X.shape[1]), 1.0)
        # Half-way between the extremes, so that an uneven sample does not push its far rows out of the cap.
        centre = (X.max(0) + X.min(0)) / 2
        reach = float(np.linalg.norm(X - centre, axis=1).max())
        return cls(kind, centre, 1 / (math.sqrt(2) * reach) if reach > 0 else 1.0)

    def beyond(self, X: Array) -> int:
        """How many rows lie outside the cap."""
        if self.kind != "cap":
            return 0
        return int((np.linalg.norm(X - self.centre, axis=1) * self.scale > math.sqrt(0.5) * (1 + 1e-9)).sum())

    def __call__(self, X: Array) -> Array:
        """Unit rows."""
        if self.kind == "cap":
            x = (X - self.centre) * self.scale
            length = np.linalg.norm(x, axis=1, keepdims=True)
            x = x * np.minimum(1, math.sqrt(0.5) / np.maximum(length, 1e-300))
            return np.hstack([x, np.sqrt(1 - np.square(x).sum(1, keepdims=True))])
        if self.kind == "split":
            X = np.hstack([np.maximum(X, 0), np.maximum(-X, 0)])
        length = np.linalg.norm(X, axis=1, keepdims=True)
        zero = np.flatnonzero(length[:, 0] == 0)
        require(
            len(zero) == 0,
            f"X: row {zero[:1].tolist()} is zero and has no direction; sphere='cap' takes such rows",
        )
        if self.kind is None:
            off = float(np.abs(length - 1).max())
            require(
                off < 1e-6,
                f"X: a row has length {float(length[np.abs(length - 1).argmax(), 0]):g}, expected unit rows with sphere=None; 'normalize' makes them so",
            )
        return X / length
