"""Judging a claim: the predicate's answer, and the reason where it is no."""

from __future__ import annotations

from lineament.report.outcome import Claim


def judged(name: str, paper: str, observed: str, holds: bool, otherwise: str) -> Claim:
    """A claim that holds, or does not for the reason ``otherwise``.

    >>> judged("a > b", "2 against 1", "1 against 2", False, "too few steps").reason
    'too few steps'
    """
    return Claim(name, paper, observed, holds, "" if holds else otherwise)
