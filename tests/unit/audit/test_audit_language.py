"""The audit of language models: prompts and pairs of every kind, what does not apply, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from lineament import cli
from lineament.audit.run import audit
from lineament.core.checks import InputError
from lineament.load.prompts import load_prompts

transformers = pytest.importorskip("transformers")
WORDS = [
    "<s>",
    "</s>",
    *[
        "the",
        "cat",
        "dog",
        "saw",
        "a",
        "man",
        "and",
        "ran",
        "home",
        "very",
        "fast",
        "now",
        "<evil>",
        "old",
        "\u202eevil",
    ],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random GPT-2 with a tokenizer of whole words, as an ordinary directory."""
    from lineament.data.patching_tasks import save_language_model

    config = transformers.GPT2Config(
        vocab_size=len(WORDS), n_positions=32, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=1
    )
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("lm") / "gpt2"
    save_language_model(transformers.GPT2LMHeadModel(config), WORDS, place)
    return place


def pair(clean, corrupt, answer=" cat", wrong=" dog"):
    return json.dumps({"clean": clean, "corrupt": corrupt, "answer": answer, "wrong": wrong})


@pytest.fixture
def files(tmp_path):
    (tmp_path / "text.txt").write_text(
        "the cat saw a man\nshort\n\nthe <evil> dog ran home very fast \u202eevil\n", encoding="utf-8"
    )
    lines = [pair(f"the cat saw a {w}", f"the dog saw a {w}") for w in ("man", "dog", "cat")]
    lines += [pair("the cat", "the dog ran"), pair("the cat saw", "the dog saw", answer=" lion zebra")]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.mark.slow
def test_a_text_file_has_its_words_explained_and_no_components(folder, files):
    found = audit(str(folder), files / "text.txt", out=files / "r")
    assert [(s.name, s.status) for s in found.sections][1] == ("components", "skipped")
    tokens = found["tokens"]
    assert tokens.status in ("good", "note", "warning") and len(tokens.pictures) == 3
    assert len(tokens.numbers["prompts"]) == 2, "the short line and the empty one are no prompts"
    page = found.html.read_text(encoding="utf-8")
    assert "\u202e" not in page and "<evil>" not in page and "&lt;evil&gt;" in page


@pytest.mark.slow
def test_pairs_show_components_and_say_what_was_left_out(folder, files):
    found = audit(str(folder), files / "pairs.jsonl", out=files / "r")
    section = found["components"]
    assert section.status in ("good", "note", "warning"), section.sentence
    numbers = section.numbers
    assert numbers["pairs"] == 3 and len(numbers["left_out"]) == 2
    assert (
        "2 pairs were left out: 'the cat': its prompts have 2 and 3 tokens; 'the cat saw':"
        in section.sentence
    )
    assert set(numbers["agreement"]) == {"resid_pre", "attn_out", "mlp_out"}
    assert len(numbers["heads"]) == 2 and len(numbers["heads"][0]) == 2
    assert {finding.section for finding in found.findings} == {"tokens", "components"}


LAYOUT = {
    "blocks": "transformer.h.*",
    "resid_pre": "transformer.h.*:in",
    "attn_out": "transformer.h.*.attn",
    "mlp_out": "transformer.h.*.mlp",
    "z": "transformer.h.*.attn:z",
}


@pytest.mark.slow
def test_a_layout_that_says_what_is_known_gives_the_same_components(folder, files):
    """On the command line as in Python; one that the model's numbers contradict is refused before any lens looks."""
    known = audit(str(folder), files / "pairs.jsonl", out=files / "r", lenses=["components"])[
        "components"
    ].numbers
    words = [word for kind, glob in LAYOUT.items() for word in ("--layout", f"{kind}={glob}")]
    command = ["audit", str(folder), str(files / "pairs.jsonl"), "--lens", "components"]
    assert cli.main([*command, "--out", str(files / "s"), *words]) == 0
    report = json.loads((files / "s" / "report.json").read_text())
    said = report["sections"][0]["numbers"]
    assert torch.allclose(torch.tensor(said["heads"]), torch.tensor(known["heads"]), atol=1e-5)
    assert said["five_heads"] == pytest.approx(known["five_heads"], abs=1e-5)
    from lineament.audit.run import AuditOptions

    wrong = AuditOptions(layout={**LAYOUT, "mlp_out": LAYOUT["attn_out"]})
    with pytest.raises(InputError, match=r"layout: what block 'transformer.h.0' adds"):
        audit(str(folder), files / "pairs.jsonl", out=files / "t", options=wrong)
    with pytest.raises(InputError, match="layout: it says where the components of a language model are"):
        audit(torch.nn.Flatten(), "digits", out=files / "u", options=wrong)


@pytest.mark.slow
def test_an_answer_that_does_not_hang_on_what_differs_is_no_behaviour(folder, files):
    """A model that hardly looks back prefers the same answer whatever the prompt says earlier."""
    from lineament.audit.language_run import audit_language
    from lineament.load.language_models import load_language_model

    model, tokenizer = load_language_model(str(folder))
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_proj.weight.mul_(1e-2)
            block.attn.c_proj.bias.mul_(1e-2)
    with torch.no_grad():
        last = model(tokenizer("the cat saw a man", return_tensors="pt")["input_ids"]).logits[0, -1]
    likelier, other = sorted((" cat", " dog"), key=lambda w: -float(last[tokenizer(w)["input_ids"][-1]]))
    lines = [pair(f"the cat saw {w} man", f"the dog saw {w} man", likelier, other) for w in ("a", "the")]
    (files / "same.jsonl").write_text("\n".join(lines))
    found = audit_language((model, tokenizer), files / "same.jsonl", out=files / "r", lenses=["components"])
    numbers = found["components"].numbers
    assert numbers, found["components"].sentence
    assert numbers["right"] == numbers["right_when_corrupt"] == 1 and not numbers["hangs_on_what_differs"]
    assert found.findings[0].severity == found["components"].status == "warning"
    assert "hardly matters to it" in found.findings[0].sentence
    assert "brings back" not in found.findings[0].sentence


@pytest.mark.slow
def test_the_model_is_left_as_it_was(folder, files):
    from tests.contracts.unchanged import unchanged

    from lineament.audit.language_run import audit_language
    from lineament.load.language_models import load_language_model

    model, tokenizer = load_language_model(str(folder))
    with unchanged(model):
        audit_language((model, tokenizer), files / "pairs.jsonl", out=files / "r")


def test_what_cannot_be_used_is_said_and_leaves_nothing(folder, files, capsys):
    (files / "bad.jsonl").write_text('{"clean": "the cat", "corrupt": "the dog"}')
    (files / "worse.jsonl").write_text("{")
    (files / "empty.txt").write_text("\n\n")
    (files / "net.py").write_text("")
    before = sorted(p.name for p in files.iterdir())
    for words, said in (
        ([str(folder), "none.txt"], "does not exist"),
        ([str(folder), "iou"], "nearest: 'ioi'"),
        ([str(folder), "data.npz"], "expected a .txt file of prompts"),
        ([str(folder), str(files / "bad.jsonl")], "line 1 holds ['clean', 'corrupt']"),
        ([str(folder), str(files / "worse.jsonl")], "line 1 is no JSON"),
        ([str(folder), str(files / "empty.txt")], "holds no prompt"),
        ([str(files / "net.py"), str(files / "text.txt")], "is no language model"),
        (
            [str(folder), str(files / "text.txt"), "--lenses", "gaze"],
            "there are: tokens, components, attention",
        ),
        ([str(folder), str(files / "text.txt"), "--text", "none.txt"], "--text: 'none.txt' cannot be read"),
        ([str(folder), str(files / "text.txt"), "--lenses", "token"], "nearest: 'tokens'"),
    ):
        assert cli.main(["audit", *words, "--out", str(files / "r")]) == 2
        err = [line for line in capsys.readouterr().err.splitlines() if "reading the" not in line]
        assert len(err) == 1 and said in err[0], err
    assert sorted(p.name for p in files.iterdir()) == before


def test_labelled_samples_have_no_language_lenses(files):
    with pytest.raises(InputError, match="for language models"):
        audit(torch.nn.Linear(2, 2), "digits", out=files / "r", lenses=["tokens"])


def test_built_in_pairs_and_a_budget(files):
    made = load_prompts("ioi", samples=5)
    assert len(made.pairs) == 5 and all(p.clean != p.corrupt for p in made.pairs)
    (files / "many.txt").write_text("\n".join(f"prompt number {i} of many" for i in range(50)))
    some, again = (load_prompts(files / "many.txt", samples=7, seed=3) for _ in range(2))
    assert len(some) == 7 and some == again and some.total == 50


def test_lines_that_are_no_prompts_are_named(folder, files):
    from lineament.audit.language_run import _facts
    from lineament.audit.subject import LanguageSubject
    from lineament.load.language_models import load_language_model

    (files / "five.txt").write_text(
        "one two three four\nshort\na b c d\n\nnot three words\nw x y z and more\n"
    )
    read = load_prompts(files / "five.txt")
    assert (len(read), read.total) == (3, 5)
    facts = dict(_facts(LanguageSubject(*load_language_model(str(folder)), read, "")))
    assert facts["Prompts"] == "3 of 5"
    assert facts["Left out"] == (
        "line 2, 'short', has 1 word, expected 4 at least; line 5, 'not three words', has 3 words, expected 4 at least"
    )
    some = load_prompts(files / "five.txt", samples=2)
    assert dict(_facts(LanguageSubject(*load_language_model(str(folder)), some, "")))["Prompts"] == (
        "2 of 5, chosen at random (1 not used)"
    )


@pytest.mark.slow
def test_an_encoder_decoder_has_the_tokens_of_its_source_explained(files):
    from tests.contracts.token_models import byte_tokenizer, model

    from lineament.audit.language_run import audit_language

    (files / "plain.txt").write_text("the cat sat on the mat\nthe dog ran to the house\n")
    found = audit_language((model("t5"), byte_tokenizer()), files / "plain.txt", out=files / "r")
    tokens, components = found["tokens"], found["components"]
    assert tokens.status in ("good", "note", "warning"), tokens.sentence
    assert tokens.numbers["prompts"][0]["tokens"] == [
        "the",
        " cat",
        " sat",
        " on",
        " the",
        " mat",
    ]
    assert len(tokens.numbers["soft"]["nc_ours"]) == 2
    assert components.status == "skipped" and "differ in what decides" in components.sentence


@pytest.mark.slow
def test_prompts_longer_than_the_model_are_cut_and_pairs_of_that_length_left_out(folder, files):
    (files / "long.txt").write_text("the cat saw a man and " * 20 + "\n")
    found = audit(str(folder), files / "long.txt", out=files / "r", lenses=["tokens"])
    assert found["tokens"].status != "failed" and len(found["tokens"].numbers["prompts"][0]["tokens"]) <= 32
    long = [pair("the cat saw a man " * 8, "the dog saw a man " * 8)]
    (files / "long.jsonl").write_text("\n".join([*long, pair("the cat saw a man", "the dog saw a man")] * 2))
    numbers = audit(str(folder), files / "long.jsonl", out=files / "p", lenses=["components"])[
        "components"
    ].numbers
    assert (
        numbers["pairs"] == 2
        and "its prompts have 40 tokens and the model takes at most 32" in numbers["left_out"][0]
    )


@pytest.mark.slow
def test_a_lens_that_cannot_use_any_prompt_says_why(folder, files):
    for lines, said in (
        ([pair("the cat saw", "the dog saw", answer=" the cat")], "' the cat' is 2 tokens"),
        ([pair("the cat saw a man", "the dog saw")], "its prompts have 5 and 3 tokens"),
        ([pair("the cat saw", "the cat saw")], "alike"),
        ([pair("the cat saw a man " * 8, "the dog saw a man " * 8)], "the model takes at most 32"),
    ):
        (files / "useless.jsonl").write_text("\n".join(lines))
        section = audit(
            str(folder), files / "useless.jsonl", out=files / "r", overwrite=True, lenses=["components"]
        )["components"]
        assert section.status == "failed" and said in section.sentence
