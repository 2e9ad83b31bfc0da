"""Recognition over all pairs against the matrix that it does not build."""

from __future__ import annotations

import pytest
import torch

from lineament.core import pairs as all_pairs
from lineament.core.checks import InputError
from lineament.measure import borda_count, pair_rates, recognition, tar_at_far
from lineament.measure.embeddings import pairs


def test_blocks_equal_the_matrix_of_all_pairs(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 7 + [1] * 5 + [2] * 9 + [3])
    x = torch.randn(22, 6, generator=generator).double() + 2 * torch.eye(6).double()[labels]
    unit = torch.nn.functional.normalize(x, dim=1)
    scores, upper = unit @ unit.T, torch.ones(22, 22, dtype=torch.bool).triu(1)
    same = labels[:, None] == labels
    fars = (0.3, 0.05, 1e-4, 1.0)
    expected = tar_at_far(scores[upper], same[upper], fars)
    off = scores.masked_fill(torch.eye(22, dtype=torch.bool), -2)
    right = (labels[off.argmax(1)] == labels).double().mean()
    average = []
    for i in range(21):
        others = int((labels == labels[i]).sum()) - 1
        near = labels[off[i].argsort(descending=True)[:others]] == labels[i]
        average.append(sum(float(near[: k + 1].double().mean()) for k in range(others) if near[k]) / others)
    for entries, tile, deep in ((1 << 22, 512, 64), (70, 5, 64), (70, 4, 2)):
        monkeypatch.setattr(pairs, "_ENTRIES", entries)
        monkeypatch.setattr(pairs, "_DEEP", deep)
        monkeypatch.setattr(pairs, "TILE", tile)
        monkeypatch.setattr(all_pairs, "TILE", tile)
        found = recognition(x, labels, fars)
        assert found.tar == pytest.approx(expected.tolist()) and found.recall == pytest.approx(float(right))
        assert found.precision == pytest.approx(sum(average) / len(average))
        assert found.gap == pytest.approx(float(scores[upper & same].min() - scores[upper & ~same].max()))
        assert (found.genuine, found.impostors, found.people) == (67, 164, 4)
        assert found.none_allowed == (1e-4,)
    assert recognition(x.numpy(), labels.numpy(), fars).to_dict() == found.to_dict()


@pytest.mark.parametrize("guess", [None, 2.0, 0.3])
def test_rates_do_not_depend_on_where_the_largest_were_guessed_to_begin(monkeypatch, guess):
    monkeypatch.setattr(pairs, "_PILOT", 128)
    if guess is not None:  # too high, and a little too high
        monkeypatch.setattr(pairs, "_floor", lambda *given: guess)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(150, (1100,), generator=generator)
    x = torch.randn(1100, 12, generator=generator)
    unit = torch.nn.functional.normalize(x, dim=1)
    upper = torch.ones(1100, 1100, dtype=torch.bool).triu(1)
    scores, same = (unit @ unit.T)[upper], (labels[:, None] == labels)[upper]
    fars = (0.2, 1e-2, 1e-3, 1e-5)
    found = pair_rates(x, labels, fars)
    # Products of other sizes are rounded otherwise: a pair at a threshold may change sides.
    assert found.tar == pytest.approx(tar_at_far(scores, same, fars).tolist(), abs=1.1 / int(same.sum()))
    impostors = scores[~same].sort(descending=True).values
    for far, limit in zip(fars, found.thresholds):
        assert limit == pytest.approx(float(impostors[int(far * len(impostors))]), abs=1e-6)
    assert (found.genuine, found.impostors) == (int(same.sum()), len(impostors))
    whole = recognition(x, labels, fars)
    assert (whole.tar, whole.thresholds, whole.gap) == (found.tar, found.thresholds, found.gap)


def test_the_largest_are_kept_when_parts_come_one_by_one():
    values = torch.randn(30_000, generator=torch.Generator().manual_seed(0))
    kept = all_pairs.Largest(50)
    for part in values.split(1000):
        kept.add(part)
    assert torch.equal(kept.sorted(), values.topk(50).values) and kept.floor > -torch.inf
    assert kept.at([0, 49, 7]) == values.topk(50).values[[0, 49, 7]].tolist()


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0, 0, 0], "two people"), ([0, 1, 2], "no genuine pair"), ([0.0, 1.0, 1.0], "whole number")],
)
def test_labels_that_say_nothing_are_named(labels, message):
    with pytest.raises(InputError, match=message):
        recognition(torch.eye(3), torch.tensor(labels))
    with pytest.raises(InputError, match="zero or NaN"):
        recognition(torch.zeros(3, 2), torch.tensor([0, 0, 1]))


def test_borda_counts_ranks():
    assert list(borda_count({"a": (1, 1, 0), "b": (2, 2, 1)}).items()) == [("b", 3.0), ("a", 0.0)]
