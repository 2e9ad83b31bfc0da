"""The parts that one-pass statistics are made of: centring without cancellation, products summed in float64, storage.

See :mod:`lineament.core.statistics.moments` for the statistics themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require

ROWS = 2048  # rows centred at once, and rows summed in the input's dtype before they are added in float64
_BLOCK = 512  # a symmetric product is computed by blocks of this many rows, upper triangle only


def working(x: Tensor) -> Tensor:
    """Half precision is computed in float32, integers in float64; the others as they are."""
    if x.dtype in (torch.float32, torch.float64):
        return x.detach()
    return x.detach().to(torch.float32 if x.is_floating_point() else torch.float64)


def finite(what: str, x: Tensor) -> Tensor:
    """``x`` if it is finite; one sum tells in the usual case, and only a sum that is not finite is looked into."""
    return x if bool(torch.isfinite(x.sum())) else checks.tensor(what, x)


def rows_of(what: str, x: Any, features: int | None) -> Tensor:
    shape = ("batch", "features" if features is None else features)
    return finite(what, working(checks.tensor(what, x, shape=shape, finite=False)))


def centre(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows minus their mean, in the input's dtype, and that mean in float64."""
    coarse = x.mean(0)
    centred = x - coarse
    rest = centred.mean(0)
    centred -= rest
    return centred, coarse.double() + rest.double()


class Products:
    """A running sum of AᵀB in float64, from GEMMs in the dtype of A and B; with B = A only the upper triangle is computed.

    Up to 2,048 rows are summed in the input's dtype before they are added to the float64 total, so that the cost
    of the addition does not depend on how small the batches are.

    >>> products = Products(2, 2, torch.device("cpu"), symmetric=True)
    >>> products.add(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    >>> products.value().tolist()
    [[10.0, 14.0], [14.0, 20.0]]
    """

    def __init__(self, rows: int, columns: int, device: torch.device, *, symmetric: bool) -> None:
        self.total = torch.zeros(rows, columns, dtype=torch.float64, device=device)
        self.symmetric = symmetric
        self._pending: Tensor | None = None
        self._count = 0

    def _strips(self) -> list[tuple[slice, slice]]:
        rows = self.total.shape[0]
        if not self.symmetric or rows < 2 * _BLOCK:
            return [(slice(None), slice(None))]
        return [(slice(i, i + _BLOCK), slice(i, None)) for i in range(0, rows, _BLOCK)]

    def add(self, a: Tensor, b: Tensor | None = None) -> None:
        """Add ``aᵀ b`` (``aᵀ a`` when ``b`` is None)."""
        b = a if b is None else b
        if a.dtype == torch.float64:
            target = self.total
        else:
            if self._pending is None or self._pending.dtype != a.dtype:
                self._flush()
                self._pending = torch.zeros_like(self.total, dtype=a.dtype)
            target = self._pending
            self._count += len(a)
        for rows, columns in self._strips():
            target[rows, columns].addmm_(a[:, rows].T, b[:, columns])
        if self._count >= ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._pending is None or self._count == 0:
            return
        for rows, columns in self._strips():
            self.total[rows, columns] += self._pending[rows, columns]
        self._pending.zero_()
        self._count = 0

    def value(self) -> Tensor:
        """The sum so far, a new float64 matrix (both triangles)."""
        self._flush()
        return self.total.triu() + self.total.triu(1).T if self.symmetric else self.total.clone()


class Stream:
    """What the statistics share: nested tensors and numbers that can be stored, read back and joined."""

    _saved: tuple[str, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        """Everything that was gathered, as a dict of tensors and numbers (what a ``Checkpoint`` stores)."""
        return {name: getattr(self, name) for name in self._saved}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Any:
        """The statistic that :meth:`state_dict` described."""
        missing = [name for name in cls._saved if name not in state]
        require(not missing, f"state: lacks {missing}, expected the keys {list(cls._saved)}")
        self = cls()
        self._load(state)
        return self

    def _load(self, state: Mapping[str, Any]) -> None:
        for name in self._saved:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def _same(self, other: Any) -> None:
        require(
            type(other) is type(self),
            f"+: got a {type(other).__name__}, expected another {type(self).__name__}",
        )

    def __radd__(self, other: Any) -> Any:
        # sum(parts) starts from 0.
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def _some(self, least: int = 1) -> None:
        count = int(getattr(self, "count", 0))
        require(count >= least, f"{type(self).__name__}: {count} samples seen, expected at least {least}")
