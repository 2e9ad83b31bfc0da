"""What colour had this before? A memory of keys and values: working, long-term, permanent.

Similarity of a memory element i and a query j: S_ij = -(s_i / √C) Σ_c e_cj (k_ci - q_cj)², one matrix product of M_i = s_i [k_i², k_i, 1] with
Q_j = [-e_j, 2 e_j q_j, -Σ e_j q_j²] / √C. An answer takes the ``top_k`` most similar elements of each query. Full working memory is consolidated:
the most used of its older elements stay as prototypes, with values averaged over all that leave (XMem: Cheng and Schwing 2022, arXiv 2207.07115).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, require

_CHUNK = 2**24  # similarities at once


def _memory_side(key: Tensor, shrinkage: Tensor | None) -> Tensor:
    """[..., channels, n] as [..., n, 2 channels + 1]."""
    rows = torch.cat([key.square(), key, torch.ones_like(key[..., :1, :])], -2)
    return (rows if shrinkage is None else rows * shrinkage).mT


def _query_side(query: Tensor, selection: Tensor | None) -> Tensor:
    """[..., channels, m] as [..., 2 channels + 1, m]."""
    e = torch.ones_like(query) if selection is None else selection
    # Without selection the term of the query alone is left out: no softmax over the memory depends on it, where shrinkage is one.
    own = (e * query.square()).sum(-2, keepdim=True) * (0 if selection is None else 1)
    return torch.cat([-e, 2 * e * query, -own], -2) / math.sqrt(query.shape[-2])


def similarity(key: Tensor, shrinkage: Tensor | None, query: Tensor, selection: Tensor | None) -> Tensor:
    """S between elements [..., channels, n] and queries [..., channels, m]: [..., n, m].

    >>> k, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[3.0]])
    >>> similarity(k, None, q, torch.ones_like(q)).flatten().tolist()
    [-9.0, -4.0]
    """
    return _memory_side(key, shrinkage) @ _query_side(query, selection)


def read_all(key: Tensor, shrinkage: Tensor, query: Tensor, selection: Tensor, value: Tensor) -> Tensor:
    """Σ_i softmax_i(S_ij) v_i over all elements, as in training; value [..., width, n], answer [..., width, m]."""
    return value @ similarity(key, shrinkage, query, selection).softmax(-2)


class TopK(NamedTuple):
    """The weights and indices of the elements that answer each query [queries, k], and the largest similarity of each."""

    weight: Tensor
    index: Tensor
    largest: Tensor


def top_weights(memory: Tensor, query: Tensor, top_k: int | None) -> TopK:
    """Softmax over the ``top_k`` most similar elements of each query, all where there are fewer; in chunks of queries.

    The maximum is subtracted first: similarities far below zero must not end in 0/0.
    """
    count = len(memory) if top_k is None else min(top_k, len(memory))
    parts = []
    for part in query.mT.split(max(1, _CHUNK // len(memory))):
        top, index = (part @ memory.mT).topk(count, 1)
        parts.append((top.softmax(1), index, top[:, 0]))
    return TopK(*(torch.cat(list(column)) for column in zip(*parts)))


def usage_of(found: TopK, elements: int) -> Tensor:
    """How much each element was used: its weights summed over queries."""
    zero = found.weight.new_zeros(elements)
    return zero.index_add_(0, found.index.flatten(), found.weight.flatten())


@dataclass
class Store:
    """Elements in the order they came: keys [n, channels], values [n, width], and how much each was used since it came."""

    key: Tensor | None = None
    shrinkage: Tensor | None = None
    selection: Tensor | None = None
    value: Tensor | None = None
    side: Tensor | None = None  # M, computed once
    use: Tensor | None = None
    life: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else len(self.key)

    def add(self, key: Tensor, shrinkage: Tensor, selection: Tensor | None, value: Tensor) -> None:
        new = {
            "key": key,
            "shrinkage": shrinkage,
            "selection": selection,
            "value": value,
            "side": _memory_side(key.mT, shrinkage.mT).contiguous(),
            "use": torch.zeros(len(key), device=key.device),
            # So that an element which was never read has the usage 0, not 0/0.
            "life": torch.full((len(key),), 1e-7, device=key.device),
        }
        for name, more in new.items():
            old = getattr(self, name)
            if more is not None:
                setattr(self, name, more if old is None or not len(old) else torch.cat([old, more]))

    def keep(self, which: Tensor) -> None:
        """Only the elements of a mask or an index."""
        for name in self.__dataclass_fields__:
            if (old := getattr(self, name)) is not None:
                setattr(self, name, old[which])

    def count(self, usage: Tensor) -> None:
        if self.use is not None and self.life is not None:
            self.use += usage
            self.life += 1

    @property
    def usage(self) -> Tensor:
        """Use for each read since the element came."""
        assert self.use is not None and self.life is not None
        return self.use / self.life


@dataclass(frozen=True)
class MemoryOptions:
    """How much is kept.

    Args:
        top_k: elements that answer a query; None: all.
        max_frames, min_frames: working memory is consolidated at the first and has the second afterwards (the oldest and the latest).
        prototypes: elements that a consolidation leaves. max_long: elements of long-term memory (not frames).
        long_term: without it working memory grows with the film. count_long: let long-term elements that are not used go first.

    >>> MemoryOptions(max_frames=4, min_frames=2).prototypes
    128
    """

    top_k: int | None = 30
    max_frames: int = 10
    min_frames: int = 5
    prototypes: int = 128
    max_long: int = 10_000
    long_term: bool = True
    count_long: bool = True

    def __post_init__(self) -> None:
        for name in ("max_frames", "min_frames", "prototypes", "max_long"):
            number(name, getattr(self, name), low=1, integer=True)
        if self.top_k is not None:
            number("top_k", self.top_k, low=1, integer=True)
        require(
            self.min_frames < self.max_frames,
            f"min_frames: got {self.min_frames}, expected fewer than max_frames = {self.max_frames}",
        )
        require(
            self.prototypes <= self.max_long or not self.long_term,
            f"max_long: got {self.max_long}, expected at least prototypes = {self.prototypes}",
        )


@dataclass
class Memory:
    """What a film has shown so far; its size does not depend on the film's length.

    ``memory.add(...)`` a frame, ``memory.read(key, selection)`` the values that answer each place. Permanent elements are read like others and never leave.

    >>> memory = Memory(MemoryOptions(top_k=1))
    >>> one = torch.ones(1, 2, 1, 1)
    >>> memory.add(one, one[:, :1], one, torch.full((1, 2, 3, 1, 1), 7.0))
    >>> memory.read(one, one).flatten().tolist()
    [7.0, 7.0, 7.0, 7.0, 7.0, 7.0]
    """

    options: MemoryOptions = field(default_factory=MemoryOptions)
    working: Store = field(default_factory=Store)
    long: Store = field(default_factory=Store)
    permanent: list[Store] = field(default_factory=list)
    objects: int = 2
    confidence: Tensor = field(default_factory=lambda: torch.tensor(math.nan))  # of the last read

    @property
    def sizes(self) -> tuple[int, int]:
        """Elements of working and of long-term memory."""
        return len(self.working), len(self.long)

    def add(
        self, key: Tensor, shrinkage: Tensor, selection: Tensor, value: Tensor, *, permanent: bool = False
    ) -> None:
        """A frame: maps [1, channels, h, w], values [1, objects, width, h, w]."""
        self.objects, places = value.shape[1], key.shape[2] * key.shape[3]
        store = self.working
        if permanent:
            store = Store()
            self.permanent.append(store)
        flat = [x[0].flatten(1).mT for x in (key, shrinkage, selection)]
        # Rows are gathered, and give other last bits where they are strided: also before a state is stored.
        store.add(flat[0], flat[1], flat[2], value[0].flatten(0, 1).flatten(1).mT.contiguous())
        options = self.options
        if options.long_term and len(self.working) >= options.max_frames * places:
            room = options.max_long - options.prototypes
            if len(self.long) > room:
                self._forget(room)
            self._consolidate(places)

    def read(self, key: Tensor, selection: Tensor) -> Tensor:
        """The values of the places of a frame, [1, objects, width, h, w]; counts what was used."""
        stores = [store for store in (*self.permanent, self.long, self.working) if len(store)]
        require(bool(stores), "memory: is empty; add a frame with its colours first")
        query = _query_side(key[0].flatten(1), selection[0].flatten(1))
        memory = joined(stores, "side")
        # Half precision has too few digits for differences of squares.
        low = memory.dtype in (torch.float16, torch.bfloat16)
        found = top_weights(
            *((memory.float(), query.float()) if low else (memory, query)), self.options.top_k
        )
        if self.options.long_term:
            used = usage_of(found, len(memory)).split([len(store) for store in stores])
            for store, usage in zip(stores, used):
                if store is not self.long or self.options.count_long:
                    store.count(usage)
        self.confidence = found.largest.exp().mean()
        answer = weighted_rows([store.value for store in stores if store.value is not None], found)
        return answer.mT.unflatten(0, (self.objects, -1)).unflatten(2, key.shape[2:])[None]

    def clear_working(self) -> None:
        """Forget the latest frames: after a cut."""
        self.working = Store()

    def _forget(self, room: int) -> None:
        """Leave the most used elements of long-term memory; ties at the border go too."""
        if not self.options.count_long:
            return self.long.keep(
                torch.arange(len(self.long) - room, len(self.long), device=self.long.usage.device)
            )
        usage = self.long.usage
        border = usage.topk(len(usage) - room, largest=False).values[-1]
        self.long.keep(usage > border)

    def _consolidate(self, places: int) -> None:
        """The most used elements of all frames but the first and the latest become prototypes, the rest leaves."""
        working = self.working
        last = len(working) - (self.options.min_frames - 1) * places
        leaving = slice(places, last)
        assert working.key is not None and working.shrinkage is not None and working.value is not None
        assert working.selection is not None
        key, shrinkage = working.key[leaving], working.shrinkage[leaving]
        chosen = working.usage[leaving].topk(min(self.options.prototypes, len(key))).indices
        # Of all that leaves, not of the top_k alone.
        weights = (
            similarity(key.mT, shrinkage.mT, key[chosen].mT, working.selection[leaving][chosen].mT)
            .softmax(0)
            .mT
        )
        self.long.add(key[chosen], weights @ shrinkage, None, weights @ working.value[leaving])
        rest = torch.ones(len(working), dtype=torch.bool, device=key.device)
        rest[leaving] = False
        working.keep(rest)


def joined(stores: Sequence[Store], name: str) -> Tensor:
    """One of the tensors of all stores, one after the other; of one store no copy."""
    parts = [getattr(store, name) for store in stores]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def weighted_rows(values: Sequence[Tensor], found: TopK) -> Tensor:
    """Σ_k weight_jk values[index_jk] for each query j, the index running through all tables of values; rows are gathered: no dense matrix is made, no table copied."""
    dtype = values[0].dtype
    if dtype in (torch.float16, torch.bfloat16) and not values[0].is_cuda:
        table = values[0] if len(values) == 1 else torch.cat(list(values))
        return (found.weight.to(dtype)[:, None] @ table[found.index])[:, 0]
    if len(values) == 1:
        return _weighted(values[0], found.index, found.weight)
    total, first = None, 0
    for table in values:
        mine = (found.index >= first) & (found.index < first + len(table))
        bags = F.pad(mine.sum(1).cumsum(0), (1, -1))
        part = _weighted(table, found.index[mine] - first, found.weight[mine], bags)
        total, first = part if total is None else total + part, first + len(table)
    assert total is not None
    return total


def _weighted(table: Tensor, index: Tensor, weight: Tensor, bags: Tensor | None = None) -> Tensor:
    weight = weight.to(table.dtype)
    return F.embedding_bag(index, table, bags, per_sample_weights=weight, mode="sum")
