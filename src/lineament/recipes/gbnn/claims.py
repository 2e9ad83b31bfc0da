"""Claims of the gbnn recipe: predicates from the paper and the reference code's figures, written before the first run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lineament.recipes.gbnn.study import REFERENCE, Cut, Head, Score, Solvers
from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim


def claims_of(
    config: Any,
    scores: Mapping[tuple[str, int], Score],
    cuts: Mapping[int, Cut],
    heads: Mapping[int, Head],
    both: Sequence[Solvers],
) -> list[Claim]:
    """Predicates: within two standard errors and one percent of the reference or better; orders; bounds."""
    seeds = config.seeds
    mean = lambda name, method: sum(scores[name, s].by[method] for s in seeds) / len(seeds)  # noqa: E731

    def near(name: str, method: str) -> bool:
        told = REFERENCE[name]
        room = 2 * told.deviation / math.sqrt(len(seeds)) + 0.01 * told.mean
        worse = told.mean - mean(name, method) if told.classes else mean(name, method) - told.mean
        return worse <= room

    share = lambda method, m: sum(c.kept[method][m] for c in cuts.values()) / len(cuts)  # noqa: E731
    marks = next(iter(cuts.values())).units
    quarter = min(range(len(marks)), key=lambda i: abs(marks[i] - marks[-1] / 4))
    whole, part = share("boosted", -1), share("boosted", quarter)
    rivals = [name for name in next(iter(cuts.values())).kept if name != "boosted"]
    flat = [share("boosted", i) for i in range(quarter, len(marks))]
    net, grown = (
        sum(getattr(h, which) for h in heads.values()) / len(heads) for which in ("network", "boosted")
    )
    trees = [t for t in ("HistGB", "LightGBM", "XGBoost") if t in next(iter(scores.values())).by]
    rise = max(s.rise for s in scores.values())
    claims = [
        judged(
            "As good as the reference code on each table (within 2 sd / √seeds + 1 %), or better",
            ", ".join(f"{name} {REFERENCE[name].mean:.4g}" for name in config.sets),
            ", ".join(f"{name} {mean(name, 'boosted, lbfgs'):.4g}" for name in config.sets),
            all(near(name, "boosted, lbfgs") for name in config.sets),
            "worse on " + ", ".join(name for name in config.sets if not near(name, "boosted, lbfgs")),
        ),
        judged(
            "Variable projection in 12 steps is no worse than the reference either",
            "not in the paper",
            ", ".join(f"{name} {mean(name, 'boosted, varpro'):.4g}" for name in config.sets),
            all(near(name, "boosted, varpro") for name in config.sets),
            "worse on " + ", ".join(name for name in config.sets if not near(name, "boosted, varpro")) + ", so L-BFGS stays the default",
        ),
        judged(
            "The training loss never rises at a rate of 0.1",
            "it falls at each step",
            f"largest rise {rise:.2g}",
            rise <= 1e-12,
            "a step made it rise",
        ),
        judged(
            "A quarter of the units keeps 99 % of the accuracy on digits",
            ".969 of .976 in the reference code",
            f"{part:.3f} with {marks[quarter]} of {marks[-1]} units, {whole:.3f} with all",
            part >= 0.99 * whole,
            "the later units still matter",
        ),
        judged(
            "From that quarter on, accuracy is flat (within 0.02)",
            "robust to the width",
            ", ".join(f"{v:.3f}" for v in flat),
            max(flat) - min(flat) <= 0.02,
            "it still changes",
        ),
        judged(
            "Control: MLPs cut to as many units, sorted by the norm of their output weights or pruned by ModHiFi, keep less",
            ".56 to .88 cut in stored order",
            f"boosted {part:.3f}; " + ", ".join(f"{name} {share(name, quarter):.3f}" for name in rivals),
            all(share(name, quarter) < part for name in rivals),
            "a trained MLP can be cut as far: " + ", ".join(name for name in rivals if share(name, quarter) >= part),
        ),
        judged(
            "A head grown on a CNN's features is no worse than the CNN's own (within a point)",
            ".969 against .960",
            f"{grown:.3f} against {net:.3f}",
            grown >= net - 0.01,
            "its own head is better",
        ),
        *(
            judged(
                f"Control: random hidden units whose output weights are {how} are worse on each table",
                "not in the paper",
                ", ".join(f"{name} {mean(name, kind):.4g}" for name in config.sets),
                all(
                    (mean(name, kind) < mean(name, "boosted, lbfgs")) == REFERENCE[name].classes
                    for name in config.sets
                ),
                f"as good on one of these: {why}",
            )
            for kind, how, why in (
                ("random hidden units", "fitted", "its hidden units need no training"),
                ("random hidden units, boosted", "boosted", "boosting random units is enough there"),
            )
        ),
        judged(
            "Control: without a line search (ρ = 1) classes are told apart no better",
            "a Newton step of ρ",
            ", ".join(f"{name} {mean(name, 'boosted, rho = 1'):.4g}" for name in config.sets if REFERENCE[name].classes),
            all(mean(name, "boosted, rho = 1") <= mean(name, "boosted, lbfgs") for name in config.sets if REFERENCE[name].classes),
            "the line search does not help on one of them",
        ),
        judged(
            "Control: an MLP with early stopping and tuned L2 is worse on each table",
            "not in the paper",
            ", ".join(f"{name} {mean(name, 'MLP, the same, L2 tuned'):.4g}" for name in config.sets),
            all((mean(name, "MLP, the same, L2 tuned") < mean(name, "boosted, lbfgs")) == REFERENCE[name].classes for name in config.sets),
            "a tuned MLP is as good or better on one of them",
        ),
        judged(
            "Control: an MLP of as many units, trained for the seconds that boosting took, is worse on each table",
            "not in the paper",
            ", ".join(f"{name} {mean(name, 'MLP, same units, same seconds'):.4g}" for name in config.sets),
            all((mean(name, "MLP, same units, same seconds") < mean(name, "boosted, lbfgs")) == REFERENCE[name].classes for name in config.sets),
            "as good or better on " + ", ".join(name for name in config.sets if (mean(name, "MLP, same units, same seconds") < mean(name, "boosted, lbfgs")) != REFERENCE[name].classes),
        ),
        judged(
            "Control: boosted trees (" + ", ".join(trees) + ") do not beat it on the regression tables",
            "59.0 against 55.1 on diabetes in the reference's protocol",
            ", ".join(f"{name} {tree} {mean(name, tree):.4g}" for name in config.sets if not REFERENCE[name].classes for tree in trees),
            all(mean(name, tree) >= mean(name, "boosted, lbfgs") for name in config.sets if not REFERENCE[name].classes for tree in trees),
            "trees are better on one of them",
        ),
        judged(
            "Variable projection takes less time than L-BFGS on every table",
            "not in the paper",
            ", ".join(f"{s.data} {s.lbfgs_seconds / s.varpro_seconds:.1f} times" for s in both),
            all(s.varpro_seconds < s.lbfgs_seconds for s in both),
            "its steps cost the square of the hidden weights",
        ),
    ]  # fmt: skip
    if "diabetes" in config.sets:
        ours, theirs = mean("diabetes", "boosted, lbfgs"), mean("diabetes", "MLP, 200 units, L-BFGS")
        claims.append(
            judged(
                "On diabetes its RMSE is under that of a 200-unit MLP by L-BFGS",
                "55.1 against 84.2",
                f"{ours:.1f} against {theirs:.1f}",
                ours < theirs,
                "the MLP is as good",
            )
        )
    return claims
