"""The gifd recipe: a tiny run goes through, and its claims can hold and fall."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lineament.core.checks import InputError
from lineament.privacy.evolution import population
from lineament.recipes.gifd import Config, run
from lineament.recipes.gifd.claims import all_claims
from lineament.recipes.gifd.experiments import Trial, search_of, setting_of, split

TINY = {
    "pictures": 4,
    "prior_steps": 2,
    "width": 8,
    "code": 4,
    "steps": 2,
    "side": 8,
    "domains": ("in", "out"),
    "batches": (2,),
    "defences": ("none", "noise=0.005"),
    "scales": (0.5, 1.0),
}


@pytest.mark.slow
def test_a_tiny_run(tmp_path):
    config = dataclasses.replace(Config.preset("quick"), **TINY, attacks=("gifd", "no ball", "latent", "dlg"))
    found = run(config, out=tmp_path)
    assert len(found.claims) == 18 and [len(t.rows) for t in found.tables] == [2 * 4] * 2 + [8]
    assert all((tmp_path / f.file).stat().st_size > 0 for f in found.figures)
    closed = {row[1]: row[2] for row in found.tables[-1].rows if row[0] == "linear first layer"}
    assert closed["closed form"] > 60 > closed["ig"]
    for wrong, name in (({"pictures": 1}, "pictures"), ({"attacks": ("gifd", "ig")}, "attacks"), ({"batches": (4,)}, "batches"), ({"tuning": 900}, "tuning")):  # fmt: skip
        with pytest.raises(InputError, match=name):
            run(dataclasses.replace(config, **wrong), out=tmp_path / name)


def test_pictures_that_choose_the_step_sizes_are_never_judged():
    config = dataclasses.replace(Config.preset("quick"), **{**TINY, "tuning": 20})
    settings = [setting_of(config, "in", seed) for seed in range(3)]
    tuned, judged, known = (
        torch.cat([getattr(s, n) for s in settings]) for n in ("tuning", "audited", "public")
    )
    assert not set(tuned.tolist()) & set(judged.tolist()) and len(set(known.tolist())) > 1000
    for s in settings:
        assert not set(s.public.tolist()) & {*s.tuning.tolist(), *s.audited.tolist()}


def test_every_attack_takes_as_many_passes_at_each_step_size():
    config = Config.preset("small")
    layers, passes = 3, {}
    for attack in ("gifd", "latent", "ggl", "dlg"):
        search = search_of(config, attack, 3.0)
        assert search.rate == pytest.approx(0.3) and search.deviation == 3.0
        steps = search.preset(attack, layers).steps * (1 + layers if attack == "gifd" else 1)
        passes[attack] = steps * (3 * population(config.code) if attack == "ggl" else 7)
    assert max(passes.values()) <= 1.05 * min(passes.values())


def test_what_is_audited_is_never_public():
    y = torch.arange(200) % 10
    for data, domain in (("digits", "in"), ("digits", "out"), ("faces", "in"), ("faces", "out")):
        public, private = split(y, domain, 0, data)
        assert not set(public.tolist()) & set(private.tolist()) and len(public) + len(private) == 200
        if data == "faces" or domain == "out":
            assert not set(y[public].tolist()) & set(y[private].tolist())


def test_claims_can_hold_and_fall():
    config = dataclasses.replace(
        Config.preset("quick"), domains=("in", "out"), defences=("none", "prune=90", "noise=0.01"), pictures=8, batches=(4,)
    )  # fmt: skip
    spread = torch.linspace(-0.1, 0.1, 8)

    def trial(heights: dict[str, float], good: bool, defences: tuple[str, ...]) -> Trial:
        names = [f"{d} | {a}" for d in defences for a in heights]
        psnr = {name: heights[name.split(" | ")[1]] + spread.roll(k) for k, name in enumerate(names)}
        one = torch.tensor(1.0)
        return Trial(
            psnr, dict.fromkeys(names, torch.full((8,), 9.0 if good else 19.0)), dict.fromkeys(names, one), dict.fromkeys(names, 0.0 * one if good else one),
            dict.fromkeys(names, torch.tensor(float(good))), dict.fromkeys(names, torch.tensor([1.0, 3.0, 2.0] if good else [1.0, 2.0, 3.0])), torch.full((8,), 12.0),
        )  # fmt: skip

    def outcome(good: bool) -> list[bool]:
        trials = {}
        for domain, gain in {"in": 3.0 if good else 0.5, "out": 6.0 if good else 0.4}.items():
            heights = {"gifd": 20 + gain, "no ball": 19 + gain if good else 21 + gain, "latent": 20.0, "ig": 15.0 if good else 40.0}  # fmt: skip
            trials[domain] = [trial(heights, good, ("nothing", "prune 90", "noise 0.01"))]
        batches = trial({"gifd": 23.0 if good else 20.1, "latent": 20.0}, good, ("batches of 4", "prior knows the audited"))  # fmt: skip
        batches.psnr["prior knows the audited | latent"] += 8 if good else -1
        batches.psnr["batches of 4, labels given | gifd"] = batches.psnr["batches of 4 | gifd"] + (0 if good else 3)  # fmt: skip
        return [c.holds for c in all_claims(trials, [batches], config)]

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 22
