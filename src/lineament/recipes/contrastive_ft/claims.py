"""Claims of the contrastive-ft recipe: predicates from the paper and its controls, written before the first run. All are paired over seeds."""

from __future__ import annotations

from lineament.recipes.contrastive_ft.training import Trained
from lineament.recipes.kit.claims import Paired, higher, judged
from lineament.report.outcome import Claim

Runs = dict[str, list[Trained]]
_LATE, _SAME = "late positives", "negatives, each with itself"
# (ours, theirs, what is higher, claim, the paper's word)
_CLAIMS = (
    ("both", "MoCo", "read_out", "Feature transformation beats MoCo, both from the start", "+2.1 points on ImageNet"),
    (_LATE, "MoCo", "read_out", "Positive extrapolation from the middle on beats MoCo", "starting earlier is better"),
    (_LATE, "positives", "read_out", "Late positives beat positives from the start", "starting earlier is better: the contrary"),
    ("negatives", "MoCo", "read_out", "Negative interpolation alone beats MoCo", "+3 points on ImageNet-100"),
    ("negatives", "MoCo", "negative_variance", "Interpolated negatives raise the variance of negative scores", "shown (figure)"),
    ("negatives", "MoCo", "raw_variance", "Interpolated negatives raise that variance before they are mixed", "shown (figure)"),
    (_LATE, "MoCo", "raw_positive", "Extrapolation raises the positive score before it is transformed", "harder positives pull views together"),
    ("positives", "MoCo", "negative_mean", "Positives from the start crowd the embedding: the mean negative rises", "not reported"),
    (_LATE, "MoCo, rate x 2.6", "read_out", "Late positives beat MoCo at 2.6 times the rate", "implied; no such control"),
    (_LATE, "MoCo, temperature / 2.6", "read_out", "Late positives beat MoCo at a temperature lower by 2.6", "implied; no such control"),
    (_LATE, "late positives, λ 1.5", "read_out", "A drawn factor beats its mean, 1.5, in every step", "implied; no such control"),
    (_LATE, "late interpolation", "read_out", "Late extrapolation beats late interpolation of positives", "interpolation lowers accuracy (figure)"),
    ("positives, query untransformed", "positives", "negative_mean", "With the query untransformed for the negatives it crowds more", "not reported"),
)  # fmt: skip


def numbers(runs: list[Trained], what: str) -> list[float]:
    """One number of each seed; of a curve the mean over its last quarter."""
    if what in ("read_out", "neighbours"):
        return [getattr(run, what) for run in runs]
    found = []
    for run in runs:
        last = run.curves[what][-max(1, len(run.curves[what]) // 4) :]
        found.append(sum(last) / len(last))
    return found


def claims_of(found: Runs) -> list[Claim]:
    """All claims that the run's variants can judge; "beats": a linear read-out is better, beyond two standard errors."""
    claims = [
        higher(name, paper, numbers(found[ours], what), numbers(found[theirs], what))
        for ours, theirs, what, name, paper in _CLAIMS
        if ours in found and theirs in found
    ]
    if {"MoCo", _SAME} <= set(found):
        apart = Paired.of(numbers(found[_SAME], "read_out"), numbers(found["MoCo"], "read_out"))
        claims.append(
            judged(
                "It is the mixing: keys mixed with themselves are MoCo, within 0.01",
                "implied; no such control",
                str(apart),
                abs(apart.mean) <= 0.01,
                "rounding grows over the steps",
            )
        )
    gaps = [run.gap for runs in found.values() for run in runs if run.gap]
    if gaps:
        claims.append(
            judged(
                "In every step the transformed positive is S + 2 λ (1 - λ) (1 - S): within 1e-5",
                "extrapolation lowers the positive score",
                f"largest gap {max(gaps):.1e}",
                max(gaps) <= 1e-5,
                "rows are not of length 1",
            )
        )
    return claims
