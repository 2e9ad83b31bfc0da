"""Columns of ids in bounded memory against exact counts, and plans within their budget."""

from __future__ import annotations

import pytest
import torch

from lineament.core.checks import InputError
from lineament.modules import plan, probe


def test_few_values_are_exact_and_parts_make_no_difference():
    ids = torch.tensor([5, 5, 9, -3, 5, 9, 2**40])
    found = probe(ids)
    assert (found.count, found.distinct, found.distinct_error, found.undercount) == (7, 4, 0.0, 0)
    assert found.hot == ((5, 3), (9, 2), (-3, 1), (2**40, 1)) and probe(ids.split(2)) == found
    assert probe(["a", "b", "a"]).distinct == 2 and probe(["a", "b", "a"]).hot[0][1] == 2


def test_many_values_are_estimated_and_hot_ones_found():
    generator = torch.Generator().manual_seed(0)
    cold = torch.randint(2**60, (40_000,), generator=generator)
    ids = torch.cat([cold, torch.full((3000,), 17), torch.full((1500,), 4)])
    ids = ids[torch.randperm(len(ids), generator=generator)]
    found = probe(ids.split(5000), keep=1024)
    assert abs(found.distinct / 40_002 - 1) < 4 * found.distinct_error < 0.2
    assert [value for value, _ in found.hot[:2]] == [17, 4]
    for (_, low), exact in zip(found.hot, (3000, 1500)):
        assert low <= exact <= low + found.undercount
    assert found.undercount <= len(ids) / 1024


def test_a_plan_keeps_its_budget_and_gives_large_features_more():
    found = plan({"a": 50, "b": 5_000, "c": 10**7}, budget=1_000_000, chunk=8)
    assert found.bytes <= 1_000_000 and found.rows == 31_250
    assert found.lookups["a"] <= found.lookups["b"] <= found.lookups["c"] == 8
    assert found.collisions.total > 0


def test_what_is_no_column_is_named():
    with pytest.raises(InputError, match="ids: got"):
        probe(torch.tensor([1.5]))
    with pytest.raises(InputError, match="got none"):
        probe(torch.empty(0, dtype=torch.int64))
    with pytest.raises(InputError, match="budget"):
        plan({"a": 5}, budget=10)
