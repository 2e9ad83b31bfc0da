"""A number with its 95 % interval: measured on all samples looked at, again on parts of them, and on each of two disjoint halves.

What few samples give differs from what many would in two ways, by chance and by a bias that shrinks as samples grow. The spread of the parts says the
first, their mean beside the number of all samples the second (Quenouille 1956, Tukey 1958: the jackknife, here of six groups).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypeVar

import torch
from torch import Tensor

from lineament.audit.phrases import compact

T = TypeVar("T")
PARTS = 6
# Student's t: of so many degrees of freedom, what 97.5 % lie below.
_STUDENT = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Estimate:
    """A measured number.

    Attributes:
        value: on all samples.
        halves: on each half of them; empty where there are none.
        error: half the width of its 95 % interval, over samples and over what the method itself leaves open.
    """

    value: float
    halves: tuple[float, ...]
    error: float

    @classmethod
    def of(
        cls,
        measure: Callable[[T], float],
        whole: T,
        parts: Sequence[T],
        halves: Sequence[T] = (),
        *,
        left_out: bool,
        method: float = 0.0,
    ) -> Estimate:
        """``measure`` of all samples and of each part, or with ``left_out`` of all but each part.

        ``method``: half the width of an interval over the method's own chance.

        >>> found = Estimate.of(float, 2.0, [1.0, 3.0, 2.5, 1.5], [1.75, 2.25], left_out=False)
        >>> found.value, found.halves, round(found.error, 2)
        (2.0, (1.75, 2.25), 1.45)
        """
        value, each = measure(whole), [measure(part) for part in parts]
        chance = bias = 0.0
        if len(each) > 1:
            k = len(each)
            # A bias that is one over the number of samples; as many samples of the whole as one part has, or all but one.
            bias = abs(fmean(each) - value) * (k - 1 if left_out else 1 / (k - 1))
            chance = interval(each) * (k - 1 if left_out else 1)
        errors = [math.hypot(chance, method) + bias, method]
        finite = [error for error in errors if math.isfinite(error)]
        return cls(value, tuple(measure(half) for half in halves), max(finite) if finite else math.nan)

    @property
    def low(self) -> float:
        """The least of what all samples and either half say."""
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


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of a few values, by Student's t; not a number where there is one value only.

    >>> round(interval([1.0, 2.0, 3.0]), 2)
    2.48
    """
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return math.nan
    return _STUDENT[min(len(values), len(_STUDENT)) - 1] * stdev(values) / math.sqrt(len(values))


def jackknife(each: Tensor, value: Callable[[Tensor], Tensor]) -> tuple[float, float, float]:
    """A value in [0, 1] of sums over samples with its 95 % interval, from the sums without each sample (the jackknife).

    >>> found, low, high = jackknife(torch.tensor([[1.0, 2.0], [2.0, 2.0], [1.0, 2.0]]), lambda s: s[..., 0] / s[..., 1])
    >>> round(found, 3), low < found < high
    (0.667, True)
    """
    total, count = each.sum(0), len(each)
    found = float(value(total))
    if count < 2:
        return found, -math.inf, math.inf
    without = torch.stack([value(total - one) for one in each]).nan_to_num(found)
    error = float(((count - 1) / count * (without - without.mean()).square().sum()).sqrt())
    return found, max(found - 1.96 * error, 0.0), min(found + 1.96 * error, 1.0)


def split(rows: Tensor, seed: int, labels: Tensor | None = None, parts: int = PARTS) -> list[Tensor]:
    """Disjoint parts of some rows, drawn at random, each in ascending order; none of fewer rows than parts.

    Args:
        labels: the class of each row: of every class the parts then have as many, to one; none where a class has fewer than four rows.

    >>> first, second = split(torch.arange(10), 0, torch.tensor([0] * 6 + [1] * 4), parts=2)
    >>> len(first), len(second), int((first > 5).sum()), int((second > 5).sum())
    (5, 5, 2, 2)
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed % 2**63))
    if labels is not None:
        order = order[torch.argsort(labels[order], stable=True)]
        if int(torch.unique(labels, return_counts=True)[1].min()) < 4:
            return []
    return [rows[order[k::parts]].sort().values for k in range(parts)] if len(rows) >= parts else []


def halved(parts: Sequence[T]) -> list[list[T]]:
    """The parts of either half."""
    return [list(parts[0::2]), list(parts[1::2])] if len(parts) > 1 else []


def without(parts: Sequence[T]) -> list[list[T]]:
    """All parts but one, for each."""
    return [[*parts[:k], *parts[k + 1 :]] for k in range(len(parts))] if len(parts) > 1 else []


def joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)).sort().values
