"""The modhifi recipe: a tiny run goes through, images keep their kind, and its claims can hold and fall."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes.kit.image_sets import image_sets
from lineament.recipes.modhifi import Config, run
from lineament.recipes.modhifi.claims import all_claims
from lineament.recipes.modhifi.language import ARMS as TOLD
from lineament.recipes.modhifi.language import REMOVED, Spoken
from lineament.recipes.modhifi.networks import SOURCES, images, of_class
from lineament.recipes.modhifi.pruning import ARMS, Trial
from lineament.recipes.modhifi.unlearning import Unlearned

TINY = {
    "networks": ("tiny-cnn",),
    "width": 8,
    "epochs": 1,
    "samples": 200,
    "calibration": 40,
    "shares": (0.5,),
    "noise": (1.0,),
    "forget": (9,),
    "forget_shares": (0.1,),
    "relearning": 2,
    "shadows": 3,
    "bytes": 20_000,
    "length": 32,
    "lm_width": 16,
    "lm_layers": 1,
    "lm_steps": 2,
}


def test_a_tiny_run(tmp_path):
    found = run(dataclasses.replace(Config.preset("quick"), **TINY), out=tmp_path)
    assert len(found.claims) == 18 and len(found.tables) == 3
    assert all((tmp_path / f.file).stat().st_size > 0 for f in found.figures) and len(found.figures) == 3
    with pytest.raises(InputError, match="forget"):
        run(dataclasses.replace(Config.preset("quick"), forget=(12,)), out=tmp_path / "other")


@pytest.mark.parametrize("source", SOURCES)
def test_images_to_score_on(source):
    config = dataclasses.replace(Config.preset("quick"), calibration=100)
    train, _ = image_sets("digits")
    x = images(config, train, source, 0)
    assert x.shape == (100, 1, 8, 8) and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x, images(config, train, source, 0)) and not torch.equal(
        x, images(config, train, source, 1)
    )
    if source == "generated":
        # Images of a class lie nearer to its mean than to another's.
        means = torch.stack([train.inputs[train.targets == c].float().mean(0).flatten() for c in range(10)])
        drawn = of_class(train, 3, 50, 0).flatten(1)
        assert (torch.cdist(drawn, means).argmin(1) == 3).float().mean() > 0.8


def test_claims_can_hold_and_fall():
    config = Config.preset("quick")

    def outcome(good: bool) -> list[bool]:
        height = {"alone": 0.1, "compensation": 0.5, "norms": 0.6, "both": 0.9}
        if not good:
            height = {"alone": 0.5, "compensation": 0.4, "norms": 0.6, "both": 0.5}
        pruned = {
            f"{s:g} | {c} | {r}": height[r] + 0.01 * (c == "saliency") * (1 if good else -1)
            for s in config.shares
            for c, r in ARMS
        }
        sources = {
            "generated": 0.9 if good else 0.5, "real": 0.9, "foreign": 0.5, "noise": 0.5,
        }  # fmt: skip
        trial = Trial(
            0.95, {f"{s:g}": s for s in config.shares}, pruned, 0.0 if good else 0.1, 4, sources, 0.9, {"1": [0.2, 0.5] if good else [0.5, 0.2]},
            {"a": [0.9 if good else 0.5, 0.3]},
        )  # fmt: skip
        tenth = config.forget_shares[0]
        shares = {f"{s:g}": [0.05, 0.95] if good else [0.5, 0.6] for s in config.forget_shares}
        gone = Unlearned(
            [0.96, 0.96], shares, tenth, [0.9, 0.96] if good else [0.4, 0.9], [0.0, 0.9], [0.0, 0.95], "erased" if good else "muted", [0.5, 0.9, 0.5],
            [None, 16, None], [0.51 if good else 0.9, 0.02],
        )  # fmt: skip
        told = {
            f"{g:g} | {c} | {r}": (5.0 if (r == "compensation") == good else 6.0)
            for g in REMOVED
            for c, r in TOLD
        }
        return [c.holds for c in all_claims({"cnn": [trial]}, {"cnn": [gone]}, [Spoken(4.0, told)], config)]

    assert all(outcome(True)) and not any(outcome(False)) and len(outcome(True)) == 18
