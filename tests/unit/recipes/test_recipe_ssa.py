"""The recipe ssa: every part on a small scale, that a killed run goes on, and that its claims can fall."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError
from lineament.modules.sparse_attention.branch import coins
from lineament.recipes import ssa as recipe
from lineament.recipes.ssa import Config, run
from lineament.recipes.ssa.claims import Found, claims_of
from lineament.recipes.ssa.measures import (
    Attention,
    Measured,
    Sharpened,
    attention_of,
    loss_of,
    replaced_loss,
    rows_of,
    sharpened,
)
from lineament.recipes.ssa.network import MODELS, Branches, Course, Decoder, choices, flops_ratio, train

TINY = replace(
    Config.preset("quick"), width=16, hidden=16, heads=2, key_heads=1, head_size=8, block_size=4, blocks=2, length=32, models=tuple(MODELS),
    steps=3, batch=2, windows=3, watched=2, controls=True,
)  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("To be, or not to be, that is the question. " * 30, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def model():
    return Decoder(TINY, 0)


def test_the_presets():
    quick, small, paper = map(Config.preset, ("quick", "small", "paper"))
    assert (quick.layers, quick.width, quick.models, quick.steps) == (2, 128, ("FullAttn", "SSA"), 100)
    assert small.models == paper.models == tuple(MODELS) and small.controls and len(paper.seeds) == 3
    # A global batch of 3.15 million tokens.
    assert paper.batch * paper.accumulate * paper.length == 3_145_728
    # The sparse branch adds little; one that reads everything nearly doubles the attention, which dominates where the text is long.
    long = replace(quick, length=65_536)
    assert 1 < flops_ratio(quick) < 1.05 and 1.9 < flops_ratio(replace(long, blocks=8192)) < 2.1


def test_a_whole_run_and_one_that_was_killed(tmp_path, text, monkeypatch):
    config = replace(TINY, text=text)
    whole = run(config, out=tmp_path / "whole")
    assert len(whole.claims) == 16 and len(whole.tables) == 5 and len(whole.figures) == 2
    theorem = next(c for c in whole.claims if c.name.startswith("Theorem 1"))
    assert theorem.holds and "0 of" in theorem.observed
    original, calls = recipe.measured, []

    def killed(*arguments):
        calls.append(arguments[3])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(recipe, "measured", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    again = run(config, out=tmp_path / "cut")
    assert calls[:4] == ["SSA", "FullAttn", "MoBA", "MoBA"]
    assert json.dumps(again.to_dict()) == json.dumps(whole.to_dict())


def test_the_network_is_causal_and_a_whole_budget_is_full_attention(model):
    ids = torch.arange(33)[None] % 7
    other = torch.cat([ids[:, :20], ids[:, 20:] + 1], 1)
    for choice in (None, choices(TINY, 2)):
        assert torch.equal(model(ids, choice)[:, :20], model(other, choice)[:, :20])
    torch.testing.assert_close(model(ids, choices(TINY, 9)), model(ids))
    assert not torch.allclose(model(ids, choices(TINY, 1)), model(ids))


def test_a_training_step_is_inference_with_what_the_coin_says(model):
    ids = torch.arange(33)[None] % 7
    for name in ("FullAttn", "MoBA", "SSA"):
        for full in (True, False):
            logits, aligned = model.aligned(ids, full, MODELS[name], TINY)
            torch.testing.assert_close(logits, model(ids, None if full else choices(TINY, 2)))
            assert (float(aligned.detach()) > 0) == (name == "SSA")


def test_nsa_takes_its_branches_in_training_and_inference():
    ids = torch.arange(33)[None] % 7
    model, plan = Branches(TINY, 0), MODELS["NSA"]
    own = model(ids, choices(TINY, 2))
    torch.testing.assert_close(model.aligned(ids, True, plan, TINY)[0], own)
    # All three replaced is full attention, whose gates are the sum of its own.
    model.full = ("compressed", "selected", "window")
    torch.testing.assert_close(model(ids, choices(TINY, 2)), model(ids))
    model.full = ()
    key = "compressed, selected, window"
    rows = rows_of(torch.arange(200) % 5, 3, 32)
    assert replaced_loss(model, rows, choices(TINY, 2), key) == pytest.approx(loss_of(model, rows, None))
    assert replaced_loss(model, rows, choices(TINY, 2), "") == loss_of(model, rows, choices(TINY, 2)) != loss_of(model, rows, None)  # fmt: skip
    assert model.full == ()
    wider = Branches(replace(TINY, window=40), 0)
    assert not torch.allclose(wider(ids, choices(TINY, 2)), own)


def test_training_lowers_the_loss_and_depends_on_the_seed_alone():
    data, config = torch.arange(600) % 5, replace(TINY, steps=25, lr=1e-2)
    model, course = train(config, data, "SSA", 0, "cpu")
    assert course.losses[-1] < course.losses[0] - 1 and len(course.alignments) == 25
    assert train(config, data, "SSA", 0, "cpu")[1] == course != train(config, data, "SSA", 1, "cpu")[1]
    assert len(train(config, data, "FullAttn, SSA's FLOPs", 0, "cpu")[1].losses) == round(25 * flops_ratio(config))  # fmt: skip
    rows = rows_of(data, 3, 32)
    late = torch.nn.functional.cross_entropy(
        model(rows[:, :-1])[:, 16:].flatten(0, 1), rows[:, 17:].flatten()
    )
    assert loss_of(model, rows, None) == pytest.approx(float(late.detach()), abs=1e-4) and rows.shape == (
        3,
        33,
    )
    assert loss_of(model, rows, None) < loss_of(Decoder(config, 0), rows, None) - 1


def test_a_killed_training_goes_on_and_parts_make_one_step(tmp_path, monkeypatch):
    monkeypatch.setattr("lineament.recipes.ssa.network.STORED", 2)
    data, config = torch.arange(600) % 5, replace(TINY, steps=5, accumulate=2)
    model, whole = train(config, data, "SSA", 0, "cpu")
    original, calls = Decoder.aligned, []

    def killed(*arguments):
        calls.append(arguments[2])
        if len(calls) == 7:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(Decoder, "aligned", killed)
    with pytest.raises(KeyboardInterrupt):
        train(config, data, "SSA", 0, "cpu", Checkpoint(tmp_path / "stages", {}))
    again, course = train(config, data, "SSA", 0, "cpu", Checkpoint(tmp_path / "stages", {}))
    assert course == whole and len(calls) == 7 + 6 and calls[4:6] == calls[7:9]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
    # A coin a part, and one step of both.
    assert len(whole.losses) == 5 and calls[:6] == [coins([0], 0.5, 0, part, "step")[0] for part in range(6)]


def test_sharper_attention_is_that_of_larger_queries(model):
    rows = rows_of(torch.randint(256, (400,), generator=torch.Generator().manual_seed(0)), 3, 32)
    larger = copy.deepcopy(model)
    with torch.no_grad():
        for layer in larger.layers:
            layer.attention.q.weight.mul_(5)
    one, two = attention_of(model, rows, TINY, sharper=5.0), attention_of(larger, rows, TINY)
    assert one.kept == pytest.approx(two.kept, abs=1e-6) and one.entropy == pytest.approx(
        two.entropy, abs=1e-5
    )
    found = sharpened(model, rows, TINY, 2.0)
    # A mark out of reach ends at the largest factor.
    assert 7.8 < found.factor < 8


def test_bad_fields_are_named_before_any_work(tmp_path, text):
    for fields, message in (
        ({"models": ("ssa",)}, "models: got 'ssa', which is not a choice; there are: 'FullAttn'"),
        ({"seeds": ()}, "seeds: got none"),
        ({"steps": 0}, "steps"),
        ({"text": "no.txt"}, "text: 'no.txt' is no file"),
        ({"length": 100}, "text: its last tenth has 129 bytes"),
    ):
        with pytest.raises(InputError, match=message):
            run(replace(TINY, **{"text": text, **fields}), out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_claims_rise_and_fall_with_the_numbers():
    def one(kept, full, sparse, sink, longer, alignments=(1.0, 0.1), over=0, controls=None, sharp=None):
        losses = {"full": full, **dict(zip(("2", "4", "8", "16"), sparse))}
        attention = Attention(kept, 1.0, sink, [0.0] * 11, over, 100, 0.5)
        course = Course([1.0], [alignments[0]] * 10 + [alignments[1]] * 10)
        sharper = Sharpened(2.0, 0.9, {"full": sharp}) if sharp else None
        return [Measured(losses, {"full": longer, "4": longer}, attention, course, controls or {}, sharper)]

    falling = (1.06, 1.04, 1.02, 1.0)
    good = {"exact": 1.0, "last": 1.1, "random": 1.2, "oracle": 0.99, "exact, k = s": 1.0, "released, k = s": 1.0}  # fmt: skip
    bad = {**good, "last": 0.99, "released, k = s": 1.1}
    config = SimpleNamespace(blocks=4)
    found = Found(
        {
            "FullAttn": one(0.7, 1.0, (1.2, 1.1, 1.0, 1.0), 0.002, 1.5, sharp=1.2),
            "MoBA": one(0.69, 1.0, (1.2, 1.1, 1.0, 1.0), 0.002, 1.5),
            "SSA": one(0.9, 1.0, falling, 0.001, 1.4, controls=good),
            "SSA, alpha 0": one(0.75, 1.0, (1.2, 1.1, 1.0, 1.0), 0.002, 1.5),
            "FullAttn, SSA's FLOPs": one(0.7, 1.0, (1.2, 1.1, 1.0, 1.0), 0.002, 1.5),
            # Least in all that asks for a full attention of its own, which it has not.
            "NSA": one(0.99, 3.0, (1.2, 1.1, 1.0, 1.0), 0.0, 0.5),
        }
    )
    assert len(claims_of(found, config)) == 16 and all(c.holds for c in claims_of(found, config))
    found = Found(
        {
            "FullAttn": one(0.7, 1.0, (1.01, 1.0, 1.0, 1.0), 0.001, 1.4, sharp=1.0),
            "MoBA": one(0.71, 1.0, (1.2, 1.1, 1.0, 1.0), 0.002, 1.5, over=1),
            "SSA": one(0.74, 1.1, (1.2, 1.22, 1.2, 1.2), 0.002, 1.5, (1.0, 0.3), controls=bad),
            "SSA, alpha 0": one(0.73, 1.0, (1.2, 1.1, 1.0, 1.0), 0.002, 1.5),
            "FullAttn, SSA's FLOPs": one(0.7, 1.0, (1.2, 1.1, 1.0, 1.0), 0.002, 1.5),
            "NSA": one(0.7, 1.1, (1.2, 1.1, 1.1, 1.1), 0.002, 1.5),
        }
    )
    fallen = claims_of(found, config)
    assert not any(c.holds for c in fallen) and all(c.reason for c in fallen)
