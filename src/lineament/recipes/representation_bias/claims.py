"""Claims of the representation-bias recipe: predicates from the paper and its controls, written before the first run."""

from __future__ import annotations

from collections.abc import Sequence

from lineament.measure.bias.consequences import rsa
from lineament.recipes.kit.claims import judged
from lineament.recipes.representation_bias.training import Measured, gap, mean
from lineament.report.outcome import Claim

Found = dict[str, list[Measured]]
_BIASED = ("easy and parity-3", "easy and parity-4")


def claims_of(found: Found) -> list[Claim]:
    """All claims that the run's conditions can judge."""
    claims = [claim for name in _BIASED if name in found for claim in _bias(name, found[name])]
    if "easy and xor" in found:
        claims.append(
            _no_gap(
                "easy and xor",
                found["easy and xor"],
                "two bits are not hard enough (not separated in the paper)",
            )
        )
    for name in ("two easy", "two hard"):
        if name in found:
            claims.append(_no_gap(name, found[name], "a control: alike features are represented alike"))
    if {"parity-4 first", "easy and parity-4"} <= found.keys():
        first, together = gap(found["parity-4 first"])[0], gap(found["easy and parity-4"])[0]
        claims.append(
            judged(
                "Learning parity-4 first narrows the gap, and does not close it",
                "the gap is smaller and stays",
                f"{first:+.3f} against {together:+.3f} (means of {len(found['parity-4 first'])} seeds)",
                0 < first < together,
                "the order of learning decides more, or less, at this scale",
            )
        )
    if "frequent and rare" in found:
        value, error = gap(found["frequent and rare"])
        claims.append(
            judged(
                "Of two easy features the one whose target is given ten times as often takes more variance (3 standard errors)",
                "rare features are represented less",
                f"{value:+.3f} ± {error:.3f}",
                value > 3 * error,
                "too few seeds, or both are learned as well",
            )
        )
    for name in ("parity-3", "parity-4"):
        names = (f"easy and {name}", f"{name}, easy alone", f"{name}, hard alone")
        if all(n in found for n in names):
            claims.append(_looks_like(name, *(found[n] for n in names)))
    if "untrained" in found:
        worst = max(abs(m.shuffled) for each in found.values() for m in each)
        claims.append(
            judged(
                "A shuffled feature explains nothing, in any network: |R²| ≤ 0.01",
                "a control",
                f"at most {worst:.4f}",
                worst <= 0.01,
                "too few samples",
            )
        )
    return claims


def _bias(name: str, each: Sequence[Measured]) -> list[Claim]:
    value, error = gap(each)
    lowest = min(min(m.accuracy) for m in each)
    reliance = mean(m.reliance for m in each)
    first, second = ([m.components[k] for m in each] for k in (0, 1))
    return [
        judged(
            f"{name}: both features are computed, with at least 99 % in every seed",
            "about 100 %",
            f"the worst {lowest:.2%} of {len(each)} seeds",
            lowest >= 0.99,
            "trained too short: its variances say nothing of bias",
        ),
        judged(
            f"{name}: the easy feature explains more variance, by more than 3 standard errors",
            "easy features take much more (figures)",
            f"{mean(m.r2[0] for m in each):.3f} against {mean(m.r2[1] for m in each):.3f}; gap {value:+.3f} ± {error:.3f}, {sum(m.r2[0] > m.r2[1] for m in each)} of {len(each)} seeds",
            value > 3 * error,
            "the seeds' spread is as large as the gap",
        ),
        judged(
            f"{name}: a new read-out that could use either follows the easy feature, in at least 90 % of conflicts",
            "about 100 %",
            f"{reliance:.3f}",
            reliance >= 0.9,
            "the hard feature is read as easily here",
        ),
        judged(
            f"{name}: principal components keep the easy feature first",
            "the easy feature needs fewer components",
            f"{mean(first):.1f} against {mean(second):.1f} components for 95 %",
            mean(first) < mean(second),
            "the same components hold both",
        ),
    ]


def _no_gap(name: str, each: Sequence[Measured], paper: str) -> Claim:
    value, error = gap(each)
    return judged(
        f"{name}: no gap beyond 3 standard errors",
        paper,
        f"{value:+.3f} ± {error:.3f}",
        abs(value) <= 3 * error,
        "seeds differ less than the two features",
    )


def _looks_like(
    name: str, both: Sequence[Measured], easy: Sequence[Measured], hard: Sequence[Measured]
) -> Claim:
    alike = [
        mean(rsa(m.patterns, other.patterns, kendall=False).spearman for m, other in zip(both, others))
        for others in (easy, hard)
    ]
    return judged(
        f"RSA: a network of easy and {name} looks more like one of the easy feature alone than like one of {name} alone",
        "both looks like easy alone",
        f"Spearman {alike[0]:.3f} against {alike[1]:.3f} (the same seeds' networks, {len(both[0].patterns)} samples)",
        alike[0] > alike[1],
        "both features shape the dissimilarities",
    )
