"""Rates, ranks and geometry of embeddings against the whole matrix of scores, and against what other codes compute of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from lineament.core import pairs as all_pairs
from lineament.core.checks import InputError
from lineament.measure import (
    equal_error_rate,
    fold_accuracy,
    geometry,
    identification,
    retrieval,
    score_shift,
    separation,
    tar_at_far,
    val_at_far,
    verification,
    with_flips,
)
from lineament.measure.embeddings.verification import best_threshold_accuracy, nearest_tar_at_far


def people(count: int = 9, each: int = 4, noise: float = 0.7, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(count).repeat_interleave(each)[torch.randperm(count * each, generator=g)]
    centres = torch.randn(count, 8, generator=g).double()
    return F.normalize(centres[labels] + noise * torch.randn(count * each, 8, generator=g), dim=1), labels


def verification_set(pairs: int = 200, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    same = torch.arange(pairs) % 2 == 0
    a, b = torch.randn(2, pairs, 8, generator=g).double()
    second = torch.where(same[:, None], a + 0.9 * b, b)
    return F.normalize(torch.stack([a, second], 1).flatten(0, 1), dim=1), same


@pytest.mark.parametrize("tile", [512, 7])
def test_accumulators_over_tiles_are_those_of_the_matrix_and_merge(monkeypatch, tile):
    monkeypatch.setattr(all_pairs, "TILE", tile)
    x, _ = people()
    whole = (x @ x.T)[torch.ones(len(x), len(x), dtype=torch.bool).triu(1)]
    made = [
        [all_pairs.Largest(20), all_pairs.Histogram(30), all_pairs.KernelMean(2.0), all_pairs.Neighbours(len(x), 5, x)]
        for _ in range(2)
    ]  # fmt: skip
    for k, each in enumerate(all_pairs.tiles(x)):
        top, seen, kernel, near = made[k % 2]
        near.add(each)
        for accumulator in (top, seen, kernel):
            accumulator.add(each.values)
    top, seen, kernel, near = (one + two for one, two in zip(*made))
    torch.testing.assert_close(top.sorted(), whole.topk(20).values, rtol=1e-12, atol=1e-12)
    counts = np.histogram(whole.numpy(), 30, (-1, 1))[0]
    assert seen.counts.tolist() == counts.tolist() and seen.counts.sum() == len(whole)
    assert kernel.mean == pytest.approx(float((-2 * (2 - 2 * whole)).exp().mean()))
    expected = (x @ x.T).fill_diagonal_(-2).topk(5, 1)
    torch.testing.assert_close(near.scores, expected.values)
    assert near.indices.equal(expected.indices)


def test_neighbours_in_long_tiles_are_those_of_the_matrix():
    x = F.normalize(torch.randn(900, 6, generator=torch.Generator().manual_seed(1)), dim=1)
    near = all_pairs.Neighbours(900, 3)
    for each in all_pairs.tiles(x, 128):  # runs of 64, along both axes, and a rest of 4
        near.add(each)
    expected = (x @ x.T).fill_diagonal_(-2).topk(3, 1)
    torch.testing.assert_close(near.scores, expected.values)
    assert near.indices.equal(expected.indices)


@pytest.mark.parametrize("tile", [512, 5])
def test_ranks_are_those_of_sorted_scores(monkeypatch, tile):
    from lineament.measure.embeddings import retrieval as module

    monkeypatch.setattr(all_pairs, "TILE", tile)
    monkeypatch.setattr(module, "TILE", tile)
    x, labels = people(noise=1.5)
    x, labels = torch.cat([x, x[:1] + 0.1]), torch.cat([labels, torch.tensor([99])])  # one without a mate
    scores = (x @ F.normalize(x, dim=1).T) / x.norm(dim=1, keepdim=True)
    ranks = []
    for i in range(len(x) - 1):
        order = [int(j) for j in scores[i].argsort(descending=True) if int(j) != i]
        ranks.append(1 + next(k for k, j in enumerate(order) if labels[j] == labels[i]))
    ranks = torch.tensor(ranks).double()
    found = retrieval(x, labels, ks=(1, 2, 7))
    assert found.recall == pytest.approx([float((ranks <= k).double().mean()) for k in (1, 2, 7)])
    assert found.mrr == pytest.approx(float(ranks.reciprocal().mean())) and 0.2 < found.mrr < 0.9
    assert found.samples == len(x) - 1
    with pytest.raises(InputError, match="ks"):
        retrieval(x, labels, ks=[0])


def test_people_are_found_among_distractors():
    x, labels = people(noise=0.9)
    others = torch.randn(60, 8, generator=torch.Generator().manual_seed(5)).double()
    impostors = x @ F.normalize(others, dim=1).T
    scores, hits, genuine = x @ x.T, [], []
    for i in range(len(x)):
        for j in range(len(x)):
            if i != j and labels[i] == labels[j]:
                hits.append(bool(scores[i, j] > impostors[i].max()))
                genuine.append(float(scores[i, j]))
    found = identification(3 * x, labels, 2 * others, fars=(0.01, 1e-6))
    assert found.rank1 == pytest.approx(np.mean(hits)) and 0.05 < found.rank1 < 0.95
    assert (found.pairs, found.distractors, found.none_allowed) == (len(hits), 60, (1e-6,))
    every = torch.cat([torch.tensor(genuine).double(), impostors.flatten()])
    same = torch.arange(len(every)) < len(genuine)
    assert found.tar == pytest.approx(tar_at_far(every, same, (0.01, 1e-6)).tolist())
    with pytest.raises(InputError, match="distractors: got"):
        identification(x, labels, others[:, :3])
    with pytest.raises(InputError, match="a row is zero"):
        identification(x, labels, torch.zeros(2, 8))


def test_geometry_is_that_of_the_matrix():
    x, labels = people()
    found = geometry(2 * x, labels, neighbours=3)
    upper = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    squared = torch.cdist(x, x).square()
    like = labels[:, None] == labels
    assert found.alignment == pytest.approx(float(squared[upper & like].mean()))
    assert found.uniformity == pytest.approx(float((-2 * squared[upper]).exp().mean().log()))
    near = squared.fill_diagonal_(torch.inf).topk(3, 1, largest=False).indices
    listed = torch.bincount(near.flatten(), minlength=len(x))
    assert (found.hub, found.lonely) == (int(listed.max()), int((listed == 0).sum()))
    assert found.skewness == pytest.approx(float(stats.skew(listed.numpy())))


def test_shifts_are_scipys():
    g = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(50, generator=g).round(decimals=1),
        0.3 + torch.randn(80, generator=g).round(decimals=1),
    )
    found = score_shift(a, b)
    ks: Any = stats.ks_2samp(a.numpy(), b.numpy())
    assert found.ks == pytest.approx(ks.statistic)
    assert found.wasserstein == pytest.approx(stats.wasserstein_distance(a.numpy(), b.numpy()))
    assert score_shift(a, a).ks == score_shift(a, a).wasserstein == 0
    with pytest.raises(InputError, match="second: got"):
        score_shift(a, torch.tensor([torch.nan]))


def test_the_equal_error_rate_is_where_both_errors_meet():
    x, same = verification_set()
    scores = (x[0::2] * x[1::2]).sum(1)
    error = equal_error_rate(scores, same)
    gaps = []
    for threshold in scores:
        accepted = scores >= threshold
        gaps.append((float(accepted[~same].double().mean()), float((~accepted)[same].double().mean())))
    nearest = min(gaps, key=lambda pair: abs(pair[0] - pair[1]))
    assert 0.05 < error < 0.4 and min(nearest) - 0.01 <= error <= max(nearest) + 0.01
    assert equal_error_rate(torch.tensor([0.9, 0.8, 0.2, 0.1]), torch.tensor([1, 1, 0, 0])) == 0
    assert equal_error_rate(torch.tensor([0.2, 0.1, 0.9, 0.8]), torch.tensor([1, 1, 0, 0])) == 1
    assert equal_error_rate(-scores, ~same) == pytest.approx(error)
    with pytest.raises(InputError, match="expected some of both"):
        equal_error_rate(scores, torch.ones(len(scores)))


def test_val_at_far_reads_its_threshold_off_the_other_folds():
    x, same = verification_set(400)
    distance = (x[0::2] - x[1::2]).square().sum(1)
    for far in (0.5, 0.1, 0.01):
        shares = []
        for fold in torch.arange(400).chunk(10):
            rest = torch.ones(400, dtype=torch.bool)
            rest[fold] = False
            at = distance[rest & ~same].quantile(far)
            shares.append(float((distance[fold][same[fold]] < at).double().mean()))
        mean, deviation, rate = val_at_far(x, same, far)
        # The copied code reads the threshold off a grid of thousandths.
        assert mean == pytest.approx(np.mean(shares), abs=0.03) and deviation == pytest.approx(np.std(shares), abs=0.03)  # fmt: skip
        assert rate == pytest.approx(far, abs=0.05)
    with pytest.raises(InputError, match="one kind only"):
        val_at_far(x[:400], torch.arange(200) < 100)


def test_protocols_are_what_their_codes_do():
    x, same = verification_set()
    flipped = F.normalize(x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3)), dim=1)
    added = F.normalize(x + flipped, dim=1)
    found = verification(x, same, flipped=flipped)
    folds = fold_accuracy(added, same)
    scores = (added[0::2] * added[1::2]).sum(1)
    assert (found.accuracy, found.deviation) == (folds.mean, folds.std)
    assert found.tar == tuple(tar_at_far(scores, same, (1e-2, 1e-3)).tolist()) and found.far == (1e-2, 1e-3)
    assert found.none_allowed == tuple(f for f in (1e-2, 1e-3) if f * int((~same.bool()).sum()) < 1) != ()
    both = torch.cat([x, flipped], 1)
    scores = F.cosine_similarity(both[0::2], both[1::2])
    found = verification(x, same, flipped=flipped, protocol="unpg", fars=(0.1,))
    assert found.accuracy == best_threshold_accuracy(scores, same) >= folds.mean and found.deviation is None
    tar, far = nearest_tar_at_far(scores, same, (0.1,))
    assert (found.tar, found.far) == (tuple(tar.tolist()), tuple(far.tolist()))
    assert with_flips(x, flipped, "concatenated").norm(dim=1).allclose(torch.ones(len(x)).double())
    with pytest.raises(InputError, match="protocol: got 'lfw'"):
        verification(x, same, protocol="lfw")  # pyright: ignore
    with pytest.raises(InputError, match="flipped: got"):
        with_flips(x, flipped[:3])


def test_a_robust_gap_is_one_of_quantiles():
    x, same = verification_set()
    scores = (x[0::2] * x[1::2]).sum(1)
    positives, negatives = scores[same], scores[~same]
    assert separation(positives, negatives, quantile=0.0).robust_gap == separation(positives, negatives).gap
    found = separation(positives, negatives, quantile=0.1)
    expected = float(positives.quantile(0.1) - negatives.quantile(0.9))
    assert found.robust_gap == pytest.approx(expected) and found.robust_gap > found.gap
