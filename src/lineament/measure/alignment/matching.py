"""Which unit of another network is this one? Greedy and one-to-one matching on any matrix of scores between units.

Li, Yosinski, Clune, Lipson, Hopcroft (2015, arXiv 1511.07543). Signed correlations are matched: an anti-correlated pair is no
match. Where the layers differ in width, the one-to-one matching uses every unit of the narrower one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from lineament.core import checks, results
from lineament.core.checks import require
from lineament.core.results import Readable


@dataclass(frozen=True)
class Matching(Readable):
    """Pairs of units: ``rows[i]`` of the one network is matched with ``columns[i]`` of the other, at the score ``values[i]``."""

    rows: Int[Tensor, " pairs"]
    columns: Int[Tensor, " pairs"]
    values: Float[Tensor, " pairs"]

    @property
    def mean(self) -> float:
        """The mean score of the pairs."""
        return float(self.values.mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain lists."""
        return results.plain(self)


def semi_matching(scores: Float[Tensor, "units_a units_b"]) -> Matching:
    """The best partner of each row, max_j c_ij; several rows may choose the same column, and a tie goes to the first.

    The direction matters: the best partners of the columns are ``semi_matching(scores.T)``.

    >>> semi_matching(torch.tensor([[0.9, 0.1], [0.8, 0.2]])).columns.tolist()
    [0, 0]
    """
    scores = _scores(scores)
    values, _ = scores.max(1)
    # torch.max promises no order among ties; the first is the rule.
    columns = (scores == values[:, None]).int().argmax(1)
    return Matching(torch.arange(len(scores)), columns, values)


def matching(scores: Float[Tensor, "units_a units_b"]) -> Matching:
    """The one-to-one matching with the largest sum of scores, max_π Σ_i c_{i,π(i)}; the pairs in the order of their rows.

    Exact (SciPy's assignment solver, cubic in the units); with unequal widths every unit of the narrower network has a partner.

    >>> matching(torch.tensor([[0.9, 0.1], [0.8, 0.2]])).columns.tolist()
    [0, 1]
    """
    scores = _scores(scores)
    rows, columns = map(torch.from_numpy, linear_sum_assignment(scores.numpy(), maximize=True))
    return Matching(rows, columns, scores[rows, columns])


def self_matching(scores: Float[Tensor, "units units"]) -> Matching:
    """The one-to-one matching of a network with itself in which no unit may choose itself: what is there twice.

    >>> self_matching(torch.tensor([[1.0, 0.9, 0.0], [0.9, 1.0, 0.1], [0.0, 0.1, 1.0]])).mean
    0.3333333432674408
    """
    scores = _scores(scores)
    require(
        scores.shape[0] == scores.shape[1] >= 2,
        f"scores: got {checks.show(scores)}, expected a square matrix of at least two units",
    )
    # No sum that keeps off the diagonal is worse than one that touches it.
    spread = float(scores.abs().max()) * 2 * len(scores) + 1
    rows, columns = map(
        torch.from_numpy,
        linear_sum_assignment((scores - spread * torch.eye(len(scores))).numpy(), maximize=True),
    )
    return Matching(rows, columns, scores[rows, columns])


def overlap(scores: Float[Tensor, "units_a units_b"], one_to_one: Matching | None = None) -> float:
    """The share of units to which semi-matching and one-to-one matching give the same partner, over the narrower network.

    >>> overlap(torch.tensor([[0.9, 0.1], [0.8, 0.2]]))
    0.5
    """
    scores = _scores(scores)
    pairs = matching(scores) if one_to_one is None else one_to_one
    if scores.shape[0] <= scores.shape[1]:
        same = semi_matching(scores).columns[pairs.rows] == pairs.columns
    else:
        same = semi_matching(scores.T).columns[pairs.columns] == pairs.rows
    return float(same.double().mean())


def cycle_order(permutation: Int[Tensor, " units"]) -> tuple[Tensor, Tensor]:
    """The cycles of a permutation: the units in the order in which they are visited, and the length of each cycle.

    From the smallest unit not visited yet, i -> π(i) is followed until the cycle closes. Rows and columns of a matrix between two
    networks shown in this order have the matches beside the diagonal, those of fixed points on it.

    >>> [part.tolist() for part in cycle_order(torch.tensor([2, 1, 0]))]
    [[0, 2, 1], [2, 1]]
    """
    whole = checks.tensor("permutation", permutation, shape=("units",), floating=False).tolist()
    require(
        sorted(whole) == list(range(len(whole))),
        f"permutation: got {checks.show(whole)}, expected each of 0 to {len(whole) - 1} once",
    )
    order: list[int] = []
    lengths: list[int] = []
    seen: set[int] = set()
    for start in range(len(whole)):
        at, before = start, len(order)
        while at not in seen:
            seen.add(at)
            order.append(at)
            at = whole[at]
        if len(order) > before:
            lengths.append(len(order) - before)
    return torch.tensor(order), torch.tensor(lengths)


def core_units(
    scores: Mapping[tuple[int, int], Float[Tensor, "units_a units_b"]], threshold: float
) -> dict[int, Tensor]:
    """The units of each network whose one-to-one match in every other network scores above a threshold.

    Args:
        scores: {(n, m): scores between the units of networks n and m}, each pair once, in either order.

    >>> one, two = torch.tensor([[0.9, 0.0], [0.0, 0.3]]), torch.tensor([[0.8, 0.0], [0.0, 0.9]])
    >>> {net: units.tolist() for net, units in core_units({(0, 1): one, (0, 2): two, (1, 2): two}, 0.5).items()}
    {0: [0], 1: [0], 2: [0, 1]}
    """
    lowest: dict[int, Tensor] = {}
    for (n, m), matrix in scores.items():
        pairs = matching(matrix)
        for net, units, width in ((n, pairs.rows, matrix.shape[0]), (m, pairs.columns, matrix.shape[1])):
            # A unit without a partner is in no core.
            found = torch.full((width,), -torch.inf, dtype=pairs.values.dtype)
            found[units] = pairs.values
            lowest[net] = torch.minimum(lowest[net], found) if net in lowest else found
    return {net: (worst > threshold).nonzero().flatten() for net, worst in sorted(lowest.items())}


def mean_activations(
    means_a: Float[Tensor, " units_a"], means_b: Float[Tensor, " units_b"], pairs: Matching
) -> dict[str, Tensor]:
    """How rarely or often matched units are active: the spectra of both networks and each pair's means beside its score.

    Returns:
        ``a``, ``b``: the mean activations from the largest to the smallest; ``pairs``: (mean in a, mean in b, score) of each pair,
        from the most to the least active unit of a.
    """
    order = means_a[pairs.rows].argsort(descending=True, stable=True)
    table = torch.stack(
        [means_a[pairs.rows].double(), means_b[pairs.columns].double(), pairs.values.double()], 1
    )
    return {
        "a": means_a.sort(descending=True).values,
        "b": means_b.sort(descending=True).values,
        "pairs": table[order],
    }


def _scores(scores: Any) -> Tensor:
    return checks.tensor("scores", scores, shape=("units_a", "units_b"), floating=True).detach().cpu()
