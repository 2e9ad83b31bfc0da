"""`lineament train` as a user calls it: what it writes, what it refuses in one line, and runs that are killed and go on."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from lineament import cli
from lineament.data.digits import digit_images

pytest.importorskip("accelerate", reason="needs the extra lm")

NET = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10)
    )

def one():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 1))

def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10))

def wide():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12))

class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = make(), nn.Linear(3, 3)

    def forward(self, x):
        return self.used(x)
"""


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    data = digit_images()[:400]
    np.savez("data.npz", images=(data.inputs[:, 0] * 240).byte(), labels=data.targets)
    return tmp_path


GOOD = ["train", "net.py:make", "data.npz", "--out", "run", "--epochs", "3", "--device", "cpu"]
X, Y = np.random.default_rng(0).random((40, 8, 8)), np.arange(40) % 10


def saved(name: str, **arrays) -> str:
    np.savez(name, **arrays)
    return name


def content(folder: Path) -> dict:
    """What a run wrote, without the seconds."""
    raw = json.loads((folder / "train.json").read_text())
    raw.pop("seconds")
    for entry in [*raw["history"], raw["early"] or {}]:
        entry.pop("seconds", None)
    return raw


def test_a_run_writes_what_it_says(files, capsys):
    words = ["--optimizer", "adam", "--lr", "0.01", "--sam", "0.02", "--useful"]
    assert cli.main([*GOOD, *words]) == 0
    shown = capsys.readouterr()
    assert "lineament audit net.py:make data.npz --weights run/model.safetensors" in shown.out
    board = importlib.util.find_spec("tensorboard") is not None
    log = "tensorboard" if board else "history.csv"
    assert {p.name for p in (files / "run").iterdir()} == {
        *("model.safetensors", "train.json", "learning-curve.svg", "learning-curve-dark.svg", log)
    }
    assert ("tensorboard is not installed" in shown.err) != board
    raw = json.loads((files / "run/train.json").read_text())
    assert raw["options"]["sam"] == 0.02 and raw["options"]["useful"] == "auto" and raw["early"]["slow"] > 0
    assert [e["epoch"] for e in raw["history"]] == [1, 2, 3] and raw["last"] > 0.5
    assert {"torch", "lineament", "accelerate", "python"} <= set(raw["versions"])
    if not board:
        rows = list(csv.DictReader((files / "run/history.csv").open()))
        assert [float(r["train_loss"]) for r in rows] == [e["train_loss"] for e in raw["history"]]


def test_event_files_hold_the_history(files):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert cli.main(GOOD) == 0
    events = EventAccumulator(str(files / "run/tensorboard"))
    events.Reload()
    history = json.loads((files / "run/train.json").read_text())["history"]
    found = [(e.step, e.value) for e in events.Scalars("loss/train")]
    assert found == [(e["epoch"], pytest.approx(e["train_loss"], rel=1e-6)) for e in history]
    assert "accuracy/validation" in events.Tags()["scalars"]


def test_images_in_folders_two_classes_one_output(files, capsys):
    generator = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (files / "photos" / name).mkdir(parents=True)
        for i in range(12):
            pixels = generator.integers(0, 100, (10, 12), dtype=np.uint8) + 120 * number
            Image.fromarray(pixels.astype(np.uint8)).save(files / "photos" / name / f"{i}.png")
    words = ["train", "net.py:one", "photos", "--out", "run", "--image-size", "8,8", "--validation", "0.25", "--device", "cpu"]  # fmt: skip
    assert cli.main([*words, "--normalize", "0.5,0.25", "--epochs", "10", "--batch-size", "6"]) == 0
    out = capsys.readouterr().out
    assert "--image-size 8,8 --normalize 0.5,0.25" in out
    assert json.loads((files / "run/train.json").read_text())["last"] > 0.9


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (lambda: ["train", "--out", "run"], "MODEL: got none"),
        (lambda: ["train", "net.py:make", "--out", "run"], "DATA: got none"),
        (lambda: ["train", "net.py:make", "data.npz"], "--out: got none"),
        (lambda: [*GOOD, "--lr", "-1"], "lr: got -1.0"),
        (lambda: [*GOOD, "--lr", "nan"], "lr: got nan"),
        (lambda: [*GOOD, "--length", "64"], "--length: got 64, which only --ssa uses"),
        (lambda: [*GOOD, "--block-size", "8"], "--block-size: got 8, which only --ssa uses"),
        (lambda: [*GOOD, "--sam", "inf"], "sam: got inf"),
        (lambda: [*GOOD, "--weight-decay", "-0.1"], "--weight-decay"),
        (lambda: [*GOOD, "--optimizer", "adamm"], "nearest: 'adam'"),
        (lambda: [*GOOD, "--optimiser", "adam"], "nearest: '--optimizer'"),
        (lambda: [*GOOD, "--useful", "9"], "useful"),
        (lambda: ["train", "--useful", *GOOD[1:]], "DATA: got none"),
        (lambda: [*GOOD, "--device", "cuda:7"], "--device: 'cuda:7'"),
        (lambda: [*GOOD, "--weights", "none.safetensors"], "does not exist"),
        (lambda: ["train", "net.py:mak", *GOOD[2:]], "nearest: 'make'"),
        (lambda: ["train", "net.py:lazy", *GOOD[2:]], "without a shape yet: 1.weight, 1.bias; run the network once"),
        (lambda: ["train", "net.py:wide", *GOOD[2:]], "2 of the model's 12 classes have no example: 10, 11"),
        (lambda: ["train", "net.py:make", saved("g.npz", x=X, y=Y * 2), *GOOD[3:]], "labels from 0 to 9"),
        (lambda: ["train", "net.py:make", saved("m.npz", x=X, y=Y // 2 * 2), *GOOD[3:]], "no example: 1, 3"),
        (lambda: ["train", "net.py:make", saved("r.npz", x=X, y=Y / 3), *GOOD[3:]], "classifiers only"),
        (lambda: ["train", "net.py:make", saved("n.npz", x=np.where(X > 0.99, np.nan, X), y=Y), *GOOD[3:]], "NaN"),
        (lambda: [*GOOD[:4], "net.py", *GOOD[5:]], "is a file"),
        (lambda: [*GOOD, "--compare", "run"], "it trains nothing"),
        (lambda: ["train", "--compare", "none"], "is no folder"),
        (lambda: ["train", "--compare", "."], "no finished run"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(files, capsys, line, said):
    words = line()
    before = sorted(p.name for p in files.iterdir() if p.name != "__pycache__")
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    lines = [text for text in shown.err.splitlines() if "reading the model" not in text]
    assert len(lines) == 1 and said in lines[0] and shown.out == "", shown.err
    assert sorted(p.name for p in files.iterdir() if p.name != "__pycache__") == before


def test_nan_says_the_step(files, capsys):
    assert cli.main([*GOOD, "--lr", "1e30", "--schedule", "none"]) == 2
    assert "NaN or infinite at step" in capsys.readouterr().err
    assert not (files / "run/train.json").exists()


def test_a_folder_that_is_there(files, capsys):
    assert cli.main([*GOOD, "--epochs", "1"]) == 0
    first = load_file("run/model.safetensors")
    capsys.readouterr()
    assert cli.main([*GOOD, "--epochs", "1"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert cli.main([*GOOD, "--epochs", "1", "--seed", "1", "--overwrite"]) == 0
    assert json.loads((files / "run/train.json").read_text())["options"]["seed"] == 1
    assert not (first["6.weight"] == load_file("run/model.safetensors")["6.weight"]).all()
    (files / "other").mkdir()
    (files / "other/thesis.txt").write_text("mine")
    assert cli.main([*GOOD[:4], "other", *GOOD[5:], "--overwrite"]) == 2
    assert "'thesis.txt'" in capsys.readouterr().err and (files / "other/thesis.txt").exists()


def test_runs_are_compared(files, capsys):
    for name, words in (("runs/plain", []), ("runs/flat", ["--asam", "0.5", "--optimizer", "diffgrad"])):
        assert cli.main([*GOOD[:4], name, *GOOD[5:], *words]) == 0
    (files / "runs/bad").mkdir()
    (files / "runs/bad/train.json").write_text("{}")
    (files / "runs/begun").mkdir()
    for name in ("plain", "begun"):
        (files / f"runs/{name}/unfinished.json").write_text("{}")
    capsys.readouterr()
    assert cli.main(["train", "--compare", "runs"]) == 0
    shown = capsys.readouterr()
    assert "'runs/begun' is not finished; left out" in shown.err
    assert "'runs/plain' shows an earlier run, which an unfinished one is to replace" in shown.err
    row = next(line for line in shown.out.splitlines() if "runs/flat" in line)
    last = json.loads((files / "runs/flat/train.json").read_text())["last"]
    assert "diffgrad" in row and "asam 0.5" in row and f"{last:.2%}" in row
    assert "runs/plain" in shown.out and "bad/train.json" in shown.err


def _start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "lineament", *words], stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--sam", "0.05", "--useful", "1"], ["--optimizer", "diffgrad"]])
def test_a_run_that_is_killed_goes_on_to_the_same_files(files, words, capsys):
    words = [*words, "--epochs", "40"]
    assert cli.main([*GOOD[:4], "whole", *GOOD[5:], *words]) == 0
    process = _start([*GOOD, *words])
    assert process.stderr is not None
    for line in process.stderr:
        if "epoch 4/40" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.stderr.close()
    process.wait(30)
    assert not (files / "run/train.json").exists() and (files / "run/unfinished.json").exists()
    capsys.readouterr()
    assert cli.main([*GOOD, *words, "--lr", "0.2"]) == 2
    assert "lr was" in capsys.readouterr().err
    process = _start([*GOOD, *words])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "going on after epoch" in err
    assert (files / "run/model.safetensors").read_bytes() == (files / "whole/model.safetensors").read_bytes()
    assert content(files / "run") == content(files / "whole")
    assert {p.name for p in (files / "run").iterdir()} == {p.name for p in (files / "whole").iterdir()}


@pytest.mark.slow
def test_the_audit_opens_what_was_trained(files, capsys):
    assert cli.main([*GOOD, "--epochs", "12", "--sam", "0.05"]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Audit it: "))
    words = command.removeprefix("Audit it: lineament ").split()
    assert cli.main([*words, "--lenses", "accuracy,collapse"]) == 0
    report = json.loads((files / "run-report/report.json").read_text())
    accuracy = next(s for s in report["sections"] if s["name"] == "accuracy")["numbers"]["overall"]
    trained = json.loads((files / "run/train.json").read_text())
    assert accuracy["count"] == 400 and trained["last"] > 0.8
    assert accuracy["accuracy"] > trained["last"] - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("name", ["make", "Spare"])
def test_two_processes_train_one_network(files, name):
    # What `accelerate launch` starts on machines with several GPUs, here with two processes of a CPU.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [
            *launch,
            "-m",
            "lineament",
            "train",
            f"net.py:{name}",
            *GOOD[2:5],
            "--epochs",
            "6",
            "--useful",
            "2",
            "--sam",
            "0.02",
        ],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0 and "find_unused_parameters" not in done.stderr, done.stderr
    raw = json.loads((files / "run/train.json").read_text())
    assert raw["processes"] == 2 and raw["last"] > 0.6 and done.stderr.count("epoch 6/6") == 1
    alone = [
        "train",
        f"net.py:{name}",
        *GOOD[2:4],
        "alone",
        "--epochs",
        "6",
        "--useful",
        "2",
        "--sam",
        "0.02",
        "--device",
        "cpu",
    ]
    assert cli.main(alone) == 0
    one = json.loads((files / "alone/train.json").read_text())
    # The same orders and rates; batch norm and dropout differ.
    assert one["history"][-1]["train_loss"] == pytest.approx(raw["history"][-1]["train_loss"], rel=0.2)


def test_what_the_training_refuses_leaves_no_folder(files, capsys):
    small = saved("s.npz", x=X, y=Y)
    for words, said in (
        (("--validation", "0.1"), "holds none out"),
        (("--validation", "0", "--lr", "1e30", "--batch-size", "8"), "step 2 of epoch 1"),
    ):
        assert cli.main(["train", "net.py:make", small, "--out", "run", "--device", "cpu", *words]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
        assert not Path("run").exists()


def test_whole_numbers_are_labels_however_they_are_stored(files):
    """Spreadsheets and pandas make 3.0 of a 3."""
    line = [
        "train",
        "net.py:make",
        saved("f.npz", x=X, y=Y.astype(np.float32)),
        "--out",
        "run",
        "--validation",
        "0",
    ]
    assert cli.main([*line, "--epochs", "1", "--device", "cpu"]) == 0
    assert Path("run/model.safetensors").is_file()
