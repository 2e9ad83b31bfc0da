"""The recipe of gradient-normalised smoothness: a resumed run, and claims that can fall."""

from __future__ import annotations

import dataclasses
import json

import pytest

from lineament.recipes.gns import Config, run, runs
from lineament.recipes.gns.claims import _above

TINY = {"lse_size": 30, "chebyshev_size": 10, "slow_iterations": 60, "fisher_iterations": 12, "directions": 3}


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    config = dataclasses.replace(Config.preset("quick"), **TINY)
    whole = run(config, out=tmp_path / "whole")
    assert len(whole.claims) == 11 and len(whole.figures) == 3 and len(whole.tables) == 6
    rosenbrock = next(claim for claim in whole.claims if claim.name.startswith("Rosenbrock: at most"))
    assert rosenbrock.holds
    original = runs.softmax
    monkeypatch.setattr(runs, "softmax", lambda config: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    monkeypatch.setattr(runs, "softmax", original)
    monkeypatch.setattr(runs, "log_sum_exp", None)  # stored: not run again
    again = run(config, out=tmp_path / "cut")
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())


def test_claims_fall_when_the_numbers_do():
    nothing = runs.Run(5, 9, 1e-3, [], [], [], [], [])
    assert nothing.count == float("inf") and dataclasses.replace(nothing, gap=0.0).count == 5
    ours = dataclasses.replace(nothing, gammas=[4.0, 4.0], norms=[10.0, 1.0, 0.1])
    theirs = dataclasses.replace(nothing, gammas=[8.0, 8.0], norms=[5.0, 2.0])
    assert _above(ours, theirs) == pytest.approx(0.5)
