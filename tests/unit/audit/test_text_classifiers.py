"""Text classifiers: what the files hold, which words decide, and that no padding is ever read."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from tests.unit.audit.text_models import FAMILIES, Bag, classifier, texts, tokenizer

from lineament import cli
from lineament.audit.run import AuditOptions, audit
from lineament.core.checks import InputError
from lineament.load.data import load_data
from lineament.load.model_and_data import bring_together
from lineament.load.models import load_model

TEXTS, LABELS = texts(24)


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("classifier") / request.param
    classifier(request.param).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def as_csv(place):
    with (place / "reviews.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text", "label"), *enumerate_rows()])
    return place / "reviews.csv"


def enumerate_rows():
    return [(k, text, label) for k, (text, label) in enumerate(zip(TEXTS, LABELS))]


def as_lines(place):
    lines = [json.dumps({"sentence": text, "label": label}) for text, label in zip(TEXTS, LABELS)]
    (place / "reviews.jsonl").write_text("\n".join(lines))
    return place / "reviews.jsonl"


def as_parquet(place):
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.table({"review": TEXTS, "label": LABELS}), place / "reviews.parquet")
    return place / "reviews.parquet"


FILES = {"csv": as_csv, "jsonl": as_lines, "parquet": as_parquet, "pair": lambda place: (TEXTS, LABELS)}


@pytest.mark.parametrize("kind", FILES)
def test_each_text_is_answered_as_if_it_were_alone(folder, kind, tmp_path):
    """In whatever file it lies and however long its neighbours are."""
    loaded = load_model(str(folder))
    data = load_data(FILES[kind](tmp_path), tokenizer=loaded.tokenizer)
    words = tokenizer()
    with torch.no_grad():
        alone = [loaded.model(**words(text, return_tensors="pt")).logits if folder.name != "gpt2" else loaded.model(input_ids=words(text, return_tensors="pt")["input_ids"]).logits for text in TEXTS]  # fmt: skip
    with bring_together(loaded, data, batch_size=8) as found:
        assert torch.allclose(found.outputs, torch.cat(alone), atol=1e-5)
        assert found.classes == ("neg", "pos")
        assert found.targets.tolist() == [LABELS[0] != label for label in LABELS]
        again = found.answer(torch.tensor([3, 0, 7]))
        assert torch.allclose(again, torch.cat([alone[k] for k in (3, 0, 7)]), atol=1e-5)
    assert load_model(str(folder)).model.config.pad_token_id == loaded.model.config.pad_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_long_texts_are_cut_where_the_model_ends_and_counted(name):
    loaded = load_model((classifier(name), tokenizer()))
    long = " ".join(["w1"] * 60)
    data = load_data((["w2 w3", long, "w1 w4"], [0, 1, 1]), tokenizer=loaded.tokenizer)
    assert any("1 of 3 texts are cut" in note for note in data.notes)
    with bring_together(loaded, data) as found:
        assert bool(torch.isfinite(found.outputs).all())


def said(found, lens="words"):
    return {finding.key for finding in found[lens].findings}


def test_a_word_that_decides_is_found_by_what_it_does(tmp_path):
    """Only “zap” has a vote: with it the answer is “pos”, without it “neg”."""
    net, words = Bag(zap=20.0), tokenizer()
    found = audit((net, words), texts(120), out=tmp_path / "r", lenses=["words", "accuracy"])
    numbers = found["words"].numbers
    top = numbers["words"][0]
    assert (top["word"], top["answer"], top["put"], top["taken"]) == ("zap", "pos", 1.0, 1.0)
    assert "word decides" in said(found) and found.findings[0].key == "word decides"
    assert "“zap”" in found["words"].sentence and "attribution holds" in said(found)
    # By hand: "pos" exactly where the text says so.
    right = sum(("zap" in text.split()) == (label == "pos") for text, label in zip(*texts(120)))
    assert found["accuracy"].numbers["overall"]["accuracy"] == pytest.approx(right / 120)


def test_where_no_word_decides_none_is_said_to(tmp_path):
    """Every word has the same vote: none changes the answer, and the account of them is not called true."""
    import numpy as np

    rng = np.random.default_rng(1)
    some = [" ".join(rng.choice([f"w{i}" for i in range(6)], 6)) for _ in range(60)]
    net = Bag(**{f"w{i}": (-1.0) ** i * 0.02 for i in range(6)})
    found = audit(
        (net, tokenizer()), (some, [k % 2 for k in range(60)]), out=tmp_path / "r", lenses=["words"]
    )
    assert "word decides" not in said(found)


@pytest.mark.slow
def test_the_command_audits_a_text_classifier_with_every_lens(tmp_path, capsys):
    place = tmp_path / "bert"
    classifier("bert").save_pretrained(place)
    tokenizer().save_pretrained(place)
    assert cli.main(["audit", str(place), str(as_csv(tmp_path)), "--out", str(tmp_path / "r")]) == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    status = {section["name"]: section["status"] for section in report["sections"]}
    assert {status.pop("gaze"), status.pop("shortcuts"), status.pop("complexity")} == {"skipped"}
    assert list(status) == ["accuracy", "words", "collapse", "spectrum", "landscape", "parts"]
    assert not {"failed", "skipped"} & {*status.values()}
    assert any("none is padded" in note for note in report["notes"])


def test_a_masked_model_fills_in(tmp_path):
    from tests.unit.audit.text_models import SMALL
    from transformers import BertConfig, BertForMaskedLM

    place = tmp_path / "mlm"
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(place)
    tokenizer().save_pretrained(place)
    options = AuditOptions(filler=str(place))
    found = audit(
        (Bag(zap=20.0), tokenizer()), texts(40), out=tmp_path / "r", lenses=["words"], options=options
    )
    assert found["words"].status != "failed" and "`filler`" not in found["words"].sentence
    with pytest.raises(InputError, match="filler: it fills in words, and this network takes no texts"):
        audit(torch.nn.Flatten(), "digits", out=tmp_path / "s", options=options)


REFUSED = {
    "no label": ("text\ngood w1\n", "targets: the data has no array called 'label'"),
    "no text": ("words,label\ngood w1,1\n", "inputs: the data has no array called 'text'"),
    "empty": ("", "is empty, expected a row of column names"),
    "no rows": ("text,label\n", "has no rows, expected at least one sample"),
    "open quote": ('text,label\n"good w1,1\n', "cannot be read as a table"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_tables_without_texts_or_labels_are_refused(kind, tmp_path):
    (tmp_path / "a.csv").write_text(REFUSED[kind][0])
    with pytest.raises(InputError, match=REFUSED[kind][1]):
        load_data(tmp_path / "a.csv", tokenizer=tokenizer())


def test_texts_without_a_text_classifier_are_refused(tmp_path):
    with pytest.raises(InputError, match="texts are read for a text classifier only"):
        load_data((TEXTS, LABELS))
    table = tmp_path / "a.csv"
    table.write_text("text,label\ngood w1,1\n")
    with pytest.raises(InputError, match="texts are read for a text classifier only"):
        load_data(table)


def test_quotes_commas_line_breaks_and_empty_texts(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"good, ""very"" good",1\n"w1\nw2",0\n,1\nnone,0\n')
    found = load_data(path, tokenizer=tokenizer())
    assert len(found) == 3 and found.index.tolist() == [0, 1, 3], "a text may say none"
    assert "1 of 4 rows read are left out for an empty cell: row 3 ('text')" in found.notes[0]
    assert found.lengths.tolist() == [5, 4, 3]
