"""How sure is what an embedding is worth? A bootstrap over people, because their pairs are not independent.

A replicate draws as many people as there are, with replacement; a pair of one person's samples then counts as often as the person was drawn, a pair of two
people as often as the product. Retrieval counts each sample as often as its person; the samples that it is sought among stay. Bolle, Ratha and Pankanti 2004
draw subsets of people for the same reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.core.checks import number, require, show
from lineament.core.checks import seed as checked_seed
from lineament.core.results import Readable
from lineament.measure.embeddings.pairs import _checked, recognition

Interval = tuple[float, float]
_ENTRIES = 1 << 22


@dataclass(frozen=True)
class Spread(Readable):
    """95 % intervals over people: of the true-accept rate at each of ``fars``, and of R@1."""

    fars: tuple[float, ...]
    tar: tuple[Interval, ...]
    recall: Interval
    replicates: int


@torch.no_grad()
def recognition_spread(
    embeddings: Float[Tensor, "samples dimension"],
    labels: Int[Tensor, "samples"],
    fars: Sequence[float] = (1e-2, 1e-3),
    *,
    replicates: int = 200,
    seed: int = 0,
) -> Spread:
    """The spread of what :func:`~lineament.measure.recognition` gives, over draws of people.

    Args:
        embeddings, labels, fars: as for :func:`~lineament.measure.recognition`. All similarities of a part of the samples are held: some
            millions at a time, and the largest tenth of the impostors' in all.

    Raises:
        InputError: as :func:`~lineament.measure.recognition`.

    >>> found = recognition_spread(torch.eye(3).repeat_interleave(2, 0), torch.tensor([0, 0, 1, 1, 2, 2]), [0.1])
    >>> found.tar, found.recall
    (((1.0, 1.0),), (1.0, 1.0))
    """
    unit, people = _checked(embeddings, labels)
    checked_seed("seed", seed)
    number("replicates", replicates, low=2, integer=True)
    for far in fars:
        number("fars", far, low=0, high=1)
    tars, recalls = _replicates(unit, people, fars, replicates, seed)
    return Spread(
        tuple(map(float, fars)),
        tuple(_interval(tars[:, k]) for k in range(len(fars))),
        _interval(recalls),
        replicates,
    )


@dataclass(frozen=True)
class Change(Readable):
    """How much higher the second embedding's true-accept rates at ``fars`` and R@1 are, with 95 % intervals over people, who are drawn alike for both."""

    fars: tuple[float, ...]
    tar: tuple[float, ...]
    tar_interval: tuple[Interval, ...]
    recall: float
    recall_interval: Interval
    replicates: int


@torch.no_grad()
def recognition_change(
    first: Float[Tensor, "samples dimension"],
    second: Float[Tensor, "samples other"],
    labels: Int[Tensor, "samples"],
    fars: Sequence[float] = (1e-2, 1e-3),
    *,
    replicates: int = 200,
    seed: int = 0,
) -> Change:
    """Does the second of two embeddings of the same samples recognise more? The change of each rate, with intervals of the paired differences.

    Each replicate draws the same people for both, so that what makes a person hard for either is not taken for a difference between the two.

    Args:
        first, second: embeddings of the same samples, of any widths. labels, fars, replicates, seed: as for :func:`recognition_spread`.

    Raises:
        InputError: as :func:`~lineament.measure.recognition`; other numbers of samples.

    >>> labels = torch.arange(8).repeat_interleave(2)
    >>> good, bad = torch.eye(8)[labels], torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    >>> found = recognition_change(bad, good, labels, [0.1])
    >>> found.tar[0] > 0.5, found.tar_interval[0][0] > 0
    (True, True)
    """
    require(
        len(first) == len(second),
        f"second: got {show(second)} beside {show(first)}, expected embeddings of the same samples",
    )
    checked_seed("seed", seed)
    number("replicates", replicates, low=2, integer=True)
    for far in fars:
        number("fars", far, low=0, high=1)
    worth = [recognition(each, labels, fars) for each in (first, second)]
    drawn = [_replicates(*_checked(each, labels), fars, replicates, seed) for each in (first, second)]
    tars, recalls = (after - before for before, after in zip(*drawn))
    return Change(
        tuple(map(float, fars)),
        tuple(after - before for before, after in zip(worth[0].tar, worth[1].tar)),
        tuple(_interval(tars[:, k]) for k in range(len(fars))),
        worth[1].recall - worth[0].recall,
        _interval(recalls),
        replicates,
    )


def _replicates(
    unit: Tensor, people: Tensor, fars: Sequence[float], replicates: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Of each draw of people the true-accept rates [replicates, fars] and R@1 [replicates]."""
    counts = torch.bincount(people)
    scores, first, second, hits = _ranked(unit, people, max(fars))
    impostor = first != second
    # Genuine pairs of a person in the order of all pairs' scores, so that one cumulative sum tells how many lie above each impostor.
    generator = torch.Generator().manual_seed(seed)
    n = len(counts)
    sizes = counts.double()
    own = sizes * (sizes - 1) / 2
    tars, recalls = torch.empty(replicates, len(fars), dtype=torch.float64), torch.empty(replicates, dtype=torch.float64)  # fmt: skip
    for at in range(replicates):
        drawn = torch.bincount(torch.randint(n, (n,), generator=generator), minlength=n).double()
        drawn = drawn.to(unit.device)
        total = ((drawn * sizes).sum() ** 2 - (drawn * sizes).square().sum()) / 2
        genuine = (drawn * own).sum().clamp(min=1)
        weight = drawn[first]
        passed = torch.where(impostor, weight * drawn[second], 0).cumsum(0)
        accepted = torch.where(impostor, 0, weight).cumsum(0)
        for k, far in enumerate(fars):
            # The first impostor with whom the rate would be passed is not accepted, nor whatever scores as much.
            end = int(torch.searchsorted(passed, far * total * (1 + 1e-12), right=True))
            end = int(torch.searchsorted(-scores, -scores[end])) if end < len(scores) else end
            tars[at, k] = accepted[end - 1] / genuine if end else 0.0
        recalls[at] = (drawn[people] * hits).sum() / (drawn * sizes).sum()
    return tars, recalls


def _interval(values: Tensor) -> Interval:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return low, high


def _ranked(unit: Tensor, people: Tensor, far: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores of all genuine pairs and of the largest impostors, falling, with both people of each; and whose nearest neighbour is of its person."""
    n = len(unit)
    # Ten times the share that may be accepted: enough for any draw but freak ones, which then count what is kept.
    share = min(1.0, 10 * max(far, 1e-3))
    size = max(1, _ENTRIES // n)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    hits = torch.empty(n, dtype=torch.float64, device=unit.device)
    for start in range(0, n, size):
        rows = torch.arange(start, min(start + size, n), device=unit.device)
        found = unit[rows] @ unit.T
        found[rows - start, rows] = -torch.inf
        hits[rows] = (people[found.argmax(1)] == people[rows]).double()
        above = torch.arange(n, device=unit.device) > rows[:, None]
        like = people[rows, None] == people
        i, j = (above & like).nonzero(as_tuple=True)
        parts.append((found[i, j], people[rows[i]], people[j]))
        others = above & ~like
        values = found[others]
        if len(values):
            kept = values.topk(max(1, min(len(values), int(share * len(values)) + 64))).indices
            i, j = (v[kept] for v in others.nonzero(as_tuple=True))
            parts.append((values[kept], people[rows[i]], people[j]))
    scores, first, second = (torch.cat(each) for each in zip(*parts))
    order = scores.argsort(descending=True, stable=True)
    return scores[order], first[order], second[order], hits
