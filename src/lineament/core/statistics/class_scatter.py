"""Per-class means and scatter in one pass: what the geometry of classes is measured from.

The joining rule and the care for rounding are those of :mod:`lineament.core.statistics.moments`, class by class.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import InputError, require
from lineament.core.statistics.accumulation import ROWS, Products, Stream, rows_of


class ClassScatter(Stream):
    """Count, mean and within-class sum of squares of every class, and the pooled within-class scatter, in one pass.

    Traces need no features-by-features matrix: ``squares[k]`` is the sum over class k of ‖h - h_k‖². The matrix
    Σ (h - h_k)(h - h_k)ᵀ is gathered only with ``scatter=True``.

    Args:
        classes: how many classes there are; ``None`` takes the largest label seen plus one.
        scatter: also gather the features-by-features matrix :attr:`within`.

    >>> stream = ClassScatter(2, scatter=True)
    >>> stream.update(torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1]))
    >>> stream.means.flatten().tolist(), stream.squares.tolist(), stream.within.item()
    ([1.0, 5.0], [2.0, 0.0], 2.0)
    """

    _saved = ("classes", "scatter", "resolution", "counts", "means", "squares", "within")

    def __init__(self, classes: int | None = None, *, scatter: bool = False) -> None:
        if classes is not None:
            checks.number("classes", classes, low=1, integer=True)
        self.classes = classes
        self.scatter = scatter
        self.resolution = 0.0
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.means = torch.zeros(0, 0, dtype=torch.float64)
        self.squares = torch.zeros(0, dtype=torch.float64)
        self._products: Products | None = None

    @property
    def count(self) -> int:
        """Samples seen."""
        return int(self.counts.sum())

    @property
    def within(self) -> Float[Tensor, "features features"]:
        """The sum over all samples of (h - h_k)(h - h_k)ᵀ; empty without ``scatter``."""
        return self.means.new_zeros(0, 0) if self._products is None else self._products.value()

    def _load(self, state: Mapping[str, Any]) -> None:
        for name in self._saved[:-1]:
            value = state[name]
            setattr(self, name, value.clone() if isinstance(value, Tensor) else value)
        if state["within"].numel():
            d = self.means.shape[1]
            self._products = Products(d, d, self.means.device, symmetric=True)
            self._products.total += state["within"]

    def _grow(self, classes: int, features: int, device: torch.device) -> None:
        have, width = self.means.shape
        if have >= classes:
            return
        require(have == 0 or width == features, f"features: got {features}, expected {width} as before")
        counts, means, squares = self.counts, self.means, self.squares
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)
        self.means = torch.zeros(classes, features, dtype=torch.float64, device=device)
        self.squares = torch.zeros(classes, dtype=torch.float64, device=device)
        if have:
            self.counts[:have], self.means[:have], self.squares[:have] = counts, means, squares
        elif self.scatter:
            self._products = Products(features, features, device, symmetric=True)

    def update(self, x: Float[Tensor, "batch features"], y: Int[Tensor, " batch"]) -> None:
        """Take in a batch of features and their class labels."""
        x = rows_of("features", x, self.means.shape[1] if len(self.means) else None)
        y = checks.labels("labels", y, count=len(x), classes=self.classes).to(x.device)
        self._grow(self.classes or int(y.max()) + 1, x.shape[1], x.device)
        for part, target in zip(x.split(ROWS), y.split(ROWS)):
            self._take(part, target)
        self.resolution = max(self.resolution, torch.finfo(x.dtype).eps)

    def _take(self, x: Tensor, y: Tensor) -> None:
        present, at = torch.unique(y, return_inverse=True)
        number = torch.bincount(at, minlength=len(present)).double()
        divide = number.to(x.dtype)[:, None]
        coarse = x.new_zeros(len(present), x.shape[1]).index_add_(0, at, x) / divide
        centred = x - coarse[at]
        rest = torch.zeros_like(coarse).index_add_(0, at, centred) / divide
        centred -= rest[at]
        norms = torch.linalg.vector_norm(centred, dim=1).double().square()
        squares = torch.zeros_like(number).index_add_(0, at, norms)
        before = self.counts[present].double()
        shift = coarse.double() + rest.double() - self.means[present]
        factor = before * number / (before + number)
        if self._products is not None:
            rows = (shift * factor.sqrt()[:, None])[before > 0].to(x.dtype)
            self._products.add(torch.cat([centred, rows]))
        self.squares[present] += squares + factor * shift.square().sum(1)
        self.means[present] += shift * (number / (before + number))[:, None]
        self.counts[present] += number.long()

    def __add__(self, other: ClassScatter) -> ClassScatter:
        self._same(other)
        if not len(self.means) or not len(other.means):
            return ClassScatter.from_state_dict((self if len(self.means) else other).state_dict())
        require(
            (self.classes, self.scatter, self.means.shape[1])
            == (other.classes, other.scatter, other.means.shape[1]),
            f"+: classes={self.classes}, scatter={self.scatter}, {self.means.shape[1]} features and classes="
            f"{other.classes}, scatter={other.scatter}, {other.means.shape[1]} features do not match",
        )
        joined = ClassScatter.from_state_dict(self.state_dict())
        there, size = self.means.device, len(other.means)
        joined._grow(max(len(self.means), size), self.means.shape[1], there)
        a = joined.counts[:size].double()
        b = other.counts.double().to(there)
        total = (a + b).clamp(min=1)
        shift = other.means.to(there) - joined.means[:size]
        factor = a * b / total
        if joined._products is not None:
            joined._products.total += other.within.to(there)
            joined._products.add(shift * factor.sqrt()[:, None])
        joined.squares[:size] += other.squares.to(there) + factor * shift.square().sum(1)
        joined.means[:size] += shift * (b / total)[:, None]
        joined.counts[:size] += other.counts.to(there)
        joined.resolution = max(self.resolution, other.resolution)
        return joined

    def complete(self) -> ClassScatter:
        """Itself, if every class has a sample and there are at least two; else an error that names the missing ones."""
        missing = (self.counts == 0).nonzero().flatten().tolist()
        if missing:
            named = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise InputError(
                f"labels: no sample of class {named} ({len(missing)} of {len(self.counts)} classes are missing); "
                "expected at least one of each: leave the empty classes out by relabelling the others from 0"
            )
        require(len(self.counts) >= 2, f"labels: got {len(self.counts)} class, expected at least 2")
        return self
