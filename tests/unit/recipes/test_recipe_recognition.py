"""The recipes elasticface and unpg: every part on a small scale, that a killed run goes on, and that their claims can fall."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lineament.core.checks import InputError
from lineament.recipes import elasticface, unpg
from lineament.recipes.elasticface.claims import Found, claims_of
from lineament.recipes.elasticface.heads import GRID, HEADS
from lineament.recipes.kit.recognition import Recognised
from lineament.recipes.unpg import claims as unpg_claims
from lineament.recipes.unpg.training import LOSSES, Dropped

SMALL = {"people": 12, "pictures": 4, "strangers": 8, "stranger_pictures": 3, "epochs": 1, "seeds": 2}


@pytest.mark.slow
def test_elasticface_runs_and_a_killed_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(GRID, "soft-max", (GRID["soft-max"][0], (8.0,), (0.0,)))
    config = elasticface.Config(
        heads=tuple(HEADS), clean_heads=("soft-max", "ArcFace"), tuned_heads=("soft-max",), tuning_people=4, **SMALL
    )  # fmt: skip
    original, calls = elasticface.recognise, []

    def killed(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(elasticface, "recognise", killed)
    with pytest.raises(KeyboardInterrupt):
        elasticface.run(config, out=tmp_path / "cut")
    outcome = elasticface.run(config, out=tmp_path / "cut")
    assert len(calls) == 1 + (10 + 2) * 2 + 1 + 2 and len(outcome.tables) == 4
    assert all((tmp_path / "cut" / figure.file).exists() for figure in outcome.figures)
    with pytest.raises(InputError, match=r"heads: got 'arcface'.*nearest: 'ArcFace'"):
        elasticface.run(replace(config, heads=("arcface",)), out=tmp_path / "other")


def recognised(tar: float) -> Recognised:
    return Recognised(tar, tar, tar, tar, tar, tar, 0.0, [1.0])


def test_elasticface_claims_rise_and_fall():
    order = (
        "soft-max",
        "ArcFace",
        "CosFace",
        "Elastic-Cos",
        "Elastic-Arc",
        "its mean, not random",
        "Elastic-Arc+, reversed",
    )
    order += ("Elastic-Arc, large σ", "Elastic-Arc+, official", "Elastic-Arc+, rank")
    rising = {name: [recognised(0.1 * k), recognised(0.1 * k + 0.01)] for k, name in enumerate(order)}
    falling = {name: [recognised(0.9 - 0.1 * k), recognised(0.9 - 0.1 * k)] for k, name in enumerate(order)}
    right = {"independent": 0.0, "rank": -1.0, "official": 0.02, "reversed": 1.0}
    wrong = {**right, "official": -0.8}
    for runs, correlation, holds in ((rising, right, True), (falling, wrong, False)):
        claims = claims_of(Found(wrong=runs, clean=runs, tuned=runs, faces=runs, correlation=correlation))
        assert len(claims) == 21 and all(claim.holds == holds for claim in claims)
    alone = claims_of(Found(wrong={name: each[:1] for name, each in rising.items()}))
    assert [c.holds for c in alone] == [False] * 8 + [True] and "one seed" in alone[0].reason


@pytest.mark.slow
def test_unpg_runs_and_says_what_is_dropped(tmp_path):
    config = unpg.Config(losses=tuple(LOSSES), **SMALL)
    outcome = unpg.run(config, out=tmp_path)
    assert len(outcome.claims) == 10 and len(outcome.tables) == 2
    assert json.dumps(unpg.run(config, out=tmp_path).to_dict()) == json.dumps(outcome.to_dict())


def test_unpg_claims_rise_and_fall():
    names = [n for n in LOSSES if n not in (unpg_claims.UNIFIED, "ArcFace + UNPG")]
    up = {n: [recognised(0.5), recognised(0.51)] for n in names}
    up |= {n: [recognised(0.6), recognised(0.61)] for n in (unpg_claims.UNIFIED, "ArcFace + UNPG")}
    down = {n: [recognised(0.9), recognised(0.9)] for n in names}
    down |= {n: each for n, each in up.items() if n not in names}
    close = {unpg_claims.UNIFIED: [recognised(0.51)] * 2, "CosFace": [recognised(0.5)] * 2}
    noise, people = [Dropped(1000, 20, 10, 5)], [Dropped(1000, 20, 10, 1)]
    for runs, clean, dropped, holds in ((up, close, noise, True), (down, down, people, False)):
        claims = unpg_claims.claims_of(unpg_claims.Found(runs, clean, dropped))
        assert len(claims) == 10 and all(claim.holds == holds for claim in claims)
