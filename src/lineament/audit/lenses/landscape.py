"""How does the loss look around its weights, and is that the curvature of a settled minimum?

The plane along the two eigenvectors of greatest curvature, the spectral density of the Hessian (stochastic Lanczos quadrature), and the
criteria r_e and K_H0.5 made of it with what they mean (Gabdullin 2024, arXiv 2412.10146). Batch norm keeps its running statistics, as
the network is used; eigenvectors put no weight on directions that only change the scale of what batch norm undoes.
"""

from __future__ import annotations

import math
import warnings
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
from lineament.measure.landscape.grids import Plane, plane
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Section
from lineament.report.surface_plot import SurfacePlot

TITLE = "What does the loss look like around its weights?"
METHOD = "loss-landscape"
_TOP, _PRODUCTS, _STEPS, _PROBES, _TRACE = 2, 48, 20, 2, 20
_GRID = 21
_NAMES = {
    1: ["eigenvalue"],
    2: ["greatest eigenvalue", "least eigenvalue"],
    3: ["greatest eigenvalue", "second greatest", "least eigenvalue"],
    4: ["greatest eigenvalue", "second greatest", "least eigenvalue", "second least"],
}
_WORK, _PLANE_WORK = 5e11, 1e11


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
    saddle = bottom < -0.1 * max(top, 0)
    # The ends of the spectrum are known well enough when what is left of them could not make a saddle of a minimum.
    sure = float(ends.residuals.max()) <= 0.05 * abs(top)
    settled = not saddle and sure and found.verdict == "settled"
    sentence = (
        f"Over {len(rows)} samples, the steepest direction has curvature {compact(top)}: plain gradient descent with a step above {compact(step)} could not stay "
        f"here. Of {size:,} weight directions, {percent(flat)} are nearly flat (below 1 % of that). "
        + (
            f"The loss also curves steeply downwards (least eigenvalue {compact(bottom)}), so that this is no minimum on these samples. "
            if saddle
            else (
                "Nothing curves downwards"
                if bottom >= 0
                else f"The steepest way down has curvature {compact(bottom)}"
            )
            + (": it sits in a minimum, as far as these samples tell. " if settled else ". ")
        )
        + f"Two numbers sum up the whole spectrum, both 0 in a minimum and near 1 in an untrained network: r_e = {_estimate(found.re) if found.reach > 0 else 0} (how far it reaches below "
        f"zero, against above) and K_H0.5 = {_estimate(found.k)} (how much of it is below). {found.meaning}"
    )
    if found.verdict == "flat":
        sentence = (
            f"Over {len(rows)} samples, none of {size:,} weight directions has any curvature. {found.meaning}"
        )
    return Section(
        name="landscape",
        title=TITLE,
        status="good" if settled else "note",
        number=compact(top),
        unit="greatest curvature of the loss",
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
                    ("r_e (least over greatest)", _or_none(float(found.re.mean())), _spread(found.re)),
                    ("K_H0.5 (downwards over upwards)", _or_none(float(found.k.mean())), _spread(found.k)),
                ],
            )
        ],
        method=METHOD,
        numbers={
            "top": top,
            "bottom": bottom,
            "eigenvalues": values,
            "residuals": ends.residuals.double().tolist(),
            "converged": ends.converged,
            "settled": settled,
            "loss": loss,
            "trace": total.value,
            "trace_standard_error": _or_none(total.standard_error),
            "weights": size,
            "samples": len(rows),
            "negative_share": negative,
            "flat_share": flat,
            "density": {"nodes": nodes.flatten().tolist(), "weights": weights.flatten().tolist()},
            "criteria": _numbers(found),
            "plane": None if around is None else around.to_dict(),
        },
    )


def _rounding(subject: Subject) -> float:
    """The mean loss below which there is nothing left to fall: what the last digits of single precision make of it."""
    eps = torch.finfo(torch.float32).eps
    if subject.task == "classification":
        return 10 * eps
    targets = subject.targets.double()
    return (10 * eps) ** 2 * max(float(targets.square().mean()), 1e-30)


def _nothing_left(loss: float, samples: int) -> Section:
    """No loss is below zero, so that at zero neither the sign nor the size of the curvature means anything."""
    return Section(
        name="landscape",
        title=TITLE,
        status="note",
        number=compact(loss),
        unit="loss on these samples: zero, within rounding",
        sentence=f"Over {samples} samples the loss is {compact(loss)}, which is zero within rounding: it cannot fall further, and how it curves there is no more than "
        "rounding, so that neither a minimum nor a saddle can be told. Audit samples that the network was not trained on, or harder ones, to learn how settled it is.",
        method=METHOD,
        numbers={"settled": None, "loss": loss, "samples": samples},
    )


def _around(subject: Subject, ends: Any, names: tuple[str, ...], rows: Any) -> Plane | None:
    """The plane along the two greatest eigenvectors, as far as the loss rises well above where it is."""
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


def _landscape(around: Plane | None) -> list[Any]:
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


def _figure(density: Density, values: list[float]) -> Any:
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
                label="greatest and least eigenvalues" if number == 0 else None,
            )
        ax.set(xlabel="curvature (eigenvalue of the Hessian)", ylabel="share of directions (density)")
        # Above the axes: inside, an eigenvalue may run through it.
        ax.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)

    return picture(
        draw,
        caption="How many weight directions have which curvature: a high peak at zero means that most directions hardly change the loss.",
        alt=f"Spectral density of the Hessian between {compact(min(values))} and {compact(max(values))}, with most of its weight near zero.",
    )


def _numbers(found: Criteria) -> dict[str, Any]:
    return {
        "re": [_or_none(v) for v in found.re.tolist()],
        "k": [_or_none(v) for v in found.k.tolist()],
        "verdict": found.verdict,
        "negative": found.negative,
        "effective_rank": found.effective_rank,
    }


def _spread(values: Any) -> float | None:
    return _or_none(float(values.std())) if len(values) > 1 else None


def _estimate(values: Any) -> str:
    """The mean over probes, and their spread where that is a tenth of it or more."""
    mean, spread = float(values.mean()), _spread(values) or 0.0
    return compact(mean) + (f" ± {compact(spread)}" if spread > 0.1 * abs(mean) else "")


def _or_none(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
