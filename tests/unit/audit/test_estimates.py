"""An error is half the width of a 95 % interval: it covers what many more samples would give."""

from __future__ import annotations

import math

import pytest
import torch

from lineament.audit.estimates import Estimate, halved, interval, joined, split, without


def estimate(measure, x, seed=0, *, left_out):
    parts = [x[rows] for rows in split(torch.arange(len(x)), seed)]
    again = [torch.cat(some) for some in without(parts)] if left_out else parts
    return Estimate.of(measure, x, again, [torch.cat(half) for half in halved(parts)], left_out=left_out)


def test_of_a_mean_it_is_students_interval():
    x = torch.randn(60, generator=torch.Generator().manual_seed(0)).double()
    means = [float(x[rows].mean()) for rows in split(torch.arange(60), 0)]
    for left_out in (False, True):
        found = estimate(lambda v: float(v.mean()), x, left_out=left_out)
        assert found.error == pytest.approx(2.571 * torch.tensor(means).double().std().item() / math.sqrt(6))


@pytest.mark.parametrize("left_out", [False, True])
def test_the_interval_covers_the_truth_in_93_of_100(left_out):
    """Also of a number that few samples give too small: the variance over n, not n - 1, of twelve and more."""

    def variance(x):
        return float(x.var(correction=0))

    draw = torch.Generator().manual_seed(1)
    found = [
        estimate(variance, torch.randn(72, generator=draw), seed, left_out=left_out) for seed in range(400)
    ]
    assert sum(abs(each.value - 1) <= each.error for each in found) >= 0.93 * len(found)


def test_the_methods_own_chance_widens_it():
    narrow, wide = (Estimate.of(float, 2.0, [1.0, 3.0], left_out=False, method=m).error for m in (0.0, 50.0))
    assert wide == pytest.approx(math.hypot(narrow, 50.0))
    assert Estimate.of(float, 2.0, [], left_out=False, method=0.5).error == 0.5
    assert math.isnan(interval([1.0])) and math.isnan(interval([1.0, math.inf]))


def test_parts_are_disjoint_and_halves_and_all_but_one_are_made_of_them():
    parts = split(torch.arange(20), 3)
    assert [len(part) for part in parts] == [4, 4, 3, 3, 3, 3]
    assert joined(parts).tolist() == list(range(20))
    assert sorted(sum(map(len, half)) for half in halved(parts)) == [10, 10]
    assert all(len(joined(some)) == 20 - len(part) for some, part in zip(without(parts), parts))
    assert split(torch.arange(5), 0) == [] == without([parts[0]]) == halved([parts[0]])
