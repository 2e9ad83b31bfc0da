"""Evaluate a network at many points of its weight space, its weights moved in place along axes.

What is not obvious: for the time of the evaluation every parameter's ``.data`` is a view of one flat vector, in float32 at least, so that a point costs one
addition however many tensors there are, and the model's own memory is never written: putting it back is exact, also after an
exception. A batch is loaded once for all points.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core import checks, shards
from lineament.core.batching import progress
from lineament.core.curvature.risk import Chunk, Risk
from lineament.core.engines import side_by_side, workers
from lineament.core.loaders import batches_of
from lineament.core.models import (
    buffers_kept,
    called,
    decided,
    frozen,
    is_half,
    logits,
    unwrapped,
    written_buffers,
)
from lineament.core.norms import recalibrate
from lineament.measure.landscape.axes import Axis, flat_weights
from lineament.measure.landscape.batchnorm_modes import MODES, batchnorm_mode, caution

Metric = str | Callable[[Tensor, Tensor], Any]
NAMED = ("accuracy", "class_loss", "gradient_norm")


def evaluate(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    loader: Iterable[Any],
    axes: Sequence[Axis],
    points: Sequence[Sequence[float]],
    *,
    metrics: Mapping[str, Metric] | Sequence[str] = (),
    batchnorm: str = "eval",
    calibration: Iterable[Any] | None = None,
    jobs: int = 1,
) -> dict[str, Tensor]:
    """The mean loss, and other quantities, at θ + Σ_k c_k d_k for each point c.

    Args:
        loss_fn: ``loss_fn(logits, targets)``, the mean over a batch.
        loader: batches ``(inputs, targets)``; walked once. Each counts by what the loss divides by there, as for
            :func:`~lineament.core.curvature.matrices.hessian`.
        axes: directions of the same parameters.
        points: (points, axes), the coefficients.
        metrics: names of :data:`NAMED`, or a dict of such names and functions ``metric(logits, targets)`` that return a batch's mean.
            ``"accuracy"`` is the share of right labels and ``"class_loss"`` the mean loss of each class; both need integer labels, of which
            negative ones do not count. ``"gradient_norm"`` is that of the whole gradient along the axes' parameters.
        batchnorm: ``"eval"``, ``"batch"`` or ``"recalibrate"`` (:mod:`~lineament.measure.landscape.batchnorm_modes`).
        calibration: batches that ``"recalibrate"`` takes statistics from; the loader's own by default.
        jobs: processes among which the points are divided (-1: one a core), see :mod:`lineament.core.engines`.

    Returns:
        ``"loss"`` and each metric, (points,) or (points, ...) in float64. NaN and infinite values stay what they are.

    Raises:
        InputError: axes of other parameters or shapes, an unknown metric or batch-norm mode, a metric that these targets do not have or
            that returns no number, a loader without samples, weights that are not finite, a model or function that cannot be sent to
            other processes.

    >>> from lineament.measure.landscape.axes import given
    >>> net = nn.Linear(1, 1, bias=False); _ = net.weight.data.fill_(1.0)
    >>> data = [(torch.ones(1, 1), torch.zeros(1, 1))]
    >>> evaluate(net, nn.functional.mse_loss, data, [given(net, torch.ones(1))], [[0.0], [2.0]])["loss"].tolist()
    [1.0, 9.0]
    """
    checks.require(len(axes) > 0, "axes: got none, expected at least one")
    names = axes[0].names
    for axis in axes:
        checks.require(isinstance(axis, Axis), f"axes: got {checks.show(axis)}, expected an Axis")
        checks.require(
            axis.names == names,
            f"axes: {axis.label!r} moves other parameters than {axes[0].label!r}; give both the same params",
        )
    for point in points:
        checks.require(len(point) == len(axes), f"points: got {list(point)} for {len(axes)} axes")
    checks.require(len(points) > 0, "points: got none, expected at least one")
    chosen = _chosen(metrics)
    checks.require(
        batchnorm != "train",
        "batchnorm: 'train' would write each point's statistics into the running ones, so that every result would hang on "
        "the order of evaluation; expected 'batch', which takes each batch's statistics and writes none, 'eval' or 'recalibrate'",
    )
    checks.one_of("batchnorm", batchnorm, MODES)
    if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs == 0:
        raise checks.InputError(
            f"jobs: got {checks.show(jobs)}, expected a number of processes, or -1 for one a core"
        )
    model = unwrapped(model)
    # Risk checks the model, the loss, the parameters and that the loader has samples; an iterator is walked only here.
    batches = list(batches_of(loader, once=True))
    risk = Risk(model, loss_fn, batches, params=list(names))
    checks.require(tuple(risk.names) == names, "axes: their parameters are not in the model's order")
    total = sum(leaf.numel() for leaf in risk.leaves.values())
    for axis in axes:
        checks.tensor(f"axis {axis.label!r}", axis.vector, shape=(total,), finite=True)
    caution(model, axes, batchnorm)
    held = None if calibration is None else list(batches_of(calibration, name="calibration", once=True))
    job = (model, loss_fn, batches, list(axes), chosen, batchnorm, held)
    together = shards.count() > 1
    count = min(shards.count() if together else workers(jobs), len(points))
    if count == 1:
        return _visit(points, *job)
    size = -(-len(points) // count)
    parts = [points[at : at + size] for at in range(0, len(points), size)]
    if together:
        return _joined(shards.each(parts, lambda part: _visit(part, *job), "points of a landscape"))
    threads = max(1, torch.get_num_threads() // count)
    try:
        found = side_by_side(_elsewhere, [(threads, part, *job) for part in parts], jobs=jobs)
        return _joined(list(found))
    except pickle.PicklingError as error:
        raise checks.InputError(_unpicklable(job, jobs)) from error


def _joined(rows: Sequence[Any]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _unpicklable(job: tuple[Any, ...], jobs: int) -> str:
    """Which part of the work cannot be sent to another process, and why."""
    from joblib.externals.loky.backend.reduction import dumps

    for what, part in zip(("model", "loss_fn", "loader", "axes", "metrics", "batchnorm", "calibration"), job):
        try:
            dumps(part)
        except Exception as error:
            return (
                f"jobs: got {jobs}, and the {what} ({type(part).__name__}) cannot be sent to other processes ({error}); use jobs=1, or make it "
                "picklable"
            )
    return f"jobs: got {jobs}, and the work cannot be sent to other processes; use jobs=1"


def _elsewhere(threads: int, *job: Any) -> dict[str, Tensor]:
    torch.set_num_threads(threads)
    return _visit(*job)


@torch.inference_mode(False)
def _visit(
    points: Sequence[Sequence[float]],
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batches: list[Any],
    axes: list[Axis],
    metrics: dict[str, Metric],
    batchnorm: str,
    calibration: list[Any] | None,
) -> dict[str, Tensor]:
    risk = Risk(model, loss_fn, batches, params=list(axes[0].names))
    sums: dict[str, list[Any]] = {name: [None] * len(points) for name in ("loss", *metrics)}
    weights: dict[str, list[Any]] = {name: [0.0] * len(points) for name in sums}

    def add(index: int, name: str, value: Any, weight: Any) -> None:
        # Plain numbers for scalars: a dozen tiny tensors a point would cost more than a small network's forward.
        if isinstance(value, Tensor):
            value = value.detach().double().cpu()
        term = torch.where(weight > 0, value * weight, 0.0) if isinstance(weight, Tensor) else value * weight
        sums[name][index] = term if sums[name][index] is None else sums[name][index] + term
        weights[name][index] = weights[name][index] + weight

    gradients = "gradient_norm" in metrics.values()
    counts: dict[int, float] = {}  # what the loss divides by on each chunk

    def look(index: int, chunk: Chunk) -> None:
        outputs = logits(called(model, chunk.inputs))
        if chunk.index not in counts:
            counts[chunk.index] = risk.weight(chunk, outputs.detach())
        # Where the loss ignores every target, there is none; what is counted otherwise is counted all the same.
        count = counts[chunk.index]
        loss = loss_fn(outputs, chunk.targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise checks.InputError(
                f"loss_fn: it returned {checks.show(loss)}, expected a scalar, the mean over the batch"
            )
        if count:
            add(index, "loss", loss.item(), count)
        for name, metric in metrics.items():
            if metric == "gradient_norm":
                if not count:
                    continue
                leaves = [dict(unwrapped(model).named_parameters())[n] for n in axes[0].names]
                pulled = torch.autograd.grad(
                    loss.reshape(()), leaves, allow_unused=True, materialize_grads=True
                )
                # The mean over batches is taken of gradients; the norm comes at the end.
                add(index, name, torch.cat([g.reshape(-1).double() for g in pulled]), count)
            elif metric == "class_loss":
                value, seen = _by_class(loss_fn, outputs.detach(), chunk.targets)
                add(index, name, value, seen)
            elif metric == "accuracy":
                right, seen = _right(outputs, chunk.targets)
                add(index, name, right, seen)
            elif callable(metric):
                value = _value(name, metric(outputs.detach(), chunk.targets))
                add(index, name, value, chunk.count)

    def kept() -> AbstractContextManager[None]:
        return buffers_kept(model) if writes else nullcontext()

    with ExitStack() as stack:
        stack.enter_context(frozen(model, requires_grad=None))
        # A norm of the user's own may write at each forward: no point is to see what another left.
        writes = bool(written_buffers(model))
        move = stack.enter_context(_moving(model, axes))
        stack.enter_context(batchnorm_mode(model, batchnorm))
        stack.enter_context(torch.enable_grad() if gradients else torch.no_grad())
        if gradients:
            for name in axes[0].names:
                dict(unwrapped(model).named_parameters())[name].requires_grad_(True)
        if batchnorm == "recalibrate" or gradients:
            own = list(risk.chunks())
            source = (
                Risk(model, loss_fn, calibration, params=list(axes[0].names))
                if calibration is not None
                else None
            )
            calibrating = own if source is None else list(source.chunks())
            for index, point in enumerate(progress(points, "landscape", len(points))):
                move(point)
                if batchnorm == "recalibrate":
                    recalibrate(model, [chunk.inputs for chunk in calibrating])
                for chunk in own:
                    with kept():
                        look(index, chunk)
                if gradients:
                    for name in [n for n, m in metrics.items() if m == "gradient_norm"]:
                        mean = sums[name][index] / weights[name][index]
                        sums[name][index], weights[name][index] = mean.norm().cpu(), 1.0
        else:
            for chunk in risk.chunks():
                for index, point in enumerate(progress(points, "landscape", len(points))):
                    move(point)
                    with kept():
                        look(index, chunk)
    checks.require(
        sums["loss"][0] is not None,
        "loss_fn: it ignores every target of the loader, so that there is nothing to average",
    )
    return {
        name: torch.stack(
            [torch.as_tensor(v, dtype=torch.float64) / w for v, w in zip(values, weights[name])]
        )
        for name, values in sums.items()
    }


@contextmanager
def _moving(model: nn.Module, axes: Sequence[Axis]) -> Iterator[Callable[[Sequence[float]], None]]:
    """A function that moves the model's weights to a point; as they were afterwards."""
    known = dict(unwrapped(model).named_parameters())
    leaves = [known[name] for name in axes[0].names]
    buffers = dict(model.named_buffers())
    flat = flat_weights(model, axes[0].names)
    sizes = [p.numel() for p in leaves]
    # Each tensor begins where a vector instruction would have it, with zeros between.
    grain = 64 // flat.element_size()
    gaps = [-size % grain for size in sizes]

    def laid_out(vector: Tensor) -> Tensor:
        parts = vector.to(flat).split(sizes)
        return torch.cat([piece for part, gap in zip(parts, gaps) for piece in (part, part.new_zeros(gap))])

    origin, vectors = laid_out(flat), [laid_out(axis.vector) for axis in axes]
    place, base = origin.clone(), origin.clone()
    pieces = place.split([size + gap for size, gap in zip(sizes, gaps)])
    parts = [piece[: p.numel()].view_as(p) for piece, p in zip(pieces, leaves)]
    # A step may be less than half precision tells apart: such numbers are held in float32 for the time.
    narrow = [t for t in (*known.values(), *buffers.values()) if is_half(t.dtype)]
    wide = {id(t): t.detach().float() for t in narrow}
    # A parameter of another precision than the vector's gets memory of its own, and a copy at each point.
    held = [wide.get(id(p), p) for p in leaves]
    apart = [(p.detach().clone(), part) for p, part in zip(held, parts) if p.dtype != place.dtype]
    copies = iter(apart)
    views = [part if p.dtype == place.dtype else next(copies)[0] for p, part in zip(held, parts)]
    own = [(t, t.data) for t in (*leaves, *buffers.values(), *narrow)]
    travelling = {name: [axis.buffers.get(name) for axis in axes] for name in buffers}
    travelling = {name: steps for name, steps in travelling.items() if any(s is not None for s in steps)}
    starts = {name: buffers[name].detach().clone() for name in travelling}
    row: list[Any] = [None]

    def move(point: Sequence[float]) -> None:
        head, last = list(point[:-1]), point[-1]
        if head != row[0]:
            # Points come row by row: what all of a row share is added once.
            base.copy_(origin)
            for c, v in zip(head, vectors):
                base.add_(v, alpha=c)
            row[0] = head
        torch.add(base, vectors[-1], alpha=last, out=place)
        for copy, part in apart:
            copy.copy_(part)
        for name, steps in travelling.items():
            buffers[name].copy_(starts[name])
            for c, step in zip(point, steps):
                if step is not None:
                    buffers[name].add_(step, alpha=c)

    try:
        for tensor in narrow:
            tensor.data = wide[id(tensor)]
        for parameter, view in zip(leaves, views):
            parameter.data = view
        for buffer in buffers.values():
            if id(buffer) not in wide:
                buffer.data = buffer.data.clone()
        yield torch.no_grad()(move)
    finally:
        for tensor, data in own:
            tensor.data = data


def _chosen(metrics: Mapping[str, Metric] | Sequence[str]) -> dict[str, Metric]:
    if isinstance(metrics, str):
        metrics = (metrics,)
    found: dict[str, Metric] = (
        dict(metrics) if isinstance(metrics, Mapping) else {str(name): name for name in metrics}
    )
    for name, metric in found.items():
        checks.require(name != "loss", "metrics: 'loss' is always there; give the other another name")
        if not callable(metric):
            checks.one_of("metrics", metric, NAMED)
    return found


def _right(outputs: Tensor, targets: Any) -> tuple[float, float]:
    """The share of labels that are the largest output, and how many labels there are."""
    labelled = _labelled("accuracy", outputs, targets)
    count = float(labelled.sum())
    right = float(((decided(outputs, 1) == targets) & labelled).sum())
    return right / max(count, 1.0), count


def _by_class(loss_fn: Callable[..., Tensor], outputs: Tensor, targets: Any) -> tuple[Tensor, Tensor]:
    """The mean loss of each class and how many of it there are; NaN for none."""
    labelled = _labelled("class_loss", outputs, targets)
    classes = max(outputs.shape[1], 2)
    values = torch.full((classes,), float("nan"), dtype=torch.float64)
    counts = torch.zeros(classes, dtype=torch.float64)
    for k in targets[labelled].unique().tolist():
        rows = targets == k
        values[k], counts[k] = float(loss_fn(outputs.movedim(1, -1)[rows], targets[rows])), float(rows.sum())
    return values, counts


def _labelled(name: str, outputs: Tensor, targets: Any) -> Tensor:
    """Which targets are labels: those below zero, such as cross-entropy's ignore_index of -100, are none."""
    places = (*outputs.shape[:1], *outputs.shape[2:])
    fits = isinstance(targets, Tensor) and targets.shape == places and not targets.is_floating_point()
    checks.require(
        fits and outputs.ndim > 1,
        f"metrics: {name!r} needs class labels, integers of shape {places} for outputs of shape {tuple(outputs.shape)}, and the loader's "
        f"targets are {checks.show(targets)}; leave it out, or give a function metric(logits, targets)",
    )
    top, last = int(targets.max()), max(outputs.shape[1], 2) - 1
    checks.require(
        top <= last,
        f"metrics: {name!r} got label {top}, expected labels from 0 to {last}, or negative ones for what has none",
    )
    return targets >= 0


def _value(name: str, value: Any) -> Tensor | float:
    try:
        return value if isinstance(value, (Tensor, float)) else torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise checks.InputError(
            f"metrics: {name!r} returned {checks.show(value)}, expected a number or a tensor, the mean over the batch"
        ) from error
