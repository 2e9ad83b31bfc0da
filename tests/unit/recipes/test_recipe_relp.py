"""The recipe of relevance patching: a tiny run, killed and resumed, on its own and on a user's model, and claims that can fall."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from tests.contracts.token_models import byte_tokenizer
from tests.contracts.token_models import model as made

from lineament.core.checks import InputError
from lineament.data.patching_tasks import NAMES, ioi_pairs, save_language_model
from lineament.explain.patching.circuit_curves import CircuitCurve
from lineament.explain.patching.result import Fidelity
from lineament.recipes import relp
from lineament.recipes.kit.networks import gpt2
from lineament.recipes.relp import Config, run
from lineament.recipes.relp.circuits import Circuits
from lineament.recipes.relp.claims import (
    AH,
    ATP,
    COUNTS,
    IG,
    KINDS,
    LN,
    RELP,
    Comparison,
    circuit_claims,
    claims_of,
    controls_of,
)

TINY = Config(
    pairs=4, ig_steps=2, seeds=(0,), layers=2, width=16, heads=2, steps=3, circuit_seeds=(0,), latents=32, dictionary_steps=2,
    other_tasks=("greater-than",),
)  # fmt: skip


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch):
    whole = run(TINY, out=tmp_path / "whole").to_dict()
    assert len(whole["claims"]) == 12 and len(whole["tables"]) == 8
    assert {f["file"] for f in whole["figures"]} == {"scatter.svg", "maps.svg", "rules.svg", "circuits.svg"}
    holds = {claim["name"].split(" (")[0]: claim["holds"] for claim in whole["claims"]}
    assert not holds["Control: the models solve the task"]
    assert holds[
        "The rules were active: every rule ran, the identity rule changed the scores, and no logit changed"
    ]
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(relp, "circuits", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        run(TINY, out=tmp_path / "cut")
    again = run(TINY, out=tmp_path / "cut").to_dict()
    for outcome in (whole, again):
        # Seconds are measured.
        outcome["tables"] = [t for t in outcome["tables"] if t["title"] != "Time for all effects"]
    assert json.dumps(again, default=str) == json.dumps(whole, default=str)


@pytest.mark.slow
def test_it_takes_a_language_model_of_the_users(tmp_path):
    texts = ioi_pairs(60)
    words = {word for side in (texts.clean, texts.corrupt) for text in side for word in text.split()}
    vocabulary = ["<bos>", "<end>", *sorted(words), *(name for name in NAMES if name not in words)]
    model = gpt2(len(vocabulary), 24, seed=0, layers=2, width=16, heads=2, std=(0.3, 0.07))
    folder = save_language_model(model, vocabulary, tmp_path / "model")
    outcome = run(Config(pairs=20, ig_steps=1, seeds=(0,), model_folder=str(folder)), out=tmp_path)
    assert "pairs of" in outcome.tables[0].title and len(outcome.claims) == 7
    for name, message in (("gpt2", "pairs 0 have names that are one token"), ("t5", "encoder-decoder")):
        made(name).save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match=message):
            run(Config(pairs=8, seeds=(0,), model_folder=str(tmp_path / name)), out=tmp_path / "other")


def test_bad_configurations_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"model_folder: .* is no folder"):
        run(Config(model_folder=str(tmp_path / "nothing")), out=tmp_path)
    with pytest.raises(InputError, match="heads cannot share evenly"):
        run(Config(heads=5), out=tmp_path)


def comparison(pearson, *, active=True, same=True, differs=True):
    """Planted agreement, by method; every kind of site has the same."""
    agreement = {
        m: {k: Fidelity(p, p, 0.1, 0.5, 10, 40) for k in KINDS} for m, p in {**pearson, IG: 0.995}.items()
    }
    maps = {
        m: {k: torch.full((2, 2), float(n if differs else 0)) for k in KINDS} for n, m in enumerate(agreement)
    }
    acted = {"ln": 9, "identity": 4} if active else {"ln": 9, "identity": 0}
    return Comparison(maps[ATP], maps, agreement, {RELP: acted}, same)


GOOD = {ATP: 0.7, LN: 0.9, RELP: 0.95, AH: 0.8}


@pytest.mark.parametrize(
    ("number", "spoilt"),
    [
        (0, comparison({**GOOD, ATP: 0.93})),
        (1, comparison({**GOOD, ATP: 0.945})),
        (2, comparison({**GOOD, RELP: 0.6})),
        (3, comparison(GOOD, active=False)),
        (3, comparison(GOOD, same=False)),
        (3, comparison(GOOD, differs=False)),
        (4, comparison({**GOOD, LN: 0.8})),
        (5, comparison({**GOOD, AH: 0.96})),
        (6, dataclasses.replace(comparison(GOOD), agreement={m: comparison(GOOD).agreement[ATP] for m in (*GOOD, IG)})),
    ],
)  # fmt: skip
def test_each_claim_falls_with_its_number(number, spoilt):
    assert all(claim.holds for claim in claims_of([comparison(GOOD)], 10))
    assert not claims_of([spoilt], 10)[number].holds


def test_controls_and_circuits_fall_with_their_numbers():
    trained, untrained = [comparison(GOOD)], [comparison({**GOOD, RELP: 0.7})]
    assert [c.holds for c in controls_of(trained, untrained, [0.96])] == [True, True]
    assert [c.holds for c in controls_of(trained, trained, [0.94])] == [False, False]

    def circuits(relp, random):
        def curve(faithful, complete):
            size = len(COUNTS)
            return CircuitCurve((), COUNTS, [faithful] * size, [complete] * size, 1.0, 0.0)

        made = {"attrib": (0.5, 0.5), "relp": relp, "ig": (0.6, 0.3), "random": (random, 1.0)}
        return [Circuits({m: curve(*of) for m, of in made.items()}, {}, [], 100)]

    assert [c.holds for c in circuit_claims(circuits((0.58, 0.4), 0.0))] == [True, True, True]
    assert [c.holds for c in circuit_claims(circuits((0.5, 0.6), 0.1))] == [False, False, False]
    assert circuit_claims([]) == []
