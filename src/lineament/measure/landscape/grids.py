"""What does the loss look like around and between networks? Lines and planes of it, and of any metric.

Gabdullin 2024, arXiv 2412.10146; Li et al. 2018, arXiv 1712.09913; Goodfellow et al. 2015, arXiv 1412.6544. Grids are symmetric and
odd, so that the middle is exactly the trained network; every point is computed from the weights themselves, so that none depends on the
order of evaluation. Axes come from :mod:`~lineament.measure.landscape.axes` and :mod:`~lineament.measure.landscape.network_axes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.curvature.matrices import hessian
from lineament.core.loaders import batches_of
from lineament.measure.landscape.axes import Axis, Weights, hessian_axes, normalised, random_axes
from lineament.measure.landscape.network_axes import between, optimizer_axes
from lineament.measure.landscape.points import evaluate
from lineament.measure.landscape.results import Line, Perturbations, Plane

Grid = Sequence[float] | Tensor
Loss = Callable[..., Tensor]


def line(
    model: nn.Module,
    loss_fn: Loss,
    loader: Iterable[Any],
    axis: Axis,
    *,
    dist: float = 1.0,
    steps: int = 41,
    at: Grid | None = None,
    cap: float | None = None,
    **options: Any,
) -> Line:
    """Z(a) = L(θ + a d) along one axis.

    Args:
        dist, steps: a from -dist to dist in so many steps (odd, so that 0 is one of them).
        at: the positions themselves, instead.
        cap: clip the loss to [0, cap]; infinite values become ``cap``, NaN stays NaN.
        options: ``metrics``, ``batchnorm``, ``calibration`` and ``jobs``, as :func:`~lineament.measure.landscape.points.evaluate` takes them.

    >>> from lineament.measure.landscape.axes import given
    >>> net = nn.Linear(1, 1, bias=False); _ = net.weight.data.zero_()
    >>> found = line(net, nn.functional.mse_loss, [(torch.ones(1, 1), torch.zeros(1, 1))], given(net, torch.ones(1)), steps=3)
    >>> found.loss.tolist(), found.curvature()
    ([1.0, 0.0, 1.0], 2.0)
    """
    where = _grid("at", at, dist, steps)
    _cap(cap)
    found = evaluate(model, loss_fn, loader, [axis], [[a] for a in where], **options)
    loss = found.pop("loss")
    return Line(
        torch.tensor(where, dtype=torch.float64),
        _capped(loss, cap),
        found,
        axis.label,
        _record([axis], options, cap),
    )


def plane(
    model: nn.Module,
    loss_fn: Loss,
    loader: Iterable[Any],
    axes: Sequence[Axis],
    *,
    dist: float = 1.0,
    steps: int = 41,
    at: tuple[Grid, Grid] | None = None,
    cap: float | None = None,
    **options: Any,
) -> Plane:
    """Z(a, b) = L(θ + a d₁ + b d₂) on a grid.

    Args:
        axes: two of them.
        dist, steps: both from -dist to dist in so many steps (odd).
        at: the positions along each axis, instead.
        cap, options: as for :func:`line`.

    Returns:
        A :class:`~lineament.measure.landscape.results.Plane`, first axis along the rows.

    Raises:
        InputError: not two axes, an even number of steps, a cap that is not positive, and what ``evaluate`` refuses.

    Source: Li et al. (2018), equation 1.

    >>> net = nn.Linear(2, 1)
    >>> data = [(torch.ones(4, 2), torch.ones(4, 1))]
    >>> found = plane(net, nn.functional.mse_loss, data, random_axes(net), steps=5)
    >>> tuple(found.loss.shape), bool(found.centre == nn.functional.mse_loss(net(data[0][0]), data[0][1]))
    ((5, 5), True)
    """
    checks.require(len(axes) == 2, f"axes: got {len(axes)}, expected two")
    _cap(cap)
    if at is not None:
        checks.require(len(at) == 2, f"at: got {len(at)} lists of positions, expected two, one for each axis")
    rows, columns = (_grid("at", None if at is None else at[k], dist, steps) for k in (0, 1))
    found = evaluate(model, loss_fn, loader, axes, list(itertools.product(rows, columns)), **options)
    shaped = {name: v.reshape(len(rows), len(columns), *v.shape[1:]) for name, v in found.items()}
    loss = shaped.pop("loss")
    a, b = torch.tensor(rows, dtype=torch.float64), torch.tensor(columns, dtype=torch.float64)
    labels = (axes[0].label, axes[1].label)
    return Plane(a, b, _capped(loss, cap), shaped, labels, _record(axes, options, cap))


def interpolation(
    model: nn.Module,
    loss_fn: Loss,
    loader: Iterable[Any],
    other: Weights,
    *,
    steps: int = 41,
    at: Grid | None = None,
    params: str | Sequence[str] | None = None,
    **options: Any,
) -> Line:
    """L((1 - a) θ + a θ') from a model (a = 0) to another (a = 1), running statistics interpolated too.

    A bump between them is the barrier of linear mode connectivity (:meth:`~lineament.measure.landscape.results.Line.barrier`).
    For the loss between networks with batch norm that is not an artefact of stale statistics, take ``batchnorm="recalibrate"``.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = a.weight.data.fill_(-1.0), b.weight.data.fill_(1.0)
    >>> interpolation(a, nn.functional.mse_loss, [(torch.ones(1, 1), torch.zeros(1, 1))], b, steps=3).loss.tolist()
    [1.0, 0.0, 1.0]
    """
    checks.number("steps", steps, low=2, integer=True)
    where = torch.linspace(0, 1, steps, dtype=torch.float64) if at is None else at
    return line(model, loss_fn, loader, between(model, other, params=params), at=where, **options)


def random_lines(
    model: nn.Module, loss_fn: Loss, loader: Iterable[Any], count: int = 5, *, axes: Mapping[str, Any] | None = None,
    seed: int = 0, **options: Any,
) -> list[Line]:  # fmt: skip
    """Lines along fresh random axes, one for each seed from ``seed`` on; ``axes`` are options of ``random_axes``."""
    checks.number("count", count, low=1, integer=True)
    batches = list(batches_of(loader, once=True))
    drawn = [random_axes(model, 1, seed=seed + k, **(axes or {}))[0] for k in range(count)]
    return [line(model, loss_fn, batches, axis, **options) for axis in drawn]


def random_planes(
    model: nn.Module, loss_fn: Loss, loader: Iterable[Any], count: int = 3, *, axes: Mapping[str, Any] | None = None,
    seed: int = 0, **options: Any,
) -> list[Plane]:  # fmt: skip
    """Planes along fresh pairs of random axes, one pair for each seed from ``seed`` on: what all of them show is the network's."""
    checks.number("count", count, low=1, integer=True)
    batches = list(batches_of(loader, once=True))
    drawn = [random_axes(model, 2, seed=seed + k, **(axes or {})) for k in range(count)]
    return [plane(model, loss_fn, batches, pair, **options) for pair in drawn]


def perturbations(
    model: nn.Module, loss_fn: Loss, loader: Iterable[Any], *, radius: float = 1.0, count: int = 20,
    axes: Mapping[str, Any] | None = None, seed: int = 0, **options: Any,
) -> Perturbations:  # fmt: skip
    """How much the loss rises at ``count`` random places at a distance: L(θ + radius · d) - L(θ).

    ``d`` are fresh random axes, filter-normalised unless ``axes`` says otherwise; the loss is evaluated for all in one walk over the data.

    >>> net = nn.Linear(2, 1)
    >>> found = perturbations(net, nn.functional.mse_loss, [(torch.ones(4, 2), net(torch.ones(4, 2)).detach())], count=3)
    >>> tuple(found.rises.shape), bool((found.rises >= 0).all())
    ((3,), True)
    """
    checks.number("count", count, low=1, integer=True)
    checks.number("radius", radius, low=0, open_low=True)
    batches = list(batches_of(loader, once=True))
    rises, here = [], 0.0
    for k in range(count):
        axis = random_axes(model, 1, seed=seed + k, **(axes or {}))[0]
        found = evaluate(model, loss_fn, batches, [axis], [[0.0], [radius]], **options)["loss"]
        here = float(found[0])
        rises.append(found[1] - found[0])
    return Perturbations(here, torch.stack(rises), radius, seed)


def adam_equation(
    model: nn.Module,
    loss_fn: Loss,
    loader: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    *,
    dist: float = 1.0,
    steps: int = 40,
    root: bool = True,
    normalise: str | None = None,
    params: str | Sequence[str] | None = None,
    freeze: int = 0,
    cap: float | None = None,
    moments: Sequence[Axis] | None = None,
    **options: Any,
) -> Plane:
    """Moves as Adam's own step would scale them: θ + C a / √b with C = m s / (√(v s) + 1e-6), s = dist / steps.

    It is a function of the one number a / √b, so each value is evaluated once. a goes from -1 to 1 and b from 0.1 to 2.1, the upper ends left
    out; with ``root=False`` it is a / b with b from -1 to 1 (b = 0 gives NaN).

    Args:
        normalise: of both moments before they are combined (:func:`~lineament.measure.landscape.axes.normalised`).
        moments: the two axes m and v themselves, instead of the optimizer's.

    Raises:
        InputError: an optimizer without Adam's moments, second moments below zero.
    """
    checks.number("dist", dist, low=0, open_low=True)
    checks.number("steps", steps, low=2, integer=True)
    _cap(cap)
    m, v = optimizer_axes(model, optimizer, params=params) if moments is None else moments
    # A bias moves by its own moments here, so it is scaled rather than left out.
    m, v = (normalised(model, axis, normalise, one_dim="scale").frozen(model, freeze) for axis in (m, v))
    checks.require(
        bool((v.vector >= 0).all()),
        "moments: the second one has entries below zero, of which there is no root; normalise otherwise",
    )
    s = dist / steps
    step = replace(m, vector=m.vector * s / ((v.vector * s).sqrt() + 1e-6), label="Adam's step")
    a = torch.arange(steps, dtype=torch.float64) * (2 / steps) - 1
    b = torch.arange(steps, dtype=torch.float64) * (2 / steps) + (0.1 if root else -1.0)
    ratio = a[:, None] / (b.sqrt() if root else b)[None, :]
    usable = torch.isfinite(ratio)
    unique, where = torch.unique(ratio[usable], return_inverse=True)
    found = evaluate(model, loss_fn, loader, [step], [[c] for c in unique.tolist()], **options)
    shaped = {}
    for name, values in found.items():
        full = torch.full((*ratio.shape, *values.shape[1:]), float("nan"), dtype=torch.float64)
        full[usable] = values[where]
        shaped[name] = full
    loss = shaped.pop("loss")
    labels = ("a, along the first moment", "b, against the second moment")
    return Plane(
        a,
        b,
        _capped(loss, cap),
        shaped,
        labels,
        {**_record([step], options, cap), "mode": "adameq", "dist": dist},
    )


def panels(
    model: nn.Module,
    loss_fn: Loss,
    loader: Iterable[Any],
    *,
    kinds: Sequence[str] = ("random", "hessian"),
    optimizer: torch.optim.Optimizer | None = None,
    batchnorm: str = "eval",
    seed: int = 0,
    **options: Any,
) -> dict[str, Plane]:
    """The same loss under every normalisation, side by side: what of a picture is the network and what the ruler.

    For each kind of axes ``None``, ``"weight"``, and ``"filter"`` by the first and the second norm; for ``"adam"`` the Adam equation too.

    Args:
        kinds: of ``"random"``, ``"hessian"`` and ``"adam"`` (which needs the optimizer).
        options: as for :func:`plane`.

    Returns:
        Planes by name, such as ``"random, filter L2"``.
    """
    for kind in kinds:
        checks.one_of("kinds", kind, ("random", "hessian", "adam"))
    checks.require(
        "adam" not in kinds or optimizer is not None,
        "optimizer: kinds has 'adam', whose axes are the optimizer's moments; give it",
    )
    batches = list(batches_of(loader, once=True))
    found: dict[str, Plane] = {}
    for kind in kinds:
        if kind == "random":
            raw = random_axes(model, normalise=None, seed=seed)
        elif kind == "hessian":
            mode = "eval" if batchnorm == "eval" else "train"
            raw = hessian_axes(hessian(model, loss_fn, batches, batchnorm=mode), seed=seed)
        else:
            assert optimizer is not None  # checked above
            raw = optimizer_axes(model, optimizer)
        for name, how, order in (
            ("none", None, 2),
            ("weight", "weight", 2),
            ("filter L1", "filter", 1),
            ("filter L2", "filter", 2),
        ):
            axes = [normalised(model, axis, how, order=order) for axis in raw]
            found[f"{kind}, {name}"] = plane(model, loss_fn, batches, axes, batchnorm=batchnorm, **options)
        if kind == "adam" and optimizer is not None:
            for name, how in (("none", None), ("filter", "filter")):
                found[f"adam equation, {name}"] = adam_equation(
                    model, loss_fn, batches, optimizer, normalise=how, batchnorm=batchnorm, **options
                )
    return found


def _grid(what: str, given: Grid | None, dist: float, steps: int) -> list[float]:
    if given is not None:
        values = torch.as_tensor(given, dtype=torch.float64)
        checks.tensor(what, values, shape=("positions",))
        return values.tolist()
    checks.number("dist", dist, low=0, open_low=True)
    checks.number("steps", steps, low=1, integer=True)
    checks.require(
        steps % 2 == 1,
        f"steps: got {steps}, expected an odd number, so that the middle is the network itself",
    )
    half = steps // 2
    # By integers, so that the middle is exactly 0 and the two sides are mirror images.
    return [dist * k / max(half, 1) for k in range(-half, half + 1)]


def _cap(cap: float | None) -> None:
    if cap is not None:
        checks.number("cap", cap, low=0, open_low=True)


def _capped(loss: Tensor, cap: float | None) -> Tensor:
    return loss if cap is None else loss.clamp(0, cap)


def _record(axes: Sequence[Axis], options: Mapping[str, Any], cap: float | None) -> dict[str, Any]:
    return {
        "axes": [axis.to_dict() for axis in axes],
        "batchnorm": options.get("batchnorm", "eval"),
        "cap": cap,
    }
