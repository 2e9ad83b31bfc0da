"""The recipe of gradient autoencoders: a killed run goes on, the language model is opened as a user's, and claims can fall."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from lineament.recipes import gsae
from lineament.recipes.gsae import CONTROLS, Config, run
from lineament.recipes.gsae.claims import language_claims, planted_claims
from lineament.recipes.gsae.language import Spoken
from lineament.recipes.gsae.planted import FEATURES, INFERENCE, OURS, RANDOM, TOPK, Measured, World

TINY = {
    "rows": 1500, "test_rows": 400, "host_epochs": 1, "width": 48, "steps": 5, "batch_size": 200, "contexts": 2, "seeds": (0, 1),
    "betas": (3.0,), "controls": CONTROLS,
}  # fmt: skip
SPEECH = {"language_model": "tiny", "letters": 4000, "length": 16, "lm_epochs": 1, "lm_width": 32, "lm_k": 2, "lm_tokens": 600,
          "lm_batch": 200, "lm_test_tokens": 100}  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    config = dataclasses.replace(Config.preset("quick"), **TINY, **SPEECH)
    whole = run(config, out=tmp_path / "whole")
    assert len(whole.claims) == 14 and len(whole.figures) == 2 and len(whole.tables) == 2
    assert (
        len(whole.tables[0].rows) == 9 + 7
    )  # eight dictionaries less the late one, with neurons and PCA; seven select by gradient
    original = gsae.spoken
    monkeypatch.setattr(gsae, "spoken", lambda config, out: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    monkeypatch.setattr(gsae, "spoken", original)
    monkeypatch.setattr(gsae, "planted", None)  # stored: not run again
    again = run(config, out=tmp_path / "cut")
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())


def test_the_planted_world_is_the_specification_s():
    world = World.drawn(0)
    x, y = world.samples(4000, 1)
    a = torch.linalg.lstsq(world.atoms.T.double(), x.double().T).solution
    assert x.shape == (4000, 64) and a.shape[0] == FEATURES and y.max() == 7
    # The mean squared norm: each feature is on with probability 0.04, functional ones of size U(0.3, 0.6), others of U(1, 2).
    expected = 0.04 * 96 * ((0.45**2 + 0.09 / 12) + (1.5**2 + 1 / 12))
    centred = x - x.mean(0)
    assert float(centred.square().sum(1).mean()) == pytest.approx(expected, rel=0.15)


def test_claims_fall_when_the_numbers_do():
    one = Measured("", "", 0.10, 0.01, 0.2, 0.4, 0.1, 0.1, 6.0, 0.5, 0.5, 0.1)
    better = dataclasses.replace(one, kl=0.09, recovered=0.44, dead=0.05, steering=0.2)

    def found(ours: Measured) -> dict[int, list[Measured]]:
        rows = [(TOPK, "activation", one), (INFERENCE, "gradient", one), (RANDOM, "gradient", one)]
        rows += [(OURS, mode, ours) for mode in ("activation", "gradient")]
        return {0: [dataclasses.replace(m, name=name, mode=mode) for name, mode, m in rows]}

    assert all(claim.holds for claim in planted_claims(found(better)))
    worse = dataclasses.replace(one, kl=0.097, recovered=0.42, dead=0.2, fvu=0.11)
    assert [claim.holds for claim in planted_claims(found(worse))] == [False] * 3 + [True] + [False] * 2 + [
        True
    ] * 2 + [False]
    said = Spoken("TopK", "activation", 2.0, 2.1, 0.01, 0.1, 0.01, 0.9, 0.1, 0.1, 0.3)
    others = [
        dataclasses.replace(said, name="g-SAE", mode=mode, ce_substituted=2.2, kl=0.2, dead=0.2)
        for mode in ("activation", "gradient")
    ]
    assert not any(claim.holds for claim in language_claims([said, *others]))
