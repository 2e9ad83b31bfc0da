"""The recipe contrastive-ft: every variant on a small scale, and that its claims can fall."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from lineament.core.checks import InputError
from lineament.losses import (
    InfoNCE,
    NegativeInterpolation,
    PositiveExtrapolation,
    Queue,
    ScoreLog,
    score_statistics,
)
from lineament.losses.info_nce import negatives_logsumexp
from lineament.recipes.contrastive_ft import Config, run
from lineament.recipes.contrastive_ft.claims import _CLAIMS, claims_of
from lineament.recipes.contrastive_ft.training import Trained

RUN = (
    "MoCo",
    "negatives",
    "positives",
    "late positives, λ 1.5",
    "positives, query untransformed",
    "negatives, each with itself",
    "both, by dimension",
)
TINY = Config(
    data_folder="/nowhere",
    samples=128,
    test_samples=60,
    variants=RUN,
    queue=64,
    batch_size=64,
    epochs=2,
)


@pytest.mark.slow
def test_every_variant_runs(tmp_path):
    outcome = run(TINY, out=tmp_path)
    assert len(outcome.claims) == 7 and outcome.claims[-1].holds and len(outcome.tables[0].rows) == 7
    with pytest.raises(InputError, match="variants: got 'SimCLR'"):
        run(replace(TINY, variants=("SimCLR",)), out=tmp_path / "other")


@pytest.mark.slow
def test_photographs_join_where_they_are(tmp_path):
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        images = generator.integers(0, 255, (60, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", x=images, y=np.arange(60) % 10)
    config = replace(TINY, data_folder=str(tmp_path), samples=60, batch_size=30, photo_epochs=1, variants=("MoCo",), photo_variants=("MoCo", "positives"))  # fmt: skip
    outcome = run(config, out=tmp_path / "run")
    assert [claim.name.startswith("CIFAR-10: ") for claim in outcome.claims] == [True, True]
    assert len(outcome.tables) == 2 and "50 labels a class" in outcome.tables[1].columns


def test_claims_rise_and_fall_with_the_numbers():
    for sign, gap in ((1, 1e-7), (-1, 0.1)):
        claims = []
        for ours, theirs, *_ in _CLAIMS:
            made = {}
            for name, up in ((ours, sign), (theirs, 0)):
                value = 0.5 + 0.1 * up
                curves = {
                    w: [value] * 4
                    for w in ("negative_mean", "negative_variance", "raw_variance", "raw_positive")
                }
                made[name] = [Trained(value + 0.01 * k, value, curves, gap) for k in range(2)]
            claims += claims_of(made)
        assert all(claim.holds == (sign > 0) for claim in claims) and len(claims) >= 2 * len(_CLAIMS)


def rows(n, seed, d=6):
    return torch.nn.functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double(), dim=1
    )


def test_a_factor_of_one_and_the_identity_permutation_are_moco(monkeypatch):
    q, k = rows(4, 0).requires_grad_(), rows(4, 1)
    losses = []
    for transform in ([], [PositiveExtrapolation(), NegativeInterpolation()]):
        loss = InfoNCE(0.2, queue=Queue(8, 6).double(), transform=transform)
        monkeypatch.setattr(PositiveExtrapolation, "draw", lambda *_: torch.tensor(1.0).double())
        monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n))
        value = loss(q, k)
        losses.append((value, torch.autograd.grad(value, q)[0]))
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize(
    "transform", [[], [PositiveExtrapolation(), NegativeInterpolation(granularity="sample")]]
)
def test_the_loss_equals_the_logits_it_does_not_keep_and_the_queue_may_move_on(transform, monkeypatch):
    q, k = rows(5, 0).requires_grad_(), rows(5, 1)
    made = [InfoNCE(0.2, queue=Queue(8, 6).double(), transform=transform, seed=3) for _ in range(2)]
    positive, negatives = made[0].scores(q, k)
    logits = torch.cat([positive[:, None], negatives], 1) / 0.2
    expected = torch.nn.functional.cross_entropy(logits, torch.zeros(5).long())
    monkeypatch.setattr("lineament.losses.info_nce._CACHED", 16)  # several chunks
    loss = made[1](q, k)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, q)[0] for each in (loss, expected)))
    found = score_statistics(positive, negatives, 0.2)
    variance, mean = negatives_logsumexp(q, made[0].queue.rows, 0.2)[1]
    if not transform:
        torch.testing.assert_close((variance, mean), (found.negative_variance, found.negative_mean))


def test_scores_are_logged_and_running_the_log_changes_nothing():
    values, log = [], ScoreLog(every=2)
    for kept in (None, log):
        loss = InfoNCE(0.2, queue=Queue(8, 6, seed=1).double(), transform=[PositiveExtrapolation()], log=kept)
        values.append([loss(rows(4, s), rows(4, s + 9)).item() for s in range(5)])
    assert values[0] == values[1] and log.curves["step"] == [0.0, 2.0, 4.0]
    assert log.curves["raw_positive"][0] == pytest.approx(float((rows(4, 0) * rows(4, 9)).sum(1).mean()))
    assert log.curves["positive_mean"][0] < log.curves["raw_positive"][0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            log.add(score_statistics(torch.ones(2), torch.full((2, 3), 0.9), 0.1))
    assert len(said) == 1 and "crowds" in str(said[0].message)
