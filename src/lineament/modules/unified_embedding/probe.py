"""What a shared table would do to some data: hot values, distinct values, buckets, collisions, and how to size it, before there is a model.

Coleman et al., "Unified Embedding", NeurIPS 2023, arXiv 2305.12102. Ids are streamed: heavy hitters in bounded memory (Misra and Gries 1982), distinct values by the smallest hashes
(KMV: Bar-Yossef et al. 2002), which is an estimate once there are more than fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, require, show, suggest
from lineament.core.results import Readable
from lineament.modules.unified_embedding.collisions import Collisions, expected_collisions
from lineament.modules.unified_embedding.hashing import as_texts, fingerprint, mix64
from lineament.modules.unified_embedding.table import UnifiedEmbedding


@dataclass(frozen=True)
class Probe(Readable):
    """One column of ids.

    Attributes:
        count: ids seen. distinct: different ones; with ``distinct_error`` above 0 an estimate with that relative standard error.
        hot: the most frequent values with a lower bound of their counts, at most ``undercount`` too low.
    """

    count: int
    distinct: int
    distinct_error: float
    hot: tuple[tuple[int, int], ...]
    undercount: int


def probe(ids: Tensor | Sequence[object] | Iterable[Tensor], *, keep: int = 1024, top: int = 10) -> Probe:
    """Look at one column's ids, in one piece or in many.

    Args:
        ids: int64, strings, or an iterable of tensors. keep: values (and hashes) held in memory. top: hot values to name.

    >>> found = probe(torch.tensor([7, 7, 7, 2, 9]))
    >>> found.distinct, found.hot[0]
    (3, (7, 3))
    """
    number("keep", keep, low=16, integer=True)
    held: dict[int, int] = {}
    smallest, count, taken = torch.empty(0, dtype=torch.int64), 0, 0
    for part in _parts(ids):
        count += len(part)
        values, counts = part.unique(return_counts=True)
        smallest = torch.cat([smallest, mix64(values, 0)]).unique()[:keep]
        for value, found in zip(values.tolist(), counts.tolist()):
            held[value] = held.get(value, 0) + found
        if len(held) > keep:
            # Misra and Gries: take the (keep + 1)-th largest count off all.
            cut = sorted(held.values(), reverse=True)[keep]
            held = {value: c - cut for value, c in held.items() if c > cut}
            taken += cut
    require(count > 0, "ids: got none, expected at least one")
    hot = tuple(sorted(held.items(), key=lambda item: (-item[1], item[0]))[:top])
    if len(smallest) < keep:
        return Probe(count, len(smallest), 0.0, hot, taken)
    # The keep-th smallest of n uniform numbers in (0, 1) lies near keep / n.
    place = (float(smallest[-1]) + 2.0**63) / 2.0**64
    return Probe(count, round((keep - 1) / place), 1 / math.sqrt(keep - 2), hot, taken)


@dataclass(frozen=True)
class RowLoads(Readable):
    """How evenly a table's rows are hit.

    ``chi_square`` of the different values' rows in ``degrees`` + 1 ranges of rows, against equally many in each, and the chance ``p_value`` of as much from even hashes. ``hot``: the rows that are
    read most, with their share of the reads.
    """

    chi_square: float
    degrees: int
    p_value: float
    hot: tuple[tuple[int, float], ...]


def row_loads(table: UnifiedEmbedding, ids: Mapping[str, Tensor], *, top: int = 10) -> RowLoads:
    """Chi-square of a table's rows over the different values of some data, and its hot rows; rows of values' own are hot rows only.

    Args:
        ids: {feature: every id that was read, as often as it was}. top: hot rows to name.

    Raises:
        InputError: no id, or fewer than 20 different values.

    >>> table = UnifiedEmbedding(64, 4)
    >>> table.add("user", 1)
    >>> found = row_loads(table, {"user": torch.arange(1000)})
    >>> found.degrees, 0.001 < found.p_value < 0.999
    (63, True)
    """
    from scipy.stats import chi2

    hashed, reads = table.tables * table.rows, torch.zeros(len(table.weight), dtype=torch.double)
    values = torch.zeros(hashed, dtype=torch.double)
    for name, given in ids.items():
        require(name in table.features, f"ids: there is no feature {name!r}{suggest(name, table.features)}")
        if not isinstance(given, Tensor) or given.is_floating_point() or not given.numel():
            raise InputError(f"ids: got {show(given)} for {name!r}, expected at least one whole id")
        own, counts = given.flatten().long().unique(return_counts=True)
        at = table.places_of(name, own).cpu()
        weights = counts.double().cpu()[:, None].expand(at.shape).reshape(-1)
        reads += torch.bincount(at.flatten(), weights=weights, minlength=len(reads))
        values += torch.bincount(at[at < hashed], minlength=hashed)
    total = int(values.sum())
    require(total >= 20, f"ids: got {total} different values and look-ups, expected 20 or more")
    # Ten or more are expected in each range of rows.
    ranges = min(hashed, total // 10)
    edges = torch.arange(ranges + 1) * hashed // ranges
    found = values.cumsum(0)[edges[1:] - 1].diff(prepend=torch.zeros(1))
    expected = edges.diff().double() * total / hashed
    statistic = float(((found - expected).square() / expected).sum())
    most = reads.topk(min(top, len(reads)))
    hot = tuple((row, n / float(reads.sum())) for row, n in zip(most.indices.tolist(), most.values.tolist()))
    return RowLoads(statistic, ranges - 1, float(chi2.sf(statistic, ranges - 1)), hot)


@dataclass(frozen=True)
class Plan(Readable):
    """Rows and chunk of a shared table, and how many look-ups each feature gets; ``collisions`` are expected for one look-up."""

    rows: int
    chunk: int
    lookups: dict[str, int]
    bytes: int
    collisions: Collisions


def plan(values: Mapping[str, int], budget: int, *, chunk: int = 16, widest: int = 64) -> Plan:
    """Rows and look-ups for features of so many distinct values, in at most ``budget`` bytes of float32.

    A feature of N values gets a width near 4 N^(1/4), between one chunk and ``widest``, and at least two look-ups where its values
    would collide: a tenth or more of its values in a shared row.

    >>> found = plan({"user": 100_000, "gender": 2}, budget=1 << 20)
    >>> found.rows, found.lookups
    (16384, {'user': 4, 'gender': 1})
    """
    number("budget", budget, low=4 * chunk, integer=True)
    number("chunk", chunk, low=1, integer=True)
    number("widest", widest, low=chunk, integer=True)
    require(len(values) > 0, "values: got none, expected {feature: number of distinct values}")
    rows = budget // (4 * chunk)
    lookups = {}
    for name, size in values.items():
        number(f"values[{name!r}]", size, low=1, integer=True)
        width = min(max(4 * size**0.25, chunk), widest)
        shared = 1 - (1 - 1 / rows) ** (size - 1)
        lookups[name] = max(round(width / chunk), 2 if shared >= 0.1 else 1)
    return Plan(rows, chunk, lookups, 4 * chunk * rows, expected_collisions(list(values.values()), rows))


def _parts(ids: object) -> Iterable[Tensor]:
    if isinstance(ids, Tensor):
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise InputError(f"ids: got {show(ids)}, expected whole ids")
        return ids.flatten().long().split(1 << 20)
    if isinstance(ids, (list, tuple)) and ids and not isinstance(ids[0], Tensor):
        return [fingerprint(as_texts(ids)) if isinstance(ids[0], (str, bytes)) else torch.tensor(ids)]
    if isinstance(ids, Iterable):
        return (part for piece in ids for part in _parts(piece))
    raise InputError(f"ids: got {show(ids)}, expected int64 ids, strings, or parts of them")
