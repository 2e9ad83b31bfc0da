"""The heads that the recipe compares, by name, and the controls: a deterministic twin, and margins matched otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lineament.losses.class_head import ClassHead
from lineament.losses.margins import ArcFace, CosFace, Cosine, Elastic, Margin, matched


class Damped(ArcFace):
    """e^(-σ²/2) cos(θ + m): the mean of cos(θ + e) over e ~ N(m, σ²), without its randomness."""

    def __init__(self, m: float = 0.5, sigma: float = 0.2):
        super().__init__(m)
        self.factor = math.exp(-(sigma**2) / 2)

    def forward(self, cosine: Tensor, norms: Tensor, drawn: Tensor | None = None) -> Tensor:
        return self.factor * super().forward(cosine, norms, drawn)


class Reversed(Elastic):
    """Elastic margins, the largest for the sample that is nearest to its class."""

    def draw(self, cosine: Tensor, generator: torch.Generator | None) -> Tensor | None:
        drawn = super().draw(cosine, generator)
        return drawn if drawn is None else matched(-cosine, drawn, "rank")


# name -> (its margin, with the large σ where it has one; its scale)
HEADS: dict[str, tuple[Callable[[float], Margin], float]] = {
    "soft-max": (lambda _: Cosine(), 16.0),
    "CosFace": (lambda _: CosFace(0.35), 16.0),
    "ArcFace": (lambda _: ArcFace(0.5), 16.0),
    "Elastic-Cos": (lambda _: Elastic("cos"), 16.0),
    "Elastic-Arc": (lambda _: Elastic("arc"), 16.0),
    "Elastic-Arc, large σ": (lambda s: Elastic("arc", sigma=s), 16.0),
    "its mean, not random": (lambda s: Damped(sigma=s), 16.0),
    "Elastic-Arc+, rank": (lambda s: Elastic("arc", sigma=s, match="rank"), 16.0),
    "Elastic-Arc+, official": (lambda s: Elastic("arc", sigma=s, match="official"), 16.0),
    "Elastic-Arc+, reversed": (lambda s: Reversed("arc", sigma=s), 16.0),
}

_SCALES, _ANGLES, _OFFSETS = (10.0, 16.0), (0.1, 0.3, 0.5), (0.2, 0.35, 0.5)
# What is tried on validation people for each: scales, and margins where it has one.
GRID: dict[str, tuple[Callable[[float, float], Margin], tuple[float, ...], tuple[float, ...]]] = {
    "soft-max": (lambda m, _: Cosine(), (8.0, 10.0, 12.0, 16.0), (0.0,)),
    "CosFace": (lambda m, _: CosFace(m), _SCALES, _OFFSETS),
    "ArcFace": (lambda m, _: ArcFace(m), _SCALES, _ANGLES),
    "Elastic-Cos": (lambda m, _: Elastic("cos", m), _SCALES, _OFFSETS),
    "Elastic-Arc": (lambda m, _: Elastic("arc", m), _SCALES, _ANGLES),
    "Elastic-Arc, large σ": (lambda m, s: Elastic("arc", m, s), _SCALES, _ANGLES),
    "its mean, not random": (Damped, _SCALES, _ANGLES),
    "Elastic-Arc+, rank": (lambda m, s: Elastic("arc", m, s, match="rank"), _SCALES, _ANGLES),
    "Elastic-Arc+, official": (lambda m, s: Elastic("arc", m, s, match="official"), _SCALES, _ANGLES),
    "Elastic-Arc+, reversed": (lambda m, s: Reversed("arc", m, s), _SCALES, _ANGLES),
}


def maker(name: str, sigma: float, scale: float | None = None) -> Callable[[int, int, int], ClassHead]:
    """Makes a head of (classes, size, seed); with the scale that suits generated people where none is given."""
    margin, usual = HEADS[name]
    return lambda classes, size, seed: ClassHead(classes, size, margin(sigma), scale or usual, seed=seed)


def face_maker(name: str, sigma: float, scale: float) -> Callable[[int, int, int], ClassHead]:
    """As :func:`maker`, with class weights drawn as the released training draws them."""

    def make(classes: int, size: int, seed: int) -> ClassHead:
        head = maker(name, sigma, scale)(classes, size, seed)
        torch.nn.init.normal_(head.weight, std=0.01, generator=head.generator)
        return head

    return make


def tuned(name: str, scale: float, m: float, sigma: float) -> Callable[[int, int, int], ClassHead]:
    """As :func:`maker`, with a scale and margin of the grid."""
    return lambda classes, size, seed: ClassHead(classes, size, GRID[name][0](m, sigma), scale, seed=seed)


def rank_correlation(match: str | None, samples: int, sigma: float, seed: int) -> float:
    """Spearman's correlation between a batch's target cosines and the margins that they get."""
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(samples, generator=generator)
    margin = Reversed("arc", sigma=sigma) if match == "reversed" else Elastic("arc", sigma=sigma, match=match)  # pyright: ignore
    drawn = margin.draw(cosines, generator)
    assert drawn is not None
    ranks = torch.stack([v.double().argsort().argsort().double() for v in (cosines, drawn)])
    return float(torch.corrcoef(ranks)[0, 1])
