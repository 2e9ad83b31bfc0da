"""The dcc recipe: a tiny run goes through, its claims can hold and fall, and its nuisance is what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes.dcc import Config, run
from lineament.recipes.dcc.claims import all_claims
from lineament.recipes.dcc.experiments import Trial, with_nuisance

TINY = {
    "side": 8,
    "width": 4,
    "outer": 1,
    "inner": 2,
    "epochs": 1,
    "batch": 8,
    "rates": (0.1,),
    "networks": 2,
    "training": 3,
    "controls": (),
}


def test_a_tiny_run(tmp_path):
    found = run(dataclasses.replace(Config.preset("quick"), **TINY), out=tmp_path)
    assert len(found.claims) == 8 and len(found.tables) == 1
    assert all((tmp_path / f.file).stat().st_size > 0 for f in found.figures)
    with pytest.raises(InputError, match="seeds"):
        run(dataclasses.replace(Config.preset("quick"), seeds=()), out=tmp_path / "other")
    with pytest.raises(InputError, match="controls"):
        run(dataclasses.replace(Config.preset("quick"), controls=("shared",)), out=tmp_path / "more")


def test_the_nuisance_is_shared_or_not():
    config = dataclasses.replace(Config.preset("quick"), amplitude=100.0)
    for nuisance, few in (("shared", True), ("independent", False)):
        x, y, _test_x, test_y = with_nuisance(config, nuisance, 0)
        assert (
            x.min() >= 0
            and x.max() <= 1
            and len(y) + len(test_y) == 1797
            and set(y.tolist()) == set(range(10))
        )
        rows = x[:60].flatten(1)
        rows = (rows - rows.mean(1, keepdim=True)) / rows.norm(dim=1, keepdim=True)
        alike = torch.corrcoef(rows)
        nearest = (alike - torch.eye(60)).max(1).values
        assert (nearest > 0.98).float().mean() > 0.9 if few else (nearest > 0.98).float().mean() < 0.5


def test_claims_can_hold_and_fall():
    def trial(good: bool, gain: float, k: int) -> Trial:
        base = {"class by class": 0.3, "summed": 0.3 + gain, "summed after warm-up": 0.3 + gain}
        others = {
            "random real": 0.4 if good else 0.1,
            "class means": 0.1 if good else 0.9,
            "own start": 0.1 if good else 0.9,
        }
        others |= {"herding": 0.1 if good else 0.9, "k_means": 0.1 if good else 0.9}
        accuracy = {
            n: torch.full((2,), v + 0.001 * k, dtype=torch.float64) for n, v in {**base, **others}.items()
        }
        accuracy["summed"] += 0.0005 * (k % 2)
        velocity = torch.linspace(1, 0.1, 20) if good else torch.linspace(0.1, 1, 20)
        return Trial(accuracy, dict.fromkeys(base, 1.0), velocity)

    def outcome(good: bool) -> list[bool]:
        gains = {
            "shared": 0.05 if good else 0.01,
            "none": 0.0 if good else 0.05,
            "independent": 0.0 if good else 0.05,
        }
        trials = {n: [trial(good, g, k) for k in range(4)] for n, g in gains.items()}
        chance = {n: torch.full((2,), 0.1 if good else 0.3) for n in trials["shared"][0].accuracy}
        trials["shuffled"] = [dataclasses.replace(t, accuracy=chance) for t in trials["shared"]]
        return [claim.holds for claim in all_claims(trials)]

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 11
