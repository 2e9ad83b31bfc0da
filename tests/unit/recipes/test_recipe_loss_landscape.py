"""The loss-landscape recipe: small, resumed with the same result, and its shifts do what they say."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lineament.core.checks import InputError
from lineament.data.samples import Samples
from lineament.measure.landscape.results import Plane
from lineament.recipes import loss_landscape
from lineament.recipes.loss_landscape import SHIFTS, Config, fresh, measure, run, shifted
from lineament.recipes.loss_landscape.claims import Measured, Shifted, Spectrum, claims

TINY = {"epochs": 2, "lanczos": 8, "grid": 3, "jobs": 1}


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    config = dataclasses.replace(Config.preset("quick"), **TINY)
    whole = run(config, out=tmp_path / "whole")
    assert len(whole.claims) == 7 and len(whole.figures) == 3
    assert all((tmp_path / "whole" / figure.file).stat().st_size < 400_000 for figure in whole.figures)
    calls = []

    def killed(*args):
        calls.append(args[3])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args)

    monkeypatch.setattr(loss_landscape, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    again = run(config, out=tmp_path / "cut")
    assert calls == ["plain", "batch norm", "batch norm"]
    assert [(c.observed, c.holds) for c in again.claims] == [(c.observed, c.holds) for c in whole.claims]


def test_claims_can_fail():
    def spectrum(value, accuracy=0.5):
        return Spectrum(re=value, k=value, k_spread=0.2, top=1.0, trace=1.0, loss=1.0, accuracy=accuracy)

    grid = torch.arange(-1.0, 2.0)
    level = Plane(grid, grid, torch.ones(3, 3))
    planes = {f"{axes}, {mode}": level for axes in ("random", "hessian") for mode in ("eval", "batch")}
    shifts = [Shifted("noise", 0.0, spectrum(a, a)) for a in (0.1, 0.5, 0.9)]
    bad = Measured(spectrum(0.5), spectrum(0.5), {}, shifts, planes, near=0.5, far=0.5)
    found = claims({"batch norm, seed 0": bad})
    assert len(found) == 7 and not any(claim.holds for claim in found)


def test_shifts_move_and_rotate():
    x = torch.zeros(1, 1, 8, 8)
    x[0, 0, 4, 3] = 1
    moved = shifted(x, "translation", 1.0, 0)
    assert float(moved[0, 0, 4, 4]) == pytest.approx(1, abs=1e-5)
    assert torch.allclose(shifted(x, "rotation", 0.0, 0), x, atol=1e-5)
    assert float((shifted(x, "rotation", 45.0, 0) - x).abs().sum()) > 0.5
    assert torch.equal(shifted(x, "noise", 0.0, 0), x)
    noisy = shifted(torch.zeros(50, 1, 8, 8), "noise", 0.3, 0)
    assert float(noisy.std()) == pytest.approx(0.3, abs=0.02)
    assert sum(map(len, SHIFTS.values())) == 13


def test_missing_data_is_named_and_the_full_network_has_no_norm_if_plain(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    config = Config.preset("paper")
    with pytest.raises(InputError, match="data_folder"):
        run(config, out=tmp_path)
    data = Samples(torch.zeros(2, 3, 8, 8), torch.zeros(2).long(), ("a", "b"))
    net = fresh(config, data, "plain", 0)
    assert not [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
