"""The loss-landscape recipe: small, resumed with the same result, and its shifts do what they say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes import loss_landscape
from lineament.recipes.loss_landscape import Config, run
from lineament.recipes.loss_landscape import task as tasks

TINY = {"epochs": 2, "lanczos": 8, "grid": 3}


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    config = dataclasses.replace(Config.preset("quick"), **TINY)
    whole = run(config, out=tmp_path / "whole")
    assert len(whole.claims) == 7 and len(whole.figures) == 3
    assert whole.claims[5].holds, whole.claims[5]
    assert all((tmp_path / "whole" / figure.file).stat().st_size < 400_000 for figure in whole.figures)
    original, calls = loss_landscape._one, []

    def one(*args):
        calls.append(args[2])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(loss_landscape, "_one", one)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    again = run(config, out=tmp_path / "cut")
    assert calls == ["plain", "batch norm", "batch norm"]
    assert [(c.observed, c.holds) for c in again.claims] == [(c.observed, c.holds) for c in whole.claims]


def test_claims_can_fail():
    point = {"re": 0.5, "k": 0.5, "k_spread": 0.2, "accuracy": 0.5, "loss": 1.0, "top": 1.0, "trace": 1.0}
    shifts = [{**point, "accuracy": a, "re": a, "k": a} for a in (0.1, 0.5, 0.9)]
    planes = {
        f"{axes}, {mode}": {"rise": 1.0} for axes in ("random", "hessian") for mode in ("eval", "batch")
    }
    bad = {
        "init": point,
        "trained": point,
        "shifts": shifts,
        "planes": planes,
        "curvature": {"near": 0.5, "far": 0.5},
    }
    found = loss_landscape.claims({"batch norm, seed 0": bad})
    assert len(found) == 7 and not any(claim.holds for claim in found)


def test_shifts_move_and_turn():
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 4, 3] = 1
    moved = tasks.shifted(x, "translation", 1.0, 0)
    assert float(moved[0, 0, 4, 4]) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(tasks.shifted(x, "rotation", 0.0, 0), x, atol=1e-5)
    assert float((tasks.shifted(x, "rotation", 45.0, 0) - x).abs().sum()) > 0.5
    assert torch.equal(tasks.shifted(x, "noise", 0.0, 0), x)
    noisy = tasks.shifted(torch.zeros(50, 1, 8, 8), "noise", 0.3, 0)
    assert float(noisy.std()) == pytest.approx(0.3, abs=0.02)
    assert len(tasks.SHIFTS) == 13


def test_missing_data_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    with pytest.raises(InputError, match="data_folder"):
        run(Config.preset("paper"), out=tmp_path)
    net = tasks.training(
        "plain",
        "resnet18",
        tasks.Task((torch.zeros(2, 3, 8, 8), torch.zeros(2).long()), (torch.zeros(1), torch.zeros(1)), 10),
        epochs=1,
        lr=1e-3,
        batch_size=2,
    ).fresh(0)
    assert not [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
