"""The neural-collapse recipe: every part on a small scale, its data formats, and that a killed run goes on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes import neural_collapse
from lineament.recipes.neural_collapse import Config, load_data, run, weight_decay_run
from lineament.recipes.neural_collapse.claims import Collapsed, decay_claims

TINY = {
    "layers": 2,
    "layer_width": 16,
    "layer_epochs": 2,
    "epochs": 2,
    "milestones": (1,),
    "widths": (16,),
    "losses": ("mse", "ce"),
    "lambda_h": (0.1, 0.25),
}


def test_presets_name_themselves_and_hold_no_path():
    for name in ("quick", "small", "paper"):
        config = Config.preset(name)
        assert config.preset == name and config.data_folder is None
        json.dumps(dataclasses.asdict(config))
    assert Config.preset("paper").network == "resnet18"
    with pytest.raises(InputError, match="preset: got 'fast'"):
        Config.preset("fast")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    config = dataclasses.replace(Config.preset("quick"), **TINY)
    threads = torch.get_num_threads()
    whole = run(config, out=tmp_path / "whole")
    assert len(whole.claims) == 7 + 2 * 7 and len(whole.figures) == 5
    for figure in whole.figures:
        assert (tmp_path / "whole" / figure.file).stat().st_size < 150_000 and figure.alt
    theory = {c.name: c for c in whole.claims[2:7]}
    assert all(claim.holds for claim in theory.values()), theory

    calls = []

    def killed(*args):
        calls.append(args[3])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return weight_decay_run(*args)

    monkeypatch.setattr(neural_collapse, "weight_decay_run", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    again = run(config, out=tmp_path / "cut")
    # Three trainings were stored; the fourth and the six that followed were run.
    assert len(calls) == 4 + 7
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_the_full_scale_network_runs_on_a_users_cifar(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (20, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", x=x.transpose(0, 2, 3, 1), y=np.arange(20) % 10)
    config = dataclasses.replace(Config.preset("paper"), data_folder=str(tmp_path), epochs=1, batch_size=10)
    data = load_data(config)
    assert torch.allclose(data.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    found = weight_decay_run(config, data, "ce", "0 features", 0)
    assert np.isfinite([found.nc1_tilde, found.nc2, found.nc3]).all()


def test_missing_or_wrong_data_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    with pytest.raises(InputError, match="cifar10 needs a folder"):
        run(Config.preset("paper"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="losses: got"):
        run(dataclasses.replace(Config.preset("quick"), losses=("hinge",)), out=tmp_path)


def test_claims_fall_when_the_numbers_do():
    def holds(features_2x: float, features_0: float, last: float, accuracy: float = 1.0):
        values = {
            "baseline": 1.0,
            "2x last": last,
            "0 last": 1.0,
            "2x features": features_2x,
            "0 features": features_0,
        }
        ends = {s: Collapsed(v, v, v, v, v, accuracy) for s, v in values.items()}
        return [claim.holds for claim in decay_claims("mse", ends)]

    assert holds(0.8, 1.2, 1.05) == [True] * 7
    assert holds(1.1, 1.2, 1.05)[1:3] == [True, False]
    assert holds(0.99, 1.01, 1.5)[1:3] == [False, True]
    assert not holds(0.8, 1.2, 1.05, accuracy=0.9)[0]
