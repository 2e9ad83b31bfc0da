"""Claims of the shortcut-learning recipe: predicates from the paper and its controls, written before the first run."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any

from lineament.measure.shortcuts.sweep import Trial
from lineament.recipes.kit.claims import judged
from lineament.recipes.shortcut_learning.training import Found, by_setting, mean, setting
from lineament.report.outcome import Claim


def claims_of(found: Found, config: Any) -> list[Claim]:
    """All claims that the run's settings can judge."""
    return [
        *_linear(found, config),
        *_footprint(found, config),
        *_nonlinear(found, config),
        *_controls(found, config),
    ]


def said(trials: Sequence[Trial], what: str = "bias") -> str:
    """Mean, deviation and number of seeds."""
    values = [getattr(t, what) for t in trials]
    spread = f" (sd {statistics.stdev(values):.2f}, {len(values)} seeds)" if len(values) > 1 else " (1 seed)"
    return f"{statistics.mean(values):+.3f}{spread}"


def _linear(found: Found, config: Any) -> list[Claim]:
    means = {
        setting(rho, ratio): statistics.mean(found.closed[setting(rho, ratio)])
        for rho in config.shortcut
        if rho <= 0.85
        for ratio in config.ratios
    }
    if not means:
        return []
    largest = max(means, key=lambda name: abs(means[name]))
    return [
        judged(
            "A linear model solved in closed form is unbiased: |mean bias| ≤ 0.05 for ρ_s ≤ 0.85 at every ratio",
            "linear models are (nearly) unbiased (figure 3)",
            f"at most {abs(means[largest]):.3f}, at {largest}",
            abs(means[largest]) <= 0.05,
            "sampling of the training set moves the solution",
        )
    ]


def _footprint(found: Found, config: Any) -> list[Claim]:
    cells, claims = by_setting(found.images), []
    for factor, words, test in (
        (
            4.0,
            "prefers the larger object: bias ≥ 0.3 with a disc of 4 times the square's side",
            lambda v: v >= 0.3,
        ),
        (1.0, "does not where they are as large: bias ≤ 0.1 at a factor of 1", lambda v: v <= 0.1),
    ):
        cell = cells.get(f"ρ_s 0.9, factor {factor:g}")
        if cell:
            claims.append(
                judged(
                    f"A convolutional network at ρ_s 0.9 {words}",
                    "bias grows with the shortcut's pixel footprint (figure 4)",
                    f"{said(cell)}; last epoch {said(cell, 'last_bias')}; the best rule's reliance is {cell[0].optimal:+.2f}",
                    test(mean(cell)),
                    "at this number of epochs and seeds",
                )
            )
    return claims


def _nonlinear(found: Found, config: Any) -> list[Claim]:
    rhos = [rho for rho in config.shortcut if rho >= 0.85]
    ratios, claims = sorted(config.ratios), []
    one, deep = found.trials.get("relu x1"), found.trials.get("relu x4")
    if one and rhos and len(ratios) > 1:
        cells = by_setting(one)
        means = {rho: [mean(cells[setting(rho, ratio)]) for ratio in ratios] for rho in rhos}
        claims.append(
            judged(
                "With one hidden ReLU layer the mean bias rises from each ratio to the next, for ρ_s ≥ 0.85",
                "a single hidden nonlinear layer suffices (figure 3)",
                "; ".join(
                    f"ρ_s {rho:g}: " + ", ".join(f"{v:+.3f}" for v in values) for rho, values in means.items()
                ),
                all(a < b for values in means.values() for a, b in itertools.pairwise(values)),
                "the spread over seeds is as large as the rise",
            )
        )
    if one and deep and rhos:
        pairs = [
            (by_setting(one)[setting(rho, ratios[-1])], by_setting(deep)[setting(rho, ratios[-1])])
            for rho in rhos
        ]
        claims.append(
            judged(
                f"Four hidden layers are more biased than one, at ratio {ratios[-1]:g} and ρ_s ≥ 0.85",
                "bias grows with depth (figure 3)",
                "; ".join(
                    f"ρ_s {rho:g}: {said(four)} against {said(single)}"
                    for rho, (single, four) in zip(rhos, pairs)
                ),
                all(mean(four) > mean(single) for single, four in pairs),
                "the spread over seeds is as large as the difference",
            )
        )
    return claims


def _controls(found: Found, config: Any) -> list[Claim]:
    claims, top = [], max(config.ratios)
    rho = max((r for r in config.shortcut if r <= 0.85), default=max(config.shortcut))
    at = setting(rho, top)
    if linear := found.trials.get("linear"):
        cell = by_setting(linear)[at]
        claims.append(
            judged(
                f"The linear network trained as the others (rate 0.1) has |mean bias| ≤ 0.05 at {at}",
                "about 0",
                f"{said(cell)}; last epoch {said(cell, 'last_bias')}",
                abs(mean(cell)) <= 0.05,
                "Adam does not reach the least-squares solution in this training: what is left is the optimizer's, not the model's",
            )
        )
    cell = by_setting(found.short)[at]
    claims.append(
        judged(
            f"Under-training looks like bias: a linear network trained at a rate of 1e-3 for {config.short_epochs} epochs has a mean bias ≥ 1 at {at}",
            "not reported; a control",
            said(cell),
            mean(cell) >= 1,
            "it was trained long enough",
        )
    )
    if one := found.trials.get("relu x1"):
        pairs = {
            r: (by_setting(found.swapped)[setting(r, top)], by_setting(one)[setting(r, top)])
            for r in config.shortcut
            if r >= 0.85
        }
        claims.append(
            judged(
                f"Amplifying the core latent instead lowers the bias of relu x1, at ratio {top:g} and ρ_s ≥ 0.85",
                "availability, not predictivity, makes the bias (implied)",
                "; ".join(
                    f"ρ_s {r:g}: {said(other)} against {said(own)}" for r, (other, own) in pairs.items()
                ),
                all(mean(other) < mean(own) for other, own in pairs.values()),
                "the spread over seeds is as large as the difference",
            )
        )
    kernels = {(k.kernel, k.ridge): k.bias for k in found.kernels if k.setting == at}
    matched = [
        (ridge, kernels["relu_ntk", ridge], kernels["linear", ridge])
        for ridge in config.ridges
        if ridge >= 0.01
    ]
    if matched:
        claims.append(
            judged(
                f"At the same relative ridge ≥ 0.01 the ReLU tangent kernel is at least as biased as the linear one, at {at}",
                "the tangent kernel's predictor prefers what is available",
                "; ".join(f"ridge {r:g}: {ours:+.3f} against {theirs:+.3f}" for r, ours, theirs in matched),
                all(ours >= theirs for _, ours, theirs in matched),
                "a ridge biases both kernels to the more available latent",
            )
        )
    cells = {name.partition(",")[0]: each for name, each in by_setting(found.remedies).items()}
    for how, words in (("sam", "Sharpness-aware minimisation"), ("useful", "USEFUL's upsampling")):
        if how in cells and "adam" in cells:
            claims.append(
                judged(
                    f"{words} lowers the bias of relu x1 at the largest ratio and predictivity",
                    "not in the paper; what those methods promise",
                    f"{said(cells[how])} against {said(cells['adam'])}",
                    mean(cells[how]) < mean(cells["adam"]),
                    "not with these settings and seeds",
                )
            )
    return claims
