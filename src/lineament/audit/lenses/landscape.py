"""How does the loss look around its weights, and is that the curvature of a settled minimum?

The plane along the two eigenvectors of largest curvature, the spectral density of the Hessian (stochastic Lanczos quadrature), and the
criteria r_e and K_H0.5 made of it with what they mean (Gabdullin 2024, arXiv 2412.10146). Batch norm keeps its running statistics, as
the network is used; eigenvectors put no weight on directions that only change the scale of what batch norm undoes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.audit.phrases import compact, percent
from lineament.audit.subject import Subject
from lineament.core.curvature.density import Density, spectral_density
from lineament.core.curvature.eigenpairs import top_eigenpairs
from lineament.core.curvature.matrices import hessian
from lineament.core.curvature.traces import trace
from lineament.measure.landscape.axes import Axis, signed
from lineament.measure.landscape.batchnorm_modes import LandscapeWarning
from lineament.measure.landscape.criteria import Criteria, criteria
from lineament.measure.landscape.grids import plane
from lineament.measure.landscape.results import Plane
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Finding, Picture, Section
from lineament.report.surface_plot import SurfacePlot
from lineament.report.text import plain

TITLE = "What does the loss look like around its weights?"
HELP = "what the loss looks like around its weights, and whether that is a settled minimum"
ORDER = 50
METHOD = "loss-landscape"
ALIASES = ("sharpness",)
_TOP, _PRODUCTS, _STEPS, _PROBES, _TRACE = 2, 48, 20, 2, 20
_GRID = 21
_NAMES = {
    1: ["eigenvalue"],
    2: ["largest eigenvalue", "smallest eigenvalue"],
    3: ["largest eigenvalue", "second largest", "smallest eigenvalue"],
    4: ["largest eigenvalue", "second largest", "smallest eigenvalue", "second smallest"],
}
_WORK, _PLANE_WORK = 5e11, 1e11
_SETTLE = "Make sure that these are data like those it was trained on; if they are, train it longer or at a smaller rate (sharpness-aware minimisation, SAM, seeks flatter places)."


@dataclass(frozen=True)
class Curvature:
    """The spectrum of the Hessian over some samples: its ends, its trace, its density, the criteria made of it, the loss around.

    ``settled``: a minimum, as far as the ends of the spectrum are known; the shares are of weight directions that curve downwards,
    and of those that are nearly flat.
    """

    top: float
    bottom: float
    eigenvalues: Sequence[float]
    residuals: Sequence[float]
    converged: bool
    settled: bool
    loss: float
    trace: float
    trace_standard_error: float
    weights: int
    samples: int
    negative_share: float
    flat_share: float
    density: Density
    criteria: Criteria
    plane: Plane | None

    @property
    def saddle(self) -> bool:
        return self.bottom < -0.1 * max(self.top, 0)

    def to_dict(self) -> dict[str, Any]:
        nodes, weights = self.density.nodes.double(), self.density.weights.double()
        found = self.criteria
        return {
            **vars(self),
            "density": {"nodes": nodes.flatten().tolist(), "weights": weights.flatten().tolist()},
            "criteria": {k: getattr(found, k) for k in ("re", "k", "verdict", "negative", "effective_rank")},
        }


def applies(subject: Subject) -> str:
    if not any(p.is_floating_point() for p in subject.model.parameters()):
        return "The network has no parameters that could be moved."
    return ""


def look(subject: Subject) -> Section:
    passes = 5.0 * (_PRODUCTS + _STEPS * _PROBES + _TRACE)
    rows = subject.subset(subject.affordable(_WORK, passes, most=256), salt=2)
    names = [name for name, p in subject.model.named_parameters() if p.is_floating_point()]
    loss = float(subject.losses(subject.outputs[rows].double(), subject.targets[rows]).mean())
    if loss < _rounding(subject):
        return _nothing_left(loss, len(rows))
    # Fused attention has no second derivative; the plain formula has.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore", LandscapeWarning)  # the section says it in words
        operator = hessian(subject.model, subject.loss, subject.batches(rows), params=names)
        size = operator.shape[0]
        ends = top_eigenpairs(
            operator, min(_TOP, size), which="both", tol=2e-2, max_products=_PRODUCTS, seed=subject.seed
        )
        density = spectral_density(operator, steps=min(_STEPS, size), probes=_PROBES, seed=subject.seed)
        total = trace(operator, max(2, min(_TRACE, size)), seed=subject.seed)
        found = criteria(density)
        around = _around(subject, ends, tuple(operator.names), rows)
    values = ends.values.double().tolist()
    weights, nodes = density.weights.double(), density.nodes.double()
    # No eigenvalue estimate reaches beyond the spectrum, so of two searches for its ends the farther is the nearer to the truth.
    seen = nodes[weights > 1e-9]
    top, bottom = max(*values, float(seen.max())), min(*values, float(seen.min()))
    negative = float(weights[nodes < -1e-3 * max(abs(top), abs(bottom))].sum() / weights.sum())
    flat = float(weights[nodes.abs() < 1e-2 * max(abs(top), 1e-30)].sum() / weights.sum())
    step = 2 / top if top > 0 else math.inf
    # The ends of the spectrum are known well enough when what is left of them could not make a saddle of a minimum.
    sure = float(ends.residuals.max()) <= 0.05 * abs(top)
    curvature = Curvature(
        top,
        bottom,
        values,
        ends.residuals.double().tolist(),
        ends.converged,
        settled=bottom >= -0.1 * max(top, 0) and sure and found.verdict == "settled",
        loss=loss,
        trace=total.value,
        trace_standard_error=total.standard_error,
        weights=size,
        samples=len(rows),
        negative_share=negative,
        flat_share=flat,
        density=density,
        criteria=found,
        plane=around,
    )
    sentence = (
        f"Over {len(rows)} samples, the steepest direction has curvature {compact(top)}: plain gradient descent with a step above {compact(step)} could not stay "
        f"here. Of {size:,} weight directions, {percent(flat)} are nearly flat (below 1 % of that). "
        + (
            f"The loss also curves steeply downwards (smallest eigenvalue {compact(bottom)}), so that this is no minimum on these samples. "
            if curvature.saddle
            else (
                "Nothing curves downwards"
                if bottom >= 0
                else f"The steepest way down has curvature {compact(bottom)}"
            )
            + (": it sits in a minimum, as far as these samples tell. " if curvature.settled else ". ")
        )
        + f"Two numbers sum up the whole spectrum, both 0 in a minimum and near 1 in an untrained network: r_e = {_estimate(found.re) if found.reach > 0 else 0} (how far it reaches below "
        f"zero, against above) and K_H0.5 = {_estimate(found.k)} (how much of it is below). {found.meaning}"
    )
    if found.verdict == "flat":
        sentence = (
            f"Over {len(rows)} samples, none of {size:,} weight directions has any curvature. {found.meaning}"
        )
    return Section(
        status="good" if curvature.settled else "note",
        number=compact(top),
        unit="largest curvature of the loss",
        sentence=sentence,
        pictures=[*_landscape(around), _figure(density, values)],
        tables=[
            Table(
                "Curvature",
                ("quantity", "value", "error"),
                [
                    *((name, v, float(r)) for name, v, r in zip(_NAMES[len(values)], values, ends.residuals)),
                    ("trace", total.value, _or_none(total.standard_error)),
                    ("trace / weights", total.value / size, _or_none(total.standard_error / size)),
                    ("r_e (smallest over largest)", _or_none(float(found.re.mean())), _spread(found.re)),
                    ("K_H0.5 (downwards over upwards)", _or_none(float(found.k.mean())), _spread(found.k)),
                ],
            )
        ],
        numbers=plain(curvature),
        findings=[_finding(curvature)],
    )


def _finding(found: Curvature) -> Finding:
    ends = f"smallest eigenvalue {compact(found.bottom)}, largest {compact(found.top)}"
    if found.saddle:
        text = f"It does not sit in a minimum: the loss curves downwards ({ends})."
        return Finding("note", text, advice=_SETTLE)
    if found.criteria.verdict == "flat":
        text = "Its loss on these samples has no curvature at all: small changes of the weights do not matter to it, or only in a straight line."
        return Finding("note", text)
    if found.criteria.verdict != "settled":
        k = [v for v in found.criteria.k.tolist() if math.isfinite(v)]
        share = f" (K_H0.5 = {compact(sum(k) / len(k))})" if k else ""
        text = f"Nothing curves steeply downwards where it is ({ends}), but many directions do gently{share}: not quite a minimum."
        return Finding("note", text, advice=_SETTLE)
    if not found.settled:
        text = f"Nothing was found that curves steeply downwards where it is, but the search for the spectrum's ends ({compact(found.bottom)} and {compact(found.top)}) had not settled."
        return Finding("note", text, advice="Audit with another seed or more samples, and compare.")
    text = f"It sits in a minimum of largest curvature {compact(found.top)}; {percent(found.flat_share, 0)} of weight directions are nearly flat."
    return Finding("good", text)


def _rounding(subject: Subject) -> float:
    """The mean loss below which there is nothing left to fall: what the last digits of single precision make of it."""
    eps = torch.finfo(torch.float32).eps
    if subject.task != "regression":
        return 10 * eps
    targets = subject.targets.double()
    return (10 * eps) ** 2 * max(float(targets.square().mean()), 1e-30)


def _nothing_left(loss: float, samples: int) -> Section:
    """No loss is below zero, so that at zero neither the sign nor the size of the curvature means anything."""
    return Section(
        status="note",
        number=compact(loss),
        unit="loss on these samples: zero, within rounding",
        sentence=f"Over {samples} samples the loss is {compact(loss)}, which is zero within rounding: it cannot fall further, and how it curves there is no more than "
        "rounding, so that neither a minimum nor a saddle can be told. Audit samples that the network was not trained on, or harder ones, to learn how settled it is.",
        numbers={"settled": None, "loss": loss, "samples": samples},
        findings=[
            Finding(
                "note",
                f"Its loss on these samples is zero within rounding ({compact(loss)}), so that how settled it is cannot be told from them.",
                advice="Audit samples that it was not trained on.",
            )
        ],
    )


def _around(subject: Subject, ends: Any, names: tuple[str, ...], rows: Any) -> Plane | None:
    """The plane along the two eigenvectors of largest curvature, as far as the loss rises well above where it is."""
    count = min(_TOP, ends.vectors.shape[1])
    if count < 2 or float(ends.values[0]) <= 0:
        return None
    axes = [
        Axis(
            signed(ends.vectors[:, k]),
            names,
            "hessian",
            f"eigenvector of curvature {compact(float(ends.values[k]))}",
        )
        for k in range(2)
    ]
    few = subject.affordable(_PLANE_WORK, float(_GRID**2), most=len(rows), least=min(16, len(rows)))
    some = rows[:: max(1, len(rows) // few)][:few]
    # At this distance the quadratic alone would add about 2 to the loss; weights' own size is the other measure.
    dist = 2 / math.sqrt(float(ends.values[0]))
    return plane(subject.model, subject.loss, subject.batches(some), axes, dist=dist, steps=_GRID)


def _landscape(around: Plane | None) -> list[Picture]:
    if around is None:
        return []
    low, high = float(around.loss.nan_to_num().min()), float(around.loss.nan_to_num().max())
    return [
        picture(
            lambda axes: (around.plot(axes[0, 0]), around.surface(axes[0, 1])),
            size=(9.2, 3.6),
            panels=(1, 2),
            kind="png",
            surfaces=[SurfacePlot.of(around)],
            caption="The loss in the plane of the two steepest directions (the mark: these weights), as contours and as a surface; the axes say how far the weights are moved. Along every other direction it is flatter.",
            alt=f"Contours and surface of the loss around the weights, {compact(around.centre)} in the middle, from {compact(low)} to {compact(high)}.",
        )
    ]


def _figure(density: Density, values: list[float]) -> Picture:
    grid, height = density.curve()

    def draw(ax: Any) -> None:
        ax.fill_between(
            grid.tolist(), 1e-6, height.clamp_min(1e-6).tolist(), color="C0", alpha=0.25, linewidth=0
        )
        ax.plot(grid.tolist(), height.clamp_min(1e-6).tolist(), color="C0")
        ax.set_yscale("log")
        ax.set_ylim(bottom=1e-5 * float(height.max()))
        for number, value in enumerate(values):
            ax.axvline(
                value,
                color="C1",
                linewidth=1,
                label="largest and smallest eigenvalues" if number == 0 else None,
            )
        ax.set(xlabel="curvature (eigenvalue of the Hessian)", ylabel="share of directions (density)")
        # Above the axes: inside, an eigenvalue may run through it.
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)

    return picture(
        draw,
        caption="How many weight directions have which curvature: a high peak at zero means that most directions hardly change the loss.",
        alt=f"Spectral density of the Hessian between {compact(min(values))} and {compact(max(values))}, with most of its weight near zero.",
    )


def _spread(values: Any) -> float | None:
    return _or_none(float(values.std())) if len(values) > 1 else None


def _estimate(values: Any) -> str:
    """The mean over probes, and their spread where that is a tenth of it or more."""
    mean, spread = float(values.mean()), _spread(values) or 0.0
    return compact(mean) + (f" ± {compact(spread)}" if spread > 0.1 * abs(mean) else "")


def _or_none(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
