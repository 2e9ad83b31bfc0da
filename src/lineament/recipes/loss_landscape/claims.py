"""What the loss-landscape recipe measures of a network, and what it claims of all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scipy.stats import spearmanr
from torch import Tensor

from lineament.measure.landscape.results import Plane
from lineament.report.outcome import Claim


@dataclass(frozen=True)
class Spectrum:
    """The criteria of a network on some data, means over probes, with the loss and the accuracy there."""

    re: float
    k: float
    k_spread: float
    top: float
    trace: float
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Shifted:
    """The spectrum on a test set with a shift of a size."""

    shift: str
    size: float
    spectrum: Spectrum


@dataclass(frozen=True)
class Measured:
    """One network: spectra and density curves before and after training, shifts, planes by axes and batch-norm mode.

    ``near`` and ``far`` say by which share a line's curvature is off its eigenvalue, from a step of 1e-6 and of 1e-2.
    """

    init: Spectrum
    trained: Spectrum
    curves: dict[str, tuple[Tensor, Tensor]]
    shifts: list[Shifted]
    planes: dict[str, Plane]
    near: float
    far: float


def claims(runs: dict[str, Measured]) -> list[Claim]:
    """Predicates, written before the first run: r_e falls over 50 times and K at least 4 times in every network; rank correlation with
    accuracy at most -0.8 in every network; with batch norm, random planes change more with its mode than Hessian planes do."""
    found = [
        _falls(runs, "re", "r_e", 50.0, "0.861 to 0.028"),
        _falls(runs, "k", "K_H0.5", 4.0, "1.033 to 0.222"),
    ]
    for key, name in (("re", "r_e"), ("k", "K_H0.5")):
        rho = [correlation(run, key) for run in runs.values()]
        found.append(
            _claim(
                f"{name} rises as accuracy falls under shift",
                "changes go together (ImageNet)",
                "rank correlation " + ", ".join(f"{r:.2f}" for r in rho),
                max(rho) <= -0.8,
                "over the thirteen shifts the order is not kept closely enough in every network",
            )
        )
    pairs = [
        (_change(run, "random"), _change(run, "hessian"))
        for run in runs.values()
        if "random, batch" in run.planes
    ]
    near, far = max(run.near for run in runs.values()), max(run.far for run in runs.values())
    spread = max(run.trained.k_spread for run in runs.values())
    return [
        *found,
        _claim(
            "with batch norm's mode, random planes change more than Hessian planes",
            "random planes can mislead, Hessian axes are safer",
            "; ".join(
                f"{math.exp(random):.3g} against {math.exp(steep):.3g} times" for random, steep in pairs
            ),
            all(random > steep for random, steep in pairs),
            "the steepest directions under running statistics are largely those that a batch's own statistics undo",
        ),
        _claim(
            "control: a line's curvature along an eigenvector is its eigenvalue",
            "to 1 %",
            f"off by at most {100 * near:.2g} % (a hundredth away, across the ReLUs' kinks: {100 * far:.2g} %)",
            near < 0.01,
            "the second difference crosses kinks of ReLUs, which autograd's Hessian does not see",
        ),
        _claim(
            "control: K_H0.5 hardly depends on the probe",
            "spread 0.005 to 0.03",
            f"at most {spread:.3g}",
            spread < 0.1,
            "take more probes",
        ),
    ]


def correlation(run: Measured, key: str) -> float:
    """Spearman's rank correlation of a quantity with accuracy over the shifted test sets."""
    points = [each.spectrum for each in run.shifts]
    return float(spearmanr([p.accuracy for p in points], [getattr(p, key) for p in points])[0])  # pyright: ignore


def rise(plane: Plane) -> float:
    """By how much the loss is higher on average over a plane than in its middle."""
    return float(plane.loss.mean()) - plane.centre


def _claim(name: str, paper: str, observed: str, holds: bool, reason: str) -> Claim:
    return Claim(name, paper, observed, holds, "" if holds else reason)


def _falls(runs: dict[str, Measured], key: str, name: str, times: float, paper: str) -> Claim:
    pairs = {run: (getattr(m.init, key), getattr(m.trained, key)) for run, m in runs.items()}
    falls = {run: before / max(after, 1e-300) for run, (before, after) in pairs.items()}
    worst = min(falls, key=falls.__getitem__)
    return _claim(
        f"training lowers {name} at least {times:g} times",
        f"{paper} (LeNet, MNIST)",
        "; ".join(f"{before:.3g} to {after:.2g}" for before, after in pairs.values()),
        falls[worst] >= times,
        f"{worst} falls {falls[worst]:.3g} times; its training ended at an accuracy of {runs[worst].trained.accuracy:.3f}",
    )


def _change(run: Measured, axes: str) -> float:
    """|log| of how many times the loss rises more, on average over the plane, under one batch-norm mode than the other."""
    one, other = (rise(run.planes[f"{axes}, {mode}"]) for mode in ("batch", "eval"))
    return abs(math.log(one / other)) if one > 0 and other > 0 else math.inf
