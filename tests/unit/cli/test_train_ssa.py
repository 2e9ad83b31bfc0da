"""`lineament train LM_DIR TEXT --ssa`: what it writes, a run that is cut off and goes on bit for bit, and what it refuses in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from lineament.cli import main
from lineament.modules.sparse_attention import continued, sparse_attention

pytest.importorskip("accelerate", reason="needs the extra lm")
WORDS = ["<unk>", "<s>", *(f"w{number}" for number in range(30))]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    core = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>"
    )
    torch.manual_seed(0)
    llama = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=64, bos_token_id=1, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    # Its attention has dropout, which is off while both kinds are aligned.
    gpt2 = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=1
    )
    for name, model in (
        ("llama", transformers.LlamaForCausalLM(llama)),
        ("gpt2", transformers.GPT2LMHeadModel(gpt2)),
    ):
        tokenizer.save_pretrained(folder / name)
        model.save_pretrained(folder / name)
    # Every word follows from the one before.
    (folder / "text.txt").write_text(" ".join(WORDS[2 + 7 * i % 30] for i in range(1900)), encoding="utf-8")
    return folder


def lineament(saved: Path, out: Path, *words, model: str = "llama") -> int:
    given = [saved / model, saved / "text.txt", "--ssa", "--block-size", 4, "--blocks", 2, "--length", 32, "--device", "cpu", "--out", out]  # fmt: skip
    return main(["train", *map(str, (*given, *words))])


def test_a_run_writes_an_ordinary_model_that_has_learned(saved, tmp_path, capsys):
    out = tmp_path / "run"
    assert lineament(saved, out, "--lr", 0.003, "--epochs", 4) == 0
    told = json.loads((out / "ssa.json").read_text())
    assert told["perplexity after"]["sparse"] < told["perplexity before"]["sparse"]
    assert told["history"]["steps"][-1] == 4 * 7 and told["held-out sequences"] == 6
    said = capsys.readouterr().out
    assert "Perplexity on 6 held-out sequences" in said and "2 blocks of 4 tokens" in said
    assert {p.name for p in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "ssa.json",
    }
    assert not {".stages", "unfinished.json"} & {p.name for p in out.iterdir()}
    opened = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert opened.config._attn_implementation == "sdpa" and transformers.AutoTokenizer.from_pretrained(out)
    tokens = torch.arange(2, 30)[None]
    with sparse_attention(opened, block_size=4, blocks=2):
        assert torch.isfinite(opened(tokens).logits).all()
    assert lineament(saved, out) == 2
    assert "already holds a finished run" in capsys.readouterr().err


def test_a_short_model_is_trained_at_its_own_length(saved, tmp_path):
    out = tmp_path / "run"
    given = [saved / "gpt2", saved / "text.txt", "--ssa", "--block-size", 4, "--blocks", 2, "--out", out]
    assert main(["train", *map(str, given)]) == 0
    assert json.loads((out / "ssa.json").read_text())["length"] == 64


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_a_run_that_was_cut_off_goes_on_bit_for_bit(saved, tmp_path, model, monkeypatch):
    monkeypatch.setattr(continued, "STORED", 3)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert lineament(saved, whole, "--epochs", 2, "--lr", 0.003, model=model) == 0
    plain = continued._Steps.on_batch

    def cut_off(self, run, batch):
        if run.step == 8:
            raise KeyboardInterrupt
        plain(self, run, batch)

    with monkeypatch.context() as patched:
        patched.setattr(continued._Steps, "on_batch", cut_off)
        assert lineament(saved, cut, "--epochs", 2, "--lr", 0.003, model=model) != 0
    assert {".stages", "unfinished.json"} == {p.name for p in cut.iterdir()}
    started = []

    def counted(self, run, batch):
        started.append(run.step)
        plain(self, run, batch)

    monkeypatch.setattr(continued._Steps, "on_batch", counted)
    assert lineament(saved, cut, "--epochs", 2, "--lr", 0.003, model=model) == 0
    assert started[0] == 7
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, cut))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    first, second = (json.loads((folder / "ssa.json").read_text()) for folder in (whole, cut))
    assert {k: v for k, v in first.items() if k != "seconds"} == {
        k: v for k, v in second.items() if k != "seconds"
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sam", "0.1"], "--ssa trains with AdamW and a cosine, and takes no --sam"),
        (["--loss", "arcface"], "takes no --loss"),
        (["--margin", "0.5"], "takes no --margin"),
        (["--head", "mlp"], "takes no --head"),
        (["--blocks", "0"], "--blocks: got 0"),
        (["--length", "100"], "--length: got 100, expected an integer in [2, 64]"),
        (["--epochs", "0"], "--epochs: got 0"),
        (["--batch-size", "0"], "--batch-size: got 0"),
        (["--validation", "0.999"], "expected some for training and some to hold out"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(saved, tmp_path, words, message, capsys):
    assert lineament(saved, tmp_path / "run", *words) == 2
    told = capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()
