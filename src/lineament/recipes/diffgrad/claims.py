"""Claims of the diffgrad recipe: predicates from the paper, written before the first run."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

from lineament.recipes.diffgrad.functions import FUNCTIONS, Walk
from lineament.recipes.diffgrad.training import RIVALS, Training
from lineament.recipes.kit.claims import judged
from lineament.report.outcome import Claim

Key = tuple[str, int, str]  # activation, batch size, optimizer
Results = dict[Key, list[Training]]


def function_claims(walks: dict[str, dict[str, Walk]]) -> list[Claim]:
    """Predicates: within .02 of the global minimum at the end, or not."""
    claims, won = [], {}
    for name in ("F1", "F2", "F3"):
        ends = {who: each.x[-1] for who, each in walks[name].items()}
        there = {who: abs(x - FUNCTIONS[name].minimum) < 0.02 for who, x in ends.items()}
        observed = ", ".join(f"{who} {x:.5f}" for who, x in ends.items())
        holds = there["diffGrad"] and not there["Adam"]
        both = there["diffGrad"] and there["Adam"]
        claims.append(
            judged(
                f"{name}: from x = -1 diffGrad stays in the basin of the global minimum and Adam does not",
                f"diffGrad ends at {FUNCTIONS[name].minimum:g}, Adam elsewhere (figure)",
                observed,
                holds,
                "Adam ends there too" if both else "diffGrad does not end there with these settings",
            )
        )
        if holds:
            won[name] = (there["Adam (half the rate)"], ends["Adam (half the rate)"])
    holds = bool(won) and not any(there for there, _ in won.values())
    claims.append(
        judged(
            "Where diffGrad wins, the friction is why: Adam at half the rate loses there too",
            "the friction avoids the overshoot (no such control in the paper)",
            ", ".join(f"{name}: Adam at half the rate ends at {x:.5f}" for name, (_, x) in won.items())
            or "no win",
            holds,
            "half the rate is enough: the friction was near 1/2 on the whole way"
            if won
            else "there is no win to explain",
        )
    )
    return claims


def training_claims(found: Results, config: Any) -> list[Claim]:
    """Predicates: a higher mean test accuracy in every setting; friction's mean against fixed bounds."""
    settings = list(itertools.product(config.activations, config.batch_sizes))
    accuracy = {key: statistics.mean(r.accuracy for r in each) for key, each in found.items()}
    loss = {key: statistics.mean(r.losses[-1] for r in each) for key, each in found.items()}
    friction = {
        key: statistics.mean(statistics.mean(r.friction.mean) for r in each)
        for key, each in found.items()
        if each[0].friction.mean
    }
    there = set(config.optimizers)
    claims = []
    if "diffGrad" not in there:
        return claims

    def label(setting: tuple[str, int]) -> str:
        parts = [setting[0]] if len(config.activations) > 1 else []
        parts += [f"batch {setting[1]}"] if len(config.batch_sizes) > 1 else []
        return ", ".join(parts) + ": " if parts else ""

    def beside(values: dict[Key, float], one: str, other: str, form: str) -> str:
        return "; ".join(
            f"{label(s)}{format(values[(*s, one)], form)} against {format(values[(*s, other)], form)}"
            for s in settings
        )

    for rival in (*RIVALS, "Adam (half the rate)"):
        if rival not in there:
            continue
        holds = all(accuracy[(*s, "diffGrad")] > accuracy[(*s, rival)] for s in settings)
        claims.append(
            judged(
                f"diffGrad's test accuracy exceeds {rival}'s",
                "higher (table; its figures could not be obtained)"
                if rival in RIVALS
                else "not compared in the paper",
                beside(accuracy, "diffGrad", rival, ".4f"),
                holds,
                _why(rival),
            )
        )
    if "Adam (half the rate)" in there:
        half = "Adam (half the rate)"
        apart = {s: abs(loss[(*s, "diffGrad")] / loss[(*s, half)] - 1) for s in settings}
        holds = min(apart.values()) > 0.05
        claims.append(
            judged(
                "diffGrad trains otherwise than Adam at half the rate: final losses differ by more than 5 %",
                "implied: the friction adapts each step",
                beside(loss, "diffGrad", half, ".5f"),
                holds,
                f"the mean friction was {min(friction[(*s, 'diffGrad')] for s in settings):.4f}: half the rate it is",
            )
        )
    values = [friction[(*s, "diffGrad")] for s in settings]
    holds = min(values) > 0.51
    claims.append(
        judged(
            "The friction adapts: its mean over coordinates and steps is above 0.51",
            "between 1/2 and 1, by how fast the gradient changes",
            ", ".join(f"{label(s)}{v:.4f}" for s, v in zip(settings, values)),
            holds,
            f"between steps a coordinate's gradient changes by about {4 * (min(values) - 0.5):.1g} (sigmoid(d) is 1/2 + d/4 there)",
        )
    )
    if {"diffGrad (loss x 1000)", "diffGrad (loss / 1000)"} <= there:
        triples = [
            [friction[(*s, f"diffGrad{how}")] for how in (" (loss / 1000)", "", " (loss x 1000)")]
            for s in settings
        ]
        holds = all(c - b < 0.01 and b - a < 0.01 for a, b, c in triples)
        claims.append(
            judged(
                "Like Adam, the method does not depend on the loss's scale: the mean friction moves by less than 0.01",
                "Adam's invariance is not claimed for diffGrad; users assume it",
                "; ".join(
                    f"{label(s)}/ 1000, 1, x 1000: " + ", ".join(f"{v:.5f}" for v in t)
                    for s, t in zip(settings, triples)
                ),
                holds,
                "sigmoid(|dg|) has a unit: the loss's scale decides between Adam's rate and half of it",
            )
        )
    return claims


def _why(rival: str) -> str:
    if rival == "Adam (half the rate)":
        return "the two are the same method where the friction is 1/2"
    if rival in ("Adam", "AMSGrad"):
        return "at half Adam's step the network is trained less in the same epochs"
    return "not at this scale, with one customary rate for each method"
