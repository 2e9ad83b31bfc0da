"""The diffroar recipe in miniature: every stage runs, the claims are judged, a killed run goes on; photographs from a folder."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lineament.core.checks import InputError
from lineament.recipes import diffroar as recipe
from lineament.recipes.diffroar.photographs import evaluation, parsed

TINY = replace(
    recipe.Config.preset("quick"), data="digits", fractions=(1.0, 0.2), level=0.2, train_images=400, test_images=150,
    widths=(32,), epochs=6, retrain_epochs=4, runs=2, jobs=1, wide=64, robust_width=32, simple_epochs=10,
    robust_epochs=5, points=300, controls=True, lr=5e-3,
)  # fmt: skip


@pytest.mark.slow
def test_every_stage_runs_and_a_second_run_reads_them(tmp_path, monkeypatch):
    outcome = recipe.run(TINY, out=tmp_path)
    assert len(outcome.claims) == 11 and len(outcome.tables) == 5 and len(outcome.figures) == 3
    assert all((tmp_path / figure.file).stat().st_size > 0 for figure in outcome.figures)
    exact = next(c for c in outcome.claims if "exactly 0" in c.name)
    assert exact.holds
    assert json.dumps(outcome.to_dict()), "an outcome is plain data"

    def forbidden(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(recipe.Demonstration, "train", forbidden)
    monkeypatch.setattr(recipe.Demonstration, "judge", forbidden)
    again = recipe.run(TINY, out=tmp_path)
    assert [c.observed for c in again.claims] == [c.observed for c in outcome.claims]


@pytest.mark.slow
def test_photographs_in_a_folder(tmp_path):
    draw = np.random.default_rng(0)
    for c, colour in enumerate(("red", "blue")):
        (tmp_path / "images" / colour).mkdir(parents=True)
        for k in range(40):
            pixels = draw.integers(0, 80, (8, 8, 3), dtype=np.uint8)
            pixels[..., 2 * c] += 150
            Image.fromarray(pixels).save(tmp_path / "images" / colour / f"{k}.png")
    config = replace(
        recipe.Config.preset("paper"), dataset="images", data_folder=str(tmp_path / "images"), image_size=8,
        network="resnet18", network_width=8, fractions=(1.0, 0.1), runs=1, jobs=1, photograph_epochs=8, photograph_lr=0.05, batch_size=16,
        attacks=("linf 2/255",),
    )  # fmt: skip
    outcome = recipe.run(config, out=tmp_path / "out")
    assert [row[0] for row in outcome.tables[0].rows] == ["standard", "linf 2/255"]
    assert len(outcome.claims) == 2
    mlp = recipe.run(
        replace(config, network="mlp", widths=(16, 16), photograph_epochs=24), out=tmp_path / "mlp"
    )
    assert mlp.tables[0].rows[0][1] > 0.8, "two hidden layers tell red from blue"


def test_bad_configurations_are_named(tmp_path):
    with pytest.raises(InputError, match=r"level: got 0\.3, expected one of the fractions"):
        recipe.run(replace(TINY, level=0.3), out=tmp_path)
    with pytest.raises(InputError, match="runs: got 0"):
        recipe.run(replace(TINY, runs=0), out=tmp_path)
    with pytest.raises(InputError, match="attacks: got 'l1 3'"):
        parsed("l1 3")
    attack = parsed("l2 0.5")
    assert (attack.norm, attack.eps, attack.steps) == ("l2", 0.5, 7)
    judge = evaluation(parsed("linf 8/255"))
    assert (judge.eps, judge.step, judge.steps) == (8 / 255, 2 / 255, 8)
    assert (evaluation(attack).step, evaluation(attack).steps) == (0.25, 5)
