"""The gifd recipe: a tiny run goes through, and its claims can hold and fall."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from lineament.core.checks import InputError
from lineament.privacy.evolution import population
from lineament.recipes.gifd import Config, run
from lineament.recipes.gifd.claims import all_claims
from lineament.recipes.gifd.experiments import Trial, in_turn, search_of, setting_of, split

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
    assert len(found.claims) == 19 and [len(t.rows) for t in found.tables] == [2 * 4] * 2 + [8]
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


def test_the_next_message_is_another_persons():
    people = torch.tensor([4, 4, 4, 1, 1, 2])
    rows = in_turn(torch.arange(6), people)
    assert rows.tolist() == [0, 3, 5, 1, 4, 2] and sorted(rows.tolist()) == list(range(6))


def test_bangla_digits_are_asked_for_where_they_are(tmp_path):
    config = dataclasses.replace(
        Config.preset("quick"), **{**TINY, "domains": ("bangla",)}, data_folder=str(tmp_path)
    )
    with pytest.raises(InputError, match=r"cmaterdb_3_1_1\.npz is not in it"):
        setting_of(config, "bangla", 0)
    x = np.random.default_rng(0).integers(0, 255, (60, 32, 32)).astype(np.uint8)
    y = np.arange(60) % 10
    np.savez(tmp_path / "cmaterdb_3_1_1.npz", train_images=x[:40], train_labels=y[:40], test_images=x[40:], test_labels=y[40:])  # fmt: skip
    found = setting_of(config, "bangla", 0)
    assert len(found.public) == 1797 and int(found.audited.min()) >= 1797 and found.x.shape[1:] == (1, 8, 8)
    with pytest.raises(InputError, match="domains: got 'bangla' with faces"):
        run(dataclasses.replace(config, data="faces"), out=tmp_path / "run")


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
            dict.fromkeys(names, torch.tensor(float(good))), dict.fromkeys(names, torch.tensor([1.0, 3.0, 2.0] if good else [1.0, 2.0, 3.0])),
            dict.fromkeys(names, torch.tensor([1.0, 3.0, 2.0] if good else [1.0, 2.0, 3.0]).repeat(8, 1) + spread[:, None]), dict.fromkeys(names, torch.tensor([1.0, 0.0 if good else 1.0, 0.02])),
            torch.full((8,), 12.0),
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

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 24
