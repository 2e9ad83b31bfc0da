"""`lineament train --multiplex`: a network on columns of ids gets one small table, trains, and is opened again by the line that is printed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lineament import cli

pytest.importorskip("accelerate", reason="needs the extra lm")

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.user, self.tags = nn.Embedding(200, 8), nn.EmbeddingBag(30, 8)
        self.out = nn.Linear(16, 2)

    def forward(self, x):
        return self.out(torch.cat([self.user(x[:, 0]), self.tags(x[:, 1:])], 1))

make = Net
"""


def test_a_shared_table_is_trained_and_opened_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(30, (120, 3), generator=generator)
    lines = [f"{a},{b},{c},{int(b > 14)}" for a, b, c in rows.tolist()]
    Path("clicks.csv").write_text("\n".join(["user,tag,other,clicked", *lines]))
    line = "train net.py:make clicks.csv --targets clicked --epochs 20 --optimizer adam --lr 0.02 --device cpu --out run --multiplex"
    assert cli.main([*line.split(), "0.25"]) == 0
    told = capsys.readouterr()
    assert "one table of 115 rows for user, tags: 460 numbers instead of 1,840" in told.err
    weights = load_file("run/model.safetensors")
    assert [w.shape for n, w in weights.items() if n.endswith("table.weight")] == [(115, 4)]
    assert json.loads(Path("run/train.json").read_text())["options"]["multiplex"] == 0.25
    said = next(text for text in told.out.splitlines() if text.startswith("Audit it: "))
    assert (
        cli.main([*shlex.split(said.removeprefix("Audit it: lineament ")), "--lens", "accuracy,tables"]) == 0
    )
    sections = {s["name"]: s for s in json.loads(Path("run-report/report.json").read_text())["sections"]}
    assert sections["accuracy"]["numbers"]["overall"]["accuracy"] > 0.8
    assert sections["tables"]["numbers"]["views"]


@pytest.mark.parametrize(
    ("share", "model", "words"),
    [
        ("1.5", "net.py:make", "--multiplex: got 1.5, expected a number in (0, 1]"),
        ("0.5", "torch.nn:Flatten", "no nn.Embedding or nn.EmbeddingBag to replace"),
    ],
)
def test_what_cannot_be_shared_is_one_line(tmp_path, monkeypatch, capsys, share, model, words):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    assert cli.main(["train", model, "digits", "--device", "cpu", "--out", "run", "--multiplex", share]) == 2
    assert words in capsys.readouterr().err and not Path("run").exists()


def test_a_column_with_one_bad_cell_and_rows_left_out_are_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(1, 2)\n")
    rows = [
        ["n.a." if k == 4 else f"{k}.5", "" if k == 7 else f"{k % 5}", "x", f"{k % 2}"] for k in range(60)
    ]
    Path("na.csv").write_text("\n".join(map(",".join, [["a", "b", "word", "y"], *rows])))
    said = [
        "column 'a' is left out: 'n.a.' in row 5 is no number, and 59 of its 60 cells are",
        "1 of 60 rows read are left out for an empty cell: row 8 ('b')",
        "columns that hold no numbers are left out: 'word'",
    ]
    for line in (
        "train net.py:make na.csv --epochs 1 --device cpu --out run",
        "baseline na.csv --classifiers knn --out base",
    ):
        assert cli.main(line.split()) == 0
        told = capsys.readouterr().err
        assert all(words in told for words in said)
    assert cli.main(["baseline", "na.csv", "--inputs", "a,b", "--classifiers", "knn", "--out", "other"]) == 2
    assert "inputs: column 'a' holds 'n.a.', expected numbers (row 5)" in capsys.readouterr().err
    Path("net.py").write_text("from torch import nn\n\n\ndef make():\n    return nn.Linear(2, 2)\n")
    assert cli.main(["train", "net.py:make", "na.csv", "--out", "unfit", "--device", "cpu"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "do not fit the model" in last and said[0] in last
