"""The gifd recipe: a tiny run goes through, and its claims can hold and fall."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes.gifd import ATTACKS, Config, run
from lineament.recipes.gifd.claims import all_claims
from lineament.recipes.gifd.experiments import Trial, split

TINY = {
    "pictures": 2,
    "prior_steps": 2,
    "width": 8,
    "code": 4,
    "steps": 2,
    "side": 8,
    "domains": ("in", "out"),
}


def test_a_tiny_run(tmp_path):
    found = run(dataclasses.replace(Config.preset("quick"), **TINY), out=tmp_path)
    assert len(found.claims) == 10 and len(found.tables) == 2
    assert all((tmp_path / f.file).stat().st_size > 0 for f in found.figures)
    with pytest.raises(InputError, match="pictures"):
        run(dataclasses.replace(Config.preset("quick"), pictures=1), out=tmp_path / "other")


def test_what_is_audited_is_never_public():
    y = torch.arange(200) % 10
    for data, domain in (("digits", "in"), ("digits", "out"), ("faces", "in"), ("faces", "out")):
        public, private = split(y, domain, 0, data)
        assert not set(public.tolist()) & set(private.tolist()) and len(public) + len(private) == 200
        if data == "faces" or domain == "out":
            assert not set(y[public].tolist()) & set(y[private].tolist())


def test_claims_can_hold_and_fall():
    config = dataclasses.replace(Config.preset("quick"), domains=("in", "out"))

    def trial(gain: float, good: bool) -> Trial:
        spread = torch.linspace(-0.1, 0.1, 6)
        height = {
            "gifd": 20 + gain,
            "no ball": 20 + gain - 1 if good else 21 + gain,
            "latent": 20.0,
            "ig": 15.0 if good else 40.0,
        }
        names = [f"{d} | {a}" for d in ("nothing", "prune 90") for a in ATTACKS]
        psnr = {name: height[name.split(" | ")[1]] + spread.roll(k) for k, name in enumerate(names)}
        stages = torch.tensor([1.0, 3.0, 2.0] if good else [1.0, 2.0, 3.0])
        wrong = torch.full((6,), 9.0 if good else 19.0)
        return Trial(
            psnr, dict.fromkeys(names, wrong), dict.fromkeys(names, torch.tensor(1.0)), dict.fromkeys(names, torch.tensor(float(good))),
            dict.fromkeys(names, stages), torch.full((6,), 12.0), {},
        )  # fmt: skip

    def outcome(good: bool) -> list[bool]:
        gains = (3.0, 6.0) if good else (0.5, 0.4)
        return [
            c.holds
            for c in all_claims({"in": [trial(gains[0], good)], "out": [trial(gains[1], good)]}, config)
        ]

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 10
