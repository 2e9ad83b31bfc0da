"""The tract recipe on a small scale: its data, the predicates, a killed run, and that missing data is said before any work."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes import tract as recipe
from lineament.recipes.tract import Config, run, training
from lineament.recipes.tract.claims import (
    Best,
    Digits,
    Pair,
    ablation_claims,
    cifar_claims,
    digit_claims,
    speed_up,
)

TINY = {"lams": (0.1,), "lengths": (1, 4, 16), "seeds": 1, "ablation_lengths": (4,), "ablation_seeds": 1}


def test_digits_of_varied_contrast():
    plain, varied = training.digits(0, contrast=False), training.digits(0)
    assert plain.x.shape == (898, 64) and plain.test_x.shape == (899, 64)
    for split in (plain, varied):
        assert abs(float(split.x.mean())) < 1e-6 and abs(float(split.x.std()) - 1) < 1e-6
    spread = lambda x: float((x.amax(1) - x.amin(1)).std())  # noqa: E731
    assert spread(varied.x) > 5 * spread(plain.x)
    raw = training.digits(0, scale="bytes").x
    assert float(raw.min()) >= 0 and 200 < float(raw.max()) <= 255
    torch.testing.assert_close(training.digits(0, scale="image").x.std(1), torch.ones(898))
    # Whitening with 0.1 added to the variances: v becomes v / (v + 0.1), along the same directions.
    variances = torch.linalg.eigvalsh(torch.cov(plain.x.T))
    white = torch.linalg.eigvalsh(torch.cov(training.digits(0, contrast=False, scale="zca").x.T))
    torch.testing.assert_close(white, variances / (variances + 0.1), rtol=1e-3, atol=1e-4)
    assert torch.equal(training.digits(3).x, training.digits(3).x)


def test_the_networks_have_the_layer_that_is_trained():
    for kind in ("mlp", "dual-norm", "resnet", "resnet18"):
        net = training.network(kind, 0)
        weight = training.first_weight(net)
        assert weight.shape == (
            (64, 64) if kind in ("mlp", "dual-norm") else (16 if kind == "resnet" else 64, 3, 3, 3)
        )
    assert torch.equal(
        training.first_weight(training.network("mlp", 1)), training.first_weight(training.network("mlp", 1))
    )


def test_the_transformer():
    pytest.importorskip("transformers")
    net = training.network("vit", 0)
    assert training.first_weight(net).shape == (96, 3, 4, 4)
    assert net(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 10)


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe, "RATES", {"sgd": (0.1,), "adam": (0.01,)})
    monkeypatch.setattr(recipe, "BYTE_RATES", (0.01,))
    config = dataclasses.replace(Config.preset("quick"), **TINY)
    whole = run(config, out=tmp_path / "whole")
    assert [len(whole.claims), len(whole.tables), len(whole.figures)] == [6, 4, 2]
    assert all((tmp_path / "whole" / f.file).stat().st_size < 200_000 and f.alt for f in whole.figures)
    control = next(c for c in whole.claims if "10,000" in c.name)
    assert control.holds, control
    original, calls = recipe.ablation, []

    def killed(config, name):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(config, name)

    monkeypatch.setattr(recipe, "ablation", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    again = run(config, out=tmp_path / "cut")
    assert len(calls) == 3 + len(recipe.VARIANTS) - 2
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())


@pytest.mark.slow
def test_photographs_of_the_user(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        x = rng.integers(0, 255, (40, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", x=x, y=(np.arange(40) % 10).astype(np.uint8))
    config = dataclasses.replace(
        Config.preset("quick"), **{**TINY, "ablation_lengths": (), "lengths": (4,)}, networks=("resnet",), epochs=(1, 2),
        train_images=30, test_images=20, data_folder=str(tmp_path), photographs="cifar100",
    )  # fmt: skip
    outcome = run(config, out=tmp_path / "out")
    assert sum("CIFAR-100, resnet" in c.name for c in outcome.claims) == 2
    assert outcome.tables[-2].columns == ["epochs", "ordinary", "lambda 0.1"]
    first, fifth = (float(word) for word in outcome.tables[-2].rows[0][1].split("; "))
    assert 0 <= first <= fifth <= 100
    assert [row[:2] for row in outcome.tables[-1].rows] == [
        ["digits of varied contrast", "0.1"],
        ["CIFAR-100, resnet", "0.1"],
    ]


def test_missing_data_and_wrong_fields_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.delenv("LINEAMENT_DATA", raising=False)
    with pytest.raises(InputError, match="cifar10 needs a folder"):
        run(Config.preset("small"), out=tmp_path / "out")
    with pytest.raises(InputError, match=r"networks: got \['vgg'\]"):
        run(dataclasses.replace(Config.preset("quick"), networks=("vgg",)), out=tmp_path / "out")
    with pytest.raises(InputError, match=r"the claims need 0\.1 and 4"):
        run(dataclasses.replace(Config.preset("quick"), lams=(0.2,)), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_speed_up_is_the_ratio_of_lengths_at_equal_accuracy():
    ordinary = {2: 70.0, 4: 80.0, 16: 90.0}
    found = speed_up(ordinary, {2: 80.0, 4: 85.0, 8: 60.0, 16: 95.0})
    assert found == {2: 2.0, 4: 2.0, 8: 0.0, 16: math.inf}
    assert speed_up(ordinary, ordinary) == dict.fromkeys(ordinary, 1.0)
    words = recipe._speed_ups(
        *({str(e): [a] for e, a in by.items()} for by in (ordinary, {2: 95.0, 4: 60.0}))
    )
    assert words == "2: > 8.0, 4: < 0.5"


def test_claims_fall_when_the_numbers_do():
    config = dataclasses.replace(Config.preset("quick"), lengths=(4, 16), lams=(0.05, 0.1))

    def digits(ours, theirs, other):
        arms = {
            "ordinary": {"4": [80.0], "16": [theirs]},
            "0.1": {"4": [ours], "16": [95.0]},
            "0.05": {"4": [other], "16": [95.0]},
        }
        own = {"4": Best(0.3, [ours]), "16": Best(0.1, [95.0])}
        return Digits({"4": 0.3, "16": 0.1}, arms, own)

    assert all(c.holds for c in digit_claims(digits(93.0, 92.0, 93.5), [80.1], config))
    assert [c.holds for c in digit_claims(digits(91.0, 92.0, 79.0), [82.0], config)] == [False] * 4
    same = {"same contrast for all": {"4": Pair(0.1, [95.0], [97.0])}}
    raw = {"ordinary": Best(0.1, [80.0]), "0.1": Best(0.1, [90.0]), "0.05": Best(0.1, [90.5])}
    assert all(c.holds for c in ablation_claims(digits(93.0, 92.0, 93.5), same, raw))
    raw["0.05"] = Best(0.1, [95.0])
    assert [c.holds for c in ablation_claims(digits(81.0, 92.0, 93.5), same, raw)] == [False, False]
    curves = {"resnet": {"ordinary": {"4": [[50.0]], "8": [[60.0]]}, "0.1": {"4": [[61.0]], "8": [[62.0]]}}}
    assert all(c.holds for c in cifar_claims(curves, config))
    curves["resnet"]["0.1"]["4"] = [[49.0]]
    assert [c.holds for c in cifar_claims(curves, config)] == [False, False]
    assert all(c.holds or c.reason for c in cifar_claims(curves, config))
