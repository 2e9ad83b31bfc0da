"""Claims of the ifm recipe: predicates from the paper and its reviews, written before the first run."""

from __future__ import annotations

import statistics
from typing import Any

from scipy.stats import spearmanr

from lineament.recipes.ifm.experiments import Depth, Net, Trial
from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim

Results = dict[tuple[int, float], list[Net]]  # by width and weight decay


def all_claims(found: Results, trials: list[Trial], deep: list[Depth], config: Any) -> list[Claim]:
    """Predicates: 5 points, the order of means, a maximum inside, a rank correlation of 0.5."""
    return [*_sizes(trials), *_widths(found, config), *_depth(deep), *_controls(found, trials, config)]


def _mean(trials: list[Trial], how: str) -> float:
    return statistics.mean(t.accuracy[how] for t in trials)


def _sizes(trials: list[Trial]) -> list[Claim]:
    ours, norm, chance = (_mean(trials, how) for how in ("merging", "L2 removal", "random merging"))
    share = statistics.mean(t.parameters for t in trials)
    return [
        judged(
            "At no more than 30 % of the parameters and equal sizes, merging is 5 points more accurate than L2 removal",
            "VGG16 on CIFAR-10 keeps 91.78 of 93.51 % at 23 % of the parameters, without data",
            f"{ours:.3f} against {norm:.3f} at {share:.3f} of the parameters",
            share <= 0.3 and ours >= norm + 0.05,
            f"at this share removal by norm costs only {_mean(trials, 'whole network') - norm:.3f} of the whole network's accuracy",
        ),
        judged(
            "Merging close channels is no worse than merging random ones into the same sizes",
            "features that are merged are equivalent",
            f"{ours:.3f} against {chance:.3f}",
            ours >= chance,
            "at this size the groups that were found are no better than random ones",
        ),
    ]


def _widths(found: Results, config: Any) -> list[Claim]:
    share = {key: statistics.mean(n.channels for n in each) for key, each in found.items()}
    few, many = min(config.widths), max(config.widths)
    low, high = min(config.decays), max(config.decays)
    claims = []
    if few != many:
        pairs = [(share[few, d], share[many, d]) for d in config.decays]
        claims.append(
            judged(
                f"Wider networks keep a smaller share of their channels (width {many} against {few}, beta {config.beta:g})",
                "larger networks have more redundant channels",
                "; ".join(f"decay {d:g}: {b:.3f} against {a:.3f}" for d, (a, b) in zip(config.decays, pairs)),
                all(b < a for a, b in pairs),
                "not with decay " + ", ".join(f"{d:g}" for d, (a, b) in zip(config.decays, pairs) if b >= a),
            )
        )
    if low != high:
        pairs = [(share[w, low], share[w, high]) for w in config.widths]
        claims.append(
            judged(
                f"Weight decay lowers the share of channels that differ ({high:g} against {low:g})",
                "implied: it shrinks what is not needed",
                "; ".join(f"width {w}: {b:.3f} against {a:.3f}" for w, (a, b) in zip(config.widths, pairs)),
                all(b < a for a, b in pairs),
                "not at width " + ", ".join(str(w) for w, (a, b) in zip(config.widths, pairs) if b >= a),
            )
        )
    return claims


def _depth(deep: list[Depth]) -> list[Claim]:
    layers = len(deep[0].shares)
    shares = [statistics.mean(d.shares[k] for d in deep) for k in range(layers)]
    top = shares.index(max(shares))
    claims = [
        judged(
            "With depth the complexity of layers rises, then falls",
            "first rises, then falls (figure)",
            ", ".join(f"{s:.3f}" for s in shares),
            0 < top < layers - 1,
            f"layer {top + 1} of {layers} holds the most",
        )
    ]
    if len(deep) >= 4:
        rank = float(spearmanr([statistics.mean(d.shares) for d in deep], [d.accuracy for d in deep])[0])  # pyright: ignore[reportArgumentType]
        claims.append(
            judged(
                f"Among {len(deep)} seeds, networks of higher complexity are more accurate: a rank correlation of at least 0.5",
                "same architecture: the higher the complexity, the better",
                f"{rank:.2f}",
                rank >= 0.5,
                f"seeds of one setting differ by little: test accuracies lie within {max(d.accuracy for d in deep) - min(d.accuracy for d in deep):.3f}",
            )
        )
    return claims


def _controls(found: Results, trials: list[Trial], config: Any) -> list[Claim]:
    swapped, chance = statistics.mean(t.swapped for t in trials), statistics.mean(t.random for t in trials)
    key = max(config.widths), max(config.decays)
    trained = statistics.mean(n.channels for n in found[key])
    untrained = statistics.mean(n.untrained for n in found[key])
    repaired = {how: statistics.mean(t.repaired[how] for t in trials) for how in trials[0].repaired}
    return [
        judged(
            "Control: fed by each other's weights, merged channels keep 5 points more answers than random groups of the same sizes",
            "equivalent features can be exchanged",
            f"{swapped:.3f} against {chance:.3f}",
            swapped >= chance + 0.05,
            "the groups are so large that exchanges inside them are as harmful as any",
        ),
        judged(
            "Control: the repetition is learned: a trained network keeps a smaller share than the same one untrained",
            "not compared in the paper",
            f"{trained:.3f} against {untrained:.3f}",
            trained < untrained,
            "the share says how the weights were drawn, not what was learned",
        ),
        judged(
            "Control: with the same repair for all, merging is within 2 points of k-means folding or better",
            "Model Folding (2025) reports folding ahead at high sparsity",
            f"{repaired['merging']:.3f} against {repaired['k-means folding']:.3f}",
            repaired["merging"] >= repaired["k-means folding"] - 0.02,
            "k-means places all channels at once, merging goes pair by pair",
        ),
    ]
