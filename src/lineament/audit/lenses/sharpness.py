"""How curved is the loss around its weights?

The Hessian of the mean loss over some samples, by products only: its greatest and least eigenvalues (Lanczos), its trace with a
standard error, and its spectral density (stochastic Lanczos quadrature; Ghorbani et al. 2019, arXiv 1901.10159).
"""

from __future__ import annotations

import math
from typing import Any

from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.audit.subject import Subject
from lineament.audit.words import compact, percent
from lineament.core.curvature import hessian
from lineament.core.spectra import Density, spectral_density, top_eigenpairs
from lineament.core.traces import trace
from lineament.report.figures import picture
from lineament.report.outcome import Table
from lineament.report.section import Section

TITLE = "How sharp is the minimum it sits in?"
METHOD = "hessian-density"
_TOP, _PRODUCTS, _STEPS, _PROBES, _TRACE = 2, 40, 20, 2, 20
_WORK = 5e11


def applies(subject: Subject) -> str:
    if not any(p.is_floating_point() for p in subject.model.parameters()):
        return "The network has no parameters that could be moved."
    return ""


def look(subject: Subject) -> Section:
    passes = 5.0 * (_PRODUCTS + _STEPS * _PROBES + _TRACE)
    rows = subject.subset(subject.affordable(_WORK, passes, most=256), salt=2)
    names = [name for name, p in subject.model.named_parameters() if p.is_floating_point()]
    # Fused attention has no second derivative; the plain formula has.
    with sdpa_kernel(SDPBackend.MATH):
        operator = hessian(subject.model, subject.loss, subject.batches(rows), params=names)
        size = operator.shape[0]
        ends = top_eigenpairs(
            operator, min(_TOP, size), which="both", tol=2e-2, max_products=_PRODUCTS, seed=subject.seed
        )
        density = spectral_density(operator, steps=min(_STEPS, size), probes=_PROBES, seed=subject.seed)
        total = trace(operator, max(2, min(_TRACE, size)), seed=subject.seed)
    values = ends.values.double().tolist()
    top, bottom = max(values), min(values)
    weights, nodes = density.weights.double(), density.nodes.double()
    negative = float(weights[nodes < -1e-3 * max(abs(top), abs(bottom))].sum() / weights.sum())
    flat = float(weights[nodes.abs() < 1e-2 * max(abs(top), 1e-30)].sum() / weights.sum())
    step = 2 / top if top > 0 else math.inf
    sentence = (
        f"Over {len(rows)} samples, the steepest direction has curvature {compact(top)}: plain gradient descent with a step above {compact(step)} could not stay "
        f"here. Of {size:,} weight directions, {percent(flat)} are nearly flat (below 1 % of that). "
    )
    saddle = bottom < -0.1 * max(top, 0)
    sentence += (
        f"The loss also curves downwards (least eigenvalue {compact(bottom)}), so that this is no settled minimum on these samples."
        if saddle
        else f"Hardly anything curves downwards (least eigenvalue {compact(bottom)}): it sits in a minimum, as far as these samples tell."
    )
    return Section(
        name="sharpness",
        title=TITLE,
        status="note" if saddle or not ends.converged else "good",
        number=compact(top),
        unit="greatest curvature of the loss",
        sentence=sentence,
        pictures=[_figure(density, values)],
        tables=[
            Table(
                "Curvature",
                ("quantity", "value", "error"),
                [
                    *(
                        (f"eigenvalue {i + 1}", v, float(r))
                        for i, (v, r) in enumerate(zip(values, ends.residuals))
                    ),
                    ("trace", total.value, _or_none(total.standard_error)),
                    ("trace / weights", total.value / size, _or_none(total.standard_error / size)),
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
            "trace": total.value,
            "trace_standard_error": _or_none(total.standard_error),
            "weights": size,
            "samples": len(rows),
            "negative_share": negative,
            "flat_share": flat,
            "density": {"nodes": nodes.flatten().tolist(), "weights": weights.flatten().tolist()},
        },
    )


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
        ax.legend(loc="upper right")

    return picture(
        draw,
        caption="How many weight directions have which curvature: a high peak at zero means that most directions hardly change the loss.",
        alt=f"Spectral density of the Hessian between {compact(min(values))} and {compact(max(values))}, with most of its weight near zero.",
    )


def _or_none(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
