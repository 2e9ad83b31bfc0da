"""What the recipe measures of each layer, and what it claims of it; every predicate was written before the first run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lineament.report.outcome import Claim


@dataclass(frozen=True)
class Layer:
    """Means over the pairs of networks at one layer; the curves are of the first pair."""

    site: str
    units: int
    semi: float
    match: float
    error: float
    overlap: float
    shuffled: float
    rotated: float
    untrained: float
    best: float
    worst: float
    single: float
    few: float
    few_units: float
    dense: float
    information: float
    subspace: float
    spectrum: float
    curve_semi: list[float]
    curve_match: list[float]
    curve_shuffled: list[float]
    curve_untrained: list[float]


def all_claims(layers: Sequence[Layer], copied: float) -> list[Claim]:
    def told(*names: str) -> str:
        return "; ".join(" / ".join(f"{getattr(layer, name):.3f}" for name in names) for layer in layers)

    def every(holds: Callable[[Layer], bool], chosen: Sequence[Layer] = layers) -> bool:
        return all(holds(layer) for layer in chosen)

    last = layers[-1]
    turned = last.match >= last.rotated + 0.05
    claims = [
        Claim(
            "Units of one training are found by another: one-to-one correlations exceed those between shuffled images by 0.15 in every layer",
            "means 0.66 (conv1) to 0.34 (conv4), no null given",
            f"matched / shuffled by layer: {told('match', 'shuffled')}",
            every(lambda layer: layer.match >= layer.shuffled + 0.15),
            "the images' own statistics give nearly as much in some layer",
        ),
        Claim(
            "They are units, and not only a shared subspace: in the first two layers one-to-one correlations exceed those of units turned at random by 0.05",
            "not measured",
            f"matched / rotated by layer: {told('match', 'rotated')}",
            every(lambda layer: layer.match >= layer.rotated + 0.05, layers[:2]),
            "a random basis of the same subspace matches as well",
        ),
        Claim(
            "The same in the last layer",
            "not measured",
            f"matched {last.match:.3f}, rotated {last.rotated:.3f}",
            turned,
            "there the networks share a subspace, not units: a random basis matches nearly as well",
        ),
        Claim(
            "Some units are found by every network and some by none: in every layer the best pair correlates at 0.85 or more and the worst at 0.3 or less",
            "a few units at 0.9 and more, others near 0.1 (figure)",
            f"best / worst by layer: {told('best', 'worst')}",
            every(lambda layer: layer.best >= 0.85 and layer.worst <= 0.3),
            "the layer has no unit that matches so well, or none so badly",
        ),
        Claim(
            "Units span small common subspaces: on held-out images at most 8 units leave 15 % less of the half-MSE than the best single unit, in every layer",
            "conv1: 0.17 with 6.4 weights a unit",
            f"best unit / few units / dense map by layer: {told('single', 'few', 'dense')}",
            every(lambda layer: layer.few <= 0.85 * layer.single and layer.few_units <= 8),
            "few units do not help enough on images that the map was not fitted to",
        ),
        Claim(
            "Mutual information ranks pairs as correlation does: Spearman's correlation of 0.7 or more in every layer",
            "7 of the 8 best pairs of conv1 are the same",
            f"by layer: {told('information')}",
            every(lambda layer: layer.information >= 0.7),
            "units share information that is not linear",
        ),
        Claim(
            "Subspaces align better than units: the mean canonical correlation exceeds the one-to-one mean in every layer",
            "clusters of units span matched subspaces",
            f"canonical / one to one by layer: {told('subspace', 'match')}",
            every(lambda layer: layer.subspace > layer.match),
            "the units match so well there that the weakest directions of the space, which count as much as any in a canonical correlation, lie below them",
        ),
        Claim(
            "The spectra of mean activations agree between networks: the sorted means correlate at 0.9 or more in every layer",
            "spectra are similar, their top differs",
            f"by layer: {told('spectrum')}",
            every(lambda layer: layer.spectrum >= 0.9),
            "the most active units differ too much",
        ),
        Claim(
            "Control: untrained networks match better than trained ones in the last layer, so they are no null for learning",
            "not measured",
            f"untrained / trained by layer: {told('untrained', 'match')}",
            last.untrained > last.match,
            "here training makes the last layer more alike than the images alone do",
        ),
        Claim(
            "Control: a copy with its units in another order is matched unit by unit, every correlation 1 to 1e-4",
            "1",
            f"smallest correlation {copied:.6f}",
            copied > 1 - 1e-4,
        ),
    ]
    return [Claim(c.name, c.paper, c.observed, c.holds, "" if c.holds else c.reason) for c in claims]
