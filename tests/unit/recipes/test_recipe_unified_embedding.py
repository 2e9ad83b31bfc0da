"""The recipe unified-embedding: every part on a small scale, and that its claims can fall."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes.unified_embedding import CONTROLS, SCHEMES, Config, run
from lineament.recipes.unified_embedding.claims import Found, claims_of
from lineament.recipes.unified_embedding.training import (
    Angles,
    Linear,
    OneSalt,
    Recommender,
    Score,
    measured_collisions,
)

TINY = Config(
    data_folder="/nowhere", generated=1500, schemes=SCHEMES, seeds=1, epochs=1, controls=tuple(CONTROLS), angle_epochs=1
)  # fmt: skip


@pytest.mark.slow
def test_every_part_runs(tmp_path):
    outcome = run(TINY, out=tmp_path)
    assert len(outcome.claims) == 10 and len(outcome.tables) == 3 and len(outcome.figures) == 1
    assert outcome.to_dict() == run(TINY, out=tmp_path).to_dict()
    with pytest.raises(InputError, match="schemes: got 'unified'"):
        run(replace(TINY, schemes=("unified",)), out=tmp_path / "other")


def test_schemes_have_as_many_parameters_and_one_salt_hashes_alike():
    counts = {
        s: sum(p.numel() for p in Recommender(s, [50, 30, 20], 40, 0).tables.parameters())
        for s in SCHEMES[1:]
    }
    assert set(counts.values()) == {40 * 16}
    table = OneSalt(1000, 2)
    for name in ("a", "b"):
        table.add(name, 2)
    ids = torch.arange(50)
    assert torch.equal(table.rows_of("a", ids), table.rows_of("b", ids))
    net = Linear([5, 3], None, 0)
    assert net(torch.tensor([[4, 2]])).shape == (1,)
    intra, inter = measured_collisions([400, 100], 200, 4)
    assert intra == pytest.approx(423.75, rel=0.1) and inter == pytest.approx(200, rel=0.1)


def scores(value):
    return [Score(value, 0.4), Score(value + 0.001, 0.4)]


def found(gain, sharing, summed, time, other, angle):
    sizes = [400, 100]
    made = {("separate 1x16", 0.21): scores(0.7), ("unified 1x16", 0.21): scores(0.7 + sharing)}
    made |= {("separate 2x8", 0.21): scores(0.7), ("unified 2x8", 0.21): scores(0.7 + gain)}
    controls = {
        ("unified 2x8, summed", "random"): scores(0.7 + summed),
        ("separate 2x8, summed", "random"): scores(0.7),
    }
    controls |= {("unified 2x8", "time"): scores(0.7 + time), ("separate 2x8", "time"): scores(0.7)}
    controls |= {(k, h): scores(0.7 + gain + other) for k, h in (("unified 2x8, one salt", "random"), ("unified 2x8", "shuffled"))}  # fmt: skip
    angles = {0: [Angles(20, 8)], 100: [Angles(60, angle)]}
    return Found(sizes, made, controls, angles, {200: [423.75, 200.0] if gain > 0 else [600.0, 100.0]})


def test_claims_rise_and_fall_with_the_numbers():
    right = claims_of(found(0.04, 0.03, 0.0, 0.02, 0.001, 90), TINY)
    assert len(right) == 10 and all(c.holds for c in right), [c.name for c in right if not c.holds]
    fallen = claims_of(found(-0.04, -0.01, 0.02, -0.02, 0.02, 40), TINY)
    assert len(fallen) == 10 and not any(c.holds for c in fallen), [c.name for c in fallen if c.holds]
