"""A table as torchrec's ``EmbeddingBagCollection``, whose planner then divides it among processes and whose kernels train it.

torchrec knows tables and keys, and hashes nothing. So each look-up of a feature is a key of its own, whose ids are rows: hashing stays here, and so does the order of the output. torchrec is imported
when it is asked for; Lineament does not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.modules.unified_embedding.inputs import by_feature
from lineament.modules.unified_embedding.table import UnifiedEmbedding, shares


@dataclass(frozen=True)
class TorchRecTables:
    """What :func:`to_torchrec` gives.

    Attributes:
        collection: an ``EmbeddingBagCollection`` that holds a copy of the rows; wrap it in ``DistributedModelParallel``, train it, ask it.
        weighted: whether its ids have weights, which means need.
    """

    table: UnifiedEmbedding
    collection: Any
    weighted: bool

    def keyed(self, inputs: Any) -> Any:
        """The ``KeyedJaggedTensor`` of a batch: a key for each look-up ("user#0", "user#1", ...), its values rows, and each value's weight in its bag's mean.

        Args:
            inputs: as the table takes them, with every one of its features.

        Raises:
            InputError: a feature is missing; weights or means of several values where the collection was made without weights.
        """
        given: Mapping[str, Any] = by_feature(inputs)
        missing = [name for name in self.table.features if name not in given]
        require(not missing, f"inputs: {', '.join(map(repr, missing))} missing, expected every feature of the table")  # fmt: skip
        values, lengths, weights = [], [], []
        for name, feature in self.table.features.items():
            read = self.table.read(name, given[name])
            # The row of each look-up within its sub-table's config.
            at = read.at if self.whole else read.at - self.table.tables_of(name).to(read.at) * self.table.rows
            count, kept = len(at), None
            offsets = torch.arange(count, device=at.device) if read.offsets is None else read.offsets
            size = offsets.diff(append=offsets.new_tensor([count]))
            share = shares(read.weights, offsets, count, feature.combiner, like=self.table.weight)
            if read.offsets is None:
                share = read.weights
            if share is None:
                share = torch.ones(count, device=at.device)
            if feature.padding is not None and bool((share == 0).any()):
                kept = share != 0
                bag = torch.arange(len(size), device=at.device).repeat_interleave(size)
                size = torch.bincount(bag[kept], minlength=len(size))
                at, share = at[kept], share[kept]
            require(
                self.weighted or bool((share == 1).all()),
                f"inputs: {name!r} has weights or a mean of several values, which need to_torchrec(table, weighted=True)",
            )
            values += at.T.unbind()
            lengths += [size] * feature.lookups
            weights += [share.float()] * feature.lookups
        keys = [key for name in self.table.features for key in self.keys_of(name)]
        return _torchrec("sparse.jagged_tensor").KeyedJaggedTensor(
            keys=keys,
            values=torch.cat(values),
            lengths=torch.cat(lengths).int(),
            weights=torch.cat(weights) if self.weighted else None,
        )

    def joined(self, outputs: Any) -> Tensor:
        """The collection's ``KeyedTensor`` as the table gives it: [batch, sum of widths], features and look-ups in their order."""
        found = outputs.to_dict()
        return torch.cat([found[key] for name in self.table.features for key in self.keys_of(name)], 1)

    def keys_of(self, name: str) -> list[str]:
        """The keys of a feature's look-ups."""
        return [f"{name}#{j}" for j in range(self.table.features[name].lookups)]

    @property
    def whole(self) -> bool:
        """Whether all rows are one of torchrec's tables, because values have rows of their own, which no sub-table holds."""
        return len(self.table.weight) != self.table.tables * self.table.rows


def to_torchrec(table: UnifiedEmbedding, *, weighted: bool = True) -> TorchRecTables:
    """A table for torchrec: an ``EmbeddingBagConfig`` for each sub-table, read by the keys of all look-ups into it, and the rows' values.

    ``found.joined(found.collection(found.keyed(inputs)))`` is ``table(inputs)``. Where features have rows of their own (``collisionless_below``, ``reserve``), one config holds all rows.
    torchrec pools by sums; means come from weights.

    Args:
        weighted: whether ids have weights; without them, which is faster, only sums and single values can be read.

    Raises:
        InputError: torchrec is not installed; no feature; rows that lie with several processes, or are not float32; a feature's name with "@", which torchrec uses itself.

    >>> table = UnifiedEmbedding(1000, 8)
    >>> to_torchrec(table)
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: table: it has no feature; add some first
    """
    require(len(table.features) > 0, "table: it has no feature; add some first")
    require(not table.sharded, "table: its rows lie with several processes; export it before shard(), or load() its file in one process")  # fmt: skip
    require(table.weight.dtype == torch.float32, f"table: its rows are {table.weight.dtype}, expected torch.float32, which torchrec's tables are")  # fmt: skip
    taken = [name for name in table.features if "@" in name]
    require(not taken, f"table: the feature {taken[:1]} has '@' in its name, which torchrec uses itself")
    configs, modules = _torchrec("modules.embedding_configs"), _torchrec("modules.embedding_modules")
    found = TorchRecTables(table, None, weighted)
    parts = [table.weight] if found.whole else list(table.weight.split(table.rows))
    keys: list[list[str]] = [[] for _ in parts]
    for name in table.features:
        for key, part in zip(found.keys_of(name), table.tables_of(name).tolist()):
            keys[0 if found.whole else part].append(key)
    read = [(f"table_{k}", part, own) for k, (part, own) in enumerate(zip(parts, keys)) if own]
    collection = modules.EmbeddingBagCollection(
        tables=[
            configs.EmbeddingBagConfig(
                name=label, num_embeddings=len(part), embedding_dim=table.chunk, feature_names=own,
                pooling=configs.PoolingType.SUM,
            )
            for label, part, own in read
        ],
        is_weighted=weighted,
        device=table.weight.device,
    )  # fmt: skip
    with torch.no_grad():
        for label, part, _ in read:
            collection.embedding_bags[label].weight.copy_(part)
    return TorchRecTables(table, collection, weighted)


def _torchrec(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"torchrec.{module}")
    except Exception as error:  # also a shared library of fbgemm that does not fit this PyTorch
        said = " ".join(str(error).split())[:160]
        raise InputError(
            f"table: torchrec cannot be imported ({said}); install torchrec and fbgemm-gpu as they fit PyTorch {torch.__version__}"
        ) from error
