"""Chunks, out-of-memory, and runs that are killed and resumed."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from lineament.core.batching import Checkpoint, chunked, is_out_of_memory, progress
from lineament.core.checks import InputError


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100, "auto"])
def test_chunks_join_to_the_whole(batch_size):
    x, y = torch.rand(7, 2), torch.rand(7)
    found = chunked(lambda a, b: {"sum": a.sum(1) + b, "pair": (a, [b])}, x, y, batch_size=batch_size)
    assert torch.equal(found["sum"], x.sum(1) + y)
    assert torch.equal(found["pair"][0], x) and torch.equal(found["pair"][1][0], y)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."
        ),
    ],
)
def test_auto_halves_until_it_fits_and_keeps_the_order(error):
    sizes = []

    def greedy(x):
        if len(x) > 3:
            raise error
        sizes.append(len(x))
        return x

    assert torch.equal(chunked(greedy, torch.arange(10)), torch.arange(10))
    assert max(sizes) <= 3 and sum(sizes) == 10
    with pytest.raises(type(error)):
        chunked(greedy, torch.arange(10), batch_size=5)


def test_a_real_allocation_that_fails_is_recognised():
    def greedy(x):
        torch.empty(len(x) * 2**50) if len(x) > 1 else None
        return x

    assert torch.equal(chunked(greedy, torch.arange(4)), torch.arange(4))


def test_other_errors_pass_and_one_sample_too_many_is_out_of_memory():
    assert not is_out_of_memory(RuntimeError("shapes differ"))
    with pytest.raises(ZeroDivisionError):
        chunked(lambda x: 1 / 0, torch.arange(3))

    def never(x):
        raise MemoryError

    with pytest.raises(MemoryError):
        chunked(never, torch.arange(3))


def test_chunked_names_unequal_and_empty_input():
    with pytest.raises(InputError, match=r"lengths \[2, 3\]"):
        chunked(lambda a, b: a, torch.ones(2), torch.ones(3))
    with pytest.raises(InputError, match="empty"):
        chunked(lambda a: a, torch.ones(0))
    with pytest.raises(InputError, match="batch_size: got 0"):
        chunked(lambda a: a, torch.ones(2), batch_size=0)


def test_progress_yields_everything():
    assert list(progress(range(4), "working", total=4)) == [0, 1, 2, 3]


NEST = {
    "tensor": torch.tensor([[1.5, float("nan")]]),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "scalar": torch.tensor(3),
    "shared": [torch.ones(3)] * 2,
    "strided": torch.arange(6).reshape(2, 3).T,
    "array": np.arange(3, dtype=np.int16),
    "tuple": (1, 2.0, None, True, "ü\n"),
    "floats": [math.inf, 0.1, -0.0],
    "is": {"is": "tensor"},
    "number": np.float32(0.1),
}


def test_a_stage_comes_back_bit_for_bit(tmp_path):
    for compute in (lambda: NEST, lambda: 1 / 0):
        found = Checkpoint(tmp_path / "c", {"a": 1}).stage("one", compute)
        assert torch.equal(found["tensor"].isnan(), NEST["tensor"].isnan()) and found["tensor"][0, 0] == 1.5
        assert found["half"].dtype == torch.bfloat16 and found["scalar"].shape == ()
        assert torch.equal(found["strided"], NEST["strided"]) and torch.equal(
            found["shared"][1], torch.ones(3)
        )
        assert isinstance(found["array"], np.ndarray) and found["array"].dtype == np.int16
        assert found["tuple"] == NEST["tuple"] and found["floats"] == NEST["floats"]
        assert math.copysign(1, found["floats"][2]) == -1
        assert found["is"] == {"is": "tensor"} and found["number"] == float(np.float32(0.1))


def test_another_configuration_starts_afresh(tmp_path):
    Checkpoint(tmp_path / "c", {"a": 1}).stage("one", lambda: 1)
    assert Checkpoint(tmp_path / "c", {"a": 1}).resumed
    other = Checkpoint(tmp_path / "c", {"a": 2})
    assert not other.resumed and not other.finished("one")
    assert other.stage("one", lambda: 2) == 2


def test_a_damaged_stage_is_done_again(tmp_path):
    Checkpoint(tmp_path / "c", {}).stage("one", lambda: {"x": torch.ones(5)})
    stored = next((tmp_path / "c").glob("*.safetensors"))
    stored.write_bytes(stored.read_bytes()[:-7])
    assert torch.equal(
        Checkpoint(tmp_path / "c", {}).stage("one", lambda: {"x": torch.zeros(5)})["x"], torch.zeros(5)
    )


def test_names_that_differ_in_odd_characters_stay_apart(tmp_path):
    run = Checkpoint(tmp_path / "c", {})
    assert run.stage("a/b", lambda: 1) == 1
    assert run.stage("a:b", lambda: 2) == 2
    assert run.stage("../../escape", lambda: 3) == 3
    assert {p.parent for p in (tmp_path / "c").iterdir()} == {tmp_path / "c"}
    run.finish()
    assert not (tmp_path / "c").exists()


def test_what_cannot_be_stored_is_named(tmp_path):
    with pytest.raises(InputError, match="set"):
        Checkpoint(tmp_path / "c", {}).stage("one", lambda: {1, 2})
    with pytest.raises(InputError, match="string keys"):
        Checkpoint(tmp_path / "c", {}).stage("one", lambda: {1: 2})


RUN = """
import json, sys, time, torch
from pathlib import Path
from lineament.core.batching import Checkpoint
folder = Path(sys.argv[1])
run = Checkpoint(folder / "stages", {"seed": 0})
def train(stage, before):
    with open(folder / "log", "a") as log:
        log.write(stage + "\\n")
    generator = torch.Generator().manual_seed(len(stage))
    time.sleep(float(sys.argv[2]))
    return before + torch.randn(4, generator=generator)
weights = torch.zeros(4)
for stage in ("a", "bb", "ccc"):
    weights = run.stage(stage, lambda: train(stage, weights))
(folder / "result").write_text(json.dumps(weights.tolist()))
"""


@pytest.mark.slow
def test_a_run_killed_at_any_moment_gives_the_result_of_an_uninterrupted_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()

    def start(folder, pause):
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / folder), str(pause)])

    assert start("whole", 0).wait(60) == 0
    first = start("cut", 1.0)
    log = tmp_path / "cut" / "log"
    deadline = time.monotonic() + 60
    while not (log.exists() and "bb" in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait(60)
    assert not (tmp_path / "cut" / "result").exists()
    assert start("cut", 0).wait(60) == 0
    assert json.loads((tmp_path / "cut" / "result").read_text()) == json.loads(
        (tmp_path / "whole" / "result").read_text()
    )
    assert log.read_text().split() == ["a", "bb", "bb", "ccc"]
