"""Rebuild a batch from its gradient through a generator: first its code, then the features between its blocks.

Fang et al., "GIFD", ICCV 2023, arXiv 2308.04699, section 1.4. It takes the auditor's own model, message and generator, and says how much of their own batch the
message gives away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, require
from lineament.core.results import Readable
from lineament.privacy.constraints import l1_projection, rate, to_sphere
from lineament.privacy.costs import total_variation

Gradient = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Stage:
    """One layer of the search: its steps, its peak rate, and the l1 radius around its start (none where it is not positive).

    >>> Stage(500, 0.1).radius
    -1.0
    """

    steps: int
    peak: float
    radius: float = -1.0


@dataclass(frozen=True)
class Inversion(Readable):
    """The picture of the stage whose gradient fits best, normalised and clipped.

    ``variables``: what each stage ended with; ``scores``: each stage's matching cost; ``objective``: at every step of all stages.
    """

    best: Tensor
    score: float
    pictures: tuple[Tensor, ...]
    variables: tuple[Tensor, ...]
    scores: tuple[float, ...]
    objective: Tensor


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
) -> Inversion:
    """One restart of the search.

    Args:
        blocks: for a code, the generator as a list of functions that are applied in turn; from the second stage on it is asked once, with the code
            that the first stage found, so that what depends on the code stays as it was.
        render: the generator's output as normalised pictures. gradient: of pictures, defended as the message is. cost: of that gradient.
        start: the first code [n, d]. stages: the code's, then those of the inputs of block 1, 2, ...
        bounds: of normalised pictures, per channel. variation, norm: weights of the total variation and of |x| / side².

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
    low, high = (bound.view(1, -1, 1, 1) for bound in bounds)
    trace: list[float] = []
    variables, pictures, scores = [], [], []
    value, frozen = start.detach().clone(), None
    for k, stage in enumerate(stages):
        if k > 0:
            frozen = blocks(variables[0]) if frozen is None else frozen
            if k >= len(frozen):
                raise InputError(f"stages: got {len(stages)}, but the generator has {len(frozen)} blocks")
            with torch.no_grad():
                value = frozen[k - 1](value)
        first = value.clone()
        value = value.clone().requires_grad_()
        optimizer = torch.optim.Adam([value], lr=stage.peak)
        x = value
        for step in range(stage.steps):
            optimizer.param_groups[0]["lr"] = rate(step / stage.steps, stage.peak)
            x = value
            for block in (blocks(value) if frozen is None else frozen)[k:]:
                x = block(x)
            x = render(x)
            objective = cost(gradient(x)) + variation * total_variation(x) + norm * x.norm() / side**2
            (value.grad,) = torch.autograd.grad(objective, value)
            optimizer.step()
            with torch.no_grad():
                if k == 0:
                    value.copy_(to_sphere(value, first))
                elif stage.radius > 0:
                    value.copy_(first + l1_projection(value - first, stage.radius))
            trace.append(float(objective.detach()))
        picture = x.detach().clamp(low, high)
        value = value.detach()
        variables.append(value)
        pictures.append(picture)
        scores.append(float(cost(gradient(picture)).detach()))
    best = min(range(len(scores)), key=scores.__getitem__)
    return Inversion(
        pictures[best], scores[best], tuple(pictures), tuple(variables), tuple(scores),
        torch.tensor(trace, dtype=torch.float64),
    )  # fmt: skip
