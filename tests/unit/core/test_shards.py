"""Two processes do together what one does alone: the same numbers, errors in both, and no one waits for one that has ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.unit.core.shared_work import SHARED, SMALL, network, samples

from lineament import cli
from lineament.audit import audit
from lineament.audit.compare import compare
from lineament.core import shards

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def launched(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **env}
    return subprocess.run([*LAUNCH, *words], capture_output=True, text=True, timeout=200, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("shared")
    script = Path(__file__).with_name("shared_work.py")
    done = launched(str(script), str(place))
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def found(folder) -> list[dict]:
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARED)
def test_both_have_what_one_process_has(found, name):
    for rank in (0, 1):
        assert found[rank]["shared"][name] == pytest.approx(found[rank]["alone"][name], rel=1e-5, abs=1e-6)
    assert found[0]["shared"][name] == found[1]["shared"][name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("in a share", "MemoryError: rank 1 of 2: not enough memory"),
        ("before a share", "MemoryError: rank 1 of 2: not enough memory"),
        ("at the end", "MemoryError: rank 1 of 2: not enough memory"),
        ("in all", "ZeroDivisionError: integer"),
        ("what cannot be sent", "rank 1 of 2: "),
        ("other work", "rank 1 of 2 came to 'items, 5' and rank 0 to 'items, 4'"),
        ("other data", "InputError: data: rank 1 of 2 has another than rank 0"),
    ],
)
def test_an_error_of_one_process_is_raised_in_both_and_named(found, where, words):
    for rank in (0, 1):
        assert words in found[rank]["errors"][where]


def close(one, two, place=""):
    if isinstance(one, dict):
        assert one.keys() == two.keys(), place
        for key in one:
            close(one[key], two[key], f"{place}/{key}")
    elif isinstance(one, list):
        assert len(one) == len(two), place
        for number, pair in enumerate(zip(one, two)):
            close(*pair, f"{place}/{number}")
    elif isinstance(one, float):
        # A ratio of rounding errors may be anything: the curvature that a flat direction has.
        assert one == pytest.approx(two, rel=2e-3, abs=2e-4, nan_ok=True), place
    else:
        assert one == two, place


@pytest.mark.slow
def test_an_audit_by_two_processes_has_the_numbers_of_one(found, folder, tmp_path):
    lenses = list(found[0]["audit"])
    alone = audit(network(), samples(), out=tmp_path / "report", lenses=lenses)
    numbers = json.loads(json.dumps({section.name: section.numbers for section in alone.sections}))
    assert [section.status for section in alone.sections] == [
        section["status"] for section in json.loads((folder / "report/report.json").read_text())["sections"]
    ]
    close(numbers, found[0]["audit"])
    assert found[0]["everywhere"] == found[1]["everywhere"] and found[1]["agreed"] == 0
    assert sorted(p.name for p in (folder / "report").iterdir()) == ["report.html", "report.json"]


@pytest.mark.slow
def test_a_comparison_by_two_processes_has_the_numbers_of_one(found, folder, tmp_path):
    alone = compare(network(), network(1), samples(), out=tmp_path / "compare", options=SMALL)
    numbers = json.loads(json.dumps({section.name: section.numbers for section in alone.sections}))
    close(numbers, found[0]["compare"])
    assert found[0]["compare"] == found[1]["compare"]
    assert sorted(p.name for p in (folder / "compare").iterdir()) == ["compare.html", "compare.json"]


NET = """
import os, signal, torch
from torch import nn

class Fragile(nn.Module):
    calls = 0
    def __init__(self):
        super().__init__()
        self.inside = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    def forward(self, x):
        Fragile.calls += 1
        if os.environ.get("DIES") == os.environ.get("RANK", "-") and Fragile.calls > int(os.environ["AFTER"]):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.inside(x)

def make():
    torch.manual_seed(0)
    return Fragile()
"""
AUDIT = "audit net.py:make digits --samples 90 --batch-size 16 --lenses accuracy,collapse,parts --out out"
TRAIN = "train net.py:make digits --epochs 4 --batch-size 64 --out out"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "result", "after"),
    [(AUDIT, "report.html", 40), (TRAIN, "train.json", 70)],
    ids=["audit", "train"],
)
def test_a_killed_process_ends_the_others_by_name_and_one_process_goes_on(
    command, result, after, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    done = launched("-m", "lineament", *command.split(), DIES="1", AFTER=str(after))
    ours = [line for line in done.stderr.splitlines() if line.startswith("lineament: ") and "ended" in line]
    assert done.returncode != 0 and len(ours) == 1, done.stderr
    assert "rank 1 of 2" in ours[0] and "goes on where it stopped" in ours[0]
    stored = {path.name for path in Path("out/.stages").rglob("*.safetensors")}
    assert stored and not Path("out", result).exists()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cli.main(command.split()) == 0
    said = capsys.readouterr().err
    assert "going on" in said, said
    assert Path("out", result).exists() and not Path("out/.stages").exists()


@pytest.mark.parametrize("command", ["reproduce gns", "bench", "papers"])
def test_what_runs_in_one_process_is_refused_in_several(command, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(command.split()) == 2
    assert "2 processes were started together" in capsys.readouterr().err


def test_one_process_sends_nothing():
    with shards.shared():
        assert shards.count() == 1 and shards.first() and not torch.distributed.is_initialized()
        assert shards.each("ab", str.upper) == ["A", "B"] and list(shards.mine("abc")) == ["a", "b", "c"]
        with pytest.raises(ZeroDivisionError):
            shards.guarded("a test", lambda: 1 // 0)
