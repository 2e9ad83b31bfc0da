"""A deep kernel as a table: it is a function of one number, so that its depth costs nothing once that function is tabulated.

Radhakrishnan, Belkin, Uhler 2022, arXiv 2204.14126, section 2.1. :class:`LogTable` is the logarithm, by a cubic spline over ln(δ / ξ), in which both ends
(δ = 1 - ξ small, ξ small) are straight lines. :class:`ValueTable` is the kernel itself, linear between 4,096 points an octave of δ that are found from the
bits of the number, so that a tile of pairs costs two look-ups each and no logarithm.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import expit

from lineament.core.checks import number, one_of
from lineament.kernels.duals import dual_of
from lineament.kernels.recursion import log_nngp, log_ntk, log_psi
from lineament.kernels.regimes import optimal_dual

Array = np.ndarray
# ln(δ / ξ) of the closest different rows there are in float64 (δ = 1e-33), and of the smallest cosine beside 1 - δ = 0.
_LOW, _HIGH = -76.0, 37.5
# Bits of the mantissa that choose a piece: 52 - 40 = 12, so 4,096 pieces an octave.
_SHIFT = 40
# Rows closer than 1e-12 count as one point; and e^600 is the largest value, so that a sum of a billion stays finite.
COINCIDENT, _TOP = 5e-25, 600.0


class LogTable:
    """ln Σ_L, ln K_L or ln ψ of δ = 1 - ξ, from a table.

    Args:
        activation: as for :func:`~lineament.kernels.dual_of`.
        depth: layers; infinity takes Koenigs' function ψ, the limit of both kernels.
        kernel: ``"nngp"`` or ``"ntk"``.
        tolerance: the table is refined until ``error`` is below it.

    Attributes:
        error: the largest difference from the recursion half-way between the points, where a spline errs most; relative where the logarithm is above 1.
        points: how many there are.

    >>> table = LogTable("erf", 40)
    >>> bool(abs(table(0.5) - log_nngp("erf", 40, delta=0.5)) < 1e-9), table.error < 1e-9
    (True, True)
    """

    def __init__(
        self,
        activation: Any,
        depth: float = math.inf,
        kernel: Literal["nngp", "ntk"] = "nngp",
        *,
        tolerance: float = 1e-10,
    ):
        one_of("kernel", kernel, ("nngp", "ntk"))
        self.dual, self.depth, self.kernel = dual_of(activation), depth, kernel
        if depth != math.inf:
            number("depth", depth, low=1, integer=True)
        self.at_one = math.inf if depth == math.inf else float(self.exact(delta=np.zeros(())))
        self.at_zero = float(self.exact(xi=np.zeros(())))
        self.points = 1 << 10
        knots = np.linspace(_LOW, _HIGH, self.points + 1)
        values = self._at(knots)
        while True:
            self._step = knots[1] - knots[0]
            self._coefficients = np.ascontiguousarray(CubicSpline(knots, values).c[::-1])
            middle = (knots[1:] + knots[:-1]) / 2
            between = self._at(middle)
            self.error = float(
                (np.abs(self._spline(middle) - between) / np.maximum(1, np.abs(between))).max()
            )
            if self.error <= tolerance or self.points >= 1 << 14:
                break
            self.points *= 2
            knots, values = _woven(knots, middle), _woven(values, between)

    def __getstate__(self) -> dict[str, Any]:
        # An activation's functions cannot be pickled, and the table does without them.
        return {name: value for name, value in self.__dict__.items() if name != "dual"}

    def exact(self, *, xi: Any = None, delta: Any = None) -> Array:
        """By the recursion, layer by layer."""
        if self.depth == math.inf:
            return log_psi(self.dual, xi=xi, delta=delta)
        logs = log_nngp if self.kernel == "nngp" else log_ntk
        return logs(self.dual, int(self.depth), xi=xi, delta=delta)

    def _at(self, u: Array) -> Array:
        # Each half from the number that is small there.
        low = u < 0
        return np.concatenate([self.exact(delta=expit(u[low])), self.exact(xi=expit(-u[~low]))])

    def _spline(self, u: Array) -> Array:
        place = (u - _LOW) / self._step
        piece = np.clip(place.astype(np.int64), 0, self.points - 1)
        t = (place - piece) * self._step
        c = self._coefficients
        found = c[3].take(piece)
        for power in (2, 1, 0):
            found *= t
            found += c[power].take(piece)
        return found

    def __call__(self, delta: Any) -> Array:
        """The logarithm at each δ in [0, 1]."""
        delta = np.asarray(delta, dtype=float)
        with np.errstate(divide="ignore"):
            u = np.log(delta) - np.log1p(-delta)
        found = self._spline(np.clip(u, _LOW, _HIGH))
        found = np.where(delta == 0, self.at_one, found)
        return np.where(delta == 1, self.at_zero, found)


class ValueTable:
    """The kernel itself as a multiple of its largest value, or for infinite depth of ψ at coincident points, by pieces found from δ's bits.

    A pair closer than 1e-12 counts as coincident. ``log_scale`` is the logarithm of what the values are multiples of; for infinite depth the values are
    multiples of e^(-600) of it, so that sums stay finite and no weight is lost.

    >>> table = ValueTable(LogTable("erf", 3))
    >>> delta = np.array([0.0, 0.25, 1.0])
    >>> np.allclose(table(delta.copy()), np.exp(log_nngp("erf", 3, delta=delta)), rtol=1e-7)
    True
    """

    def __init__(self, logs: LogTable):
        first = int(np.array([COINCIDENT / 2]).view(np.int64)[0]) >> _SHIFT
        last = int(np.array([1.0]).view(np.int64)[0]) >> _SHIFT
        edges = (np.arange(first, last + 2, dtype=np.int64) << _SHIFT).view(float)
        endless = logs.depth == math.inf
        with np.errstate(divide="ignore"):
            there = logs(np.clip(edges, COINCIDENT, 1.0))
        self.log_scale = float(there.max()) - _TOP if endless else logs.at_one
        values = np.exp(there - self.log_scale)
        if not endless:
            values[0] = 1.0
        self.slope = np.diff(values) / np.diff(edges)
        # Beyond 1 there is nothing: the last piece starts there.
        self.slope[-1] = 0.0
        self.offset = values[:-1] - self.slope * edges[:-1]
        self._first, self._least, self._nearest = first, float(edges[0]), float(values[0])

    def __call__(self, delta: Array, out: Array | None = None) -> Array:
        """Values at δ [any shape], which is clipped to [0, 1] in its own memory."""
        np.clip(delta, self._least, 1.0, out=delta)
        piece = delta.view(np.int64) >> _SHIFT
        piece -= self._first
        slope = self.slope.take(piece, out=out, mode="clip")
        slope *= delta
        slope += self.offset.take(piece, mode="clip")
        return slope


@lru_cache(maxsize=32)
def optimal_table(dimension: float, family: str = "hermite") -> ValueTable:
    """The table of ψ for the activation that is optimal in a dimension.

    >>> table = optimal_table(2)
    >>> near, far = table(np.array([0.01, 0.02]))
    >>> round(float(near / far), 2)
    2.02
    """
    return ValueTable(LogTable(optimal_dual(dimension, family)))  # pyright: ignore


def _woven(even: Array, odd: Array) -> Array:
    """even[0], odd[0], even[1], ..."""
    made = np.empty(len(even) + len(odd))
    made[::2], made[1::2] = even, odd
    return made
