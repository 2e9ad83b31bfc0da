"""How many values share a row: expectations, and whose data move a row.

Coleman et al. 2023, arXiv 2305.12102, section 4. Values of one feature in one row are merged; values of different features are only neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import InputError, number, require, show, suggest
from lineament.core.results import Readable
from lineament.modules.unified_embedding.table import UnifiedEmbedding


@dataclass(frozen=True)
class Collisions(Readable):
    """Expected pairs of values that share a row.

    ``intra``: of one feature, in one table for all; ``inter``: of different features. ``proportional_rows`` splits the rows by vocabulary;
    ``proportional``, ``equal``: pairs in separate tables of that many rows, or of equally many. ``occupied``: rows that any value has.
    """

    intra: float
    inter: float
    total: float
    proportional_rows: tuple[int, ...]
    proportional: float
    equal: float
    occupied: float


def expected_collisions(sizes: Sequence[int], rows: int) -> Collisions:
    """Expectations for vocabularies of these sizes, one row a value.

    >>> expected_collisions([2, 2], 4).total
    1.5
    """
    number("rows", rows, low=1, integer=True)
    require(len(sizes) > 0, "sizes: got none, expected a vocabulary size a feature")
    for size in sizes:
        number("sizes", size, low=0, integer=True)
    n = sum(sizes)
    pairs = [size * (size - 1) / 2 for size in sizes]
    intra, total = sum(pairs) / rows, n * (n - 1) / 2 / rows
    split = tuple(max(1, round(size / n * rows)) for size in sizes) if n else (1,) * len(sizes)
    each = max(1, rows // len(sizes))
    return Collisions(
        intra, total - intra, total, split, sum(p / m for p, m in zip(pairs, split)), sum(pairs) / each,
        rows * (1 - (1 - 1 / rows) ** n),
    )  # fmt: skip


@dataclass(frozen=True)
class Collided(Readable):
    """What :func:`collision_report` counted, and under ``expected`` what independent hashes would give.

    ``within``, ``between``: pairs of values of one feature, and of two, in one row (by the same look-up; by any look-ups into one sub-table).
    ``touched``: the share of the reads of which at least one row is also read for another value of the feature. ``merged``: the share of the reads of values
    all of whose rows are also those of another value of their feature, so that nothing can tell the two apart.
    """

    within: float
    between: float
    touched: float
    merged: float
    expected: Collided | None = None


def collision_report(table: UnifiedEmbedding, ids: Mapping[str, Any]) -> Collided:
    """Which of the values in some data share rows of a table; what is read more often weighs more.

    Args:
        ids: {feature: every id that was read}, as often as it was read; int64 of any shape, or strings.

    Raises:
        InputError: an unknown feature, no id.

    >>> table = UnifiedEmbedding(1, 4)  # a single row: all values of a feature are one
    >>> table.add("user", 1); table.add("item", 1)
    >>> found = collision_report(table, {"user": torch.tensor([1, 1, 2]), "item": torch.tensor([5])})
    >>> found.within, found.between, found.merged
    (1.0, 2.0, 0.75)
    """
    require(len(ids) > 0, "ids: got no feature, expected {feature: ids}")
    whole = squares = torch.zeros(len(table.weight), dtype=torch.double)
    hashed = squared = torch.zeros(table.tables, dtype=torch.double)
    within = reads = touched = merged = 0.0
    expected = torch.zeros(3, dtype=torch.double)
    for name, given in ids.items():
        values, counts = _distinct(table, name, given)
        places = table.places_of(name, values).cpu()
        own, k = torch.bincount(places.flatten(), minlength=len(whole)).double(), places.shape[1]
        whole, squares, reads = whole + own, squares + own.square(), reads + float(counts.sum())
        sizes = torch.stack([torch.bincount(column)[column] for column in places.T], 1)
        within += float((sizes - 1).sum()) / 2
        touched += float(counts[(sizes > 1).any(1)].sum())
        alike, size = places.unique(dim=0, return_inverse=True, return_counts=True)[1:]
        merged += float(counts[size[alike] > 1].sum())
        # What has rows of its own is hashed to none.
        free = (places < table.tables * table.rows).all(1)
        n, weight, p = int(free.sum()), float(counts[free].sum()), 1 / table.rows
        if n:
            one, every = 1 - (1 - p) ** (k * (n - 1)), 1 - (1 - p**k) ** (n - 1)
            expected += torch.tensor([k * n * (n - 1) / 2 * p, weight * one, weight * every])
        slots = n * torch.bincount(table.tables_of(name), minlength=table.tables).double()
        hashed, squared = hashed + slots, squared + slots.square()
    between = float((whole.square() - squares).sum()) / 2
    apart = float((hashed.square() - squared).sum()) / 2 / table.rows
    pairs, one, every = expected.tolist()
    return Collided(
        within, between, touched / reads, merged / reads, Collided(pairs, apart, one / reads, every / reads)
    )


def _distinct(table: UnifiedEmbedding, name: str, given: Any) -> tuple[Any, Tensor]:
    """Different ids, and how often each was read."""
    require(name in table.features, f"ids: there is no feature {name!r}{suggest(name, table.features)}")
    if not isinstance(given, Tensor):
        counts = Counter(given)
        require(len(counts) > 0, f"ids: got none for {name!r}, expected at least one")
        return list(counts), torch.tensor(list(counts.values()))
    if given.is_floating_point() or given.dtype == torch.bool or not given.numel():
        raise InputError(f"ids: got {show(given)} for {name!r}, expected at least one whole id")
    return given.flatten().long().unique(return_counts=True)


def reader_overlap(first: Tensor, second: Tensor) -> float:
    """How far two readers look into the same directions of a row: ||A Bᵀ|| / (||A|| ||B||), 0 where no direction is read by both.

    Of random readers of d coordinates it is near 1 / sqrt(d); of vectors it is the cosine's size.

    Args:
        first, second: weights [outputs, d], or [d], by which two features are read.

    >>> reader_overlap(torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
    0.8
    """
    require(
        first.shape[-1:] == second.shape[-1:] and 0 < first.ndim < 3 and 0 < second.ndim < 3,
        f"second: got {show(second)} beside {show(first)}, expected readers [outputs, d] of the same d",
    )
    a, b = (reader.detach().double().reshape(-1, reader.shape[-1]) for reader in (first, second))
    size = float(a.norm() * b.norm())
    require(size > 0, "first: a reader is zero, so that its directions are not defined")
    return float((a @ b.T).norm()) / size


@dataclass(frozen=True)
class RowGradient(Readable):
    """The gradient of a row, in three parts [width]: a value's own data, other values of its feature there, values of other features there."""

    own: Tensor
    intra: Tensor
    inter: Tensor


def logits(table: Tensor, theta: Tensor, rows: Sequence[Tensor], values: Tensor) -> Tensor:
    """z = Σ_t <theta_t, table[h_t(x_t)]> of values [n, features]; ``rows[t]`` is h_t."""
    return sum(
        (table[h[values[:, t]]] @ theta[t] for t, h in enumerate(rows)), torch.zeros((), dtype=table.dtype)
    )


def row_gradient(
    table: Tensor,
    theta: Tensor,
    rows: Sequence[Tensor],
    values: Tensor,
    labels: Tensor,
    value: int,
    feature: int = 0,
) -> RowGradient:
    """Whose data move the row of one value, in a logistic model with one vector a feature.

    >>> h = [torch.tensor([0]), torch.tensor([0])]
    >>> found = row_gradient(torch.zeros(1, 2), torch.eye(2), h, torch.zeros(1, 2, dtype=torch.long), torch.ones(1), 0)
    >>> found.own.tolist(), found.inter.tolist()
    ([-0.5, 0.0], [0.0, -0.5])
    """
    z = logits(table, theta, rows, values)
    blame = (torch.sigmoid(z) - labels) / len(labels)
    row = rows[feature][value]
    parts = {
        "own": torch.zeros_like(table[0]),
        "intra": torch.zeros_like(table[0]),
        "inter": torch.zeros_like(table[0]),
    }
    for t, h in enumerate(rows):
        here = h[values[:, t]] == row
        mine = here & (values[:, t] == value) if t == feature else torch.zeros_like(here)
        parts["own"] = parts["own"] + theta[t] * blame[mine].sum()
        key = "intra" if t == feature else "inter"
        parts[key] = parts[key] + theta[t] * blame[here & ~mine].sum()
    return RowGradient(**parts)


def loss(table: Tensor, theta: Tensor, rows: Sequence[Tensor], values: Tensor, labels: Tensor) -> Tensor:
    """The model's mean binary cross-entropy."""
    return F.binary_cross_entropy_with_logits(logits(table, theta, rows, values), labels.to(table.dtype))
