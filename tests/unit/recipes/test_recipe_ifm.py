"""The ifm recipe: the rivals keep the sizes, a tiny run goes through, and its claims can hold and fall."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.measure import merge
from lineament.recipes.ifm import Config, run
from lineament.recipes.ifm.claims import all_claims
from lineament.recipes.ifm.experiments import Depth, Net, Trial
from lineament.recipes.ifm.rivals import MERGERS, REMOVALS, grouped, removed

TINY = {
    "widths": (12, 16),
    "epochs": 1,
    "seeds": (0,),
    "betas": (0.1, 0.3),
    "ranked": 2,
    "depth": 3,
    "depth_width": 12,
    "draws": 1,
}


@pytest.mark.parametrize("how", [*REMOVALS, *MERGERS])
def test_every_rival_has_the_same_sizes(how):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(40, 6)
    found = merge(net, example=x[:1], keep={"0": 5, "2": 3})
    other = removed(found, how, 0) if how in REMOVALS else grouped(found, how, x, 0).model
    shapes = [tuple(p.shape) for p in found.model.parameters()]
    assert [tuple(p.shape) for p in other.parameters()] == shapes and other(x).isfinite().all()
    if how == "L2 removal":
        kept = net[0].weight.square().sum(1) + net[0].bias.square()
        assert torch.equal(other[0].weight, net[0].weight[kept.argsort()[4:].sort().values])


def test_a_tiny_run(tmp_path):
    found = run(dataclasses.replace(Config.preset("quick"), **TINY), out=tmp_path)
    assert len(found.claims) == 8 and len(found.tables) == 4
    assert all((tmp_path / f.file).stat().st_size > 0 for f in found.figures) and len(found.figures) == 3
    with pytest.raises(InputError, match="share"):
        run(dataclasses.replace(Config.preset("quick"), share=0.5), out=tmp_path / "other")


def test_claims_can_hold_and_fall():
    config = Config.preset("quick")

    def outcome(good: bool) -> list[bool]:
        def net(width: int, decay: float) -> Net:
            share = (
                (1 / width) * (0.5 if decay > 1e-3 else 1)
                if good
                else width * (2 if decay > 1e-3 else 1) / 1000
            )
            return Net(0.9, share, 0.2, 0.9, 0.9, 0.9 if good else 0.0, [0.5] * len(config.betas))

        found = {(w, d): [net(w, d)] for w in config.widths for d in config.decays}
        low, high = (0.5, 0.9) if good else (0.9, 0.5)
        accuracy = {"whole network": 0.95, "merging": high, "L2 removal": low, "random merging": low}
        trial = Trial(0.25, {}, accuracy, {"merging": high, "k-means folding": low}, high, low, [])
        shape = [0.2, 0.5, 0.3] if good else [0.5, 0.3, 0.2]
        deep = [Depth(0.9 + (k if good else -k) / 100, [s + k / 100 for s in shape]) for k in range(4)]
        return [c.holds for c in all_claims(found, [trial], deep, config)]

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 9
