"""The complexity recipe: claims that judge planted numbers, its own measures by hand, and a run on a small scale."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from lineament.recipes.vinfo_complexity import Config, run
from lineament.recipes.vinfo_complexity.claims import Study, Suspects, claims_of
from lineament.recipes.vinfo_complexity.study import explained, joined, partial, pearson

HOLDS = {
    "K and Lambda": 0.5,
    "K and importance, end": -0.01,
    "K and importance, first epoch": 0.0,
    "K and noise variance": 0.3,
    "K and colour": -0.4,
    "simplest: residual minus main CKA": 0.01,
    "hardest: last third minus first third CKA": 0.01,
    "top K, last minus first checkpoint": -0.01,
    "accuracy kept": 0.99,
    "K and Hoyer": 0.2,
    "K and redundancy": -0.01,
}
FAILS = {
    "K and Lambda": 0.49,
    "K and importance, end": 0.0,
    "K and importance, first epoch": -0.01,
    "K and noise variance": 0.29,
    "K and colour": -0.39,
    "simplest: residual minus main CKA": 0.0,
    "hardest: last third minus first third CKA": 0.0,
    "top K, last minus first checkpoint": 0.0,
    "accuracy kept": 0.98,
    "K and Hoyer": -0.21,
    "K and redundancy": 0.0,
}


def made(numbers):
    empty = torch.zeros(1)
    return Study(numbers, {}, ["a"], empty[None], empty, empty, empty, empty, empty, [0.0], [0.0])


def test_every_predicate_stands_at_its_threshold():
    good = claims_of([made(HOLDS)], Suspects((1.0, 1.0), (1, 0), (9.0, 0.0), 12))
    bad = claims_of([made(FAILS)], Suspects((1.0, 1.0), (1, 1), (9.0, 9.0), 12))
    assert len(good) == 12 and all(claim.holds and not claim.reason for claim in good)
    assert not any(claim.holds for claim in bad) and all(claim.reason for claim in bad)
    without = {name: value for name, value in HOLDS.items() if name != "K and colour"}
    assert len(claims_of([made(without)] * 2, Suspects((1.0, 1.0), (0, 0), (0.0, 0.0), 12))) == 11


def test_the_recipes_own_measures():
    a = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert abs(partial(a + noise, a - noise, a)) > 0.99 and math.isnan(pearson(a[:2], a[:2]))
    known = a.clone()
    known[0] = math.nan
    assert abs(pearson(known, 2 * a) - 1) < 1e-12
    labels = torch.arange(50) % 5
    between = explained(torch.stack([labels.double(), a], 1), labels, 5)
    assert abs(float(between[0]) - 1) < 1e-12 and 0 <= float(between[1]) < 0.5
    x = torch.rand(6, 4)
    every, places = joined(x, {"same": lambda v: v, "double": lambda v: 2 * v[..., :2]})
    assert torch.equal(every.encode(x)[:, places["double"]], 2 * x[:, :2]) and every.encode(x).shape == (6, 6)


@pytest.mark.slow
def test_a_run_on_a_small_scale(tmp_path):
    config = dataclasses.replace(
        Config(), copies=1, network="small-resnet", width=4, epochs=2, features=6, draws=3, noise_images=20, batch_size=128
    )  # fmt: skip
    outcome = run(config, out=tmp_path)
    assert len(outcome.claims) == 12 and {figure.file for figure in outcome.figures} >= {"curves.svg"}
    controls = next(table for table in outcome.tables if table.title == "Controls")
    names = [str(row[0]) for row in controls.rows]
    for control in ("random directions", "untrained", "permuted", "without the last read-out", "PCA", "TopK", "k-means", "halves", "ridge", "given variance"):  # fmt: skip
        assert any(control in name for name in names), control
    assert all(math.isfinite(value) for row in controls.rows for value in row[1:])
