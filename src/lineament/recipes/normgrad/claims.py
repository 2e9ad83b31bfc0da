"""What NormGrad's recipe claims, on scenes of digits and on photographs: predicates that were written before the first run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lineament.report.outcome import Claim

COMBINED = ["linear_approx", "grad_cam", "norm_grad", "norm_grad_selective"]
META = ["norm_grad", "norm_grad_selective"]


@dataclass(frozen=True)
class Pointing:
    """Pointing accuracies: ``layers[method][site]``, and ``products[method]`` of four layers' maps."""

    layers: dict[str, dict[str, float]]
    products: dict[str, float]


@dataclass(frozen=True)
class Correlations:
    """Mean rank correlations of two classes' maps, ``mean[method][site]`` (``None``: undefined for all), and how many were undefined."""

    mean: dict[str, dict[str, float | None]]
    undefined: dict[str, int]


@dataclass(frozen=True)
class AfterStep:
    """Pointing accuracy and mean correlation after the meta step, by method and site."""

    pointing: dict[str, dict[str, float]]
    correlation: dict[str, dict[str, float | None]]


def number(value: float | None) -> str:
    """A correlation in a sentence."""
    return "undefined" if value is None else f"{value:.3f}"


def scene_claims(
    points: Pointing, alike: Correlations, meta: AfterStep, sites: dict[str, str]
) -> list[Claim]:
    """The claims on scenes of digits; ``sites`` is {number of the ReLU: site}, in depth order."""
    order = list(sites.values())
    layers, products = points.layers, points.products
    last = order[-1]
    cam, norm = ([layers[m][s] for s in order] for m in ("grad_cam", "norm_grad"))
    selective, plain = layers["norm_grad_selective"][last], layers["norm_grad"][last]
    averages = {m: sum(layers[m].values()) / len(order) for m in COMBINED}
    label = {s: f"ReLU {k}" for k, s in sites.items()}
    pairs = [(m, s) for m in META for s in order[-2:]]
    moved = {p: (alike.mean[p[0]][p[1]], meta.correlation[p[0]][p[1]]) for p in pairs}
    raised = {p: (layers[p[0]][p[1]], meta.pointing[p[0]][p[1]]) for p in pairs}
    before, after = (sum(v[i] for v in raised.values()) / len(pairs) for i in (0, 1))
    ignores = alike.mean["norm_grad"][last]
    return [
        _claim(
            "Grad-CAM collapses in early layers (first two at least 20 points below its best)",
            "VGG16, VOC07: 59.1 and 58.4 % at the first two layers, 86.6 % at the last",
            f"{_list(cam[:2])} % at the first two, {100 * max(cam):.1f} % at its best layer",
            max(cam[:2]) <= max(cam) - 0.2,
        ),
        _claim(
            "NormGrad stays flat (before the last layer, at most 15 points between layers)",
            "VGG16, VOC07: 78.9 to 81.9 % at layers 3 to 22, 77.7 % at the last",
            f"{_list(norm[:-1])} % at ReLU 1, 2, 4, 6, then {100 * norm[-1]:.1f} % at the last",
            max(norm[:-1]) - min(norm[:-1]) <= 0.15,
            "the deep maps have 12 x 12 and 6 x 6 cells of 4 and 8 pixels, and a hit must lie within 2 pixels of the digit",
        ),
        _claim(
            "Selective NormGrad points at least as well as NormGrad at the last layer",
            "VGG16: 86.0 against 77.7 %; ResNet50: 87.4 against 78.8 %",
            f"{100 * selective:.1f} against {100 * plain:.1f} %",
            selective >= plain,
        ),
        _claim(
            "Combining layers helps (the product beats the average single layer, for each of four methods)",
            "combined layers are reported as better than single ones; the table was not at hand",
            "; ".join(
                f"{m} {100 * products[m]:.1f} against {100 * averages[m]:.1f} on average and {100 * max(layers[m].values()):.1f} at best"
                for m in COMBINED
            ),
            all(products[m] > averages[m] for m in COMBINED),
        ),
        _claim(
            "Before global average pooling NormGrad ignores the class (rank correlation 1)",
            "follows from the gradient being the same everywhere",
            number(ignores),
            ignores is not None and ignores > 0.999,
        ),
        _claim(
            "The meta step makes late maps more specific to the class (each correlation falls)",
            "the correlation of the maps of the most and least probable class falls",
            "; ".join(f"{m} at {label[s]}: {number(a)} to {number(b)}" for (m, s), (a, b) in moved.items()),
            all(a is not None and b is not None and b < a for a, b in moved.values()),
        ),
        _claim(
            "The meta step raises pointing accuracy in late layers (on average)",
            "ResNet50, last layer: NormGrad 78.8 to 80.9 %, selective 87.4 to 88.6 %",
            f"{100 * before:.1f} to {100 * after:.1f} % ("
            + "; ".join(
                f"{m} at {label[s]}: {100 * a:.1f} to {100 * b:.1f}" for (m, s), (a, b) in raised.items()
            )
            + ")",
            after > before,
        ),
    ]


# The paper's figures on VOC2007 for the claims below.
_VGG16 = {
    "cam": "VGG16: 59.1, 58.4, 55.4, 58.2, 86.6 %",
    "norm": "VGG16: 78.9, 81.0, 81.9, 81.9, 77.7 %",
    "selective": "VGG16: 86.0 against 77.7 %",
    "meta": "VGG16: NormGrad 77.7 to 78.2 %, selective 86.0 to 86.1 %",
}
_RESNET50 = {
    "cam": "ResNet50: 54.5, 52.9, 66.3, 90.4 %",
    "norm": "ResNet50: 81.9, 84.0, 84.6, 78.8 %",
    "selective": "ResNet50: 87.4 against 78.8 %",
    "meta": "ResNet50: NormGrad 78.8 to 80.9 %, selective 87.4 to 88.6 %",
}


def photograph_claims(
    layers: dict[str, dict[str, float]], products: dict[str, float], sites: list[str], network: str
) -> list[Claim]:
    """The claims on photographs; ``network`` is the kind whose figures stand beside ours."""
    paper = _VGG16 if network == "VGG16" else _RESNET50
    cam, norm = ([layers[m][s] for s in sites] for m in ("grad_cam", "norm_grad"))
    last = {m: row[sites[-1]] for m, row in layers.items()}
    averages = {m: sum(layers[m].values()) / len(sites) for m in products}
    return [
        _claim(
            "Grad-CAM collapses before the last layer (first two at least 20 points below its best)",
            paper["cam"],
            f"{_list(cam)} %",
            max(cam[:2]) <= max(cam) - 0.2,
        ),
        _claim(
            "NormGrad stays flat (before the last layer, at most 15 points between layers)",
            paper["norm"],
            f"{_list(norm)} %",
            max(norm[:-1]) - min(norm[:-1]) <= 0.15,
        ),
        _claim(
            "Selective NormGrad points at least as well as NormGrad at the last layer",
            paper["selective"],
            f"{100 * last['norm_grad_selective']:.1f} against {100 * last['norm_grad']:.1f} %",
            last["norm_grad_selective"] >= last["norm_grad"],
        ),
        _claim(
            "Combining layers helps (the product beats the average single layer, for each of four methods)",
            "combined layers are reported as better than single ones; the table was not at hand",
            "; ".join(f"{m} {100 * products[m]:.1f} against {100 * averages[m]:.1f} %" for m in products),
            all(products[m] > averages[m] for m in products),
        ),
        _claim(
            "The meta step raises pointing accuracy at the last layer (both methods)",
            paper["meta"],
            "; ".join(f"{m} {100 * last[m]:.1f} to {100 * last[m + ' + meta']:.1f} %" for m in META),
            all(last[f"{m} + meta"] > last[m] for m in META),
        ),
    ]


def _claim(name: str, paper: str, observed: str, holds: bool, reason: str = "") -> Claim:
    fallback = "the differences are within the noise of this many test scenes"
    return Claim(name, paper, observed, bool(holds), "" if holds else reason or fallback)


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{100 * v:.1f}" for v in values)
