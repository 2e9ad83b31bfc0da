"""`lineament dictionary`: train, evaluate and look, on a saved language model and on a network of images; its files repeat the run."""

from __future__ import annotations

import json

import pytest
import torch

from lineament.cli import main
from lineament.dictionaries import load_dictionary

transformers = pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
tokenizers = pytest.importorskip("tokenizers")

WORDS = [
    "<unk>",
    "<s>",
    *[
        "the",
        "a",
        "cat",
        "dog",
        "sat",
        "ran",
        "on",
        "mat",
        "to",
        "house",
        "and",
        "then",
        "it",
        "was",
        "good",
        "bad",
        ".",
        ",",
        "red",
        "blue",
    ],
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>"
    )
    tokenizer.save_pretrained(folder / "lm")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=1
    )
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(folder / "lm")
    generator = torch.Generator().manual_seed(1)
    chosen = torch.randint(2, len(WORDS), (900,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(WORDS[i] for i in chosen), encoding="utf-8")
    return folder


SITE = "transformer.h.0"


def lineament(*words) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def trained(saved):
    out = saved / "sae"
    code = lineament(
        "dictionary", "train", saved / "lm", saved / "text.txt", "--site", SITE, "--out", out, "--length", 10, "--tokens", 3000,
        "--batch-size", 300, "--width", 24, "--k", 3, "--learning-rate", 0.01,
    )  # fmt: skip
    assert code == 0
    return out


def test_training_writes_a_dictionary_and_repeats_it(saved, trained, capsys):
    sae = load_dictionary(trained)
    assert (type(sae).__name__, sae.k, sae.width, sae.site) == ("TopK", 3, 24, SITE)
    assert not (trained / "training").exists() or not any((trained / "training").iterdir())
    words = ["dictionary", "train", saved / "lm", saved / "text.txt", "--length", 10]
    assert lineament(*words, "--config", trained / "config.json", "--out", saved / "again") == 0
    again = load_dictionary(saved / "again")
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), again.state_dict().values()))
    assert (
        lineament(
            *words,
            "--config",
            trained / "config.json",
            "--out",
            saved / "gated",
            "--kind",
            "gated",
            "--tokens",
            600,
        )
        == 0
    )
    assert type(load_dictionary(saved / "gated")).__name__ == "Gated"
    capsys.readouterr()


def test_evaluation_is_a_page_and_json(saved, trained, capsys):
    words = [
        "dictionary",
        "evaluate",
        trained,
        saved / "lm",
        saved / "text.txt",
        "--length",
        10,
        "--steering",
    ]
    assert lineament(*words, "--against", saved / "gated") == 0
    record = json.loads((trained / "evaluate.json").read_text())
    names = [(each["dictionary"], each["mode"]) for each in record["evaluations"]]
    assert names[0] == (str(trained), "activation") and (str(trained), "gradient") in names
    assert {"PCA, 3 components", "neurons, 3 a row", str(saved / "gated")} <= {name for name, _ in names}
    assert record["evaluations"][0]["l0"] <= 3 and len(record["steering"]["kl"]) == 24
    page = (trained / "evaluate.html").read_text()
    for words in (
        "Does it fit this model?",
        "What does it keep?",
        "Do its features steer?",
        "activation mode",
    ):
        assert words in page
    assert "Adding 1 typical norm (" in page
    shown = capsys.readouterr().out
    assert "of the variance is left" in shown and "steering by 1 typical norm: 24 of its features" in shown


def test_the_dashboard_names_tokens_and_takes_foreign_dictionaries(saved, trained, capsys):
    from lineament.dictionaries import export_saelens

    foreign = export_saelens(load_dictionary(trained), saved / "foreign", model="gpt2")
    for folder, out in ((trained, "site"), (foreign, "site2")):
        words = [
            "dictionary",
            "dashboard",
            folder,
            saved / "lm",
            saved / "text.txt",
            "--length",
            10,
            "--ablated",
            5,
        ]
        assert lineament(*words, "--out", saved / out) == 0
        text = (saved / out / "data/index.js").read_text()
        index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
        assert set(index["columns"]) == {"density", "maximum", "importance", "complexity", "effect"}
        assert sum(value is not None for value in index["rows"]["effect"]) == 5
        assert all(set(words.split()) <= set(WORDS) for words in index["rows"]["words"])
        chunk = (saved / out / "data/features-00000.js").read_text()
        features = json.loads(chunk[chunk.index("{") : chunk.rindex(")")])
        card = features[str(index["rows"]["number"][0])]
        assert {word for word, _ in card["raises"]} <= set(WORDS) and len(card["nearest"]) == 5
        assert 0 <= card["complexity"] <= 1 and "complexity" in index["rows"]
    capsys.readouterr()


def test_a_network_of_images(tmp_path, capsys):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\ndef make():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 10))\n"
    )
    model, sae = f"{tmp_path / 'net.py'}:make", tmp_path / "sae"
    shared = ["--samples", 60]
    code = lineament(
        "dictionary",
        "train",
        model,
        "digits",
        "--site",
        "1",
        "--out",
        sae,
        "--tokens",
        2000,
        "--width",
        12,
        "--k",
        2,
        *shared,
    )
    assert code == 0
    assert (
        lineament(
            "dictionary",
            "dashboard",
            sae,
            model,
            "digits",
            "--out",
            tmp_path / "site",
            "--ablated",
            2,
            *shared,
        )
        == 0
    )
    chunk = (tmp_path / "site/data/features-00000.js").read_text()
    assert "data:image/jpeg;base64," in chunk and '"complexity":0' in chunk.replace(" ", "")
    assert lineament("dictionary", "evaluate", sae, model, "digits", *shared) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "lm", "text.txt", "--out", "x"], "--site: got none"),
        (
            ["train", "lm", "text.txt", "--out", "sae", "--site", SITE],
            "--out: .*holds a finished dictionary; give --overwrite",
        ),
        (
            ["train", "lm", "text.txt", "--out", "x", "--site", "transformer.h.9"],
            "transformer.h.9.*is no site",
        ),
        (["train", "lm", "text.txt", "--out", "x", "--site", SITE, "--kind", "nmf"], "--kind: got 'nmf'"),
        (
            ["train", "lm", "text.txt", "--out", "x", "--site", SITE, "--kind", "relu", "--k", "3"],
            "--k: ReLU has none",
        ),
        (["train", "lm", "none.txt", "--out", "x", "--site", SITE], "DATA: .*does not exist"),
        (["train", "lm", "text.txt", "--out", "x", "--config", "text.txt"], "--config: .*cannot be read"),
        (["evaluate", "lm", "lm", "text.txt"], "DIR: .*holds no dictionary"),
        (
            ["evaluate", "lm", "sae", "text.txt"],
            "MODEL: 'sae' is a dictionary.*; DIR comes first: lineament dictionary evaluate sae lm text.txt",
        ),
        (["dashboard", "sae", "sae", "text.txt", "--out", "s"], "MODEL: 'sae' is a dictionary.*belongs to$"),
        (["evaluate", "sae", "lm", "text.txt", "--against", "sae"], "--against: .*is the dictionary itself"),
        (["dashboard", "sae", "lm", "text.txt", "--out", "lm"], "--out: .*holds other files"),
        (["dashboard", "sae", "lm", "text.txt", "--out", "s", "--top", "0"], "--top: got 0"),
        (["show"], "ACTION|action|choice"),
    ],
)
def test_what_cannot_be_done_is_one_line(saved, trained, monkeypatch, capsys, words, message):
    monkeypatch.chdir(saved)
    short = [] if words[0] == "show" else ["--length", "10"]
    assert main(["dictionary", *words, *short]) == 2
    import re

    said = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, said[-1]), said
