"""The diffgrad recipe: every part on a small scale, that a killed run goes on, and that its claims can fall."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes import diffgrad as recipe
from lineament.recipes.diffgrad import Config, run
from lineament.recipes.diffgrad.claims import function_claims, training_claims
from lineament.recipes.diffgrad.functions import FUNCTIONS, Walk, walks_of
from lineament.recipes.diffgrad.training import (
    OPTIMIZERS,
    RIVALS,
    Frictions,
    Timing,
    Training,
    data_of,
    step_times,
    train,
)
from lineament.recipes.kit.networks import network

TINY = {"epochs": 1, "batch_sizes": (256,), "timing_sizes": (10, 1000), "function_steps": 40}


def test_the_papers_preset_is_the_papers():
    paper = Config.preset("paper")
    assert paper.network == "resnet50" and paper.batch_sizes == (32, 64, 128) and paper.epochs == 100
    assert set(RIVALS) < set(paper.optimizers) and len(paper.activations) == 4
    # ResNet-50 with a stem for 32 x 32 pixels.
    net = network("resnet50", (3, 32, 32), 10, seed=0)
    assert sum(p.numel() for p in net.parameters()) == 23_520_842


def test_slopes_are_the_functions_derivatives():
    for name in ("F1", "F2", "F3"):
        function = FUNCTIONS[name]
        for x in np.linspace(-1.07, 1.031, 41):  # no kink among these
            numeric = (function.value(x + 1e-6) - function.value(x - 1e-6)) / 2e-6
            assert function.slope(x) == pytest.approx(numeric, abs=1e-4), (name, x)
        least = min(function.value(x) for x in np.linspace(-1, 1, 401))
        assert function.value(function.minimum) <= least + 1e-6


@pytest.mark.slow
def test_the_functions_end_where_the_specification_says():
    ends = {name: [each.x[-1] for each in found.values()] for name, found in walks_of(0.1, 299).items()}
    assert ends["F1"] == pytest.approx([-0.30007, 0.20011, -0.30030], abs=1e-5)
    assert ends["F2"] == pytest.approx([-0.64296, 0.00009, -0.64312], abs=1e-5)
    assert ends["F2, released derivative"] == pytest.approx([-0.81214, 0.00018, -0.83506], abs=1e-5)
    assert ends["F3"] == pytest.approx([0.01357, 0.00051, 0.00213], abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    config = dataclasses.replace(Config.preset("quick"), **TINY)
    times = Timing([10], {"Adam, fused": [1.0], "diffGrad, eager": [2.0]})
    monkeypatch.setattr(recipe, "step_times", lambda *_: times)  # a clock is not the same twice
    whole = run(config, out=tmp_path / "whole")
    assert len(whole.figures) == 4 and len(whole.claims) == 9
    original, calls = recipe.train, []

    def killed(config, data, key, seed):
        calls.append(key[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(config, data, key, seed)

    monkeypatch.setattr(recipe, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    again = run(config, out=tmp_path / "cut")
    assert calls == [*config.optimizers[:3], *config.optimizers[2:]]
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())


def test_every_optimizer_trains_and_the_friction_is_watched():
    samples, test = (part[:64] for part in data_of("digits", None))
    config = dataclasses.replace(Config.preset("quick"), epochs=2, milestones=(1,), track_every=2)
    for name in OPTIMIZERS:
        found = train(config, (samples, test), ("elu", 32, name), 0)
        assert np.isfinite(found.losses).all() and found.losses[-1] < found.losses[0]
        frictional = name.startswith("diffGrad")
        assert found.friction.step == ([0, 2] if frictional else []) and 0 <= found.accuracy <= 1
        assert not frictional or "version" in name or found.friction.mean[0] >= 0.5


def test_bad_fields_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    for fields, message in (
        ({"optimizers": ("adan",)}, "optimizers: got 'adan'"),
        ({"activations": ("gelo",)}, "activations: got 'gelo'.*nearest: 'gelu'"),
        ({"seeds": ()}, "seeds: got none"),
        ({"epochs": 0}, "epochs"),
        ({"data": "cifar10"}, "cifar10 needs a folder"),
    ):
        with pytest.raises(InputError, match=message):
            run(dataclasses.replace(Config.preset("quick"), **fields), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_claims_rise_and_fall_with_the_numbers():
    config = Config.preset("quick")

    def found(diffgrad: float, adam: float, half: float, loss: float, frictions: tuple[float, float, float]):
        values = {"diffGrad": (diffgrad, loss, frictions[1]), "Adam": (adam, 0.1, None)}
        values["Adam (half the rate)"] = (half, 0.1, None)
        values["diffGrad (loss / 1000)"] = (0.9, 0.1, frictions[0])
        values["diffGrad (loss x 1000)"] = (0.9, 0.1, frictions[2])
        return {
            ("relu", 64, name): [Training(a, [b], b, Frictions(mean=[] if f is None else [f]))]
            for name, (a, b, f) in values.items()
        }

    assert all(c.holds for c in training_claims(found(0.97, 0.96, 0.95, 0.2, (0.6, 0.6, 0.6)), config))
    fallen = training_claims(found(0.95, 0.96, 0.96, 0.101, (0.5, 0.5005, 0.7)), config)
    assert not any(c.holds for c in fallen) and all(c.reason for c in fallen)
    half = [c.holds for c in training_claims(found(0.95, 0.96, 0.94, 0.101, (0.5, 0.52, 0.53)), config)]
    assert half == [False, True, False, True, False]

    def walks(*ends: float):
        each = dict(zip(("diffGrad", "Adam", "Adam (half the rate)"), ends))
        return {
            name: {who: Walk([FUNCTIONS[name].minimum + x], 0.5) for who, x in each.items()}
            for name in FUNCTIONS
        }

    assert [c.holds for c in function_claims(walks(0, 0.5, 0.5))] == [True] * 4
    assert [c.holds for c in function_claims(walks(0, 0.5, 0))] == [True, True, True, False]
    for lost in (walks(0.5, 0.5, 0.5), walks(0, 0, 0)):
        assert not any(c.holds for c in function_claims(lost)) and all(
            c.reason for c in function_claims(lost)
        )


def test_a_way_to_run_that_fails_is_left_out(monkeypatch):
    def broken(self, closure=None):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch.optim.Adam, "step", broken)
    with pytest.warns(UserWarning, match="is left out: no compiler"):
        found = step_times((10,), compiled=False, repeats=1)
    assert np.isnan(found.seconds["Adam, fused"]).all() and found.seconds["diffGrad, eager"][0] > 0
