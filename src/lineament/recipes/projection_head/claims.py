"""Claims of the projection-head recipe: predicates from the paper and its controls, written before the first run. All are paired over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lineament.recipes.kit.claims import Paired, higher, judged
from lineament.recipes.projection_head.training import Groups, Pair, Probed, Weights
from lineament.report.outcome import Claim


@dataclass
class Found:
    """The linear network's weights; by kind of training, by probability of dropping, and of groups: one entry a seed."""

    weights: Weights
    kinds: dict[str, list[Probed]] = field(default_factory=dict)
    drops: dict[float, list[Pair]] = field(default_factory=dict)
    groups: list[Groups] = field(default_factory=list)


def values(each: Sequence[Probed], side: str, what: str) -> list[float]:
    """One number of each seed."""
    return [getattr(getattr(found, side), what) for found in each]


def claims_of(found: Found) -> list[Claim]:
    """All claims that the run's trainings can judge; "more" is beyond two standard errors."""
    return [*_linear(found.weights), *_fine(found.kinds), *_drops(found.drops), *_groups(found.groups)]


def _linear(w: Weights) -> list[Claim]:
    gaps = [
        max(abs(a - b) for a, b in zip(ours, theory))
        for ours, theory in ((w.before, w.before_theory), (w.after, w.after_theory))
    ]
    squares = max(abs(b**2 - a) for b, a in zip(w.before, w.after))
    return [
        judged(
            "The trained linear network weighs features as the closed form says: within 0.02 before and after the head",
            "pre = F^(1/4), post = F^(1/2)",
            f"largest gap {gaps[0]:.4f} before, {gaps[1]:.4f} after",
            max(gaps) <= 0.02,
            "the weakest features still grow: the loss is flat there",
        ),
        judged(
            "The head squares every weight: within 0.01",
            "layer-wise progressive feature weighting",
            f"largest |before² - after| {squares:.4f}",
            squares <= 0.01,
            "the layers are not balanced",
        ),
    ]


def on_folder(found: dict[str, Any], divided: bool) -> list[Claim]:
    """The claims on a folder of photographs; where classes have no sub-folders, only SimCLR, which sees no labels, has something to lose."""
    kinds = {name: [each.read for each in runs] for name, runs in found.items()}
    claims = (
        _fine(kinds, ("SL", "SCL", "SimCLR"), "sub-folders")
        if divided
        else _fine(kinds, ("SimCLR",), "classes")
    )
    for name, runs in found.items():
        groups = [each.groups for each in runs if each.groups is not None]
        if not name.endswith("no head"):
            claims += [replace(claim, name=f"{name}: {claim.name}") for claim in _groups(groups)]
    return claims


def _fine(
    kinds: dict[str, list[Probed]], hows: Sequence[str] = ("SL", "SCL"), what: str = "fine classes"
) -> list[Claim]:
    claims: list[Claim] = []
    for how in hows:
        mlp = kinds.get(f"{how}, MLP head")
        if mlp is None:
            continue
        before, after = values(mlp, "before", "fine_standardised"), values(mlp, "after", "fine_standardised")
        claims.append(
            higher(f"{how}: {what} are kept before an MLP head and lost after it", "sub-class information is reduced by the head", before, after)
        )  # fmt: skip
        untrained = values(mlp, "untrained", "fine_standardised")
        claims.append(
            higher(
                f"{how}: an untrained head of the same shape loses less than the trained one",
                "implied; no such control",
                untrained,
                after,
            )
        )
        components = values(mlp, "components", "fine_standardised")
        claims.append(
            higher(
                f"{how}: as many principal components keep more than the head",
                "implied; no such control",
                components,
                after,
            )
        )
    for how in (how for how in hows if how != "SL"):
        for head, a_head, paper in (
            ("MLP head", "an MLP head", "better representation"),
            ("fixed head", "a fixed head", "a controllable substitute"),
        ):
            ours, theirs = kinds.get(f"{how}, {head}"), kinds.get(f"{how}, no head")
            if ours and theirs:
                pair = [values(each, "before", "fine_standardised") for each in (ours, theirs)]
                claims.append(
                    higher(f"{how}: training with {a_head} and dropping it beats none", paper, *pair)
                )
    for how in hows:
        fixed = kinds.get(f"{how}, fixed head")
        if fixed is not None:
            claims += _blind(how, fixed)
    return claims


def _blind(how: str, fixed: list[Probed]) -> list[Claim]:
    apart = Paired.of(
        values(fixed, "before", "fine_standardised"), values(fixed, "after", "fine_standardised")
    )
    plain = Paired.of(values(fixed, "before", "fine"), values(fixed, "after", "fine"))
    return [
        judged(
            f"{how}: a standardised read-out cannot see the fixed head (within 0.005), one as it is can (more than 0.02)",
            "released notebooks standardise",
            f"before less after: standardised {apart}, as it is {plain}",
            abs(apart.mean) <= 0.005 and plain.mean > 0.02,
            "the read-out as it is does not lose much, either" if abs(apart.mean) <= 0.005 else "rounding",
        )
    ]


def _drops(drops: dict[float, list[Pair]]) -> list[Claim]:
    claims = [
        higher(
            f"Where a view drops the digit with probability {drop:g}, it is read out better before the head",
            "augmentation destroys the feature after the head",
            [p.before for p in each],
            [p.after for p in each],
        )
        for drop, each in sorted(drops.items())
        if drop > 0
    ]
    if 0.0 in drops and len(drops) > 1:
        worst = drops[max(drops)]
        losses: list[Any] = [[p.before - p.after for p in each] for each in (worst, drops[0.0])]
        claims.append(
            higher(
                f"The head loses more of the digit when views always differ in it ({max(drops):g} against 0)",
                "grows with the disruption",
                *losses,
            )
        )
    return claims


def _groups(groups: list[Groups]) -> list[Claim]:
    if not groups:
        return []
    return [
        higher(
            f"The worst group is better before the head ({how})",
            "worst-group accuracy, Waterbirds and UrbanCars",
            [getattr(each, name).before for each in groups],
            [getattr(each, name).after for each in groups],
        )
        for name, how in (("dfr", "read out from as many of each group"), ("mlp", "DFR-MLP"))
    ]
