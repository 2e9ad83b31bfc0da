"""How many values share a row: expectations, and whose data move a row.

Coleman et al. 2023, arXiv 2305.12102, section 4. Values of one feature in one row are merged; values of different features are only neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, require
from lineament.core.results import Readable


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
