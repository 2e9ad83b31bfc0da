"""The neural-collapse recipe: every part on a small scale, its data formats, and that a killed run goes on."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes.neural_collapse import Config, _decay_claims, run, training

TINY = {
    "layers": 2,
    "layer_width": 16,
    "layer_epochs": 2,
    "epochs": 2,
    "milestones": (1,),
    "widths": (16,),
    "every": 1,
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

    original, calls = training.weight_decay_run, []

    def killed(*args, **kwargs):
        calls.append(kwargs["setting"])
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(training, "weight_decay_run", killed)
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
    data = training.load_data("cifar10", str(tmp_path))
    assert torch.allclose(data.inputs.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    curve = training.weight_decay_run(
        data, kind="resnet18", widths=(), setting="0 features", loss="ce", epochs=1, milestones=[], lr=0.01,
        weight_decay=5e-4, batch_size=10, every=1, seed=0, device="cpu",
    )  # fmt: skip
    assert curve["epoch"] == [1] and np.isfinite(curve["nc1_tilde"] + curve["nc2"] + curve["nc3"]).all()


def test_missing_or_wrong_data_is_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    with pytest.raises(InputError, match="cifar10 needs a folder"):
        run(Config.preset("paper"), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="losses: got"):
        run(dataclasses.replace(Config.preset("quick"), losses=("hinge",)), out=tmp_path)


def test_claims_fall_when_the_numbers_do():
    def ends(features_2x: float, features_0: float, last: float, accuracy: float = 1.0):
        values = {
            "baseline": 1.0,
            "2x last": last,
            "0 last": 1.0,
            "2x features": features_2x,
            "0 features": features_0,
        }
        return {s: {"nc1_tilde": v, "nc1": v, "nc2": v, "accuracy": accuracy} for s, v in values.items()}

    assert all(c.holds for c in _decay_claims("mse", ends(0.8, 1.2, 1.05)))
    assert [c.holds for c in _decay_claims("mse", ends(1.1, 1.2, 1.05))][1:3] == [True, False]
    assert [c.holds for c in _decay_claims("mse", ends(0.99, 1.01, 1.5))][1:3] == [False, True]
    fallen = _decay_claims("ce", ends(0.8, 1.2, 1.05, accuracy=0.9))[0]
    assert not fallen.holds and fallen.reason
