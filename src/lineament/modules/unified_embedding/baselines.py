"""Other ways to make a table small, as functions of their tensors: hashing, several hashes, HashedNet, ROBE, quotient and remainder, codes.

Coleman et al. 2023, arXiv 2305.12102, compare these; here rows, signs and codes are given, from :mod:`hashing` or learnt.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lineament.core.checks import number, one_of, require, show


def multi_hash(
    table: Tensor,
    rows: Tensor,
    combiner: Literal["concat", "sum", "mean"] = "concat",
    signs: Tensor | None = None,
) -> Tensor:
    """Several rows a value: joined, summed, averaged, or summed with signs (count sketch); one row is the hashing trick.

    Args:
        table: [rows, width], or [hashes, rows, width], one table a hash. rows: [n, hashes]. signs: [n, hashes].

    >>> multi_hash(torch.eye(2), torch.tensor([[0, 1]]), "sum").tolist()
    [[1.0, 1.0]]
    """
    one_of("combiner", combiner, ("concat", "sum", "mean"))
    found = table[rows] if table.ndim == 2 else table[torch.arange(rows.shape[1]), rows]
    if signs is not None:
        found = found * signs[..., None]
    return {"concat": found.flatten(1), "sum": found.sum(1), "mean": found.mean(1)}[combiner]


def hash_embeddings(table: Tensor, rows: Tensor, importance: Tensor, *, append: bool = False) -> Tensor:
    """Σ_j p_j table[row_j] with weights p [n, hashes] of each value, which may be appended (Svenstrup et al. 2017).

    >>> hash_embeddings(torch.eye(2), torch.tensor([[0, 1]]), torch.tensor([[2.0, 3.0]])).tolist()
    [[2.0, 3.0]]
    """
    found = (table[rows] * importance[..., None]).sum(1)
    return torch.cat([found, importance], 1) if append else found


def quotient_remainder(
    quotients: Tensor, remainders: Tensor, ids: Tensor, operation: Literal["mult", "add", "concat"] = "mult"
) -> Tensor:
    """quotients[id // c] and remainders[id % c], c the remainder table's rows, by whole-number division at any size.

    >>> quotient_remainder(torch.ones(2, 1), torch.tensor([[1.0], [2.0]]), torch.tensor([3])).item()
    2.0
    """
    one_of("operation", operation, ("mult", "add", "concat"))
    c = len(remainders)
    one, two = quotients[torch.div(ids, c, rounding_mode="floor")], remainders[ids % c]
    return {"mult": one * two, "add": one + two, "concat": torch.cat([one, two], 1)}[operation]


def robe(array: Tensor, starts: Tensor, length: int) -> Tensor:
    """Chunks of consecutive entries of a flat array, from hashed starts [n, chunks], wrapping round, joined.

    >>> robe(torch.arange(4.0), torch.tensor([[3]]), 2).tolist()
    [[3.0, 0.0]]
    """
    number("length", length, low=1, integer=True)
    return array[(starts[..., None] + torch.arange(length)) % len(array)].flatten(1)


def hashed_net(array: Tensor, index: Tensor, signs: Tensor | None = None) -> Tensor:
    """Every coordinate from its own hashed entry of a flat array, [n, width], with signs or without.

    >>> hashed_net(torch.arange(3.0), torch.tensor([[2, 0]])).tolist()
    [[2.0, 0.0]]
    """
    return array[index] if signs is None else array[index] * signs


def product_quantised(codebooks: Tensor, codes: Tensor) -> Tensor:
    """Parts from codebooks [parts, codes, width / parts] by each value's codes [n, parts], joined.

    >>> product_quantised(torch.arange(4.0).view(2, 2, 1), torch.tensor([[1, 0]])).tolist()
    [[1.0, 2.0]]
    """
    require(
        codes.shape[1] == len(codebooks), f"codes: got {show(codes)}, expected {len(codebooks)} codes a value"
    )
    return codebooks[torch.arange(len(codebooks)), codes].flatten(1)


def mixed_dimension(table: Tensor, ids: Tensor, projection: Tensor) -> Tensor:
    """A narrow table [n, small] and a projection [width, small].

    >>> mixed_dimension(torch.ones(1, 1), torch.tensor([0]), torch.ones(2, 1)).tolist()
    [[1.0, 1.0]]
    """
    return table[ids] @ projection.T
