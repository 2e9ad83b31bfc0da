"""Claims of the tract recipe: predicates from the paper, written before the first run."""

from __future__ import annotations

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim

ORDINARY = "ordinary"
NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}


@dataclass(frozen=True)
class Best:
    """The best of several learning rates, and the test accuracies with it by seed, in per cent."""

    rate: float
    accuracies: list[float]


@dataclass(frozen=True)
class Digits:
    """By length of training: the rate that is best for ordinary training; accuracies by "ordinary" or lambda; lambda 0.1 at its own best rate."""

    rates: dict[str, float]
    accuracies: dict[str, dict[str, list[float]]]
    own: dict[str, Best]


@dataclass(frozen=True)
class Pair:
    """Test accuracies by seed without and with TrAct, at the rate that is best without."""

    rate: float
    ordinary: list[float]
    tract: list[float]


@dataclass(frozen=True)
class Curve:
    """Test accuracy after each epoch, and top-5 accuracy after the last, in per cent."""

    accuracies: list[float]
    top5: float


def mean(values: list[float]) -> float:
    return statistics.fmean(values)


def speed_up(ordinary: dict[int, float], ours: dict[int, float]) -> dict[int, float]:
    """The paper's measure: epochs of ordinary training over those of ours at equal accuracy, for each length of ours.

    Accuracies are those at the ends of trainings of these lengths, in between along straight lines over the logarithm of the length; infinite where ordinary training
    does not get there, and 0 where it is better in its shortest training already.

    >>> speed_up({2: 80.0, 8: 90.0}, {2: 85.0, 8: 91.0})
    {2: 2.0, 8: inf}
    """
    lengths = sorted(ordinary)
    found = {}
    for e, wanted in ours.items():
        found[e] = 0.0 if ordinary[lengths[0]] > wanted else math.inf
        for a, b in itertools.pairwise(lengths):
            low, high = ordinary[a], ordinary[b]
            if low <= wanted <= high:
                share = (wanted - low) / (high - low) if high > low else 0.0
                found[e] = a * (b / a) ** share / e
                break
    return found


def digit_claims(digits: Digits, control: list[float], config: Any) -> list[Claim]:
    """Predicates: 4 epochs >= ordinary 16; a gain at every lambda from .05 to .2 and length up to 8; these lambdas within a point."""
    means = {arm: {int(e): mean(v) for e, v in by.items()} for arm, by in digits.accuracies.items()}
    usual = [arm for arm in means if arm != ORDINARY and 0.05 <= float(arm) <= 0.2]
    claims = []
    if 16 in config.lengths:
        ours, theirs, own = means["0.1"][4], means[ORDINARY][16], digits.own["4"]
        claims.append(
            judged(
                "Digits of varied contrast, SGD: lambda 0.1 is as good after 4 epochs as ordinary training after 16",
                "an eighth of the epochs (CIFAR-10, ResNet-18, SGD: 100 epochs beat 800)",
                f"{ours:.2f} % after 4, {theirs:.2f} % after 16 (ordinary, best of five rates)",
                ours >= theirs,
                "the rate that is best for ordinary training in 4 epochs is too small for TrAct, whose own best "
                f"({own.rate:g}) gives {mean(own.accuracies):.2f} %",
            )
        )
    short = [e for e in config.lengths if e <= 8]
    gains = {(arm, e): means[arm][e] - means[ORDINARY][e] for arm in usual for e in short}
    claims.append(
        judged(
            "Short trainings (up to 8 epochs) are better with every lambda from 0.05 to 0.2, at ordinary training's best rate",
            "better on 33 of 36 networks; small lambda for short training",
            "gains " + ", ".join(f"{g:+.2f} (lambda {arm}, {e})" for (arm, e), g in gains.items()),
            min(gains.values()) > 0,
            "the rate that is best for ordinary training is too large or small here",
        )
    )
    spread = {
        e: max(means[a][e] for a in usual) - min(means[a][e] for a in usual) for e in config.lengths if e >= 4
    }
    claims.append(
        judged(
            "Lambda hardly matters from 0.05 to 0.2: accuracies from 4 epochs on differ by less than one point",
            "0.1 is a good start everywhere",
            ", ".join(f"{s:.2f} points after {e}" for e, s in spread.items()),
            max(spread.values()) < 1,
            "the shortest of these trainings ends while the larger lambda, whose steps are smaller, is still on its way",
        )
    )
    apart = abs(mean(control) - means[ORDINARY][4])
    claims.append(
        judged(
            "Control: lambda = 10,000 with a rate as much larger is ordinary training (within half a point after 4 epochs)",
            "lambda to infinity is the ordinary gradient",
            f"{mean(control):.2f} % against {means[ORDINARY][4]:.2f} %",
            apart < 0.5,
            "rounding sends the two trainings apart",
        )
    )
    return claims


def ablation_claims(
    digits: Digits, ablations: dict[str, dict[str, Pair]], raw: dict[str, Best] | None
) -> list[Claim]:
    """Predicates: without the contrast less than half the gain; on bytes lambda within one point and at least two points better."""
    claims = []
    same = ablations.get("same contrast for all", {}).get("4")
    if same is not None:
        gain = mean(digits.accuracies["0.1"]["4"]) - mean(digits.accuracies[ORDINARY]["4"])
        less = mean(same.tract) - mean(same.ordinary)
        claims.append(
            judged(
                "Control: where all images have the same contrast, the gain after 4 epochs is less than half as large",
                "the gradient's proportionality to the input's size is the reason",
                f"{less:+.2f} points against {gain:+.2f}",
                less < gain / 2,
                "the gain has another source than the contrast",
            )
        )
    if raw is not None:
        accuracies = {arm: mean(found.accuracies) for arm, found in raw.items()}
        ours = [a for arm, a in accuracies.items() if arm != ORDINARY]
        holds = max(ours) - min(ours) < 1 and min(ours) > accuracies[ORDINARY] + 2
        claims.append(
            judged(
                "Pixels in [0, 255]: lambda hardly matters (under one point), and TrAct is far better (over two points)",
                "barely depends on lambda, far better than ordinary training",
                ", ".join(f"{arm}: {a:.2f} % (rate {raw[arm].rate:g})" for arm, a in accuracies.items()),
                holds,
                f"lambda moves the accuracy by {max(ours) - min(ours):.2f} points, the gain is at least "
                f"{min(ours) - accuracies[ORDINARY]:.2f}",
            )
        )
    return claims


def cifar_claims(curves: dict[str, Any], config: Any) -> list[Claim]:
    """Predicates: lambda 0.1 (or the first one) in half the epochs >= ordinary in all; better at every length."""
    claims = []
    for kind, arms in curves.items():
        lam = "0.1" if "0.1" in arms else next(arm for arm in arms if arm != ORDINARY)
        ends = {
            arm: {int(e): mean([c[-1] for c in runs]) for e, runs in arms[arm].items()}
            for arm in (ORDINARY, lam)
        }
        seeds = f"{config.cifar_seeds} seed{'s' if config.cifar_seeds > 1 else ''}"
        noise = f"differences of a point are within the noise of {seeds} and {config.test_images or 'all'} test images"
        longest = max(config.epochs)
        if longest % 2 == 0 and longest // 2 in config.epochs:
            ours, theirs = ends[lam][longest // 2], ends[ORDINARY][longest]
            claims.append(
                judged(
                    f"{NAMES[config.photographs]}, {kind}: lambda {lam} in half the epochs is as good as ordinary training",
                    "SGD: an eighth; Adam: a quarter; ViT: half of the epochs",
                    f"{ours:.2f} % after {longest // 2}, {theirs:.2f} % after {longest} (ordinary)",
                    ours >= theirs,
                    "at this scale training stops far from its end, where its length counts for more than the first layer",
                )
            )
        gains = {e: ends[lam][e] - ends[ORDINARY][e] for e in config.epochs}
        better = min(gains.values()) > 0
        claims.append(
            judged(
                f"{NAMES[config.photographs]}, {kind}: better than ordinary training at every equal length",
                "better at each length (curves)",
                ", ".join(f"{g:+.2f} points after {e}" for e, g in gains.items()),
                better,
                noise,
            )
        )
    return claims
