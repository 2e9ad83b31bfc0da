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
