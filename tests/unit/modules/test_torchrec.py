"""A table as torchrec's collection gives what it gave; torchrec, which loads with few versions of PyTorch, is stood in for by what its documentation says of its classes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lineament.core.checks import InputError
from lineament.modules import UnifiedEmbedding, to_torchrec


class PoolingType(Enum):
    SUM = "SUM"
    MEAN = "MEAN"


@dataclass
class EmbeddingBagConfig:
    num_embeddings: int
    embedding_dim: int
    name: str
    feature_names: list[str]
    pooling: PoolingType


@dataclass
class KeyedTensor:
    held: dict[str, Tensor]

    def to_dict(self) -> dict[str, Tensor]:
        return self.held


class KeyedJaggedTensor:
    def __init__(self, keys: list[str], values: Tensor, weights: Tensor | None = None, lengths: Any = None):
        assert len(lengths) % len(keys) == 0 and int(lengths.sum()) == len(values)
        assert weights is None or len(weights) == len(values)
        self.parts = (keys, values, lengths, weights)

    def keys(self) -> list[str]:
        return self.parts[0]

    def values(self) -> Tensor:
        return self.parts[1]

    def lengths(self) -> Tensor:
        return self.parts[2]

    def weights_or_none(self) -> Tensor | None:
        return self.parts[3]


class EmbeddingBagCollection(nn.Module):
    def __init__(self, tables: list[EmbeddingBagConfig], is_weighted: bool = False, device: Any = None):
        super().__init__()
        self.tables, self.weighted = tables, is_weighted
        assert len({config.name for config in tables}) == len(tables)
        keys = [key for config in tables for key in config.feature_names]
        assert len(set(keys)) == len(keys), "a key in two tables has another name in the output"
        assert all(config.pooling == PoolingType.SUM for config in tables)
        self.embedding_bags = nn.ModuleDict(
            {t.name: nn.EmbeddingBag(t.num_embeddings, t.embedding_dim, mode="sum", include_last_offset=True, device=device) for t in tables}
        )  # fmt: skip

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        keys, values, lengths, weights = features.parts
        batch = len(lengths) // len(keys)
        ends = [0, *lengths.view(len(keys), batch).sum(1).cumsum(0).tolist()]
        found = {}
        for config in self.tables:
            for name in config.feature_names:
                k = keys.index(name)
                own = slice(ends[k], ends[k + 1])
                offsets = torch.cat([torch.zeros(1), lengths[k * batch : (k + 1) * batch].cumsum(0)]).long()
                share = weights[own] if self.weighted and weights is not None else None
                found[name] = self.embedding_bags[config.name](values[own], offsets, per_sample_weights=share)
        return KeyedTensor(found)


@pytest.fixture
def torchrec(monkeypatch):
    parts = {
        "torchrec": {},
        "torchrec.modules": {},
        "torchrec.sparse": {},
        "torchrec.modules.embedding_configs": {"EmbeddingBagConfig": EmbeddingBagConfig, "PoolingType": PoolingType},
        "torchrec.modules.embedding_modules": {"EmbeddingBagCollection": EmbeddingBagCollection},
        "torchrec.sparse.jagged_tensor": {"KeyedJaggedTensor": KeyedJaggedTensor},
    }  # fmt: skip
    for name, held in parts.items():
        module = ModuleType(name)
        module.__dict__.update(held)
        monkeypatch.setitem(sys.modules, name, module)


def table(tables: int, **options: Any) -> UnifiedEmbedding:
    made = UnifiedEmbedding(30, 4, tables)
    made.add("user", 3, **options)
    made.add("tags", 2, combiner="sqrtn", padding=0)
    made.add("film", 1)
    return made


INPUTS = {
    "user": torch.tensor([5, 7, 5]),
    "tags": torch.tensor([[1, 0, 2], [0, 0, 0], [4, 4, 9]]),
    "film": (["Heat", "Alien", "Heat", "Them"], torch.tensor([0, 1, 1]), torch.tensor([2.0, 1.0, 3.0, 0.5])),
}


@pytest.mark.parametrize(
    ("tables", "options"), [(1, {}), (2, {}), (5, {}), (2, {"reserve": [5], "collisionless_below": 3})]
)
def test_torchrec_reads_what_the_table_reads(torchrec, tables, options):
    made = table(tables, **options)
    found = to_torchrec(made)
    configs = found.collection.tables
    assert sum(config.num_embeddings for config in configs) <= len(made.weight)
    assert len(configs) == (1 if options else min(tables, 5))
    keyed = found.keyed(INPUTS)
    assert keyed.keys() == ["user#0", "user#1", "user#2", "tags#0", "tags#1", "film#0"]
    assert len(keyed.values()) == 3 * 3 + 2 * 5 + 4, "padding is left out"
    torch.testing.assert_close(found.joined(found.collection(keyed)), made(INPUTS))
    with torch.no_grad():
        made.weight.zero_()
    assert found.joined(found.collection(keyed)).abs().sum() > 0, "its rows are its own"


def test_without_weights_sums_and_single_values_are_read(torchrec):
    made = UnifiedEmbedding(30, 4)
    made.add("user")
    made.add("tags", combiner="sum", padding=0)
    found = to_torchrec(made, weighted=False)
    inputs = {name: INPUTS[name] for name in ("user", "tags")}
    keyed = found.keyed(inputs)
    assert keyed.weights_or_none() is None
    torch.testing.assert_close(found.joined(found.collection(keyed)), made(inputs))
    with pytest.raises(InputError, match="'user' has weights or a mean of several values"):
        found.keyed({**inputs, "user": INPUTS["tags"]})
    with pytest.raises(InputError, match="inputs: 'tags' missing"):
        found.keyed({"user": INPUTS["user"]})


def test_what_torchrec_cannot_hold_is_refused(torchrec, monkeypatch):
    with pytest.raises(InputError, match=r"expected torch\.float32"):
        to_torchrec(table(1).double())
    made = UnifiedEmbedding(30, 4)
    made.add("user@home")
    with pytest.raises(InputError, match="has '@' in its name"):
        to_torchrec(made)
    monkeypatch.setitem(sys.modules, "torchrec.modules.embedding_configs", None)
    with pytest.raises(InputError, match=r"torchrec cannot be imported .*; install torchrec and fbgemm-gpu"):
        to_torchrec(table(1))
