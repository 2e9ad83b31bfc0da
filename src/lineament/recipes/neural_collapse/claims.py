"""What the neural-collapse recipe measures, and what it claims of it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from torch import Tensor

from lineament.report.outcome import Claim

LOSSES = {"mse": "squared loss", "ce": "cross-entropy"}


@dataclass(frozen=True)
class Depth:
    """Within-class variability of the input, and after each layer."""

    nc1: list[float]
    nc1_tilde: list[float]


@dataclass(frozen=True)
class Collapsed:
    """The features before the head at the end of a training, and the training accuracy."""

    nc1: float
    nc1_tilde: float
    nc2: float
    nc3: float
    nc4: float
    accuracy: float


@dataclass(frozen=True)
class Near:
    """Spectra near collapse for one λ_H, of the matrices and in closed form."""

    lambda_h: float
    block: Tensor
    block_closed: Tensor
    cross: list[float]
    cross_closed: float
    map: Tensor
    map_closed: Tensor


@dataclass(frozen=True)
class Theory:
    """The flow on the central path, NC1~ of the minimisers along β, and the map near collapse."""

    times: Tensor
    nc1_tilde: Tensor
    scaled_within: Tensor
    scaled_between: Tensor
    betas: list[float]
    ratios: list[float]
    near: list[Near]
    errors: list[float]


def depth_claims(depth: list[Depth]) -> list[Claim]:
    """Strict falls from layer to layer, for every seed."""
    claims = []
    for name, shown in (("nc1_tilde", "NC1~"), ("nc1", "NC1")):
        values = [getattr(run, name) for run in depth]
        claims.append(
            Claim(
                f"{shown} falls with every layer that is added and trained",
                "decreases with the number of hidden layers (figure, CIFAR-10)",
                "; ".join(" ".join(f"{v:.3g}" for v in run) for run in values),
                all(b < a for run in values for a, b in itertools.pairwise(run)),
            )
        )
    return claims


def decay_claims(loss: str, ends: dict[str, Collapsed]) -> list[Claim]:
    """Predicates: |Δ| of the feature layers exceeds that of the last; 2x is below the baseline, 0 above."""
    name, base = LOSSES[loss], ends["baseline"]
    lowest = min(end.accuracy for end in ends.values())
    short = "too few epochs at this preset; the other claims of this loss lack their premise"
    claims = [
        Claim(
            f"{name}: zero training error in every setting",
            "after about 40 epochs",
            f"lowest training accuracy {lowest:.4f}",
            lowest == 1,
            "" if lowest == 1 else short,
        )
    ]
    for metric, shown in (("nc1_tilde", "NC1~"), ("nc1", "NC1"), ("nc2", "NC2")):
        value = {setting: getattr(end, metric) for setting, end in ends.items()}
        middle = value["baseline"]
        features, last = (
            max(abs(value[f"{times} {layers}"] - middle) for times in ("2x", "0"))
            for layers in ("features", "last")
        )
        ordered = value["2x features"] < middle < value["0 features"]
        observed = ", ".join(f"{setting} {v:.4g}" for setting, v in value.items())
        why = "the network or the number of seeds is too small for the effect"
        if base.nc1_tilde > 0.1:
            why = f"training has not come near collapse here (NC1~ of the baseline {base.nc1_tilde:.2g}), where the theory holds"
        elif metric == "nc1":
            why = (
                "NC1 divides by the between-class variance of each direction, so that the weakest one rules it, and ranks the settings "
                "otherwise than NC1~, the metric of the paper's theorems"
            )
        claims += [
            Claim(
                f"{name}: weight decay of the feature layers moves {shown} more than that of the last layer",
                "much more (curves)",
                f"{observed}; largest change {features:.3g} against {last:.3g}",
                features > last,
                "" if features > last else why,
            ),
            Claim(
                f"{name}: feature decay 0 is further from collapse by {shown}, 2x is closer",
                "0 further, 2x closer (curves)",
                f"2x {value['2x features']:.4g}, baseline {middle:.4g}, 0 {value['0 features']:.4g}",
                ordered,
                "" if ordered else why,
            ),
        ]
    return claims


def theory_claims(theory: Theory) -> list[Claim]:
    flow = {
        "NC1~ falls": bool((theory.nc1_tilde.diff() < 0).all()),
        "scaled tr S_W falls": bool((theory.scaled_within.diff() < 0).all()),
        "scaled tr S_B rises": bool((theory.scaled_between.diff() > 0).all()),
    }
    start = float(theory.nc1_tilde[0])
    large = [ratio for beta, ratio in zip(theory.betas, theory.ratios) if beta >= 10]
    apart = max(
        float((found - closed).abs().max())
        for near in theory.near
        for found, closed in ((near.block, near.block_closed), (near.map, near.map_closed))
    )
    crossed = max(max(abs(n.cross[0] - n.cross_closed), *n.cross[1:], 0.0) for n in theory.near)
    # The same index of two spectra is the same kind of direction only by rank: ask that no value grows.
    ordered = sorted(theory.near, key=lambda near: near.lambda_h)
    weaker = [float((b.map <= a.map + 1e-12).double().mean()) for a, b in itertools.pairwise(ordered)]
    return [
        Claim(
            "Along the central path NC1~ and e^(2 lH t) tr S_W fall strictly, e^(2 lH t) tr S_B rises",
            "theorem",
            ", ".join(f"{name}: {'yes' if holds else 'no'}" for name, holds in flow.items()),
            all(flow.values()),
        ),
        Claim(
            "The minimiser of (2) has a smaller NC1~ than H0 for every large enough beta",
            "corollary",
            f"H0 {start:.4g}; minimisers, beta from 10 to 10,000: {min(large):.4g} to {max(large):.4g}",
            max(large) < start,
        ),
        Claim(
            "At collapse the spectra of the perturbation map are the closed forms",
            "sigma_max = 1, sigma_min = 1 - sqrt(lH/lW)/beta, cross blocks of rank 1",
            f"largest difference {apart:.1e} (blocks and whole map), {crossed:.1e} (cross blocks)",
            apart < 1e-10 and crossed < 1e-10,
        ),
        Claim(
            "The first-order map predicts the true minimiser",
            "first order in the perturbation",
            "relative errors at norm 1e-4: " + ", ".join(f"{e:.1e}" for e in theory.errors),
            max(theory.errors) < 1e-5,
        ),
        Claim(
            "A larger lH attenuates almost every direction more",
            "almost every direction",
            "share of eigenvalues that do not grow from one lH to the next: "
            + (", ".join(f"{w:.1%}" for w in weaker) or "one lH only"),
            bool(weaker) and min(weaker) > 0.9,
        ),
    ]
