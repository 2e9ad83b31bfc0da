"""The diffgrad recipe: every part on a small scale, that a killed run goes on, and that its claims can fall."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes.diffgrad import Config, function_claims, run, runs, training_claims, walks_of

TINY = {"epochs": 1, "batch_sizes": (256,), "timing_sizes": (10, 1000), "function_steps": 40}


def test_presets_are_plain_and_the_paper_is_the_papers():
    for name in ("quick", "small", "paper"):
        json.dumps(dataclasses.asdict(Config.preset(name)))
    paper = Config.preset("paper")
    assert paper.network == "resnet50" and paper.batch_sizes == (32, 64, 128) and paper.epochs == 100
    assert set(runs.RIVALS) < set(paper.optimizers) and len(paper.activations) == 4


def test_slopes_are_the_functions_derivatives():
    for name in ("F1", "F2", "F3"):
        function = runs.FUNCTIONS[name]
        for x in np.linspace(-1.07, 1.031, 41):  # no kink among these
            numeric = (function.value(x + 1e-6) - function.value(x - 1e-6)) / 2e-6
            assert function.slope(x) == pytest.approx(numeric, abs=1e-4), (name, x)
        assert (
            function.value(function.minimum) <= min(function.value(x) for x in np.linspace(-1, 1, 401)) + 1e-6
        )


@pytest.mark.slow
def test_the_functions_end_where_the_specification_says():
    ends = {
        name: [each["x"][-1] for each in found.values()]
        for name, found in walks_of(Config.preset("quick")).items()
    }
    assert ends["F1"] == pytest.approx([-0.30007, 0.20011, -0.30030], abs=1e-5)
    assert ends["F2"] == pytest.approx([-0.64296, 0.00009, -0.64312], abs=1e-5)
    assert ends["F2, released derivative"] == pytest.approx([-0.81214, 0.00018, -0.83506], abs=1e-5)
    assert ends["F3"] == pytest.approx([0.01357, 0.00051, 0.00213], abs=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    config = dataclasses.replace(Config.preset("quick"), **TINY)
    times = {"sizes": [10], "seconds": {"Adam, fused": [1.0], "diffGrad, eager": [2.0]}}
    monkeypatch.setattr(runs, "step_times", lambda *_: times)  # a clock is not the same twice
    whole = run(config, out=tmp_path / "whole")
    assert len(whole.figures) == 4 and len(whole.claims) == 9
    for figure in whole.figures:
        assert (tmp_path / "whole" / figure.file).stat().st_size < 200_000 and figure.alt
    original, calls = runs.train, []

    def killed(*args, **kwargs):
        calls.append(kwargs["optimizer_name"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(runs, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    again = run(config, out=tmp_path / "cut")
    assert calls == [*config.optimizers[:3], *config.optimizers[2:]]
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())


def test_every_optimizer_and_activation_trains():
    data = runs.data_of("digits", None)
    data = data._replace(x=data.x[:64], y=data.y[:64], test_x=data.test_x[:32], test_y=data.test_y[:32])
    options = {"kind": "cnn", "lr": 1e-3, "epochs": 2, "milestones": (1,), "batch_size": 32, "track_every": 2}
    for name in runs.OPTIMIZERS:
        found = runs.train(data, activation="relu", optimizer_name=name, seed=0, device="cpu", **options)
        assert np.isfinite(found["losses"]).all() and found["losses"][-1] < found["losses"][0]
        assert len(found["friction"]["mean"]) == (2 if name.startswith("diffGrad") else 0)
    for activation in ("leaky_relu", "elu", "selu"):
        found = runs.train(
            data, activation=activation, optimizer_name="diffGrad", seed=0, device="cpu", **options
        )
        assert found["friction"]["mean"][0] >= 0.5


@pytest.mark.slow
def test_the_full_scale_network_runs_on_a_users_cifar(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        x = rng.integers(0, 255, (10, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", x=x, y=np.arange(10, dtype=np.uint8))
    data = runs.data_of("cifar10", str(tmp_path))
    assert data.augment and data.x.shape == (10, 3, 32, 32)
    net = runs.network("resnet50", 10, 3, "relu", 0)
    assert sum(p.numel() for p in net.parameters()) == 23_520_842  # ResNet-50 with a stem for 32 x 32 pixels
    found = runs.train(
        data, kind="resnet50", activation="relu", optimizer_name="diffGrad", lr=1e-3, epochs=1, milestones=(),
        batch_size=10, track_every=1, seed=0, device="cpu",
    )  # fmt: skip
    assert np.isfinite(found["losses"]).all()


def test_bad_fields_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    for fields, message in (
        ({"optimizers": ("adan",)}, "optimizers: got 'adan'"),
        ({"activations": ("gelu",)}, "activations: got 'gelu'.*nearest: 'elu'"),
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
            ("relu", 64, name): [
                {"accuracy": a, "losses": [b], "friction": {"mean": [] if f is None else [f]}}
            ]
            for name, (a, b, f) in values.items()
        }

    assert all(c.holds for c in training_claims(found(0.97, 0.96, 0.95, 0.2, (0.6, 0.6, 0.6)), config))
    fallen = training_claims(found(0.95, 0.96, 0.96, 0.101, (0.5, 0.5005, 0.7)), config)
    assert not any(c.holds for c in fallen) and all(c.reason for c in fallen)
    half = [c.holds for c in training_claims(found(0.95, 0.96, 0.94, 0.101, (0.5, 0.52, 0.53)), config)]
    assert half == [False, True, False, True, False]

    def walks(diffgrad: float, adam: float, half: float):
        each = {"diffGrad": diffgrad, "Adam": adam, "Adam (half the rate)": half}
        return {
            name: {who: {"x": [runs.FUNCTIONS[name].minimum + x]} for who, x in each.items()}
            for name in runs.FUNCTIONS
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
        found = runs.step_times((10,), compiled=False, repeats=1)
    assert np.isnan(found["seconds"]["Adam, fused"]).all() and found["seconds"]["diffGrad, eager"][0] > 0
