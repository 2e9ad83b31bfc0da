"""`lineament audit` as a user calls it: one clear line for what cannot be used, and runs that are killed and go on."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lineament import cli
from lineament.data.digits import digit_images

NET = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))

class Answers(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = make()

    def forward(self, x):
        return {"scores": self.body(x)}

class Pair(Answers):
    def forward(self, x):
        return self.body(x), None

def leaves():
    raise SystemExit(0)
"""


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A folder with a user's file, weights and data, as the current one."""
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10)
    )
    save_file(model.state_dict(), "net.safetensors")
    data = digit_images()[:200]
    np.savez("data.npz", images=(data.inputs[:, 0] * 240).byte(), labels=data.targets)
    return tmp_path


GOOD = ["audit", "net.py:make", "data.npz", "--weights", "net.safetensors", "--out", "out"]


def changed(**words: str) -> list[str]:
    """The good command line with some words exchanged."""
    return [words.get({"net.py:make": "model", "data.npz": "data", "net.safetensors": "weights", "out": "out"}.get(w, ""), w) for w in GOOD]  # fmt: skip


def corrupt(name: str, content: bytes) -> str:
    Path(name).write_bytes(content)
    return name


def saved(name: str, **arrays) -> str:
    np.savez(name, **arrays)
    return name


X, Y = np.random.default_rng(0).random((20, 8, 8)), np.arange(20) % 10


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (lambda: changed(model="net.py:mak"), "nearest: 'make'"),
        (lambda: changed(model="nett.py:make"), "does not exist"),
        (lambda: changed(model="net.py"), "names no factory"),
        (lambda: changed(model="net.py:Answers"), "does not fit"),
        (lambda: ["audit", "net.py:Answers", "data.npz", "--out", "out"], "dict with keys ['scores']"),
        (
            lambda: ["audit", "net.py:Pair", "data.npz", "--out", "out"],
            "a tuple of a float32 tensor of shape",
        ),
        (lambda: ["audit", "net.py:leaves", "data.npz", "--out", "out"], "failed (SystemExit: 0)"),
        (lambda: ["audit", corrupt("s.py", b"raise SystemExit") + ":make", "data.npz"], "failed (SystemExit"),
        (lambda: changed(weights="."), "is a folder"),
        (lambda: changed(data="digit"), "nearest: 'digits'"),
        (lambda: changed(data=saved("d.npz", x=X, y=3 * np.eye(10, dtype=int)[Y])), "a row of 0s and 1s"),
        (lambda: changed(data=saved("s.npz", x=X[:1], y=Y[:1])), "the only sample is of class 0"),
        (lambda: [*GOOD, "--classes", "a,b"], "2 class names for labels up to 9"),
        (lambda: changed(out=""), "got an empty name"),
        (lambda: [*GOOD, "--classes", corrupt("e.txt", b"")], "is empty, expected one name a line"),
        (lambda: [*GOOD, "--classes", corrupt("l.txt", b"\xfc")], "cannot be read as UTF-8"),
        (lambda: changed(weights=corrupt("p.safetensors", b"\x80\x04K\x01.")), "no file of torch"),
        (lambda: changed(weights=corrupt("c.safetensors", b"\x10" + bytes(7) + b"no header")), "is corrupt"),
        (lambda: changed(weights="none.safetensors"), "does not exist"),
        (lambda: changed(data="none.npz"), "does not exist"),
        (lambda: changed(data=corrupt("c.npz", b"PK\x03\x04")), "is corrupt"),
        (lambda: changed(data=saved("n.npz", x=np.where(X > 0.99, np.nan, X), y=Y)), "NaN"),
        (lambda: changed(data=saved("l.npz", x=X, y=Y + 7)), "expected labels from 0 to 9"),
        (lambda: changed(data=saved("e.npz", x=X[:0], y=Y[:0])), "it is empty"),
        (lambda: changed(data=saved("o.npz", x=X, y=Y * 0)), "at least two classes"),
        (lambda: changed(data=saved("u.npz", x=X, y=Y[:9])), "as many samples"),
        (lambda: changed(data=saved("a.npz", a=X, b=Y)), "--inputs: the data has no array called"),
        (lambda: changed(data=saved("j.npz", x=X, y=np.array([{}] * 20, dtype=object))), "pickle"),
        (lambda: changed(out="net.py"), "is a file"),
        (lambda: [*GOOD, "--sites", "7"], "there are: '0', '1', '2', '3', '4'"),
        (lambda: [*GOOD, "--lenses", "gaz"], "nearest: 'gaze'"),
        (lambda: [*GOOD, "--groups", "hospital"], "there are: 'images', 'labels'"),
        (lambda: [*GOOD, "--method", "gradcam"], "nearest: 'grad_cam'"),
        (lambda: [*GOOD, "--samples", "1"], "samples"),
        (lambda: [*GOOD, "--sample", "9"], "nearest: '--samples'"),
        (lambda: ["audit", "net.py:make", "--out", "out"], "DATA"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_leaves_nothing(files, capsys, line, said):
    words = line()
    before = sorted(p.name for p in files.iterdir() if p.name != "__pycache__")
    assert cli.main(words) == 2
    shown = capsys.readouterr()
    lines = [text for text in shown.err.splitlines() if "reading the model" not in text]
    assert len(lines) == 1 and said in lines[0], shown.err
    assert shown.out == ""
    assert sorted(p.name for p in files.iterdir() if p.name != "__pycache__") == before


def test_nan_in_the_weights(files, capsys):
    torch.manual_seed(0)
    weights = {"0.weight": torch.full((4, 1, 3, 3), float("nan")), "0.bias": torch.zeros(4)}
    save_file({**weights, "4.weight": torch.zeros(10, 64), "4.bias": torch.zeros(10)}, "net.safetensors")
    assert cli.main(GOOD) == 2
    assert "NaN or infinite values in weights: 0.weight" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that is closed to root too")
def test_a_closed_folder(files, capsys):
    assert cli.main(changed(out="/proc/report")) == 2
    assert "'/proc/report' cannot be written" in capsys.readouterr().err


def test_the_report_is_where_it_says(files, capsys):
    assert cli.main([*GOOD, "--lenses", "accuracy"]) == 0
    assert capsys.readouterr().out.strip().endswith(f"Report: {files / 'out/report.html'}")
    assert json.loads((files / "out/report.json").read_text())["command"]


def test_a_report_in_which_every_lens_failed_is_no_success(files, capsys, monkeypatch):
    from lineament.audit.lenses import spectrum

    def look(subject):
        raise ZeroDivisionError("by nothing")

    monkeypatch.setattr(spectrum, "look", look)
    assert cli.main([*GOOD, "--lenses", "spectrum"]) == 1
    out = capsys.readouterr().out
    assert "failed  spectrum: This lens failed" in out and "ZeroDivisionError: by nothing" in out
    assert cli.main([*changed(out="beside"), "--lenses", "accuracy,spectrum"]) == 0


def _start(words: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "lineament", *words], stderr=subprocess.PIPE, text=True)


def _content(report: Path) -> dict:
    """What a report says, but for how long anything took."""
    stored = json.loads(report.read_text(encoding="utf-8"))
    for section in stored["sections"]:
        section.pop("seconds")
        if "removal" in section["numbers"]:
            section["numbers"]["removal"].pop("timing")
            section["sentence"] = re.sub(
                r"(A|How long a) forward of .* To write it", "To write it", section["sentence"]
            )
    return {key: stored[key] for key in ("sections", "findings")}


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_stopped_goes_on_with_the_same_result(files, how):
    lenses = ["--lenses", "accuracy,collapse,spectrum,parts"]
    assert cli.main([*changed(out="whole"), *lenses]) == 0
    process = _start([*GOOD, *lenses])
    assert process.stderr is not None
    for line in process.stderr:
        if "2/4" in line:
            process.send_signal(how)
            break
    rest = process.stderr.read()
    process.wait(30)
    if how == signal.SIGINT:
        assert process.returncode == 130 and "goes on where it stopped" in rest and "Traceback" not in rest
    assert not (files / "out/report.html").exists()
    process = _start([*GOOD, *lenses])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "going on where it stopped" in err
    assert _content(files / "out/report.json") == _content(files / "whole/report.json")
    assert {p.name for p in (files / "out").iterdir()} == {"report.html", "report.json"}


@pytest.mark.slow
def test_work_goes_on_when_nobody_reads_the_progress(files):
    process = _start([*GOOD, "--lenses", "accuracy,spectrum"])
    assert process.stderr is not None
    process.stderr.readline()
    process.stderr.close()
    assert process.wait(120) == 0
    assert (files / "out/report.html").exists()
