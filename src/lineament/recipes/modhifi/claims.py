"""Claims of the modhifi recipe: predicates from the paper and its pitfalls, written before the first run."""

from __future__ import annotations

import math
import statistics
from typing import Any

from lineament.recipes.kit.claims import judged
from lineament.recipes.modhifi.language import REMOVED, Spoken
from lineament.recipes.modhifi.pruning import CRITERIA, Trial
from lineament.recipes.modhifi.unlearning import Unlearned, mean
from lineament.report.outcome import Claim

Results = dict[str, list[Trial]]  # by network
Classes = dict[str, list[Unlearned]]


def all_claims(found: Results, classes: Classes, texts: list[Spoken], config: Any) -> list[Claim]:
    """Predicates: 50 points, the order of means, a fifth of the inputs, a tenth of the class."""
    trials = [t for each in found.values() for t in each]
    gone = [u for each in classes.values() for u in each]
    return [*_pruned(found, trials, config), *_sets(trials), *_unlearned(gone), *_language(texts)]


def arm(trials: list[Trial], share: float, criterion: str, repair: str) -> float:
    """The mean accuracy of one way to prune."""
    return statistics.mean(t.pruned[f"{share:g} | {criterion} | {repair}"] for t in trials)


def _pruned(found: Results, trials: list[Trial], config: Any) -> list[Claim]:
    half = config.shares[0]
    pairs = {
        name: (arm(each, half, "saliency", "both"), arm(each, half, "magnitude", "alone"))
        for name, each in found.items()
    }
    rises, layers = max(t.risen for t in trials), sum(t.layers for t in trials)
    alone, compensated, norms, both = (
        arm(trials, half, "saliency", r) for r in ("alone", "compensation", "norms", "both")
    )
    equal = [(arm(trials, s, "saliency", "both"), arm(trials, s, "magnitude", "both")) for s in config.shares]
    chance = [arm(trials, s, "random", "both") for s in config.shares]
    kept = ", ".join(f"{s:g}" for s in config.shares)
    unrepaired = arm(trials, half, "magnitude", "norms")
    sources = {s: statistics.mean(t.sources[s] for t in trials) for s in trials[0].sources}
    new = statistics.mean(t.anew for t in trials)
    return [
        judged(
            f"With {half:g} of the channels, saliency and both repairs are at least 50 points above L2 alone",
            "ResNet-50 on CIFAR-10 at 4.07 times fewer operations: 91.02 against 15.91",
            "; ".join(f"{name}: {a:.3f} against {b:.3f}" for name, (a, b) in pairs.items()),
            all(a >= b + 0.5 for a, b in pairs.values()),
            f"L2 alone keeps {max(b for _, b in pairs.values()):.3f} in the network that suffers least",
        ),
        judged(
            "Compensation never raises a layer's local error",
            "follows from the optimal weights",
            f"largest rise {rises:.2g} of the output's energy, over {layers} layers",
            rises <= 1e-6,
            "lambda pulls the solution away from the optimum",
        ),
        judged(
            f"Each repair helps at {half:g} of the channels: either alone above none, both above either",
            "operations at equal accuracy: 1.61 times fewer with neither, 2.21 and 2.53 with one, 3.22 with both",
            f"none {alone:.3f}, compensation {compensated:.3f}, norms {norms:.3f}, both {both:.3f}",
            alone < min(compensated, norms) and both > max(compensated, norms),
            "one of them alone is no help",
        ),
        judged(
            f"Saliency is more accurate than L2 with the same repairs (shares {kept})",
            "implied; expected to fail in small networks",
            "; ".join(f"{a:.3f} against {b:.3f}" for a, b in equal),
            all(a > b for a, b in equal),
            f"with the same repairs the criterion decides little: random channels reach {', '.join(f'{c:.3f}' for c in chance)}",
        ),
        judged(
            f"Control: with both repairs saliency beats random channels (shares {kept})",
            "not shown at equal repairs",
            "; ".join(f"{a:.3f} against {c:.3f}" for (a, _), c in zip(equal, chance)),
            all(a > c for (a, _), c in zip(equal, chance)),
            "the repairs do the work, not the criterion",
        ),
        judged(
            f"Control: saliency and both repairs beat L2 with its norms measured again, at {half:g}",
            "L2 is shown without",
            f"{both:.3f} against {unrepaired:.3f}",
            both > unrepaired,
            "measuring the norms again is enough",
        ),
        judged(
            "Control: generated images serve within 2 points of real ones, and better than noise",
            "FID 85.8 costs accuracy: 86.27 against 90.39",
            ", ".join(f"{s} {a:.3f}" for s, a in sources.items()),
            sources["generated"] >= sources["real"] - 0.02 and sources["generated"] > sources["noise"],
            "what the layers are scored on matters less, or more, than that",
        ),
        judged(
            "Control: pruning without labels is within 2 points of the same sizes trained anew on as many samples",
            "not compared in the paper",
            f"{both:.3f} against {new:.3f}",
            both >= new - 0.02,
            f"trained anew they reach {new:.3f}: where labels and training are at hand, they are the better way",
        ),
    ]


def _sets(trials: list[Trial]) -> list[Claim]:
    best, rest = (statistics.mean(v[k] for t in trials for v in t.noise.values()) for k in (0, 1))
    layers = [v for t in trials for v in t.sets.values()]
    reached = sum(v[0] >= 0.8 for v in layers) / len(layers)
    levels = ", ".join(trials[0].noise)
    return [
        judged(
            f"Noise on the 20 % of inputs of the highest saliency hurts more than on the other 80 % (deviations {levels}, mean accuracy)",
            "ResNet-50 on CIFAR-10: 12 points against 1",
            f"{best:.3f} against {rest:.3f}",
            best < rest,
            "four times as many inputs carry four times as much noise",
        ),
        judged(
            "In at least half of the layers a fifth of the inputs reaches a fidelity of 0.8 (means over outputs)",
            "fewer than 20 % of the inputs in at least half of the layers",
            f"in {reached:.2f} of {len(layers)} layers; means {statistics.mean(v[0] for v in layers):.3f}, random {statistics.mean(v[1] for v in layers):.3f}",
            reached >= 0.5,
            "the layers of these networks need more of their inputs",
        ),
    ]


def _unlearned(gone: list[Unlearned]) -> list[Claim]:
    forget, remain = mean([u.shares[f"{u.share:g}"] for u in gone])
    _, before = mean([u.before for u in gone])
    chance, head = mean([u.random for u in gone]), mean([u.head for u in gone])
    probe = [statistics.mean(u.probe[k] for u in gone) for k in range(3)]
    erased = sum(u.verdict == "erased" for u in gone)
    claims = [
        judged(
            "A class is answered in at most 10 % of its images, and the others stay within 5 points",
            "ResNet-50 on CIFAR-10: 0.2 %, and 92.98 of 94.99 %",
            f"forget {forget:.3f}, others {remain:.3f} of {before:.3f} ({len(gone)} classes, the smallest share that does it on training images)",
            forget <= 0.1 and remain >= before - 0.05,
            f"the others fell by {before - remain:.3f}"
            if forget <= 0.1
            else "the largest share of the pairs that was tried does not take every class out",
        ),
        judged(
            "Control: as many random pairs do not do it: the class is answered more often, or the others less",
            "not compared in the paper",
            f"random: forget {chance[0]:.3f}, others {chance[1]:.3f}",
            chance[0] > forget or chance[1] < remain,
            "any pairs of that share would do",
        ),
        judged(
            "Control: it keeps more of the others than the head alone, the class's logit at minus infinity",
            "not compared in the paper; forget accuracy alone is met by the head at no cost",
            f"others {remain:.3f} against {head[1]:.3f}; forget {forget:.3f} against {head[0]:.3f}",
            remain > head[1] and forget <= max(head[0], 0.1),
            "muting the head costs the others nothing",
        ),
        judged(
            "The class is erased, not only muted, in most cases: read out and learned again no more easily than in a network trained without it",
            "claimed by the name; expected to fail",
            f"{erased} of {len(gone)}; a linear probe tells the class in {probe[0]:.3f}, of the muted head {probe[1]:.3f}, trained without it {probe[2]:.3f}",
            erased > len(gone) / 2,
            "the features still hold the class",
        ),
    ]
    told = [u.lira for u in gone if u.lira]
    if told:
        accuracy = statistics.mean(t[0] for t in told)
        error = math.sqrt(sum(t[1] ** 2 for t in told)) / len(told)
        claims.append(
            judged(
                "Control: the likelihood-ratio attack (U-LiRA) tells networks that lost a class from those that never saw it no better than chance",
                "not compared in the paper; expected to fail",
                f"right in {accuracy:.3f} ± {error:.3f} of the class's training images ({len(told)} classes)",
                accuracy - 2 * error <= 0.5,
                "what the edited networks say of these images gives them away",
            )
        )
    return claims


def _language(texts: list[Spoken]) -> list[Claim]:
    claims = []
    whole = statistics.mean(t.whole for t in texts)
    for removed in REMOVED:

        def of(criterion: str, repair: str, removed: float = removed) -> float:
            return statistics.mean(t.pruned[f"{removed:g} | {criterion} | {repair}"] for t in texts)

        ours = of("energy", "compensation")
        others = {
            name: of(c, "alone")
            for name, c in (("L2", "magnitude"), ("random", "random"), ("energy alone", "energy"))
        }
        told = ", ".join(f"{n} {v:.3f}" for n, v in others.items())
        claims.append(
            judged(
                f"Language model, {removed:.0%} of the perceptrons' width removed: energy with compensation has the lowest perplexity",
                "Llama-2-7B on WikiText: 5.97, 7.91 and 11.53 at 10, 20 and 30 %, from 5.12",
                f"{ours:.3f} against {told} (whole {whole:.3f}; L2 with compensation {of('magnitude', 'compensation'):.3f})",
                all(ours < v for v in others.values()),
                "it is not the lowest: " + ", ".join(n for n, v in others.items() if v <= ours),
            )
        )
    return claims


__all__ = ["CRITERIA", "all_claims", "arm"]
