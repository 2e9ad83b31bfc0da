"""One-pass statistics over a loader: moments, covariance, cross-covariance, per-class means and scatter.

Each statistic takes batches by ``update`` and joins with another of its kind by ``a + b``, so that processes can share
the work. The joining rule is Chan, Golub and LeVeque's (1983): two samples of sizes a and b whose means differ by δ have

    M2 = M2_a + M2_b + (a b / (a + b)) δ δᵀ

Every batch is centred on its own mean (twice, so that the mean's rounding is removed too) before it is multiplied,
means and sums are kept in float64, and the products run in the input's own dtype: float32 data keep the speed of a
float32 GEMM, and nothing cancels, however far the mean lies from zero. Memory does not grow with the samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require
from lineament.core.statistics.accumulation import ROWS, Products, Stream, centre, finite, rows_of, working


class Moments(Stream):
    """Mean, variance, skewness, kurtosis, minimum and maximum of each feature, in one pass (Pébay 2008).

    Args:
        correction: the variance is the sum of squares over ``count - correction`` (1: unbiased).

    >>> stream = Moments()
    >>> stream.update(torch.tensor([[1.0], [2.0]])); stream.update(torch.tensor([[6.0]]))
    >>> stream.mean.item(), stream.variance.item(), stream.maximum.item()
    (3.0, 7.0, 6.0)
    """

    _saved = ("correction", "count", "mean", "m2", "m3", "m4", "minimum", "maximum")

    def __init__(self, *, correction: int = 1) -> None:
        self.correction = correction
        self.count = 0
        self.mean = self.m2 = self.m3 = self.m4 = torch.zeros(0, dtype=torch.float64)
        self.minimum = self.maximum = torch.zeros(0)

    def update(self, x: Float[Tensor, "batch *features"]) -> None:
        """Take in a batch; the trailing shape is kept."""
        x = working(checks.tensor("x", x, finite=False))
        require(x.ndim >= 1, f"x: got {checks.show(x)}, expected (batch, ...)")
        require(
            self.count == 0 or x.shape[1:] == self.mean.shape,
            f"x: got {checks.show(x)}, expected (batch, {', '.join(map(str, self.mean.shape))}) as before",
        )
        low, high = finite("x", x).amin(0), x.amax(0)
        step = max(1, 2**22 // max(1, x[0].numel()))
        for part in x.split(step):
            wide = part.double()
            mean = wide.mean(0)
            wide = wide - mean
            square = wide * wide
            self._join(len(part), mean, square.sum(0), (square * wide).sum(0), (square * square).sum(0))
        first = self.minimum.shape != low.shape
        self.minimum = low if first else torch.minimum(self.minimum, low)
        self.maximum = high if first else torch.maximum(self.maximum, high)

    def _join(self, count: int, mean: Tensor, m2: Tensor, m3: Tensor, m4: Tensor) -> None:
        if self.count == 0:
            self.count, self.mean, self.m2, self.m3, self.m4 = count, mean, m2, m3, m4
            return
        a, b = self.count, count
        n = a + b
        d = mean - self.mean
        fourth = self.m4 + m4 + d**4 * (a * b * (a * a - a * b + b * b) / n**3)
        self.m4 = (
            fourth + 6 * d**2 * (a * a * m2 + b * b * self.m2) / n**2 + 4 * d * (a * m3 - b * self.m3) / n
        )
        self.m3 = self.m3 + m3 + d**3 * (a * b * (a - b) / n**2) + 3 * d * (a * m2 - b * self.m2) / n
        self.m2 = self.m2 + m2 + d**2 * (a * b / n)
        self.mean = self.mean + d * (b / n)
        self.count = n

    def __add__(self, other: Moments) -> Moments:
        self._same(other)
        if self.count == 0 or other.count == 0:
            return Moments.from_state_dict((other if self.count == 0 else self).state_dict())
        require(
            self.mean.shape == other.mean.shape,
            f"+: features of shape {tuple(self.mean.shape)} and {tuple(other.mean.shape)} do not match",
        )
        joined = Moments.from_state_dict(self.state_dict())
        there = self.mean.device
        joined._join(other.count, *(getattr(other, m).to(there) for m in ("mean", "m2", "m3", "m4")))
        joined.minimum = torch.minimum(self.minimum, other.minimum.to(there))
        joined.maximum = torch.maximum(self.maximum, other.maximum.to(there))
        return joined

    @property
    def variance(self) -> Float[Tensor, "*features"]:
        """The sum of squared deviations over ``count - correction``."""
        self._some(1 + self.correction)
        return self.m2 / (self.count - self.correction)

    @property
    def std(self) -> Float[Tensor, "*features"]:
        """The square root of :attr:`variance`."""
        return self.variance.sqrt()

    @property
    def skewness(self) -> Float[Tensor, "*features"]:
        """The third central moment over the 3/2 power of the second (0 for a constant feature)."""
        self._some()
        return torch.nan_to_num(self.count**0.5 * self.m3 / self.m2**1.5)

    @property
    def kurtosis(self) -> Float[Tensor, "*features"]:
        """Excess kurtosis, 0 for a Gaussian (and for a constant feature)."""
        self._some()
        return torch.where(self.m2 > 0, self.count * self.m4 / self.m2**2 - 3, torch.zeros_like(self.m2))


class Covariance(Stream):
    """Mean and covariance of the features of one site, in one pass.

    >>> stream = Covariance()
    >>> stream.update(torch.tensor([[0.0, 0.0], [2.0, 4.0]])); stream.update(torch.tensor([[4.0, 8.0]]))
    >>> stream.covariance.tolist()
    [[4.0, 8.0], [8.0, 16.0]]
    """

    _saved = ("correction", "count", "mean", "scatter")

    def __init__(self, *, correction: int = 1) -> None:
        self.correction = correction
        self.count = 0
        self.mean = torch.zeros(0, dtype=torch.float64)
        self._products: Products | None = None

    @property
    def scatter(self) -> Float[Tensor, "features features"]:
        """The sum of (x - mean)(x - mean)ᵀ over the samples, float64."""
        return self.mean.new_zeros(0, 0) if self._products is None else self._products.value()

    def _load(self, state: Mapping[str, Any]) -> None:
        self.correction, self.count = state["correction"], state["count"]
        self.mean = state["mean"].clone()
        if self.count:
            d = len(self.mean)
            self._products = Products(d, d, self.mean.device, symmetric=True)
            self._products.total += state["scatter"]

    def update(self, x: Float[Tensor, "batch features"]) -> None:
        """Take in a batch."""
        x = rows_of("x", x, len(self.mean) if self.count else None)
        for part in x.split(ROWS):
            self._take(*centre(part))

    def _take(self, centred: Tensor, mean: Tensor) -> None:
        if self._products is None:
            d = len(mean)
            self._products = Products(d, d, centred.device, symmetric=True)
            self.mean = torch.zeros_like(mean)
        a, b = self.count, len(centred)
        shift = mean - self.mean
        row = shift * (a * b / (a + b)) ** 0.5
        self._products.add(centred if a == 0 else torch.cat([centred, row.to(centred.dtype)[None]]))
        self.mean = self.mean + shift * (b / (a + b))
        self.count = a + b

    def __add__(self, other: Covariance) -> Covariance:
        self._same(other)
        if self.count == 0 or other.count == 0:
            return Covariance.from_state_dict((other if self.count == 0 else self).state_dict())
        require(
            len(self.mean) == len(other.mean),
            f"+: {len(self.mean)} and {len(other.mean)} features do not match",
        )
        joined = Covariance.from_state_dict(self.state_dict())
        products = joined._products
        assert products is not None
        a, b = self.count, other.count
        shift = other.mean.to(self.mean.device) - self.mean
        products.total += other.scatter.to(self.mean.device)
        products.add((shift * (a * b / (a + b)) ** 0.5)[None])
        joined.mean = self.mean + shift * (b / (a + b))
        joined.count = a + b
        return joined

    @property
    def covariance(self) -> Float[Tensor, "features features"]:
        """The scatter over ``count - correction``."""
        self._some(1 + self.correction)
        return self.scatter / (self.count - self.correction)

    @property
    def correlation(self) -> Float[Tensor, "features features"]:
        """Pearson's correlations; 0 beside a constant feature."""
        self._some(2)
        scatter = self.scatter
        return _correlate(scatter, scatter.diagonal(), scatter.diagonal())


class CrossCovariance(Stream):
    """Covariance and correlation between the features of two sites (of one network or of two), in one pass.

    >>> stream = CrossCovariance()
    >>> stream.update(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[5.0, 1.0], [7.0, 1.0], [9.0, 1.0]]))
    >>> stream.covariance.tolist(), stream.correlation.tolist()
    ([[2.0, 0.0]], [[1.0, 0.0]])
    """

    _saved = ("correction", "count", "mean_x", "mean_y", "squares_x", "squares_y", "scatter")

    def __init__(self, *, correction: int = 1) -> None:
        self.correction = correction
        self.count = 0
        empty = torch.zeros(0, dtype=torch.float64)
        self.mean_x = self.mean_y = self.squares_x = self.squares_y = empty
        self._products: Products | None = None

    @property
    def scatter(self) -> Float[Tensor, "features_x features_y"]:
        """The sum of (x - mean_x)(y - mean_y)ᵀ over the samples, float64."""
        return self.mean_x.new_zeros(0, 0) if self._products is None else self._products.value()

    def _start(self, p: int, q: int, device: torch.device) -> Products:
        self._products = Products(p, q, device, symmetric=False)
        zero = torch.zeros(p + q, dtype=torch.float64, device=device)
        self.mean_x, self.mean_y = zero[:p], zero[p:]
        self.squares_x, self.squares_y = zero[:p], zero[p:]
        return self._products

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["count"]:
            p, q = state["scatter"].shape
            products = self._start(p, q, state["mean_x"].device)
            products.total += state["scatter"]
        for name in self._saved[:-1]:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)

    def update(self, x: Float[Tensor, "batch features_x"], y: Float[Tensor, "batch features_y"]) -> None:
        """Take in a batch of both: row i of ``x`` and of ``y`` come from the same sample."""
        x = rows_of("x", x, len(self.mean_x) if self.count else None)
        y = rows_of("y", y, len(self.mean_y) if self.count else None)
        require(len(x) == len(y), f"y: got {checks.show(y)}, expected {len(x)} rows, as many as x has")
        common = torch.promote_types(x.dtype, y.dtype)
        for part_x, part_y in zip(x.to(common).split(ROWS), y.to(common).split(ROWS)):
            self._take(*centre(part_x), *centre(part_y))

    def _take(self, u: Tensor, mean_u: Tensor, v: Tensor, mean_v: Tensor) -> None:
        squares = (u.square().sum(0).double(), v.square().sum(0).double())
        if self._products is None:
            self._start(u.shape[1], v.shape[1], u.device)
        self._join(len(u), mean_u, mean_v, *squares, (u, v))

    def _join(
        self, b: int, mean_x: Tensor, mean_y: Tensor, sx: Tensor, sy: Tensor, rows: tuple[Tensor, Tensor]
    ) -> None:
        assert self._products is not None
        a = self.count
        dx, dy = mean_x - self.mean_x, mean_y - self.mean_y
        factor = a * b / (a + b)
        u, v = rows
        if a:
            u = torch.cat([u, (dx * factor**0.5).to(u.dtype)[None]])
            v = torch.cat([v, (dy * factor**0.5).to(v.dtype)[None]])
        self._products.add(u, v)
        self.squares_x = self.squares_x + sx + dx**2 * factor
        self.squares_y = self.squares_y + sy + dy**2 * factor
        self.mean_x = self.mean_x + dx * (b / (a + b))
        self.mean_y = self.mean_y + dy * (b / (a + b))
        self.count = a + b

    def __add__(self, other: CrossCovariance) -> CrossCovariance:
        self._same(other)
        if self.count == 0 or other.count == 0:
            return CrossCovariance.from_state_dict((other if self.count == 0 else self).state_dict())
        sizes = (len(self.mean_x), len(self.mean_y)), (len(other.mean_x), len(other.mean_y))
        require(sizes[0] == sizes[1], f"+: {sizes[0]} and {sizes[1]} features do not match")
        joined = CrossCovariance.from_state_dict(self.state_dict())
        assert joined._products is not None
        there = self.mean_x.device
        joined._products.total += other.scatter.to(there)
        parts = (getattr(other, m).to(there) for m in ("mean_x", "mean_y", "squares_x", "squares_y"))
        none = (self.mean_x.new_zeros(0, sizes[0][0]), self.mean_x.new_zeros(0, sizes[0][1]))
        joined._join(other.count, *parts, none)
        return joined

    @property
    def covariance(self) -> Float[Tensor, "features_x features_y"]:
        """The scatter over ``count - correction``."""
        self._some(1 + self.correction)
        return self.scatter / (self.count - self.correction)

    @property
    def correlation(self) -> Float[Tensor, "features_x features_y"]:
        """Pearson's correlations; 0 beside a constant feature."""
        self._some(2)
        return _correlate(self.scatter, self.squares_x, self.squares_y)


def update_together(
    own: Sequence[Covariance], cross: CrossCovariance, x: Sequence[Tensor], y: Tensor
) -> None:
    """Take in a batch of several sites and of y, each centred once: ``own`` are the covariances of the sites, ``cross`` that of all of them, side by side, with y.

    Rows must be finite, of one count, in single or double precision, as the callers have checked.

    >>> own, cross = [Covariance()], CrossCovariance()
    >>> update_together(own, cross, [torch.tensor([[0.0], [2.0]])], torch.tensor([[1.0], [5.0]]))
    >>> own[0].covariance.tolist(), cross.covariance.tolist()
    ([[2.0]], [[4.0]])
    """
    common = max((each.dtype for each in (*x, y)), key=lambda dtype: dtype.itemsize)
    for part_y, *parts in zip(y.to(common).split(ROWS), *(each.split(ROWS) for each in x)):
        centred = [centre(part) for part in parts]
        for stream, (rows, mean) in zip(own, centred):
            stream._take(rows, mean)
        rows = [rows.to(common) for rows, _ in centred]
        side_by_side = rows[0] if len(rows) == 1 else torch.cat(rows, 1)
        cross._take(side_by_side, torch.cat([mean for _, mean in centred]), *centre(part_y))


def _correlate(scatter: Tensor, squares_x: Tensor, squares_y: Tensor) -> Tensor:
    scale = (squares_x[:, None] * squares_y[None]).sqrt()
    return torch.where(scale > 0, scatter / scale, torch.zeros_like(scatter)).clamp(-1, 1)
