"""Claims of the unified-embedding recipe: predicates from the paper and its controls, written before the first run. All are paired over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lineament.modules.unified_embedding.collisions import expected_collisions
from lineament.recipes.kit.claims import Paired, higher, judged
from lineament.recipes.unified_embedding.training import Angles, Score
from lineament.report.outcome import Claim


@dataclass
class Found:
    """By scheme and fraction of the rows, by control, by rows of the one-layer model (0: collisionless): one entry a seed."""

    sizes: list[int]
    scores: dict[tuple[str, float], list[Score]] = field(default_factory=dict)
    controls: dict[tuple[str, str], list[Score]] = field(default_factory=dict)
    angles: dict[int, list[Angles]] = field(default_factory=dict)
    collisions: dict[int, list[float]] = field(default_factory=dict)


def aucs(each: Sequence[Score]) -> list[float]:
    return [score.auc for score in each]


def claims_of(found: Found, config: Any) -> list[Claim]:
    """All claims that the run's settings can judge; "beats": AUC is higher by more than two standard errors."""
    return [*_shared(found, config), *_controls(found, config), *_angles(found), *_collisions(found)]


def _shared(found: Found, config: Any) -> list[Claim]:
    claims, paper = [], ".7912 against .743 at .42 (tutorial); .8259 against .7707 at the smallest (table)"
    for fraction in config.fractions:
        for k, words in (("2x8", "as many look-ups"), ("1x16", "one look-up each")):
            ours, theirs = (found.scores.get((f"{where} {k}", fraction)) for where in ("unified", "separate"))
            if ours and theirs:
                claims.append(
                    higher(f"One table beats separate ones of as many rows at {fraction:g} of the vocabulary, {words} ({k})", paper, aucs(ours), aucs(theirs))
                )  # fmt: skip
        two, one = found.scores.get(("unified 2x8", fraction)), found.scores.get(("unified 1x16", fraction))
        if two and one and fraction == config.control_fraction:
            claims.append(
                higher(
                    f"In one table two narrow look-ups beat a wide one, at {fraction:g}",
                    "one look-up is about 2 % lower",
                    aucs(two),
                    aucs(one),
                )
            )
            separate = found.scores.get(("separate 1x16", fraction))
            if separate:
                claims.append(_half(aucs(two), aucs(one), aucs(separate), fraction))
    return claims


def _half(two: list[float], one: list[float], separate: list[float], fraction: float) -> Claim:
    whole, sharing = Paired.of(two, separate), Paired.of(one, separate)
    share = sharing.mean / whole.mean if whole.mean else 0.0
    return judged(
        f"Sharing rows, not the second look-up, makes most of the headline gap at {fraction:g}: more than half of it",
        "the gap is given without separating the two",
        f"whole gap {whole}, by sharing alone {sharing}: {share:.0%}",
        share > 0.5 and whole.above,
        "half or less is sharing",
    )


def _controls(found: Found, config: Any) -> list[Claim]:
    base = {
        where: found.scores.get((f"{where} 2x8", config.control_fraction))
        for where in ("unified", "separate")
    }
    claims, at = [], f"at {config.control_fraction:g}"
    if not (base["unified"] and base["separate"]):
        return []
    joined = Paired.of(aucs(base["unified"]), aucs(base["separate"]))
    pair = [found.controls.get((f"{where} 2x8, summed", "random")) for where in ("unified", "separate")]
    if pair[0] and pair[1]:
        summed = Paired.of(aucs(pair[0]), aucs(pair[1]))
        claims.append(
            judged(
                f"Where features are summed before any reader, the gain of sharing at least halves, {at}",
                "collisions between features are harmless because each has its own reader",
                f"joined {joined}, summed {summed}",
                summed.mean <= joined.mean / 2,
                "it does not need readers of their own here",
            )
        )
    pair = [found.controls.get((f"{where} 2x8", "time")) for where in ("unified", "separate")]
    if pair[0] and pair[1]:
        claims.append(
            higher(
                f"One table beats separate ones on the latest fifth of the ratings, {at}",
                "random split only",
                aucs(pair[0]),
                aucs(pair[1]),
            )
        )
    same = {
        ("unified 2x8, one salt", "random"): "One salt for all features makes no difference",
        ("unified 2x8", "shuffled"): "Renumbered ids make no difference",
    }
    for key, words in same.items():
        each = found.controls.get(key)
        if each:
            apart = Paired.of(aucs(each), aucs(base["unified"]))
            name = f"{words}: the mean difference is within 0.005, {at}"
            claims.append(judged(name, "not reported", str(apart), abs(apart.mean) <= 0.005, "it does"))
    return claims


def _angles(found: Found) -> list[Claim]:
    rows = [r for r in found.angles if r]
    if not rows or 0 not in found.angles:
        return []
    few = min(rows)
    mean = {
        r: [statistics.mean(getattr(a, k) for a in found.angles[r]) for k in ("mean", "largest")]
        for r in found.angles
    }
    return [
        judged(
            f"Readers of the two largest features turn orthogonal under collisions only: 60° or more in {few} rows, 30° or less without collisions",
            "0° at the start, 70° to 72° in the smallest table",
            "; ".join(
                f"{'collisionless' if r == 0 else f'{r} rows'}: {m[1]:.0f}° (all pairs {m[0]:.0f}°)"
                for r, m in mean.items()
            ),
            mean[few][1] >= 60 and mean[0][1] <= 30,
            "not in so short a training",
        )
    ]


def _collisions(found: Found) -> list[Claim]:
    claims = []
    for rows, (intra, inter) in found.collisions.items():
        expected = expected_collisions(found.sizes, rows)
        gaps = [abs(intra / expected.intra - 1), abs(inter / expected.inter - 1)]
        claims.append(
            judged(
                f"Collisions within and between features are as predicted in {rows} rows: within 5 %",
                "Σ N_t (N_t - 1) / 2M and the rest of N (N - 1) / 2M",
                f"within {intra:.0f} (predicted {expected.intra:.0f}), between {inter:.0f} ({expected.inter:.0f}); separate tables of these rows have {expected.proportional:.0f} within",
                max(gaps) <= 0.05,
                "the hash is uneven",
            )
        )
    return claims
