"""Whether a network is as often right as it is sure: the expected calibration error over 15 bins (Guo et al. 2017, arXiv 1706.04599)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.audit.phrases import percent, points
from lineament.report.figures import picture
from lineament.report.section import Finding, Picture

BINS = 15


@dataclass(frozen=True)
class Bin:
    """The samples of about one confidence: how sure the network is of them, and how often it is right."""

    confidence: float
    accuracy: float
    count: int


@dataclass(frozen=True)
class Calibration:
    """The expected calibration error, the mean confidence and accuracy, and the bins that hold samples."""

    error: float
    confidence: float
    accuracy: float
    bins: Sequence[Bin]
    gap_error: float = math.inf

    @property
    def gap(self) -> float:
        """By how much it is surer than right."""
        return self.confidence - self.accuracy


def calibration(probabilities: Tensor, targets: Tensor, bins: int = BINS) -> Calibration:
    """Expected calibration error: Σ_b n_b/N · |accuracy_b - confidence_b| over equal bins of the top probability.

    >>> calibration(torch.tensor([[0.8, 0.2]] * 5), torch.tensor([0, 0, 0, 0, 1])).error < 1e-6
    True
    """
    confidence, decision = probabilities.double().max(1)
    right = (decision == targets).double()
    number = (confidence * bins).ceil().long().clamp(1, bins) - 1
    count = torch.bincount(number, minlength=bins)
    sure = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, confidence)
    hit = torch.zeros(bins, dtype=torch.float64).index_add_(0, number, right)
    error = float((hit - sure).abs().sum() / len(targets))
    filled = count > 0
    bins_filled = zip(sure[filled], hit[filled], count[filled])
    return Calibration(
        error,
        float(confidence.mean()),
        float(right.mean()),
        [Bin(float(s / n), float(h / n), int(n)) for s, h, n in bins_filled],
        float((confidence - right).std()) / math.sqrt(len(right)) if len(right) > 1 else math.inf,
    )


def confidence_findings(known: Calibration) -> list[Finding]:
    sure = abs(known.gap) - 1.96 * known.gap_error
    if known.error <= 0.05 or sure <= 0.03:
        return []
    return [
        Finding(
            "warning" if known.gap > 0 and sure > 0.1 else "note",
            f"It is {'over' if known.gap > 0 else 'under'}confident: {percent(known.confidence)} sure on average, and right in {percent(known.accuracy)}, a gap of {points(known.gap)} ± {points(1.96 * known.gap_error)} (95 % interval).",
            advice="Do not use its confidence as it is: divide the logits by one temperature that you fit on held-out data (the paper that the section names says how).",
            key="overconfident" if known.gap > 0 else "underconfident",
        )
    ]


def reliability(known: Calibration) -> Picture:
    def draw(ax: Any) -> None:
        ax.plot([0, 1], [0, 1], color="C7", linewidth=1, linestyle="--", label="sure as often as right")
        sizes = [12 + 160 * b.count / max(x.count for x in known.bins) for b in known.bins]
        at = [b.confidence for b in known.bins]
        hit = [b.accuracy for b in known.bins]
        ax.plot(at, hit, color="C0", linewidth=1.2)
        ax.scatter(at, hit, s=sizes, color="C0", alpha=0.8, label="the network (size: samples)")
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="how sure it is", ylabel="how often it is right")
        # Above the axes: inside, the network's line may run through it.
        ax.legend(loc="lower left", ncols=2, bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)

    return picture(
        draw,
        size=(5.2, 3.4),
        caption=f"Calibration: points below the line are overconfident. Expected calibration error {percent(known.error)}.",
        alt=f"Reliability diagram in {len(known.bins)} bins; mean confidence {percent(known.confidence)}, "
        f"accuracy {percent(known.accuracy)}.",
    )
