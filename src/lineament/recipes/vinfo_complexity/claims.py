"""What the complexity recipe measures of one network, and what it claims of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim


@dataclass(frozen=True)
class Study:
    """One network: its numbers and controls by name, and what the figures draw.

    ``curves`` is information by site and feature, ``flow`` mean CKA (simplest residual, main, hardest residual, main; by block), ``means`` and
    ``tops`` complexity of all and of the most important features by checkpoint.
    """

    numbers: dict[str, float]
    controls: dict[str, float]
    sites: list[str]
    curves: Tensor
    complexity: Tensor
    errors: Tensor
    temporal: Tensor
    importance: Tensor
    flow: Tensor
    means: list[float]
    tops: list[float]


@dataclass(frozen=True)
class Suspects:
    """Shortcut suspects of a network trained with a planted mark, and of one without."""

    accuracy: tuple[float, float]
    found: tuple[int, int]
    cost: tuple[float, float]
    features: int


def claims_of(runs: Sequence[Study], suspects: Suspects) -> list[Claim]:
    """Predicates over the mean of the seeds; a further claim compares each effect with the spread over seeds where there are several."""

    def values(name: str) -> list[float]:
        return [run.numbers[name] for run in runs if name in run.numbers]

    def said(name: str) -> str:
        return ", ".join(f"{value:+.2f}" for value in values(name))

    def by(name: str, text: str, paper: str, holds: Callable[[float], bool]) -> Claim:
        found = values(name)
        return judged(
            text, paper, f"{name}: {said(name)}", bool(found) and holds(statistics.fmean(found)),
            "the network, its training or the number of features is too small for the effect, or the paper's holds at its scale only",
        )  # fmt: skip

    first, last = "K and importance, first epoch", "K and importance, end"
    claims = [
        by("K and Lambda", "Complex features are learned late: corr(K, Lambda) >= 0.5", "positive (figure)", lambda v: v >= 0.5),
        by(last, "At the end, important features are simpler: corr(K, importance) < 0", "negative at epoch 90 (figure)", lambda v: v < 0),
        by(first, "After the first epoch they are not: corr(K, importance) >= 0", "no relation at epoch 1 (figure)", lambda v: v >= 0),
        by("K and noise variance", "Complex features are less robust: rank corr(K, noise variance) >= 0.3", "positive (figure)", lambda v: v >= 0.3),
    ]  # fmt: skip
    if values("K and colour"):
        claims.append(
            by("K and colour", "Features that say the colour are simple: corr(K, variance explained by colour) <= -0.4",
               "colours are simple (figure)", lambda v: v <= -0.4)
        )  # fmt: skip
    claims += [
        by("simplest: residual minus main CKA", "The simplest features are stronger in the residual branch, as a mean over blocks", "residual branch from block 3 on (figure)", lambda v: v > 0),
        by("hardest: last third minus first third CKA", "The most complex features rise late: CKA in the last third of the blocks exceeds that in the first", "built up in both branches (figure)", lambda v: v > 0),
        by("top K, last minus first checkpoint", "The most important features grow simpler in training", "simpler (figure)", lambda v: v < 0),
        by("accuracy kept", "The dictionary keeps 99 % of the accuracy", "> 99 %", lambda v: v >= 0.99),
        by("K and Hoyer", "Complexity has no relation with locality: |corr(K, Hoyer)| <= 0.2", "no relation (figure)", lambda v: abs(v) <= 0.2),
        by("K and redundancy", "Complex features are less redundant: corr(K, redundancy) < 0", "negative (figure)", lambda v: v < 0),
        judged(
            "Among the features of a network trained with a planted mark there are shortcut suspects, and none where it was trained without",
            "not in the paper",
            f"{suspects.found[0]} with the mark, {suspects.found[1]} without, of {suspects.features} features",
            suspects.found[0] > 0 and suspects.found[1] == 0,
            "NMF on so small a network does not give the mark a feature of its own, or a plain digit's feature is read as early",
        ),
    ]  # fmt: skip
    return claims
