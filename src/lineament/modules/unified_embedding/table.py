"""One table for all features: each value of each feature is hashed, with the feature's own salt, to some of its rows.

Coleman et al., "Unified Embedding", NeurIPS 2023, arXiv 2305.12102. Values of different features that share a row are told apart by the layers
that read them; only values of one feature that share all rows are merged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import InputError, number, one_of, require, show, suggest
from lineament.core.whole_files import divided, load_parts, read_one, save_whole
from lineament.modules.unified_embedding import sharded
from lineament.modules.unified_embedding.hashing import (
    as_texts,
    fingerprint,
    hashed_rows,
    mixed_salt,
    remainder,
    signed,
    siphash,
)
from lineament.modules.unified_embedding.inputs import bags_of, by_feature, listed


@dataclass(frozen=True)
class Feature:
    """A feature of a table: its number, look-ups, combiner, the id that stands for nothing, and its first look-up's number.

    Ids below ``below``, and those of ``reserved`` (sorted), have rows of their own, which begin at ``start``. ``named`` is the name's fingerprint.
    """

    name: str
    number: int
    lookups: int
    combiner: str
    padding: int | None
    first: int
    below: int = 0
    reserved: tuple[int, ...] = ()
    start: int = 0
    named: int = 0

    @property
    def own(self) -> int:
        """Rows of its own."""
        return (self.below + len(self.reserved)) * self.lookups


# Numbers that are drawn at once.
_DRAWN = 1 << 22


@dataclass(frozen=True)
class Read:
    """A feature's values: their rows, where bags begin (``None``: each is one), what each value weighs, the number of bags."""

    at: Tensor
    offsets: Tensor | None
    weights: Tensor | None
    count: int


class UnifiedEmbedding(nn.Module):
    """Embeddings of any number of features out of one table of narrow rows.

    Args:
        rows: of each sub-table. chunk: width of a row. tables: sub-tables; look-ups take turns.
        hash: ``"mix64"`` of integer ids (strings by their fingerprint), or ``"siphash"``, the bits of TensorFlow Recommenders.
        seed: of the hashes; it is part of the model, and weights do not load under another one.
        salt: of a feature's hashes: its ``"name"``, or the ``"order"`` in which it was added, which changes all later ones when one is inserted.
        assign: which sub-table a feature's look-ups start at: by its name, or going on from the last feature ("order").
        sparse: gradients of the rows that were read only.
        device: where the weights are; ``"meta"``: nowhere until :meth:`shard`, where each process then draws its part of them and none has the whole.

    ``add`` features, then call it with {name: ids}. A feature's output has ``lookups * chunk`` numbers.

    >>> table = UnifiedEmbedding(1000, 8)
    >>> table.add("user"); table.add("item", lookups=3)
    >>> table({"user": torch.tensor([1, 2]), "item": torch.tensor([7, 7])}).shape
    torch.Size([2, 40])
    """

    # Any id will do: what brings data and models together then takes whole numbers for ids.
    num_embeddings = 1 << 63

    def __init__(
        self,
        rows: int,
        chunk: int,
        tables: int = 1,
        *,
        hash: Literal["mix64", "siphash"] = "mix64",
        seed: int = 0,
        salt: Literal["name", "order"] = "name",
        assign: Literal["name", "order"] = "name",
        sparse: bool = False,
        device: Any = None,
    ):
        super().__init__()
        self.rows = number("rows", rows, low=1, high=(1 << 31) - 1, integer=True)
        self.chunk = number("chunk", chunk, low=1, integer=True)
        self.tables = number("tables", tables, low=1, integer=True)
        self.hash = one_of("hash", hash, ("mix64", "siphash"))
        self.seed = number("seed", seed, low=0, high=(1 << 63) - 1, integer=True)
        self.salt = one_of("salt", salt, ("name", "order"))
        self.assign = one_of("assign", assign, ("name", "order"))
        self.sparse = sparse
        self.features: dict[str, Feature] = {}
        self._plans: dict[Any, tuple[list[str], Tensor, Tensor]] = {}
        self.weight = nn.Parameter(torch.empty(tables * rows, chunk, device=device))
        self._fill(0)

    def add(
        self,
        name: str,
        lookups: int = 2,
        *,
        combiner: Literal["mean", "sum", "sqrtn"] = "mean",
        padding: int | None = None,
        collisionless_below: int = 0,
        reserve: Sequence[Any] = (),
    ) -> None:
        """Add a feature; before an optimizer is given the weights.

        Args:
            lookups: rows of each value. combiner: of several values. padding: an id that gives zeros.
            collisionless_below: ids from 0 up to this have rows of their own, which nothing else is hashed to: a small vocabulary.
            reserve: further ids (or strings) with rows of their own: the most frequent ones, as :func:`~lineament.modules.probe` finds them.
        """
        require(not self.sharded, "name: features are added before a table is divided")
        require(name not in self.features, f"name: there is a feature {name!r} already")
        number("lookups", lookups, low=1, integer=True)
        one_of("combiner", combiner, ("mean", "sum", "sqrtn"))
        below = number("collisionless_below", collisionless_below, low=0, high=(1 << 31) - 1, integer=True)
        given = torch.tensor([], dtype=torch.int64)
        if len(reserve):
            texts = isinstance(reserve[0], (str, bytes))
            given = self._ids(reserve if texts else torch.as_tensor(reserve)).cpu()
        reserved = given[(given < 0) | (given >= below)].unique().tolist()
        self._plans.clear()
        first = sum(feature.lookups for feature in self.features.values())
        feature = Feature(
            name,
            len(self.features),
            lookups,
            combiner,
            padding,
            first,
            below,
            tuple(reserved),
            len(self.weight),
            _name(name),
        )
        self.features[name] = feature
        if feature.own:
            more = self.weight.new_empty(feature.own, self.chunk)
            self.weight = nn.Parameter(torch.cat([self.weight.detach(), more]))
            self._fill(feature.start)

    def _fill(self, start: int) -> None:
        """Draw the rows from ``start`` on, where there are any."""
        if not self.weight.is_meta:
            for at, rows in self.drawn(start):
                self.weight.detach()[at : at + len(rows)] = rows

    def drawn(self, start: int = 0) -> Iterator[tuple[int, Tensor]]:
        """(the first row's number, rows), some at a time: what the weights begin with, from row ``start`` on, which is 0 or where a feature's own rows begin."""
        parts = [(0, self.tables * self.rows, self.seed)]
        own = (f for f in self.features.values() if f.own)
        parts += [(f.start, f.own, self._salt(f, 0) >> 1) for f in own]
        for first, count, seed in parts:
            generator = torch.Generator().manual_seed(seed)
            for at in range(0, count if first >= start else 0, step := max(1, _DRAWN // self.chunk)):
                rows = torch.empty(min(step, count - at), self.chunk)
                # Keras' range; the normal distribution of nn.Embedding costs several points of AUC.
                yield first + at, rows.uniform_(-0.05, 0.05, generator=generator)

    def forward(self, inputs: Any, *, as_dict: bool = False) -> Any:
        """Embeddings of each feature's values.

        Args:
            inputs: {feature: ids}, or torchrec's ``KeyedJaggedTensor``, or what has its ``keys()``, ``values()`` and ``lengths()``. Ids are whole numbers [batch] or
                [batch, values]; a nested tensor; a list of ids or strings, one a sample or a list of them; ``(ids, offsets, per_sample_weights)`` as ``nn.EmbeddingBag`` takes them,
                of which the last may be left out, and offsets are ``None`` for ids [batch, values]; or torchrec's ``JaggedTensor``.

        Returns:
            [batch, sum of widths] in the order in which features were added, or {feature: [batch, width]}. A bag's rows are combined as its feature says: with weights w the sum is
            Σ w e, the mean that over Σ w, and "sqrtn" that over √Σ w².

        >>> table = UnifiedEmbedding(1000, 8)
        >>> table.add("film"); table.add("tags", combiner="sum")
        >>> table({"film": ["Alien", "Heat"], "tags": [["space", "horror"], []]})[1, 16:].abs().sum().item()
        0.0
        """
        inputs = by_feature(inputs)
        for name in inputs:
            require(
                name in self.features,
                f"inputs: there is no feature {name!r}{suggest(name, self.features)}",
            )
        names = [name for name in self.features if name in inputs]
        require(
            len(names) > 0,
            f"inputs: got no feature, expected some of {', '.join(self.features) or 'none yet'}",
        )
        if not as_dict and self.hash == "mix64" and all(self._single(name, inputs[name]) for name in names):
            return self._at_once(names, inputs)
        prepared = {name: self.read(name, inputs[name]) for name in names}
        if not as_dict:
            self._alike({name: bag.count for name, bag in prepared.items()})
        source, places = self.rows_at([bag.at for bag in prepared.values()])
        found = {
            name: self._combined(self.features[name], bag, at, source)
            for (name, bag), at in zip(prepared.items(), places)
        }
        return found if as_dict else torch.cat(list(found.values()), 1)

    def _single(self, name: str, given: Any) -> bool:
        whole = isinstance(given, Tensor) and given.ndim == 1 and given.dtype == torch.int64
        return whole and self.features[name].padding is None and not self.features[name].own

    def _at_once(self, names: Sequence[str], inputs: Mapping[str, Tensor]) -> Tensor:
        """One hash and one gather for all features of one value each: what is gathered is the output already."""
        self._alike({name: len(inputs[name]) for name in names})
        for name in names:
            self._here(inputs[name])
        which, salts, starts = self._plan(tuple(names), self.weight.device)
        ids = torch.stack([inputs[name] for name in which], 1)
        at = hashed_rows(ids, salts, self.rows)
        at = at if self.tables == 1 else at + starts
        source, (at,) = self.rows_at([at])
        return F.embedding(at, source, sparse=self.sparse and not self.sharded).flatten(1)

    def _alike(self, counts: Mapping[str, int]) -> None:
        """Refuse features of different numbers of samples."""
        first = next(iter(counts))
        other = next((name for name in counts if counts[name] != counts[first]), first)
        require(
            other == first,
            f"inputs: {other!r} has {counts[other]} samples and {first!r} {counts[first]}, expected as many of each",
        )

    def _plan(self, names: tuple[str, ...], device: torch.device) -> tuple[list[str], Tensor, Tensor]:
        """Of each look-up of these features: whose it is, its mixed salt, and where its sub-table starts."""
        key = (names, device)
        if key not in self._plans:
            features = [self.features[name] for name in names]
            which = [feature.name for feature in features for _ in range(feature.lookups)]
            salts = [signed(mixed_salt(self._salt(f, j))) for f in features for j in range(f.lookups)]
            starts = torch.cat([self.tables_of(name) * self.rows for name in names])
            self._plans[key] = (
                which, torch.tensor(salts, device=device), starts.to(device),
            )  # fmt: skip
        return self._plans[key]

    def places_of(self, name: str, ids: Tensor | Sequence[Any]) -> Tensor:
        """The row of ``weight`` of each value and look-up, [n, lookups]."""
        device, feature = self.weight.device, self.features[name]
        self._here(ids)
        at = self.rows_of(name, ids) + (self.tables_of(name) * self.rows).to(device)
        if not feature.own:
            return at
        ids = self._ids(ids).to(device).contiguous()
        which = torch.where((ids >= 0) & (ids < feature.below), ids, -1)
        if feature.reserved:
            known = torch.tensor(feature.reserved, device=device)
            place = torch.searchsorted(known, ids).clamp(max=len(known) - 1)
            which = torch.where(known[place] == ids, feature.below + place, which)
        lookups = torch.arange(feature.lookups, device=device)
        return torch.where(
            which[:, None] >= 0, feature.start + which[:, None] * feature.lookups + lookups, at
        )

    def rows_of(self, name: str, ids: Tensor | Sequence[Any]) -> Tensor:
        """The row in its sub-table that each value is hashed to, [n, lookups]; what has rows of its own is not read there."""
        feature = self.features[name]
        if self.hash == "siphash":
            texts = as_texts(ids)
            hashed = [siphash(texts, (feature.number, j)) for j in range(feature.lookups)]
            return torch.stack([remainder(h, self.rows) for h in hashed], 1).to(self.weight.device)
        ids = self._ids(ids).to(self.weight.device)
        return torch.stack(
            [hashed_rows(ids, salt, self.rows) for salt in self._plan((name,), ids.device)[1].split(1)], 1
        )

    def tables_of(self, name: str) -> Tensor:
        """The sub-table of each look-up, [lookups]."""
        feature = self.features[name]
        start = feature.first if self.assign == "order" else mixed_salt(feature.named) % self.tables
        return (torch.arange(feature.lookups) + start) % self.tables

    def _salt(self, feature: Feature, lookup: int) -> int:
        own = feature.named if self.salt == "name" else feature.number
        return mixed_salt(mixed_salt(mixed_salt(self.seed) ^ own) ^ lookup)

    def _ids(self, ids: Tensor | Sequence[Any]) -> Tensor:
        if not isinstance(ids, Tensor):
            ids = listed(ids)
            return ids if isinstance(ids, Tensor) else fingerprint(as_texts(ids))
        if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
            raise InputError(f"inputs: got {show(ids)}, expected whole ids")
        return ids.long()

    def _here(self, ids: Any) -> None:
        """Refuse ids on another device than the rows'."""
        require(
            not isinstance(ids, Tensor) or ids.device == self.weight.device,
            f"inputs: got ids on {getattr(ids, 'device', None)}, and the table's rows are on {self.weight.device}; move the ids there",
        )

    def rows_at(self, places: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """(a table of rows, and where in it the rows of ``places`` are): the weights; or what the processes among which they are divided gave of them."""
        if not self.sharded:
            return self.weight, list(places)
        found, where = sharded.exchanged(self, torch.cat([at.reshape(-1) for at in places]))
        parts = where.split([at.numel() for at in places])
        return found, [part.view_as(at) for part, at in zip(parts, places)]

    def read(self, name: str, given: Any) -> Read:
        """Which rows a feature's values read, and what each weighs, before it is combined; ``given`` as ``forward`` takes it."""
        feature = self.features[name]
        bags = bags_of(given, feature.name, self.weight.device)
        at, weights = self.places_of(feature.name, bags.ids), bags.weights
        if feature.padding is not None and isinstance(bags.ids, Tensor):
            there = bags.ids != feature.padding
            weights = there.to(self.weight.dtype) if weights is None else weights * there
        return Read(at, bags.offsets, weights, bags.count)

    def _combined(self, feature: Feature, bags: Read, at: Tensor, source: Tensor) -> Tensor:
        """Each bag's rows combined by look-up; an empty bag is zeros."""
        offsets, weights, sparse = bags.offsets, bags.weights, self.sparse and not self.sharded
        if offsets is None:
            found = F.embedding(at, source, sparse=sparse).flatten(1)
            return found if weights is None else found * weights[:, None]
        share = shares(weights, offsets, len(at), feature.combiner, like=source)
        made = [
            F.embedding_bag(at[:, j], source, offsets, mode="sum", sparse=sparse, per_sample_weights=share)
            for j in range(feature.lookups)
        ]
        return torch.cat(made, 1)

    def shard(self, mesh: Any = None, by: Literal["row", "table", "column", "replicate"] = "row") -> None:
        """Divide the table among the processes of a training; called by all of them when all features are added, before an optimizer is given the weights.

        ``weight`` is then a DTensor, as the first process has it, which ``torch.distributed.checkpoint`` saves and opens in any number of processes. Each process passes its own samples, in as many calls
        as the others, with the same features (of none a tensor without ids). The gradient is the mean over the processes, as DistributedDataParallel makes it of the network behind the table; the table
        itself stays outside of it. With ``sparse=True`` it is of the rows alone that were read, for :class:`~lineament.optim.RowAdagrad` and the like; it is left in ``weight.grad`` by ``backward()``.

        Args:
            mesh: a DeviceMesh of one dimension with all processes; made where there is none.
            by: ``"row"``, any number of them; ``"table"``: whole sub-tables, as many with each; ``"column"``; ``"replicate"``: all with each, for small tables.

        Raises:
            InputError: no process group, a mesh of some of the processes only, sub-tables or columns that cannot be divided.

        >>> UnifiedEmbedding(10, 4).shard()
        Traceback (most recent call last):
        ...
        lineament.core.checks.InputError: mesh: there is no process group; start the processes by torchrun and call torch.distributed.init_process_group() first
        """
        sharded.shard(self, mesh, by)

    @property
    def sharded(self) -> bool:
        """Whether the weights lie with several processes."""
        return divided(self.weight)

    def save(self, path: str | Path) -> None:
        """Write the table as one safetensors file, the ``state_dict``; every process of a divided one must call it, and none holds it whole.

        >>> import tempfile
        >>> path = f"{tempfile.mkdtemp()}/table.safetensors"; table = UnifiedEmbedding(10, 4); table.save(path)
        >>> UnifiedEmbedding(10, 4, seed=1).load(path)
        Traceback (most recent call last):
        ...
        lineament.core.checks.InputError: state_dict: the table was saved with seed 0 (here 1), so that its rows mean other values
        """
        save_whole(self.state_dict(), path)

    def load(self, path: str | Path) -> None:
        """Read what :meth:`save` wrote, in any number of processes; each reads its part.

        Raises:
            InputError: another seed, number of rows, chunk or salt; no file of a table.
        """
        self.set_extra_state(read_one(path, "_extra_state"))
        load_parts(path, {"weight": self.weight})

    def meaning(self) -> dict[str, Any]:
        """What the rows' meaning depends on; weights load only where it is the same."""
        known = ("rows", "chunk", "tables", "hash", "seed", "salt", "assign")
        own = {f.name: [f.below, *f.reserved] for f in self.features.values() if f.own}
        return {**{key: getattr(self, key) for key in known}, **({"own rows": own} if own else {})}

    def get_extra_state(self) -> Tensor:
        """The bytes of :meth:`meaning` as JSON, which any file of weights holds; spaces make most of them as long, which distributed checkpoints want."""
        said = json.dumps(self.meaning()).encode()
        return torch.tensor(list(said + b" " * (-len(said) % 512)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        ours, said = self.meaning(), json.loads(bytes(state.tolist()))
        keys = dict.fromkeys((*ours, *said))
        other = {key: (said.get(key), ours.get(key)) for key in keys if said.get(key) != ours.get(key)}
        if other:
            told = ", ".join(f"{key} {theirs!r} (here {mine!r})" for key, (theirs, mine) in other.items())
            raise InputError(
                f"state_dict: the table was saved with {told}, so that its rows mean other values"
            )


def shares(
    weights: Tensor | None, offsets: Tensor, count: int, combiner: str, *, like: Tensor
) -> Tensor | None:
    """What each of ``count`` ids counts in its bag: its weight w, over Σ w for a mean and over √Σ w² for "sqrtn", as TensorFlow weighs them; ``None``: 1.

    >>> shares(torch.tensor([1.0, 3.0]), torch.tensor([0]), 2, "mean", like=torch.ones(1)).tolist()
    [0.25, 0.75]
    """
    if combiner == "sum":
        return None if weights is None else weights.to(like.dtype)
    own = torch.ones(count, device=like.device) if weights is None else weights.float()
    bag = torch.bucketize(torch.arange(count, device=like.device), offsets, right=True) - 1
    size = torch.zeros(len(offsets), device=like.device).index_add_(
        0, bag, own if combiner == "mean" else own.square()
    )
    size = torch.where(size == 0, 1, size)[bag]
    return (own / (size if combiner == "mean" else size.sqrt())).to(like.dtype)


def _name(name: str) -> int:
    return int(fingerprint([name])[0]) & ((1 << 64) - 1)


def lexicographic(lookups: int) -> list[int]:
    """The order in which the official layer joins its chunks: by the text of their numbers, 0, 1, 10, 11, 2, ...

    >>> lexicographic(11)
    [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]
    """
    return sorted(range(lookups), key=str)
