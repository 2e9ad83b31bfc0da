"""Hashes against their published values, and the fast path against the plain one; how evenly rows are hit."""

from __future__ import annotations

import pytest
import torch

from lineament.core.checks import InputError
from lineament.modules import UnifiedEmbedding, fingerprint, mix64, multiply_shift, row_loads, xxh64
from lineament.modules.unified_embedding.hashing import bucket, hashed_rows, mixed_salt, signed


@pytest.mark.parametrize("rows", [1, 2, 500_000, (1 << 24) - 1, 1 << 24, (1 << 31) - 1])
def test_rows_hashed_in_parts_are_those_hashed_at_once(rows):
    g = torch.Generator().manual_seed(0)
    ids, salts = (torch.randint(-(2**63), 2**63 - 1, shape, generator=g) for shape in ((1000, 26), (26,)))
    assert hashed_rows(ids, salts, rows).equal(bucket(mix64(ids, salts), rows))
    assert hashed_rows(ids.T[3], salts[:1], rows).equal(bucket(mix64(ids.T[3], salts[:1]), rows))
    assert hashed_rows(ids[:0], salts, rows).shape == (0, 26)
    salt = torch.tensor([signed(mixed_salt(9))])
    assert hashed_rows(ids[:, 0], salt, rows).equal(bucket(mix64(ids[:, 0], 9), rows))


def test_xxh64_has_the_published_values():
    texts = ["", "a", "abc", "Nobody inspects the spammish repetition"]
    found = [f"{int(h) % 2**64:016x}" for h in xxh64(texts)]
    assert found == ["ef46db3751d8e999", "d24ec4f1a98c6e5b", "44bc2cf5ad770999", "fbcea83c8a378bf1"]
    assert xxh64([texts[3], b"abc"]).equal(xxh64(texts)[[3, 2]]), "side by side or alone"
    assert not xxh64(texts, seed=1).equal(xxh64(texts)) and fingerprint(texts, "xxh64").equal(xxh64(texts))
    assert xxh64([]).shape == (0,)


def test_xxh64_is_that_of_the_package():
    package = pytest.importorskip("xxhash")
    texts = [bytes(range(n)) for n in range(100)]
    for seed in (0, 7, 2**64 - 1):
        assert [int(h) % 2**64 for h in xxh64(texts, seed)] == [
            package.xxh64_intdigest(t, seed) for t in texts
        ]


def test_multiply_shift_is_arithmetic_of_unsigned_numbers():
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(-(2**63), 2**63 - 1, (500,), generator=g)
    for a, bits in ((0x9E3779B97F4A7C15, 10), (2**64 - 1, 1), (1, 62)):
        expected = [((a * int(x)) % 2**64) >> (64 - bits) for x in ids]
        assert multiply_shift(ids, a, bits).tolist() == expected
    with pytest.raises(InputError, match="expected an odd number"):
        multiply_shift(ids, 4, 8)
    with pytest.raises(InputError, match="expected int64 ids"):
        multiply_shift(ids.double(), 5, 8)


def test_rows_are_hit_evenly_and_hot_ones_are_named():
    chances = []
    for seed in range(30):
        table = UnifiedEmbedding(50, 2, tables=2, seed=seed)
        table.add("user", 2, reserve=[7])
        chances.append(row_loads(table, {"user": torch.arange(900)}).p_value)
    chances = torch.tensor(chances)
    # Even hashes: the chance is uniform. 0.3 is the Kolmogorov-Smirnov bound for 30 at one in a hundred.
    expected = (torch.arange(30) + 0.5) / 30
    assert (chances.sort().values - expected).abs().max() < 0.3
    hot = row_loads(table, {"user": torch.cat([torch.arange(900), torch.full((900,), 7)])}, top=2).hot
    own = table.places_of("user", torch.tensor([7]))[0].tolist()
    assert sorted(row for row, _ in hot) == sorted(own) and hot[0][1] == pytest.approx(901 / 3600)
    biased = UnifiedEmbedding(50, 2)
    biased.add("user", 1)
    values = torch.arange(20_000)
    low = values[biased.places_of("user", values)[:, 0] < 25]
    assert row_loads(biased, {"user": low}).p_value < 1e-9
    with pytest.raises(InputError, match="no feature 'users'"):
        row_loads(biased, {"users": values})
    with pytest.raises(InputError, match="expected 20 or more"):
        row_loads(biased, {"user": values[:5]})


@pytest.mark.slow
def test_a_compiled_table_reads_the_same_rows():
    table = UnifiedEmbedding(1000, 4, tables=2)
    table.add("user")
    table.add("item", 3)
    ids = {"user": torch.arange(50), "item": torch.arange(50) - 7}
    compiled = torch.compile(table, backend="aot_eager", fullgraph=True)
    assert compiled(ids).equal(table(ids))
