"""What every way to make an embedding table small keeps: one row a value, the same for the same value, gradients where it was read, any batch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lineament.modules import UnifiedEmbedding, multiplex
from lineament.modules.unified_embedding import baselines as b
from lineament.modules.unified_embedding.hashing import bucket, mix64

ROWS, IDS = 40, torch.tensor([3, 0, 7, 3, 2**40, -5, 19])
Scheme = Callable[[Tensor], Tensor]


class Own(nn.Module):
    """A scheme whose numbers are one tensor, and how it is read."""

    def __init__(self, read: Callable[[Tensor, Tensor], Tensor], *shape: int, seed: int = 0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        self.read = read

    def forward(self, ids: Tensor) -> Tensor:
        return self.read(self.weight, ids)


def rows(ids: Tensor, count: int, most: int = ROWS) -> Tensor:
    return torch.stack([bucket(mix64(ids, salt), most) for salt in range(count)], 1)


def signs(ids: Tensor, count: int, like: Tensor) -> Tensor:
    return (2 * rows(ids, count, 2) - 1).to(like)


class Table(nn.Module):
    def __init__(self, seed: int = 0, name: str = "a", **options):
        super().__init__()
        added = {k: options.pop(k) for k in ("lookups", "reserve", "collisionless_below") if k in options}
        self.table = UnifiedEmbedding(ROWS, 4, seed=seed, **options)
        self.table.add("other")
        self.table.add(name, **added)
        self.name = name

    def forward(self, ids: Tensor) -> Tensor:
        return self.table({self.name: ids})


def view(seed: int) -> nn.Module:
    net = nn.ModuleDict({"a": nn.Embedding(100, 8), "b": nn.EmbeddingBag(50, 16)})
    multiplex(net, rows=ROWS, seed=seed)
    return net["a"]


SCHEMES: dict[str, Callable[[int], nn.Module]] = {
    "unified": lambda seed: Table(seed),
    "unified, sub-tables": lambda seed: Table(seed, tables=3, lookups=3),
    "unified, siphash": lambda seed: Table(seed, hash="siphash"),
    "unified, by order": lambda seed: Table(seed, salt="order", assign="order", tables=2),
    "unified, rows of their own": lambda seed: Table(seed, collisionless_below=5, reserve=[2**40, -5]),
    "view": view,
    "hashing trick": lambda seed: Own(lambda w, i: b.multi_hash(w, rows(i, 1)), ROWS, 4, seed=seed),
    "hashes, joined": lambda seed: Own(lambda w, i: b.multi_hash(w, rows(i, 2)), ROWS, 4, seed=seed),
    "hashes, summed": lambda seed: Own(lambda w, i: b.multi_hash(w, rows(i, 2), "sum"), ROWS, 4, seed=seed),
    "hashes, a table each": lambda seed: Own(
        lambda w, i: b.multi_hash(w, rows(i, 2), "mean"), 2, ROWS, 4, seed=seed
    ),
    "hashes, signed": lambda seed: Own(
        lambda w, i: b.multi_hash(w, rows(i, 2), "sum", signs(i, 2, w)), ROWS, 4, seed=seed
    ),
    "hash embeddings": lambda seed: Own(
        lambda w, i: b.hash_embeddings(w, rows(i, 2), torch.ones(len(i), 2).to(w)), ROWS, 4, seed=seed
    ),
    "quotient and remainder": lambda seed: Own(
        lambda w, i: b.quotient_remainder(w[0], w[1], i % 400), 2, ROWS, 4, seed=seed
    ),
    "robe": lambda seed: Own(lambda w, i: b.robe(w, rows(i, 2), 2), ROWS, seed=seed),
    "hashed net": lambda seed: Own(lambda w, i: b.hashed_net(w, rows(i, 4), signs(i, 4, w)), ROWS, seed=seed),
    "product quantised": lambda seed: Own(lambda w, i: b.product_quantised(w, rows(i, 2, 8)), 2, 8, 2, seed=seed),
    "mixed dimension": lambda seed: Own(lambda w, i: b.mixed_dimension(w[:, :2], rows(i, 1)[:, 0], w[:4, 2:]), ROWS, 4, seed=seed),
}  # fmt: skip
each = pytest.mark.parametrize("make", SCHEMES.values(), ids=SCHEMES)


@each
def test_a_value_has_one_row_whatever_stands_beside_it(make):
    net = make(0)
    found = net(IDS)
    assert found.ndim == 2 and len(found) == len(IDS) and found.isfinite().all()
    assert found[0].equal(found[3]), "the same value twice"
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(1))
    assert net(IDS[order]).equal(found[order])
    assert net(IDS[2:3]).equal(found[2:3]), "a batch of one"
    assert net(IDS[:0]).shape == (0, found.shape[1])
    strided = torch.stack([IDS, IDS + 1], 1)[:, 0]
    assert not strided.is_contiguous() and net(strided).equal(found)


@each
def test_the_same_seed_gives_the_same_and_precision_follows(make):
    found = make(3)(IDS)
    assert make(3)(IDS).equal(found) and not make(4)(IDS).equal(found)
    wide = make(3).double()(IDS)
    assert wide.dtype == torch.float64 and torch.allclose(wide.float(), found, atol=1e-5)
    assert make(3).bfloat16()(IDS).dtype == torch.bfloat16
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.allclose(make(3)(IDS), found, atol=1e-6)
    finally:
        torch.set_num_threads(before)


@each
def test_gradients_reach_what_was_read_and_nothing_else(make):
    net = make(0)
    weight = next(net.parameters())
    once = net(IDS[2:3])
    once.square().sum().backward()
    touched = weight.grad.abs() > 0
    assert touched.any() and not touched.all()
    with torch.no_grad():
        weight[~touched] += 1.0
    moved = net(IDS[2:3])
    assert torch.allclose(moved, once, atol=1e-5)
    with torch.no_grad():
        weight[touched] += 1.0
    assert not torch.allclose(net(IDS[2:3]), once, atol=1e-3)


@each
def test_weights_travel_through_a_state_dict(make):
    net, other = make(0), make(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)
    other.load_state_dict(net.state_dict())
    assert other(IDS).equal(net(IDS))
