"""Claims of the unpg recipe: predicates from the paper and its controls, written before the first run. All are paired over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lineament.recipes.kit.claims import Paired, higher, judged
from lineament.recipes.kit.recognition import Recognised, column
from lineament.recipes.unpg.training import Dropped
from lineament.report.outcome import Claim

Runs = dict[str, list[Recognised]]


@dataclass
class Found:
    """What was trained, by loss, one entry a seed; and what the filter drops of CosFace + UNPG's batches, with wrong labels."""

    wrong: Runs = field(default_factory=dict)
    clean: Runs = field(default_factory=dict)
    dropped: list[Dropped] = field(default_factory=list)


UNIFIED = "CosFace + UNPG"
_CLAIMS = (
    (UNIFIED, "CosFace", "With wrong labels UNPG raises CosFace", "+0.5 to +1.9 points on web-scraped data"),
    ("ArcFace + UNPG", "ArcFace", "With wrong labels UNPG raises ArcFace", "+0.5 to +1.9 points on web-scraped data"),
    (UNIFIED, "CosFace + UNPG, no filter", "The filter is needed: with it CosFace + UNPG is higher than without", "box and whisker removes label noise"),
    (UNIFIED, "CosFace + contrastive", "One denominator beats an added contrastive loss", "unified beats multi-objective"),
    (UNIFIED, "CosFace + triplet", "One denominator beats an added triplet loss", "unified beats multi-objective"),
    (UNIFIED, "CosFace, margin 0.5", "UNPG beats the base head at its own best margin, 0.5", "the base is tuned (not shown)"),
    (UNIFIED, "pairs detached", "The gain is the gradient through the pairs: with pairs detached it is lower", "implied; no such control"),
    (UNIFIED, "random directions", "It needs real samples: with random directions instead it is lower", "implied; no such control"),
)  # fmt: skip


def claims_of(found: Found) -> list[Claim]:
    """All claims that the run's losses can judge; TAR at FAR 1e-3 on people never seen, beyond two standard errors."""
    claims = [
        higher(name, paper, column(found.wrong[ours], "tar3"), column(found.wrong[theirs], "tar3"))
        for ours, theirs, name, paper in _CLAIMS
        if ours in found.wrong and theirs in found.wrong
    ]
    if UNIFIED in found.clean and "CosFace" in found.clean:
        claims.append(_clean(found.clean))
    if found.dropped:
        claims.append(_dropped(found.dropped))
    return claims


def _clean(runs: Mapping[str, Sequence[Recognised]]) -> Claim:
    apart = Paired.of(column(runs[UNIFIED], "tar3"), column(runs["CosFace"], "tar3"))
    return judged(
        "With clean labels UNPG changes little: the mean difference from CosFace is within 0.02",
        "gains on noisy sets; nothing said of clean ones",
        str(apart),
        abs(apart.mean) <= 0.02,
        "it costs something there" if apart.mean < 0 else "it gains there, too",
    )


def _dropped(each: Sequence[Dropped]) -> Claim:
    pairs, above, pairs_same, above_same = (
        sum(getattr(d, name) for d in each) for name in ("pairs", "above", "pairs_same", "above_same")
    )
    among, chance = above_same / max(above, 1), pairs_same / max(pairs, 1)
    return judged(
        "What the upper whisker drops is label noise: pairs of one person under two labels are 10 times as frequent there as among all unlike pairs",
        "suspected label noise",
        f"{above_same} of {above} dropped pairs ({among:.1%}) against {pairs_same} of {pairs} ({chance:.2%})",
        above > 0 and among >= 10 * chance,
        "most of what is dropped are two people",
    )
