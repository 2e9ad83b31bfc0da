"""What a faithfulness score has to be read beside: chance, and the same ranking at another sharpness.

Soft sufficiency and comprehensiveness reward peaked scores whatever they point at. So a comparison brings all methods to one entropy, or to one mean
retention, and keeps each method's ranking.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.results import entropy, normalized


def random_importance(
    scored: Bool[Tensor, "tokens"], *, seed: int = 0, draws: int = 1
) -> Float[Tensor, "draws tokens"]:
    """What a method has to beat: the softmax of uniform numbers over the scored tokens.

    >>> round(random_importance(torch.tensor([True, True, False])).sum().item(), 6)
    1.0
    """
    generator = torch.Generator().manual_seed(seed)
    found = torch.zeros(draws, len(scored), dtype=torch.float64)
    found[:, scored] = torch.rand(draws, int(scored.sum()), generator=generator, dtype=torch.float64).softmax(
        1
    )
    return found


def match_entropy(scores: Float[Tensor, "tokens"], wanted: float) -> Float[Tensor, "tokens"]:
    """The same ranking at a given entropy (nats): softmax(minmax(scores) / temperature), the temperature found by bisection.

    Scores that are all equal cannot be sharpened and stay uniform; with m tokens sharing the largest score the entropy cannot fall below log m.

    >>> a = match_entropy(torch.tensor([3.0, 1.0, 0.0, 0.0]), 0.5)
    >>> round(float(entropy(a)), 4), a.argmax().item()
    (0.5, 0)
    """
    checks.number("wanted", float(wanted), low=0)
    z = normalized(scores.double(), "minmax")
    return _bisect(lambda log_t: (z / 2.0**log_t).softmax(-1), entropy, wanted, -40.0, 20.0)


def match_retention(scores: Float[Tensor, "tokens"], wanted: float) -> Float[Tensor, "tokens"]:
    """The same ranking at a given mean importance: minmax(scores)^power, so that all methods keep as much of the input on average.

    The mean lies between the share of tokens with the largest score and the share of those above the smallest.

    >>> round(match_retention(torch.tensor([4.0, 3.0, 1.0, 0.0]), 0.4).mean().item(), 4)
    0.4
    """
    checks.number("wanted", float(wanted), low=0, high=1)
    z = normalized(scores.double(), "minmax")
    return _bisect(lambda log_p: z**2.0 ** (-log_p), lambda a: a.mean(-1), wanted, -20.0, 20.0)


def _bisect(
    make: Callable[[float], Tensor],
    measure: Callable[[Tensor], Tensor],
    wanted: float,
    low: float,
    high: float,
) -> Tensor:
    """``make(x)`` whose measure (rising in x) is as wanted, or as near as it gets."""
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if float(measure(make(middle))) < wanted else (low, middle)
    return make((low + high) / 2)
