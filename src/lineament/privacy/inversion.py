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

from lineament.core.checks import InputError, number, require
from lineament.core.results import Readable
from lineament.privacy.constraints import l1_projection, rate, to_sphere
from lineament.privacy.costs import total_variation

Gradient = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Stage:
    """One layer of the search: its steps, its peak rate, and the l1 radius around its start (none where it is negative).

    ``sphere``: whether a code keeps its radius.

    >>> Stage(500, 0.1).radius
    -1.0
    """

    steps: int
    peak: float
    radius: float = -1.0
    sphere: bool = True


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
        bounds: of normalised pictures, per channel. variation, norm: weights of the total variation and of |x| / side².
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
    value, frozen, rising = start.detach().clone(), None, 0
    for k, stage in enumerate(stages):
        if k > 0:
            frozen = blocks(variables[0]) if frozen is None else frozen
            if k >= len(frozen):
                raise InputError(f"stages: got {len(stages)}, but the generator has {len(frozen)} blocks")
            with torch.no_grad():
                value = frozen[k - 1](value)
        first, tau = value.clone(), value.new_zeros(len(value))
        value = value.clone().requires_grad_()
        optimizer = torch.optim.Adam([value], lr=stage.peak)
        x = value
        for step in range(stage.steps):
            optimizer.param_groups[0]["lr"] = rate(step / stage.steps, stage.peak)
            x = value
            for block in (blocks(value) if frozen is None else frozen)[k:]:
                x = block(x)
            x = render(x)
            match = cost(gradient(x))
            objective = match.sum() + _natural(x, match.numel(), variation, norm / side**2)
            (value.grad,) = torch.autograd.grad(objective, value)
            optimizer.step()
            with torch.no_grad():
                if k == 0 and stage.sphere:
                    value.copy_(_sphere(value, first, match.ndim == 0))
                elif k > 0 and stage.radius > 0:
                    value.copy_(first + l1_projection(value - first, stage.radius, warm=tau))
            trace.append(float(objective.detach()))
        picture = x.detach().clamp(low, high)
        value = value.detach()
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
