"""`lineament explain`: tokens in the terminal, a page that works without script, one line for bad input."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest
import tokenizers
import transformers
from tests.contracts.token_models import byte_tokenizer, masked_model, model, wordpiece_tokenizer

from lineament import cli
from lineament.report.token_page import TokenBlock, render

PROMPT = "the cat <b>sat</b> on the"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name in ("gpt2", "t5"):
        model(name, attention="sdpa").save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    masked_model().save_pretrained(root / "bert")
    wordpiece_tokenizer().save_pretrained(root / "bert")
    judge = transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=len(wordpiece_tokenizer()),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    )
    judge.save_pretrained(root / "judge")
    wordpiece_tokenizer().save_pretrained(root / "judge")
    foreign = ["[PAD]", "[UNK]", "[MASK]", *(chr(0x4E00 + k) for k in range(120))]
    kind = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: k for k, w in enumerate(foreign)}, unk_token="[UNK]")
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=kind, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
    ).save_pretrained(root / "han")
    transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=len(foreign),
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(root / "han")
    (root / "bare").mkdir()
    model("gpt2").save_pretrained(root / "bare")
    return root


def explain(capsys, *words, status=0):
    assert cli.main(["explain", *map(str, words)]) == status
    return capsys.readouterr()


def test_a_token_is_explained(folders, tmp_path, capsys):
    page = tmp_path / "page.html"
    shown = explain(capsys, folders / "gpt2", PROMPT, "--target", " cat", "--steps", 5, "--out", page)
    assert shown.out.splitlines()[0].startswith("' cat': probability ") and f"Page: {page}" in shown.out
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "&lt;" in html and "<b>sat" not in html
    assert re.search(r"default-src (&#39;|')none", html)
    assert "lineament explain" in html and "--steps 5" in html
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    # One line a scored token, most important first.
    lines = [line for line in shown.out.splitlines() if line.startswith("   ")]
    places = [int(line.split()[1].strip("[]")) for line in lines]
    assert sorted(places) == list(range(len(lines)))
    values = [float(line.split()[0]) for line in lines]
    assert len(values) == len(byte_tokenizer()(PROMPT)["input_ids"]) and values == sorted(
        values, reverse=True
    )


@pytest.mark.parametrize("method", ["rollout", "integrated_gradients", "kernel_shap", "random"])
def test_other_methods_and_an_attention_that_they_need(folders, tmp_path, capsys, method):
    shown = explain(
        capsys,
        folders / "gpt2",
        "the cat sat on",
        "--method",
        method,
        "--contrast",
        " dog",
        "--target",
        " cat",
        "--out",
        tmp_path / "p.html",
    )
    assert "rather than ' dog'" in shown.out
    assert method in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_a_continuation_an_encoder_decoder_and_a_masked_model(folders, tmp_path, capsys):
    shown = explain(
        capsys, folders / "gpt2", "the cat sat", "--new-tokens", 3, "--steps", 3, "--out", tmp_path / "a.html"
    )
    assert shown.out.count("probability") == 3
    assert (tmp_path / "a.html").read_text(encoding="utf-8").count("<h2 id=") == 3
    shown = explain(
        capsys,
        folders / "gpt2",
        "the cat",
        "--continuation",
        " sat on",
        "--steps",
        3,
        "--out",
        tmp_path / "e.html",
    )
    assert [line.split(":")[0] for line in shown.out.splitlines() if "probability" in line] == [
        "' sat'",
        "' on'",
    ]
    assert "--continuation ' sat on'" in (tmp_path / "e.html").read_text(encoding="utf-8").replace(
        "&#39;", "'"
    )
    shown = explain(
        capsys,
        folders / "t5",
        "the cat sat",
        "--target-prefix",
        " the",
        "--scope",
        "all",
        "--steps",
        3,
        "--out",
        tmp_path / "b.html",
    )
    assert 'class="break"' in (tmp_path / "b.html").read_text(encoding="utf-8")
    explain(
        capsys,
        folders / "gpt2",
        "the cat sat on",
        "--mlm",
        folders / "bert",
        "--steps",
        3,
        "--out",
        tmp_path / "c.html",
    )
    shown = explain(
        capsys,
        folders / "gpt2",
        "the cat sat on",
        "--early-stop",
        "--target",
        "#77",
        "--steps",
        1,
        "--out",
        tmp_path / "d.html",
    )
    assert "no probe passed" in shown.err and "no probe passed" in (tmp_path / "d.html").read_text(
        encoding="utf-8"
    )


def test_bad_input_is_one_line_before_any_page(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.html").write_text("mine")
    gpt = folders / "gpt2"
    for words, said in (
        ((gpt, ""), "empty prompt"),
        ((gpt, "the cat", "--target", "the cat"), "2 tokens"),
        (("my_model.py:build", "the cat"), "save_pretrained"),
        ((gpt, "the cat", "--target", "#99999"), "99999"),
        ((gpt, "the cat", "--out", "there.html"), "--overwrite"),
        ((gpt, "the cat", "--out", tmp_path), "is a folder"),
        ((gpt, "the cat", "--out", "there.html/page.html"), "cannot be written"),
        ((gpt, "the cat", "--out", ""), "empty name"),
        ((gpt, "the cat", "--method", "rolout"), "nearest: 'rollout'"),
        ((gpt, "the cat", "--normalize", "soft"), "nearest: 'softmax'"),
        ((gpt, "the cat", "--sampler", "unifrom"), "nearest: 'uniform'"),
        ((gpt, "the cat", "--sampler", "mlm"), "--mlm MODEL"),
        ((gpt, "the cat", "--steps", "0"), "--steps"),
        ((gpt, "the cat", "--seed", "-1"), "--seed: got -1"),
        ((gpt, "the cat", "--tokenizer", "./nowhere"), "--tokenizer: './nowhere' is no folder"),
        ((gpt, "the cat", "--continuation", " sat", "--contrast", " ran"), "--continuation: it chooses"),
        ((gpt, "the cat", "--continuation", " sat", "--new-tokens", "2"), "give one of them"),
        ((gpt, "the cat", "--target", " cat", "--contrast", " cat"), "got ' cat' (id"),
        ((gpt, "the cat", "--new-tokens", "2", "--target", " cat"), "leave --target"),
        ((gpt, "the cat", "--device", "nodevice"), "--device"),
        ((gpt, "the " * 70), "at most 64"),
        ((tmp_path / "none", "the cat"), "is no folder"),
        ((folders, "the cat"), "cannot be loaded"),
        ((folders / "bert", "the cat"), "is a masked language model (BertForMaskedLM), which has no next token"),
        ((folders / "judge", "the cat"), "is a BertForSequenceClassification, which predicts no tokens"),
        ((gpt, "the cat", "--mlm", gpt), "is a GPT2LMHeadModel, which fills no masks (give it as MODEL); expected a masked language model"),
        ((gpt, "the cat", "--mlm", folders / "t5"), "is a T5ForConditionalGeneration, which fills no masks"),
        ((gpt, "the cat", "--mlm", folders / "judge"), "which fills no masks (its head is another)"),
        ((gpt, "the cat", "--mlm", folders / "han"), "the vocabularies do not align"),
        ((gpt, "the cat", "--mlm", folders / "bert", "--sampler", "inferential"), "--mlm and --sampler inferential: each says"),
        ((gpt, "the cat", "--corpus", "none.txt"), "--corpus: 'none.txt' cannot be read"),
        ((gpt, "the cat", "--corpus", "there.html", "--method", "rollout"), "--corpus: rollout replaces no tokens"),
        ((gpt, "the cat", "--keep", "many"), "--keep: got 'many'"),
        ((gpt, "the cat", "--keep", "2"), "the stop test would keep 2 of 2 scored tokens"),
        ((gpt, "the cat", "--top-k", "0"), "--top-k: got 0"),
        ((gpt, "the cat", "--mlm", folders / "bert", "--method", "rollout"), "--mlm: rollout replaces no tokens"),
        ((gpt, "the cat", "--sampler", "pos", "--method", "rollout"), "--sampler: rollout replaces no tokens"),
        ((gpt, "the cat", "--ratio", "0.2", "--method", "lime"), "--ratio: it is an option of reagent"),
        ((gpt, "the cat", "--early-stop", "--method", "lime"), "--early-stop: it is an option of reagent"),
        ((gpt, "the cat", "--ratio", "1.5"), "ratio: got 1.5, expected a number in (0, 1)"),
        ((gpt, "the cat", "--tokenizer", folders / "bert"), "tokens and the model's embedding 310; expected the tokenizer that the model was trained with"),
        ((gpt, "the cat", "--target", ""), "of which the tokenizer makes no token"),
        ((gpt, "the cat", "--continuation", " "), "--continuation: got an empty text"),
        ((gpt, "the cat", "--continuation", "the " * 70), "continuation: with its"),
        ((gpt, "the cat", "--target-prefix", "a"), "it is for an encoder-decoder"),
        ((gpt, "a"), "1 of its 1 tokens can be scored"),
        ((folders / "t5", "the cat", "--method", "rollout"), "for an encoder-decoder choose 'attention_all'"),
        ((folders / "t5", "the cat", "--sampler", "inferential"), "choose another for an encoder-decoder"),
        (("nowhere/none", "the cat"), "is no file or folder here, it is not in the cache"),
        ((folders / "bare", "the cat"), "--tokenizer"),
        ((gpt, "the cat", "--targt", " cat"), "nearest: '--target'"),
        ((gpt,), "TEXT"),
    ):  # fmt: skip
        shown = explain(capsys, *words, status=2)
        assert shown.out == "" and shown.err.count("\n") == 1 and said in shown.err, (words, shown.err)
    assert [p.name for p in tmp_path.iterdir()] == ["there.html"]
    assert (tmp_path / "there.html").read_text() == "mine"


def test_fills_of_a_masked_model_go_to_every_method_that_replaces_tokens(folders, tmp_path, capsys):
    shown = [
        explain(
            capsys, folders / "gpt2", "the cat sat on", "--method", "occlusion", *more, "--out", tmp_path / name
        ).out.split("Page")[0]
        for name, more in (("a.html", ()), ("b.html", ("--mlm", folders / "bert")))
    ]  # fmt: skip
    assert shown[0] != shown[1]


def test_what_replaces_tokens_and_what_the_stop_test_asks_can_be_chosen(folders, tmp_path, capsys):
    (tmp_path / "words.txt").write_text("the old dog ran to the red house\n")
    common = (capsys, folders / "gpt2", "the cat sat on", "--steps", 4, "--early-stop")
    shown = [
        explain(*common, *more, "--out", tmp_path / f"{k}.html").out.split("Page")[0]
        for k, more in enumerate(((), ("--corpus", tmp_path / "words.txt"), ("--keep", 1, "--top-k", 1)))
    ]
    assert len(set(shown)) == 3
    again = (tmp_path / "2.html").read_text(encoding="utf-8")
    assert "--keep 1 --top-k 1" in again


def test_fewer_generated_tokens_than_asked_for_are_told(folders, tmp_path, capsys):
    shown = explain(
        capsys,
        folders / "gpt2",
        "the cat",
        "--method",
        "random",
        "--new-tokens",
        80,
        "--out",
        tmp_path / "a.html",
    )
    assert "of 80 tokens were generated" in shown.err and "of 80 tokens" in (tmp_path / "a.html").read_text()


class _Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.ids, self.described, self.focusable, self.tags = [], [], 0, []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.described += [values["aria-describedby"]] if "aria-describedby" in values else []
        self.focusable += values.get("tabindex") == "0" and "tok" in values.get("class", "")


def test_every_scored_token_can_be_reached_and_read_without_a_pointer():
    hostile = ["<script>alert(1)</script>", '" onfocus="x', "\u202egod", "\n", "&amp;"]
    block = TokenBlock(
        '<img src="x">', "line", hostile, [0.5, -0.25, 0.1, 0.0, 3.0], [True] * 4 + [False], marked=(0,)
    )
    html = render(
        "</title><script>",
        "<i>",
        [("<a>", "<b>")],
        [block],
        command="lineament explain '<x>'",
        notes=["<note>"],
    )
    reader = _Reader()
    reader.feed(html)
    assert not {"script", "img", "i", "b", "note"} & set(reader.tags)
    assert reader.focusable == 4 == len(reader.described) and set(reader.described) <= set(reader.ids)
    assert len(reader.ids) == len(set(reader.ids))
    assert "\u202e" not in html and "\\u202e" in html and "onfocus=&#34;" in html
    assert ".tok:focus .tip" in html and ".tok:hover .tip" in html
    assert "http://" not in html and "https://" not in html
    body = html[html.index("<main") : html.index("</main>") + 7]
    ElementTree.fromstring(body.replace("&#39;", "'").replace("&#34;", "'"))
    shares = [t["share"] for t in block.shown()]
    assert shares == [1.0, 0.5, 0.2, 0.0, 0.0], (
        "what is not scored is not coloured, and does not set the scale"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "m", "t", "--steps", "zero"], "--steps: got 'zero', expected an integer"),
        (["explain", "m", "t", "--ratio", "few"], "--ratio: got 'few', expected a number"),
        (["explain"], "MODEL, TEXT: got none, and lineament explain needs all of them"),
        (["explain", "m", "t", "--zebra"], "no option or argument '--zebra' (see"),
    ],
)
def test_the_parser_speaks_as_the_library_does(words, said, capsys):
    from lineament import cli

    assert cli.main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0], lines


def test_a_method_of_the_library_is_named_by_its_option():
    from lineament.cli import build_parser
    from lineament.cli.parser import in_options

    message = "target: ' a b' is 2 tokens, expected one; explain the whole with `explain_continuation`"
    assert in_options(message, build_parser()[1]["explain"]).endswith("explain the whole with --continuation")
