"""Do weights sit in a settled minimum of the loss? What its spectrum says of it, what speaks against it, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lineament.audit.estimates import Estimate
from lineament.audit.phrases import compact, percent
from lineament.core.curvature.density import Density
from lineament.measure.landscape.criteria import Criteria
from lineament.measure.landscape.results import Plane
from lineament.measure.landscape.spectrum import MeanGradient
from lineament.report.section import Finding

# Below this share of the largest curvature a downward one is as small as a trained network's; above, the place is a saddle.
_STEEP = 0.1
# From this K_H0.5 on, about as much curves downwards as in a network that has not learned.
_MANY = 0.5
# A gradient of zero measures one noise on average; above so many it is one that sampling hardly makes.
_NOISES = 2.0
_SETTLE = "On samples that it did not learn from this is usual: audit its training samples to learn how settled it is. If these are, train it longer or at a smaller rate (sharpness-aware minimisation, SAM, seeks flatter places)."


@dataclass(frozen=True)
class Curvature:
    """The spectrum of the Hessian over some samples: its ends, its trace, its density, the criteria made of it, the loss around.

    ``settled``: whether it is a minimum, ``None`` where these samples do not tell; ``why``: what is against it, or what they leave open.
    ``errors`` (half the width of a 95 % interval) and ``halves`` are of the numbers by name; ``rows`` the samples of each half and ``parts`` of each
    part, by their numbers in the data; ``of`` says of what ``accuracy`` is the share, where not of samples.
    """

    top: float
    bottom: float
    trace: float
    flat_share: float
    re: float
    k: float
    errors: dict[str, float]
    halves: dict[str, tuple[float, ...]]
    eigenvalues: Sequence[float]
    residuals: Sequence[float]
    settled: bool | None
    why: Sequence[str]
    loss: float
    constant_loss: float
    accuracy: float | None
    chance: float | None
    of: str
    gradient_norm: float | None
    gradient_noise: float | None
    gradient_parts: int
    weights: int
    samples: int
    rows: Sequence[Sequence[int]]
    parts: Sequence[Sequence[int]]
    steps: int
    probes: int
    density: Density
    criteria: Criteria
    plane: Plane | None

    def to_dict(self) -> dict[str, Any]:
        nodes, weights = self.density.nodes.double(), self.density.weights.double()
        found = self.criteria
        return {
            **{name: value for name, value in vars(self).items() if name != "of"},
            "density": {"nodes": nodes.flatten().tolist(), "weights": weights.flatten().tolist()},
            "criteria": {k: getattr(found, k) for k in ("re", "k", "verdict", "negative", "effective_rank")},
        }


def objections(
    estimates: dict[str, Estimate],
    gradient: MeanGradient | None,
    loss: float,
    constant: float,
    accuracy: float | None,
    chance: float | None,
    of: str,
) -> tuple[list[str], list[str]]:
    """What is against a minimum on all samples and on either half, and what these leave open."""
    top, bottom, k = estimates["top"], estimates["bottom"], estimates["k"]
    against, open_ = [], []
    if not loss < constant:
        against.append(
            f"the loss, {compact(loss)}, is not below what the best constant answer has ({compact(constant)})"
        )
    if accuracy is not None and chance is not None and accuracy <= chance:
        against.append(
            f"it is right for {percent(accuracy)}{of}, and the most frequent class alone would be for {percent(chance)}"
        )
    if gradient is None:
        open_.append("a single batch does not tell how far the gradient is from zero")
    elif gradient.ratio > _NOISES:
        against.append(
            f"the gradient is not zero there (norm {compact(gradient.norm)}, {compact(gradient.ratio)} times what sampling makes of none, {compact(gradient.noise)})"
        )
    tops, bottoms = (top.value, *top.halves), (bottom.value, *bottom.halves)
    steep = [b < -_STEEP * max(t, 0) for t, b in zip(tops, bottoms)]
    many = [not each < _MANY for each in (k.value, *k.halves)]
    for found, text in (
        (
            steep,
            f"the loss curves steeply downwards (lowest curvature {bottom.words()}, highest {top.words()})",
        ),
        (many, f"many directions curve downwards (K_H0.5 = {k.words()})"),
    ):
        if all(found):
            against.append(text)
        elif any(found):
            open_.append(f"{text}, on some of the samples and not on others")
    return against, open_


def verdict(found: Curvature) -> str:
    if found.settled is None:
        return f"Whether it sits in a minimum these samples do not tell: {'; '.join(found.why)}."
    if not found.settled:
        return f"It does not sit in a minimum on these samples: {'; '.join(found.why)}."
    right = "" if found.accuracy is None else f" and it is right for {percent(found.accuracy)}{found.of}"
    return (
        f"It sits in a minimum, as far as these samples tell: the gradient (norm {compact(found.gradient_norm or 0)}) is within {compact(_NOISES)} times what sampling makes of none "
        f"({compact(found.gradient_noise or 0)}, from {found.gradient_parts} parts), nothing curves downwards by more than a tenth of the steepest, and the loss is {compact(found.loss)}, where the best "
        f"constant answer has {compact(found.constant_loss)}{right}."
    )


def finding(found: Curvature, estimates: dict[str, Estimate]) -> Finding:
    if found.settled is None:
        text = (
            f"Whether it sits in a minimum of the loss on {found.samples:,} samples is open: {found.why[0]}."
        )
        return Finding(
            "note", text, advice="Audit more samples, or with another seed, and compare.", key="minimum open"
        )
    if not found.settled:
        text = f"It does not sit in a minimum of the loss on {found.samples:,} samples: {found.why[0]}."
        return Finding("note", text, advice=_SETTLE, key="no minimum")
    text = f"It sits in a minimum of the loss on {found.samples:,} samples, of largest curvature {estimates['top'].words()}; {estimates['flat_share'].words(percent)} of weight directions are nearly flat."
    return Finding("good", text, key="minimum")
