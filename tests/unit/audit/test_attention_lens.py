"""The lens on sparse attention: what it says of a model that looks back only one token, of one that needs its whole past, and of texts that are too short."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.contracts.token_models import byte_tokenizer

from lineament.audit.language_run import audit_language
from lineament.audit.lenses import attention
from lineament.core.checks import InputError

transformers = pytest.importorskip("transformers")
LETTERS = torch.randint(97, 123, (1400,), generator=torch.Generator().manual_seed(0)).tolist()
TEXT = "".join(map(chr, LETTERS))


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "prompts.txt").write_text("the cat saw a man\n")
    return tmp_path


def model(past: bool = False) -> Any:
    """All of the past weighs alike; with ``past``, the second layer predicts the tokens as often as it has seen them."""
    words = len(byte_tokenizer())
    width = words + words % 2
    shape = {"n_embd": width, "n_layer": 2, "n_head": 2, "vocab_size": words, "n_positions": 256}
    net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter.copy_(
                torch.ones_like(parameter)
                if ".ln_" in name and "weight" in name
                else torch.zeros_like(parameter)
            )
        net.transformer.wte.weight.copy_(torch.eye(words, width))
        layer = net.transformer.h[1].attn
        layer.c_attn.weight[:, 2 * width :].copy_(torch.eye(width))
        layer.c_proj.weight.copy_(float(past) * 1000 * torch.eye(width))
    return net.eval()


def audited(net: Any, files: Any, **options: Any) -> Any:
    options = {"lenses": ["attention"], "text": files / "text.txt", **options}
    return audit_language((net, byte_tokenizer()), files / "prompts.txt", out=files / "r", **options)


def test_a_model_that_does_not_look_back_needs_an_eighth_at_most(files):
    section = audited(model(), files)["attention"]
    assert section.status == "good" and section.findings[0].key == "part of the past is enough"
    found = section.numbers
    assert (found["tokens"], found["block_size"], found["count"], found["chosen"]) == (256, 16, 16, 2)
    assert found["blocks"] == [1, 2, 4, 8] and found["needy"] == []
    assert (
        "2 of 16 blocks of 16 tokens" in section.sentence
        and f"{found['windows']} windows" in section.sentence
    )
    assert max(map(abs, found["rise"][1])) < 1e-6
    # All of the past weighs alike: the first token has the mean of 1 / t.
    expected = sum(1 / t for t in range(1, 257)) / 256
    assert found["first"][0][0] == pytest.approx(expected, rel=1e-4)
    assert len(section.pictures) == 2 and len(section.tables) == 2


def test_the_layer_that_needs_its_past_is_named(files):
    section = audited(model(past=True), files)["attention"]
    assert section.status == "note" and section.findings[0].key == "past needed"
    rise = torch.tensor(section.numbers["rise"])
    assert float(rise[1].mean()) > float(rise[3].mean()) > 0.01
    assert section.numbers["needy"] == [1] and "Layer 1 needs its whole past" in section.sentence
    alone = torch.tensor(section.numbers["layer_rise"])
    assert float(alone[0].abs().max()) < 1e-6 and torch.allclose(
        alone[1].double(), rise[1].double(), atol=1e-6
    )
    assert section.number.startswith("+") and math.isfinite(section.seconds)


def test_a_past_that_misleads_is_said_with_how_the_loss_goes_along_a_window(files, monkeypatch):
    """A window begins with 64 times one letter, which outweighs those that follow, 16 times each."""
    letters = iter(LETTERS)
    windows = ("a" * 64 + "".join(chr(next(letters)) * 16 for _ in range(12)) for _ in range(5))
    (files / "text.txt").write_text("".join(windows))
    section = audited(model(past=True), files)["attention"]
    found = section.numbers
    assert found["better"] == 0 and max(found["rise"][0]) < 0
    assert min(found["quarters"][3]) > max(found["quarters"][0])
    told = next(each for each in section.findings if each.key == "misled by its past")
    assert (
        "With 1 of 16 blocks its perplexity falls by" in told.sentence and told.sentence in section.sentence
    )
    assert "beyond the length that it was trained at" in told.sentence and "as long as" in told.advice
    measured = attention._measured
    monkeypatch.setattr(
        attention, "_measured", lambda *given: replace(m := measured(*given), quarters=m.quarters.flip(0))
    )
    section = audited(model(past=True), files, overwrite=True)["attention"]
    told = next(each for each in section.findings if each.key == "misled by its past")
    assert "does not speak for windows beyond" in told.sentence and not told.advice


@pytest.mark.parametrize(("rise", "advice"), [([0.1, 0.11], "--ssa"), ([0.3, -0.1], "longer text")])
def test_training_is_advised_only_where_the_rise_is_more_than_chance(files, monkeypatch, rise, advice):
    measured = attention._measured

    def changed(*given: Any) -> attention.Attention:
        found = measured(*given)
        rises = torch.tensor(rise, dtype=torch.float64).repeat(found.windows)[: found.windows]
        return replace(found, rise=rises.expand_as(found.rise))

    monkeypatch.setattr(attention, "_measured", changed)
    section = audited(model(), files)["attention"]
    assert section.findings[0].key == "past needed" and advice in section.findings[0].advice
    assert len(section.findings) == 1 and section.numbers["better"] is None


def test_long_prompts_stand_in_for_a_text_and_short_ones_leave_the_lens_out(files):
    (files / "prompts.txt").write_text("".join(f"a b c {TEXT[at : at + 140]}\n" for at in (0, 300)))
    found = audited(model(), files, text=None)["attention"].numbers
    assert found["windows"] == 2 and 128 <= found["tokens"] <= 150
    (files / "prompts.txt").write_text("the cat saw a man\n")
    asked = audited(model(), files, text=None, overwrite=True)["attention"]
    assert asked.status == "skipped" and "at least 128 tokens" in asked.sentence


def test_a_text_that_cannot_be_read_is_refused_before_anything_else(files):
    (files / "empty.txt").write_text(" \n")
    for name, words in {"none.txt": "cannot be read", "empty.txt": "is empty"}.items():
        with pytest.raises(InputError, match=f"text: .*{words}"):
            audited(model(), files, text=files / name)
