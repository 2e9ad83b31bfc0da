"""The claims of the useful recipe; their predicates were written before the first run."""

from __future__ import annotations

import statistics
from typing import Any

from lineament.recipes.useful.theory import WAYS, Theory
from lineament.recipes.useful.training import Early, Final
from lineament.report.outcome import Claim

# Better method, worse one, the paper's words. Judged by the mean paired difference of the last epoch's test errors.
_PAIRS = (
    ("sgd+useful", "sgd", "USEFUL lowers the test error of SGD", "in every panel (bars)"),
    ("sam+useful", "sam", "USEFUL lowers the test error of SAM", "in every panel (bars)"),
    ("asam+useful", "asam", "USEFUL lowers the test error of ASAM", "lower (bars)"),
    ("sgd+useful+ta", "sgd+ta", "USEFUL lowers the test error of SGD with TrivialAugment", "lower (bars)"),
    ("sgd+useful", "sgd+random", "USEFUL is better than as many random copies", "lower (ablation)"),
    (
        "sgd+useful",
        "sgd+steps",
        "USEFUL is better than as many steps on the original data",
        "control of ours",
    ),
    ("sgd+useful", "sgd+upweight", "Copies are better than a doubled loss", "lower (ablation)"),
    ("sgd+useful", "sgd+quantile", "Clusters are better than the highest losses", "lower (ablation)"),
    ("sgd+useful", "sgd+misclassified", "Clusters are better than what is misclassified", "lower (ablation)"),
    ("sgd+useful", "sgd+eiil", "Clusters are better than EIIL's environments", "lower (ablation)"),
    ("sgd+useful", "sgd+jtt", "USEFUL is better than JTT", "lower (ablation)"),
    ("sgd+useful", "sgd+useful3", "Two copies are better than three", "2 is the best factor (ablation)"),
)


def claims_of(
    config: Any,
    theory: Theory,
    early: list[Early],
    found: dict[str, list[Final]],
) -> list[Claim]:
    claims = _theory(config, theory)
    if early and early[0].recall is not None:
        recall = statistics.fmean(e.recall or 0.0 for e in early)
        precision = statistics.fmean(e.precision or 0.0 for e in early)
        claims.append(
            Claim(
                "Early outputs tell the examples without the fast feature from the rest",
                "separable (theorem, t-SNE figure)",
                f"recall {recall:.3f}, precision {precision:.3f} of the selection, mean of {len(early)} seeds",
                recall >= 0.9 and precision >= 0.5,
                "" if recall >= 0.9 and precision >= 0.5 else _not_told_apart(early),
            )
        )
    for better, worse, name, paper in _PAIRS:
        if better in found and worse in found:
            claims.append(_paired(better, worse, name, paper, found))
    if {"sam+useful+ta", "sgd"} <= set(found):
        means = {name: statistics.fmean(r.test for r in trained) for name, trained in found.items()}
        best = min(means, key=lambda n: means[n])
        claims.append(
            Claim(
                "SAM with USEFUL and TrivialAugment is the best of all",
                "best in every panel (bars)",
                f"{means['sam+useful+ta']:.2f} %; the best is {best} with {means[best]:.2f} %",
                best == "sam+useful+ta",
                "" if best == "sam+useful+ta" else "too few epochs for so much augmentation at this scale",
            )
        )
    return claims


def _paired(better: str, worse: str, name: str, paper: str, found: dict[str, list[Final]]) -> Claim:
    change = [a.test - b.test for a, b in zip(found[better], found[worse])]
    mean = statistics.fmean(change)
    means = [statistics.fmean(r.test for r in found[n]) for n in (better, worse)]
    spread = statistics.stdev(change) / len(change) ** 0.5 if len(change) > 1 else float("nan")
    wins = sum(c < 0 for c in change)
    why = "" if mean < 0 else _why(better, worse, mean, spread, len(change))
    error = f" (standard error {spread:.2f})" if len(change) > 1 else ""
    observed = (
        f"{means[0]:.2f} % against {means[1]:.2f} %; paired {mean:+.2f}{error}, "
        f"lower in {wins} of {len(change)} seeds"
    )
    return Claim(name, paper, observed, mean < 0, why)


def _not_told_apart(early: list[Early]) -> str:
    found = early[0]
    if (found.noisy_selected or 0) >= 0.5:
        return f"wrong labels are learned late too: {found.noisy_selected:.0%} of them are selected"
    shares = found.class_shares
    if max(shares) - min(shares) >= 0.3:
        return f"some classes are learned late as a whole: {min(shares):.0%} to {max(shares):.0%} of a class is selected"
    return "the network has not separated them at this epoch"


def _why(better: str, worse: str, mean: float, spread: float, seeds: int) -> str:
    if not mean < 2 * spread:
        return (
            f"{worse} is better here by more than two standard errors"
            if seeds > 1
            else "one seed decides nothing"
        )
    return (
        f"the difference is within two standard errors of {seeds} seeds: no effect can be seen at this scale"
    )


def _theory(config: Any, theory: Theory) -> list[Claim]:
    """Early is step 200 (or the first mark); the slow feature is compared at step 400 (or the second)."""
    marks = theory.marks
    at, later = marks[0] - 1, marks[min(1, len(marks) - 1)] - 1

    slows = config.theory_slow
    first = {s: theory.mean(s, "GD")[at] for s in slows}
    gaps = {
        s: [float(theory.mean(s, r)[at][0] - theory.mean(s, r)[at][1]) for r in ("GD", "SAM")] for s in slows
    }
    learned = {s: [float(theory.mean(s, r)[later][1]) for r in WAYS] for s in slows}
    faster = all(v[2] > max(v[:2]) for v in learned.values())
    closer = all(sam < gd for gd, sam in gaps.values())
    wrong = max(theory.recursion.values())
    return [
        Claim(
            "Gradient descent learns the fast feature first",
            "theorem",
            "; ".join(
                f"beta_d {s:g}: {v[0]:.3f} fast, {v[1]:.3f} slow at step {at + 1}" for s, v in first.items()
            ),
            all(float(v[0]) > 2 * float(v[1]) for v in first.values()),
        ),
        Claim(
            "SAM learns the two more evenly early on",
            "theorem: the gap of alignments is smaller",
            "; ".join(
                f"beta_d {s:g}: gap {v[0]:.3f} GD, {v[1]:.3f} SAM at step {at + 1}" for s, v in gaps.items()
            ),
            closer,
            ""
            if closer
            else "SAM also speeds up the fast feature; with a weak slow one that widens the gap, as the smaller gap is proven "
            "for a range of rho and beta_d only",
        ),
        Claim(
            "Twice the examples without the fast feature: the slow one is learned sooner than by GD or SAM",
            "the effect of SAM, for any optimizer",
            "; ".join(
                f"beta_d {s:g}: {v[0]:.3f} GD, {v[1]:.3f} SAM, {v[2]:.3f} upsampled at step {later + 1}"
                for s, v in learned.items()
            ),
            faster,
            "" if faster else "a slow feature this weak is not learned in so many steps by any of the three",
        ),
        Claim(
            "Without noise training is the recursion of the alignments, with alpha' = alpha / (alpha + k (1 - alpha))",
            "derived from the theory",
            ", ".join(f"{name}: difference {e:.1e} after 300 steps" for name, e in theory.recursion.items()),
            wrong < 1e-10,
        ),
    ]
