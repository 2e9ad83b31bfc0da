"""Rebuild a batch from its gradient through a generator: first its code, then the features between its blocks.

Fang et al., "GIFD", ICCV 2023, arXiv 2308.04699, section 1.4. It takes the auditor's own model, message and generator, and says how much of their own batch the
message gives away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, one_of, require
from lineament.core.results import Readable
from lineament.privacy.constraints import l1_projection, rate, to_sphere
from lineament.privacy.costs import total_variation

Gradient = Callable[[Tensor], Sequence[Tensor]]
OPTIMIZERS = ("adam", "sgd", "lbfgs")


@dataclass(frozen=True)
class Stage:
    """One layer of the search: its steps, its peak rate, and the l1 radius around its start (none where it is negative).

    ``sphere``: whether a code keeps its radius. ``optimizer``: ``"adam"``, ``"sgd"`` (Nesterov, 0.9) or ``"lbfgs"`` (of one row, with a line search; ``steps``
    then counts gradients, and ``peak`` is the first length that is tried). ``parts``: sizes of what the variable is made
    of side by side, and whether each is ``"free"``, on its own ``"sphere"``, or ``"fixed"``; each has its share of the ball. ``layer``: of which block it is the input, by
    default that of its place among the stages; a later one passes over the layers between.
    ``ramps``: the shares of the steps in which the rate falls and rises, see :func:`lineament.privacy.constraints.rate`. ``adam``: its two betas and its eps.

    >>> Stage(500, 0.1).radius
    -1.0
    """

    steps: int
    peak: float
    radius: float = -1.0
    sphere: bool = True
    optimizer: str = "adam"
    parts: tuple[tuple[int, str], ...] = ()
    layer: int | None = None
    ramps: tuple[float, float] = (0.75, 0.05)
    adam: tuple[float, float, float] = (0.9, 0.999, 1e-8)


@dataclass(frozen=True)
class Inversion(Readable):
    """The pictures of the stage whose gradient fits best, normalised and clipped.

    ``variables``: what each stage ended with; ``scores``: each stage's matching cost; ``objective``: at every step of all stages. Where the cost was
    one number a row, ``score`` and ``scores`` are, too, and the best stage is each row's own: ``stage``.
    """

    best: Tensor
    score: Any
    pictures: tuple[Tensor, ...]
    variables: tuple[Tensor, ...]
    scores: tuple[Any, ...]
    objective: Tensor
    stage: Any = 0


def invert(
    blocks: Callable[[Tensor], Sequence[Callable[[Tensor], Tensor]]],
    render: Callable[[Tensor], Tensor],
    gradient: Gradient,
    cost: Callable[[Sequence[Tensor]], Tensor],
    start: Tensor,
    stages: Sequence[Stage],
    *,
    bounds: tuple[Tensor, Tensor],
    variation: float = 0.0,
    norm: float = 0.0,
    side: int = 64,
    penalty: Callable[[Tensor, int], Tensor] | None = None,
    patience: int | None = None,
) -> Inversion:
    """One restart of the search, or as many side by side as the cost has rows.

    Args:
        blocks: for a code, the generator as a list of functions that are applied in turn; from the second stage on it is asked once, with the code
            that the first stage found, so that what depends on the code stays as it was.
        render: the generator's output as normalised pictures. gradient: of pictures, defended as the message is. cost: of that gradient: a number,
            or one for each row, which are then searched independently: pictures are rows after one another, each code stays on its own sphere, and
            ``variation`` and ``norm`` act on each row.
        start: the first code [n, d]. stages: the code's, then those of the inputs of block 1, 2, ...
        bounds: of normalised pictures, per channel. variation, norm: weights of the total variation and of |x| / side². penalty: what else pictures are
            held to, summed over rows, at each step of all stages; no part of a score.
        patience: end when the score rose over so many stages in a row.

    >>> found = invert(
    ...     lambda z: [lambda v: v.view(1, 1, 2, 2)], lambda x: x, lambda x: [x], lambda g: g[0].square().sum(),
    ...     torch.ones(1, 4), [Stage(3, 0.1)], bounds=(torch.zeros(1), torch.ones(1)),
    ... )
    >>> len(found.objective)
    3
    """
    require(len(stages) > 0, "stages: got none, expected one for the code at least")
    for stage in stages:
        number("steps", stage.steps, low=1, integer=True)
        require(
            stage.radius != 0, "radius: got 0, with which nothing moves; expected a positive one, or none"
        )
    low, high = (bound.view(1, -1, 1, 1) for bound in bounds)
    trace: list[float] = []
    variables, pictures, scores = [], [], []

    def judged(x: Tensor) -> tuple[Tensor, Tensor]:
        match = cost(gradient(x))
        total = match.sum() + _natural(x, match.numel(), variation, norm / side**2)
        if penalty is not None:
            total = total + penalty(x, len(trace))
        trace.append(float(total.detach()))
        return match, total

    value, frozen, rising, at = start.detach().clone(), None, 0, 0
    for k, stage in enumerate(stages):
        if k > 0:
            frozen = blocks(variables[0]) if frozen is None else frozen
            to = k if stage.layer is None else stage.layer
            require(to > at, f"stages: got layer {to} after layer {at}, expected a later one")
            if to >= len(frozen):
                raise InputError(f"stages: got layer {to}, but the generator has {len(frozen)} blocks")
            with torch.no_grad():
                value = _through(value, frozen[at:to])
            at = to
        x, value = _descend(
            stage,
            value,
            lambda v, at=at, frozen=frozen: render(
                _through(v, (blocks(v) if frozen is None else frozen)[at:])
            ),
            judged,
            code=k == 0,
        )
        picture = x.detach().clamp(low, high)
        variables.append(value)
        pictures.append(picture)
        scores.append(cost(gradient(picture)).detach())
        rising = rising + 1 if k > 0 and bool((scores[-1] > scores[-2]).all()) else 0
        if patience is not None and rising >= patience:
            break
    told = torch.stack(scores).nan_to_num(nan=torch.inf)
    stage_of = told.argmin(0)
    if told.ndim == 1:
        best = pictures[int(stage_of)]
        plain = tuple(float(s) for s in scores)
        return Inversion(
            best,
            plain[int(stage_of)],
            tuple(pictures),
            tuple(variables),
            plain,
            _double(trace),
            int(stage_of),
        )
    each = len(pictures[0]) // told.shape[1]
    rows = torch.arange(len(pictures[0]))
    best = torch.stack(pictures)[stage_of.cpu().repeat_interleave(each), rows]
    return Inversion(
        best, told.amin(0), tuple(pictures), tuple(variables), tuple(scores), _double(trace), stage_of
    )


def _descend(
    stage: Stage,
    start: Tensor,
    made: Callable[[Tensor], Tensor],
    judged: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    code: bool,
) -> tuple[Tensor, Tensor]:
    """One stage: the pictures of its last forward pass, and where the variable ended."""
    value, tau = start.clone().requires_grad_(), start.new_zeros(len(start))
    optimizer = _optimizer(stage, value)
    x, one, step = value, False, 0

    def objective() -> float:
        nonlocal x, one, step
        x = made(value)
        match, total = judged(x)
        (value.grad,) = torch.autograd.grad(total, value)
        one, step = match.ndim == 0, step + 1
        return float(total.detach())

    while step < stage.steps:
        if stage.optimizer == "lbfgs":
            optimizer.step(objective)
        else:
            optimizer.param_groups[0]["lr"] = rate(
                step / stage.steps, stage.peak, down=stage.ramps[0], up=stage.ramps[1]
            )
            objective()
            optimizer.step()
        with torch.no_grad():
            if stage.parts:
                value.copy_(_by_parts(value, start, stage))
            elif code and stage.sphere:
                value.copy_(_sphere(value, start, one))
            elif not code and stage.radius > 0:
                value.copy_(start + l1_projection(value - start, stage.radius, warm=tau))
    if stage.optimizer == "lbfgs":  # its last evaluation may have been a trial of the line search
        with torch.no_grad():
            x = made(value)
    return x, value.detach()


def _by_parts(value: Tensor, start: Tensor, stage: Stage) -> Tensor:
    """Each part of a variable [n, size] inside its ball around the start, and on its sphere."""
    sizes = [size for size, _ in stage.parts]
    found = []
    for (size, kind), moved, before in zip(stage.parts, value.split(sizes, 1), start.split(sizes, 1)):
        if kind == "fixed":
            moved = before
        elif stage.radius > 0:
            moved = before + l1_projection(moved - before, stage.radius * size / sum(sizes))
        found.append(_sphere(moved, before, False) if kind == "sphere" else moved)
    return torch.cat(found, 1)


def _through(value: Tensor, blocks: Sequence[Callable[[Tensor], Tensor]]) -> Tensor:
    for block in blocks:
        value = block(value)
    return value


def _optimizer(stage: Stage, value: Tensor) -> torch.optim.Optimizer:
    one_of("optimizer", stage.optimizer, OPTIMIZERS)
    if stage.optimizer == "sgd":
        return torch.optim.SGD([value], lr=stage.peak, momentum=0.9, nesterov=True)
    if stage.optimizer == "lbfgs":
        # One iteration a call, so that a ball or sphere is kept between iterations; what it learned of the curvature stays.
        return torch.optim.LBFGS(
            [value], lr=stage.peak, max_iter=1, max_eval=25, line_search_fn="strong_wolfe"
        )
    return torch.optim.Adam([value], lr=stage.peak, betas=stage.adam[:2], eps=stage.adam[2])


def _natural(x: Tensor, rows: int, variation: float, norm: float) -> Tensor:
    """What keeps pictures natural, summed over rows."""
    found = x.new_zeros(())
    if variation:
        found = found + variation * rows * total_variation(x)
    if norm:
        found = found + norm * x.reshape(rows, -1).norm(dim=1).sum()
    return found


def _sphere(moved: Tensor, before: Tensor, one: bool) -> Tensor:
    """One radius for the whole batch, as published, or each code's own."""
    if one:
        return to_sphere(moved, before)
    return to_sphere(moved.flatten(1)[:, None], before.flatten(1)[:, None]).view_as(moved)


def _double(trace: list[float]) -> Tensor:
    return torch.tensor(trace, dtype=torch.float64)
