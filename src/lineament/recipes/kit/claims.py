"""Judging a claim: the predicate's answer, and the reason where it is no; differences that are paired over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from lineament.report.outcome import Claim


def judged(name: str, paper: str, observed: str, holds: bool, otherwise: str) -> Claim:
    """A claim that holds, or does not for the reason ``otherwise``.

    >>> judged("a > b", "2 against 1", "1 against 2", False, "too few steps").reason
    'too few steps'
    """
    return Claim(name, paper, observed, holds, "" if holds else otherwise)


@dataclass(frozen=True)
class Paired:
    """The mean of differences between two runs of each seed, with its standard error.

    >>> print(Paired.of([0.6, 0.7, 0.8], [0.5, 0.61, 0.69]))
    +0.100 ± 0.006 (3 seeds)
    """

    mean: float
    error: float
    count: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Paired:
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        spread = statistics.stdev(differences) if len(differences) > 1 else math.inf
        return cls(statistics.mean(differences), spread / math.sqrt(len(differences)), len(differences))

    @property
    def above(self) -> bool:
        """Whether the difference is positive by more than two standard errors."""
        return self.mean > 2 * self.error

    @property
    def below(self) -> bool:
        """Whether it is negative by more than two standard errors."""
        return self.mean < -2 * self.error

    def __str__(self) -> str:
        if self.count < 2:
            return f"{self.mean:+.3f} (1 seed)"
        return f"{self.mean:+.3f} ± {self.error:.3f} ({self.count} seeds)"


def higher(
    name: str, paper: str, ours: Sequence[float], theirs: Sequence[float], *, otherwise: str = ""
) -> Claim:
    """A claim that ``ours`` is higher than ``theirs``, paired over seeds: by more than two standard errors.

    >>> claim = higher("a > b", "higher", [0.8, 0.81], [0.5, 0.5])
    >>> claim.holds, claim.observed
    (True, '0.805 against 0.500: +0.305 ± 0.005 (2 seeds)')
    """
    found = Paired.of(ours, theirs)
    reason = "it is lower" if found.below else "not resolved: within two standard errors"
    reason = "not resolved with one seed" if found.count < 2 else reason
    observed = f"{statistics.mean(ours):.3f} against {statistics.mean(theirs):.3f}: {found}"
    return judged(name, paper, observed, found.above, f"{reason}; {otherwise}" if otherwise else reason)


def welch(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The two-sided p of Welch's t-test: means of independent runs, whose variances may differ; ``nan`` with fewer than two of each.

    >>> round(welch([0.80, 0.81, 0.82], [0.79, 0.80, 0.84]), 2)
    1.0
    """
    from scipy.stats import ttest_ind

    if min(len(ours), len(theirs)) < 2:
        return math.nan
    return float(ttest_ind(ours, theirs, equal_var=False).pvalue)  # pyright: ignore
