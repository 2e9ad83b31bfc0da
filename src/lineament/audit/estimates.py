"""A number with its error: measured on all samples looked at, and again on each of two disjoint halves of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lineament.audit.phrases import compact

T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes:
        value: on all samples.
        halves: on each half of them; empty where there are none.
        error: the largest of the halves' distances from ``value`` and of what the method itself leaves open.
    """

    value: float
    halves: tuple[float, ...]
    error: float

    @classmethod
    def of(
        cls, measure: Callable[[T], float], whole: T, halves: Sequence[T], method: float = 0.0
    ) -> Estimate:
        """``measure`` of all samples and of each half; ``method``: an error of the method's own.

        >>> Estimate.of(float, 2.0, [1.5, 2.25])
        Estimate(value=2.0, halves=(1.5, 2.25), error=0.5)
        """
        value, parts = measure(whole), tuple(measure(half) for half in halves)
        errors = [method, *(abs(part - value) for part in parts)]
        finite = [error for error in errors if math.isfinite(error)]
        return cls(value, parts, max(finite) if finite else math.nan)

    @property
    def low(self) -> float:
        return min(self.value, *self.halves) if self.halves else self.value

    @property
    def high(self) -> float:
        return max(self.value, *self.halves) if self.halves else self.value

    @property
    def vague(self) -> bool:
        """Whether the error is as large as the number."""
        return not self.error < abs(self.value) and not self.value == self.error == 0

    def words(self, form: Callable[[float], str] = compact) -> str:
        """The number with its error, or where that is as large, what the halves say.

        >>> Estimate(162.0, (150.0, 171.0), 12.0).words()
        '162 ± 12'
        >>> Estimate(500.0, (417.0, 1081.0), 581.0).words()
        '500 (between 417 and 1,081 on halves of these samples)'
        """
        text = form(self.value)
        if not math.isfinite(self.value) or not math.isfinite(self.error) or self.error == 0:
            return text
        if self.vague and self.low < self.high:
            ends = [form(end) for end in (min(self.halves), max(self.halves))]
            return f"{text} (between {ends[0]} and {ends[1]} on halves of these samples)"
        return f"{text} ± {form(float(f'{self.error:.2g}'))}"


def halves(rows: Tensor, seed: int, labels: Tensor | None = None) -> list[Tensor]:
    """Two disjoint halves of some rows, drawn at random, each in ascending order; none of a single row.

    Args:
        labels: the class of each row: of every class the halves then have as many, to one; none where a class has fewer than four rows.

    >>> first, second = halves(torch.arange(10), 0, torch.tensor([0] * 6 + [1] * 4))
    >>> len(first), len(second), int((first > 5).sum()), int((second > 5).sum())
    (5, 5, 2, 2)
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed % 2**63))
    if labels is not None:
        order = order[torch.argsort(labels[order], stable=True)]
    parts = [rows[order[0::2]].sort().values, rows[order[1::2]].sort().values]
    if labels is not None and int(torch.unique(labels, return_counts=True)[1].min()) < 4:
        return []
    return parts if len(rows) > 1 else []
