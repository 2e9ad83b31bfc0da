"""The panel of the two-layer theory: alignments by gradient descent, SAM and with the fast-free examples twice; and the recursion without noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.data.fast_slow_patches import fast_slow_patches
from lineament.learn.useful.two_layer_theory import (
    alignment_recursion,
    cubic_network,
    fast_free_weights,
    train_cubic,
    upsampled_share,
)

WAYS = ("GD", "SAM", "GD, fast-free x2")


@dataclass(frozen=True)
class Walk:
    """One training: the alignments with the fast and the slow feature after each step, the test accuracy at each mark."""

    alignments: Tensor
    accuracy: list[float]


@dataclass(frozen=True)
class Theory:
    """Trainings by the strength of the slow feature and by their way, one a seed; ``marks`` are the steps at which they are judged.

    ``recursion`` is the largest difference between a noise-free training and the recursion of its alignments, by way.
    """

    marks: list[int]
    walks: dict[str, dict[str, list[Walk]]]
    recursion: dict[str, float]

    def mean(self, slow: float, way: str) -> Tensor:
        """The alignments (steps, 2), averaged over seeds."""
        return torch.stack([walk.alignments for walk in self.walks[f"{slow:g}"][way]]).mean(0)


def theory_panel(config: Any) -> Theory:
    marks = [m for m in (200, 400, 1200) if m <= config.theory_steps] or [config.theory_steps]
    walks: dict[str, dict[str, list[Walk]]] = {}
    for slow in config.theory_slow:
        each: list[dict[str, Walk]] = []
        for seed in config.theory_seeds:
            options = {"slow": slow, "alpha": config.theory_alpha}
            data = fast_slow_patches(config.theory_samples, seed=2 * seed, **options)
            test = fast_slow_patches(2000, seed=2 * seed + 1, **options)
            draw = torch.Generator().manual_seed(seed + 100)
            W = 0.1 * torch.randn(20, 50, generator=draw, dtype=torch.float64)
            weights = fast_free_weights(data.extras["has_fast"])
            settings: Sequence[dict[str, Any]] = ({}, {"rho": config.theory_rho}, {"weights": weights})
            each.append({way: _walk(W, data, test, marks, **s) for way, s in zip(WAYS, settings)})
        walks[f"{slow:g}"] = {way: [found[way] for found in each] for way in WAYS}
    recursion = {way: _recursion_error(config.theory_alpha, k) for way, k in (("GD", 1), (WAYS[2], 2))}
    return Theory(marks, walks, recursion)


def _walk(W: Tensor, data: Any, test: Any, marks: Sequence[int], **setting: Any) -> Walk:
    alignments, accuracy = [], []
    for steps in (b - a for a, b in zip([0, *marks], marks)):
        path = train_cubic(W, *data.pair, steps=steps, lr=0.1, **setting)
        W = path.W
        alignments.append(path.alignments)
        accuracy.append(float((cubic_network(W, test.inputs).sign() == test.targets).double().mean()))
    return Walk(torch.cat(alignments), accuracy)


def _recursion_error(alpha: float, factor: int) -> float:
    data = fast_slow_patches(200, dims=6, slow=0.5, alpha=alpha, noise=0.0, seed=1)
    has_fast = data.extras["has_fast"]
    W = 0.3 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    path = train_cubic(W, *data.pair, steps=300, lr=0.1, weights=fast_free_weights(has_fast, factor))
    share = upsampled_share(float(has_fast.double().mean()), factor)
    a, b = alignment_recursion(W[:, 0], W[:, 1], steps=300, lr=0.1, fast=1.0, slow=0.5, alpha=share)
    return float((path.W[:, :2] - torch.stack([a[-1], b[-1]], 1)).abs().max())
