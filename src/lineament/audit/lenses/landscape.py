"""How does the loss look around its weights, and is that the curvature of a settled minimum?

The spectral density of the Hessian (stochastic Lanczos quadrature), its ends, its trace, the criteria r_e and K_H0.5 made of it
(Gabdullin 2024, arXiv 2412.10146), the gradient beside its own sampling noise, and the plane along the two directions of largest curvature. As many samples as half a minute
allows; each number is measured again on sixths of them, whose spread is its error, and on either half; nothing is said
that a half contradicts. Batch norm keeps its running statistics, as
the network is used; eigenvectors put no weight on directions that only change the scale of what batch norm undoes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lineament.audit.curvature_budget import (
    FEWEST,
    PROBES,
    affordable,
    gradient_over,
    is_linear,
    parts_of,
    reached,
    rounding,
    without_learning,
)
from lineament.audit.estimates import Estimate, halved, interval, joined
from lineament.audit.phrases import compact, percent
from lineament.audit.settled import Curvature, finding, objections, verdict
from lineament.audit.subject import Subject
from lineament.core.checks import NoGradientError
from lineament.core.curvature.density import Density
from lineament.core.curvature.matrices import hessian
from lineament.core.models import offloaded, quantised_layer
from lineament.measure.landscape.axes import Axis, signed
from lineament.measure.landscape.batchnorm_modes import LandscapeWarning
from lineament.measure.landscape.criteria import criteria
from lineament.measure.landscape.grids import plane
from lineament.measure.landscape.results import Plane
from lineament.measure.landscape.spectrum import MeanGradient, Pooled, Spectrum, spectrum
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
DENSE = True
# Seconds and samples for the plane.
_PLANE_SECONDS, _PLANE_MOST = 10.0, 256
_GRID = 21
_NAMES = {
    1: ["eigenvalue"],
    2: ["largest eigenvalue", "smallest eigenvalue"],
    3: ["largest eigenvalue", "second largest", "smallest eigenvalue"],
    4: ["largest eigenvalue", "second largest", "second smallest", "smallest eigenvalue"],
}


def applies(subject: Subject) -> str:
    if offloaded(subject.model):
        return "Some of the network's weights are kept elsewhere until they are computed with (offloaded), so that the loss has no curvature along them here."
    if not any(p.is_floating_point() for p in subject.model.parameters()):
        return (
            "The network has no parameters that gradients could reach: it has none, or holds them quantised."
        )
    return ""


def look(subject: Subject) -> Section:
    if quantised_layer(subject.model) is not None:
        return _no_gradients()
    # Fused attention has no second derivative; the plain formula has.
    with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        warnings.simplefilter("ignore", LandscapeWarning)  # the section says it in words
        try:
            return _look(subject)
        except NoGradientError:
            return _no_gradients()


def _look(subject: Subject) -> Section:
    unit = subject.batch_size if subject.fixed_batch else 1
    generator = torch.Generator().manual_seed((subject.seed * 1000 + 2) % 2**63)
    # At random, not so many of each class: the loss is the mean over these data.
    order = torch.randperm(len(subject), generator=generator)
    names, missed = reached(subject, order[: max(2, unit)])
    if not names:
        return _no_gradients()
    count, steps, seconds = affordable(subject, names, order, unit)
    parts = parts_of(order[:count], unit)
    rows = torch.cat(parts)
    if subject.task == "dense":
        loss = float(subject.answered(rows)[1].mean())
    else:
        loss = float(subject.losses(subject.outputs[rows].double(), subject.targets[rows]).mean())
    if loss < rounding(subject):
        return _nothing_left(loss, len(rows))
    operators = [hessian(subject.model, subject.loss, subject.batches(part), params=names) for part in parts]
    pooled = Pooled(operators, [len(part) for part in parts])
    found = spectrum(pooled, steps=steps, probes=PROBES, seed=subject.seed)
    size = pooled.shape[0]
    if found.top == found.bottom == 0 and not is_linear(subject, names, rows):
        return _no_gradients()
    # The same probes on each part and half, so that differences are the samples'.
    several = list(zip(operators, map(len, parts))) if len(parts) > 1 else []
    each, halves = (
        [_again(part, subject.seed, steps) for part in some]
        for some in ([[one] for one in several], halved(several))
    )
    around = _around(subject, found, tuple(operators[0].names), rows, seconds / len(rows))
    del operators, pooled, several
    gradient = gradient_over(subject, names, rows, unit)
    return _section(subject, found, each, halves, gradient, around, parts, loss, size, missed)


def _section(
    subject: Subject,
    found: Spectrum,
    each: list[Spectrum],
    halves: list[Spectrum],
    gradient: MeanGradient | None,
    around: Plane | None,
    parts: list[Tensor],
    loss: float,
    size: int,
    missed: int,
) -> Section:
    rows = torch.cat(parts)
    made = {id(some): criteria(some.density) for some in (found, *each, *halves)}
    own, nodes = made[id(found)], found.density.nodes.double()

    def estimate(measure: Callable[[Spectrum], float], method: float) -> Estimate:
        return Estimate.of(measure, found, each, halves, left_out=False, method=method)

    estimates = {
        "top": estimate(lambda s: s.top, float(found.residuals[0])),
        "bottom": estimate(lambda s: s.bottom, float(found.residuals[-1])),
        "trace": estimate(lambda s: s.trace, interval(found.traces)),
        "flat_share": estimate(
            lambda s: float(s.flat_shares().mean()), interval(found.flat_shares().tolist())
        ),
        "re": estimate(_reach, interval((nodes.amin(-1) / nodes.amax(-1)).clamp(max=0).tolist())),
        "k": estimate(lambda s: float(made[id(s)].k.mean()), interval(own.k.tolist())),
    }
    constant, accuracy, chance = without_learning(subject, rows)
    loss = loss if gradient is None else gradient.loss
    of = f" of a sample's {subject.unit}s, on average" if subject.task == "dense" else ""
    against, open_ = objections(estimates, gradient, loss, constant, accuracy, chance, of)
    if float(found.residuals.max()) > 0.05 * abs(found.top):
        open_.append(
            f"the search for the ends of the spectrum had not settled after {found.density.nodes.shape[1]} steps"
        )
    settled = False if against else None if open_ else True
    curvature = Curvature(
        **{name: each.value for name, each in estimates.items()},
        errors={name: each.error for name, each in estimates.items()},
        halves={name: each.halves for name, each in estimates.items()},
        eigenvalues=found.values.tolist(),
        residuals=found.residuals.tolist(),
        settled=settled,
        why=against or open_,
        loss=loss,
        constant_loss=constant,
        accuracy=accuracy,
        chance=chance,
        of=of,
        gradient_norm=None if gradient is None else gradient.norm,
        gradient_noise=None if gradient is None else gradient.noise,
        gradient_parts=0 if gradient is None else gradient.parts,
        weights=size,
        samples=len(rows),
        rows=[subject.samples.index[joined(half)].tolist() for half in halved(parts) or [parts]],
        parts=[subject.samples.index[part].tolist() for part in parts],
        steps=found.density.nodes.shape[1],
        probes=PROBES,
        density=found.density,
        criteria=own,
        plane=around,
    )
    over = _over(subject, len(rows), len(parts))
    if found.top == found.bottom == 0:
        sentence = f"{over}, none of {size:,} weight directions has any curvature. {own.meaning}"
        text = "Its loss on these samples has no curvature at all: small changes of the weights do not matter to it, or only in a straight line."
        return Section(
            status="note",
            number="0",
            unit="largest curvature of the loss",
            sentence=sentence,
            pictures=[_figure(found.density, curvature.eigenvalues)],
            numbers=plain(curvature),
            findings=[Finding("note", text, key="flat")],
        )
    sentence = " ".join(
        (
            f"{over}, the steepest direction has curvature {estimates['top'].words()}{_step(estimates['top'])}.",
            f"Of {size:,} weight directions, {estimates['flat_share'].words(percent)} are nearly flat (below 1 % of that); the lowest curvature is {estimates['bottom'].words()}.",
            verdict(curvature),
            f"Two numbers sum up the whole spectrum, both small in a minimum and near 1 in an untrained network: r_e = {estimates['re'].words()} (how far it reaches below "
            f"zero, against above) and K_H0.5 = {estimates['k'].words()} (how much of it is below; {PROBES} probes of {curvature.steps} steps).",
        )
    )
    if missed:
        sentence += f" No gradient reaches {missed:,} further weights, which are left out."
    return Section(
        status="good" if settled else "note",
        number=compact(found.top),
        unit="largest curvature of the loss",
        sentence=sentence,
        pictures=[*_landscape(around), _figure(found.density, curvature.eigenvalues)],
        tables=[_table(curvature, estimates)],
        numbers=plain(curvature),
        findings=[finding(curvature, estimates)],
    )


def _over(subject: Subject, count: int, parts: int) -> str:
    of = f" of {len(subject):,}" if count < len(subject) else ""
    how = (
        f", and again over {parts} parts of them"
        if parts > 1
        else ", which are one batch, so that errors are of the method only"
    )
    return f"Over {count:,}{of} samples{how}"


def _step(top: Estimate) -> str:
    """Which step of gradient descent no part of the samples bears, if the parts agree well enough to say so."""
    if top.low <= 0:
        return ""
    if top.error >= 0.5 * top.value:
        return ", too uncertain to say which step would be too large for gradient descent"
    return f": plain gradient descent with a step above {compact(2 / min(top.low, top.value - top.error))} could not stay here"


def _table(found: Curvature, estimates: dict[str, Estimate]) -> Table:
    errors = dict(zip(_NAMES[len(found.eigenvalues)], found.residuals))
    errors["largest eigenvalue"] = estimates["top"].error
    errors["smallest eigenvalue"] = estimates["bottom"].error
    rows: list[tuple[Any, ...]] = [
        (name, value, errors[name], *_of_halves(estimates[end].halves if end else ()))
        for name, value, end in zip(
            _NAMES[len(found.eigenvalues)],
            found.eigenvalues,
            ("top", *("",) * (len(found.eigenvalues) - 2), "bottom")[: len(found.eigenvalues)],
        )
    ]
    trace = estimates["trace"]
    for name, each, scale in (
        ("trace", trace, 1),
        ("trace / weights", trace, found.weights),
        ("r_e (smallest over largest)", estimates["re"], 1),
        ("K_H0.5 (downwards over upwards)", estimates["k"], 1),
        ("share of nearly flat directions", estimates["flat_share"], 1),
    ):
        rows.append(
            (
                name,
                _or_none(each.value / scale),
                _or_none(each.error / scale),
                *_of_halves(h / scale for h in each.halves),
            )
        )
    if found.gradient_norm is not None:
        rows.append(("norm of the gradient", found.gradient_norm, found.gradient_noise, None, None))
    return Table(
        f"Curvature over {found.samples:,} samples, with batch norm as it is used (error: half the width of a 95 % interval over samples and probes, from sixths of the samples; "
        "of the middle eigenvalues the solver's alone, of the gradient its sampling noise)",
        ("quantity", "value", "error", "first half", "second half"),
        rows,
    )


def _of_halves(values: Any) -> tuple[float | None, float | None]:
    first, second = (*map(_or_none, values), None, None)[:2]
    return first, second


def _again(part: list[tuple[Any, int]], seed: int, steps: int) -> Spectrum:
    found = spectrum(Pooled(*zip(*part)), steps=steps, probes=PROBES, seed=seed)
    return replace(found, vectors=found.vectors[:, :0])


def _no_gradients() -> Section:
    text = (
        "Gradients cannot pass through this network to its weights, so that its curvature cannot be measured"
    )
    return Section(
        status="note",
        sentence=f"{text}: it is quantised, or rounds or detaches on the way from its weights to its answers. Audit the network that it was made of.",
        numbers={"settled": None},
        findings=[
            Finding(
                "note",
                f"{text}.",
                advice="Audit the network that it was made of, before it was quantised.",
                key="gradients cannot pass",
            )
        ],
    )


def _reach(found: Spectrum) -> float:
    return max(-found.bottom, 0.0) / found.top if found.top > 0 else math.inf


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
                key="minimum open",
            )
        ],
    )


def _around(
    subject: Subject, found: Spectrum, names: tuple[str, ...], rows: Tensor, seconds: float
) -> Plane | None:
    """The plane along the two eigenvectors of largest curvature, as far as the loss rises well above where it is.

    ``seconds``: of a product with the Hessian, for one sample; a forward takes about a third of that.
    """
    if len(found.values) < 2 or float(found.values[0]) <= 0:
        return None
    axes = [
        Axis(
            signed(found.vectors[:, k]),
            names,
            "hessian",
            f"eigenvector of curvature {compact(float(found.values[k]))}",
        )
        for k in range(2)
    ]
    unit = subject.batch_size if subject.fixed_batch else 1
    few = int(_PLANE_SECONDS / (_GRID**2 * seconds / 3))
    few = max(min(few, _PLANE_MOST, len(rows)), min(FEWEST, len(rows))) // unit * unit
    # At this distance the quadratic alone would add about 2 to the loss; weights' own size is the other measure.
    dist = 2 / math.sqrt(float(found.values[0]))
    some = rows[torch.linspace(0, len(rows) - 1, max(few, unit)).long()]
    around = plane(subject.model, subject.loss, subject.batches(some), axes, dist=dist, steps=_GRID)
    return replace(around, record={**around.record, "samples": len(some)})


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
            caption=f"The loss on {around.record['samples']} of these samples in the plane of the two steepest directions (the mark: these weights), as contours and as a surface; the axes say how far the weights are moved. Along every other direction it is flatter.",
            alt=f"Contours and surface of the loss around the weights, {compact(around.centre)} in the middle, from {compact(low)} to {compact(high)}.",
        )
    ]


def _figure(density: Density, values: Sequence[float]) -> Picture:
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


def _or_none(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
