"""The dcc recipe: a tiny run goes through, its claims can hold and fall, and its nuisance is what it says."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.data.identities import orl_photographs
from lineament.learn import condense
from lineament.recipes.dcc import Config, run
from lineament.recipes.dcc.claims import all_claims
from lineament.recipes.dcc.experiments import Trial, configured, with_nuisance
from lineament.recipes.dcc.rivals import mean_matched, often_forgotten

TINY = {
    "side": 8,
    "width": 4,
    "outer": 1,
    "inner": 2,
    "epochs": 1,
    "batch": 8,
    "rates": (0.1,),
    "networks": 2,
    "choosing": 1,
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


def test_mean_features_come_nearer_to_those_of_the_data():
    x = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % 2
    start = condense(x, y, per_class=1, method="random", network="mlp")
    goal = torch.stack([x[y == c].mean(0) for c in range(2)])
    pixels = partial(nn.Sequential, nn.Flatten(), nn.Linear(16, 2))  # whose last layer reads the pixels
    found = mean_matched(start, (x, y), pixels, steps=60, rate=1.0, batch=30, seed=0)
    assert (found.pictures - goal).norm() < 0.2 * (start.pictures - goal).norm()


def test_the_pictures_that_a_training_forgets_most_often():
    right = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 0, 0], [1, 0, 1, 0, 1, 1], [1, 0, 0, 1, 0, 0]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])  # 0 is never forgotten, 1 never learned, 2 and 5 forgotten twice

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.epoch = nn.Parameter(torch.ones(())), -1

        def forward(self, numbers):
            self.epoch += 1
            answer = torch.where(right[self.epoch][numbers] == 1, y[numbers], 1 - y[numbers])
            return self.weight.abs() * nn.functional.one_hot(answer, 2)

    for per_class, rows in ((1, [2, 5]), (2, [2, 0, 5, 3])):
        found = often_forgotten(
            (y, y), torch.arange(6), Scripted, per_class=per_class, seed=0, epochs=len(right)
        )
        assert found.tolist() == rows


@pytest.mark.parametrize(
    ("name", "shape", "train", "test"), [("faces", (1, 8, 8), [7] * 40, [3] * 40), ("cifar10", (3, 32, 32), [6] * 10, [3] * 10), ("mnist", (1, 8, 8), [6] * 10, [3] * 10)]
)  # fmt: skip
def test_other_data_are_settings_of_their_own(name, shape, train, test, tmp_path, monkeypatch):
    config = dataclasses.replace(Config.preset("quick"), others=(name,), most=6)
    if orl_photographs() is None:
        pytest.skip("no ORL, CIFAR-10 and MNIST here")
    x, y, test_x, test_y = with_nuisance(configured(config, name), name, 0)
    assert torch.bincount(y).tolist() == train and torch.bincount(test_y).tolist() == test
    assert x.shape[1:] == test_x.shape[1:] == shape and 0 <= x.min() < x.max() <= 1
    monkeypatch.delenv("LINEAMENT_DATA")
    with pytest.raises(InputError, match="data_folder"):
        run(config, out=tmp_path)


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
            "faces": 0.05 if good else 0.01,
            "cifar10": 0.05 if good else -0.01,
        }
        trials = {n: [trial(good, g, k) for k in range(4)] for n, g in gains.items()}
        chance = {n: torch.full((2,), 0.1 if good else 0.3) for n in trials["shared"][0].accuracy}
        trials["shuffled"] = [dataclasses.replace(t, accuracy=chance) for t in trials["shared"]]
        return [claim.holds for claim in all_claims(trials)]

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 14
