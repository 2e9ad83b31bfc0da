"""Values that share rows: counted by hand in small tables, and near what independent hashes give in large ones."""

from __future__ import annotations

import itertools

import pytest
import torch

from lineament.core.checks import InputError
from lineament.modules import UnifiedEmbedding, collision_report, expected_collisions, reader_overlap


@pytest.mark.parametrize(("lookups", "tables", "options"), [(1, 1, {}), (2, 1, {}), (2, 3, {"reserve": [4, 9]}), (3, 2, {"collisionless_below": 5})])  # fmt: skip
def test_the_report_is_the_count_over_all_pairs(lookups, tables, options):
    table = UnifiedEmbedding(7, 2, tables)
    table.add("a", lookups, **options)
    table.add("b", 2)
    generator = torch.Generator().manual_seed(1)
    ids = {name: torch.randint(12, (40,), generator=generator) for name in ("a", "b")}
    found = collision_report(table, ids)
    places = {
        n: {v: table.places_of(n, torch.tensor([v]))[0].tolist() for v in x.tolist()} for n, x in ids.items()
    }
    within = sum(
        a == b
        for own in places.values()
        for x, y in itertools.combinations(own.values(), 2)
        for a, b in zip(x, y)
    )
    between = sum(a == b for x in places["a"].values() for y in places["b"].values() for a in x for b in y)
    touched = merged = 0
    for name, read in ids.items():
        for value in read.tolist():
            others = [p for v, p in places[name].items() if v != value]
            touched += any(a == b for p in others for a, b in zip(p, places[name][value]))
            merged += places[name][value] in others
    assert (found.within, found.between) == (within, between)
    assert (found.touched, found.merged) == pytest.approx((touched / 80, merged / 80))


def test_many_values_collide_as_expected():
    table = UnifiedEmbedding(5000, 1)
    table.add("a", 1)
    table.add("b", 1)
    found = collision_report(table, {"a": torch.arange(4000), "b": torch.arange(2000)})
    plain, expected = expected_collisions([4000, 2000], 5000), found.expected
    assert (expected.within, expected.between) == pytest.approx((plain.intra, plain.inter))
    for field in ("within", "between", "touched", "merged"):
        assert getattr(found, field) == pytest.approx(getattr(expected, field), rel=0.05)


def test_strings_count_as_the_table_reads_them():
    for hash in ("mix64", "siphash"):
        table = UnifiedEmbedding(1000, 1, hash=hash)
        table.add("a", 1)
        found = collision_report(table, {"a": ["x", "y", "x"]})
        rows = table.places_of("a", ["x", "y"])
        assert found.merged == float(rows[0].equal(rows[1]))
    with pytest.raises(InputError, match="expected at least one whole id"):
        collision_report(table, {"a": torch.tensor([0.5])})
    with pytest.raises(InputError, match="no feature 'b'"):
        collision_report(table, {"b": ["x"]})


def test_overlap_of_readers_is_a_cosine_of_vectors_and_one_over_root_d_of_random_ones():
    a, b = torch.randn(2, 200, 16, generator=torch.Generator().manual_seed(0))
    assert reader_overlap(a[0], b[0]) == pytest.approx(
        abs(float(torch.cosine_similarity(a[0], b[0], 0))), rel=1e-5
    )
    assert reader_overlap(a, b) == pytest.approx(16**-0.5, rel=0.05)
    assert reader_overlap(torch.eye(16)[:8], torch.eye(16)[8:]) == 0
    with pytest.raises(InputError, match="of the same d"):
        reader_overlap(a, b[:, :3])
