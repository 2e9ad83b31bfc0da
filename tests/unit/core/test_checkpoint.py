"""Runs that are killed and resumed give the result of an uninterrupted one; what is stored comes back bit for bit."""

from __future__ import annotations

import enum
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import InputError

Pair = namedtuple("Pair", "a b")


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
    with pytest.raises(InputError, match="holds a run of other options"):
        Checkpoint(tmp_path / "c", {"a": 2}, discard=False)
    assert Checkpoint(tmp_path / "c", {"a": 1}).resumed
    with pytest.warns(UserWarning, match="belongs to another configuration"):
        other = Checkpoint(tmp_path / "c", {"a": 2})
    assert not other.resumed and not other.finished("one")
    assert other.stage("one", lambda: 2) == 2


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _edit(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _forge(path):
    path.write_text(path.read_text().replace("0.1", "0.2").replace("note", "mote"))


def _empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _edit, _empty, lambda path: path.unlink()])
@pytest.mark.parametrize("kind", ["stage-*.safetensors", "stage-*.json"])
def test_a_damaged_stage_is_done_again(tmp_path, damage, kind):
    Checkpoint(tmp_path / "c", {}).stage("one", lambda: {"x": torch.ones(5), "y": "note"})
    (stored,) = (tmp_path / "c").glob(kind)
    damage(stored)
    again = Checkpoint(tmp_path / "c", {})
    if damage is _edit and kind.endswith("json"):
        _forge(stored)  # the last byte of the JSON is a line end, which says nothing
    assert not again.finished("one")
    assert torch.equal(again.stage("one", lambda: {"x": torch.zeros(5)})["x"], torch.zeros(5))
    assert Checkpoint(tmp_path / "c", {}).finished("one")


def test_a_damaged_marker_discards_the_folder_and_nothing_else(tmp_path):
    Checkpoint(tmp_path / "c", {}).stage("one", lambda: 1)
    _cut(tmp_path / "c" / "checkpoint.json")
    with pytest.warns(UserWarning, match="discarded"):
        assert Checkpoint(tmp_path / "c", {}).stage("one", lambda: 2) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match=r"holds 'thesis\.txt'"):
        Checkpoint(tmp_path / "mine", {})
    (tmp_path / "c" / "thesis.txt").write_text("kept")
    Checkpoint(tmp_path / "c", {}).finish()
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["thesis.txt"]
    with pytest.raises(InputError, match="is a file"):
        Checkpoint(tmp_path / "mine" / "thesis.txt", {})


def _try(folder, answers):
    try:
        Checkpoint(folder, {})
    except InputError as error:
        answers.put(str(error))
    else:
        answers.put("taken")


def test_another_process_in_the_same_folder_is_refused(tmp_path):
    def elsewhere():
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()
        process = context.Process(target=_try, args=(tmp_path / "c", answers))
        process.start()
        answer = answers.get()
        process.join(60)
        return answer

    run = Checkpoint(tmp_path / "c", {})
    assert "another process is running" in elsewhere()
    Checkpoint(tmp_path / "c", {}).stage("one", lambda: 1)  # the same process may, as after an exception
    assert "another process is running" in elsewhere()
    run.finish()
    assert elsewhere() == "taken"


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor([0.5 - 1.5j, 2.25 + 0.1j]),
        torch.tensor([0.5 - 1.5j, 1e-30 + 0.1j], dtype=torch.complex128).conj(),
        torch.zeros(0, 3, dtype=torch.complex64),
        torch.empty(2, 0),
        torch.ones(2).to(torch.float8_e5m2),
        torch.tensor([-0.0, float("nan"), float("inf")]),
        np.array([["a", "bc"]]),
        np.zeros((0, 2)),
        np.array([1 + 2j]),
        np.datetime64("2026-01-02"),
        np.bool_(True),
        np.arange(6).reshape(2, 3).T,
        {1: "a", None: 2, -0.5: [()], False: {}},
        2**200,
        "\ud800 lone, \x00 and \u202e",
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_value_round_trips(tmp_path, value):
    found = Checkpoint(tmp_path / "c", {}).stage("one", lambda: value)
    assert type(found) is type(value)
    if isinstance(value, torch.Tensor):
        assert found.dtype == value.dtype and found.shape == value.shape
        bits = [t.resolve_conj().contiguous().reshape(-1).view(torch.uint8) for t in (found, value)]
        assert torch.equal(*bits)
        found.zero_()  # what comes back can be written to
    elif isinstance(value, np.ndarray):
        assert found.dtype == value.dtype and np.array_equal(found, value) and found.flags.writeable
    else:
        assert found == value


def test_the_first_run_gets_what_a_resumed_one_gets(tmp_path):
    strided = torch.randn(4, 3).T
    first = Checkpoint(tmp_path / "c", {}).stage("one", lambda: strided)
    again = Checkpoint(tmp_path / "c", {}).stage("one", lambda: 1 / 0)
    assert first.stride() == again.stride() and torch.equal(first, strided)


def _training():
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.0), torch.nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    state = {
        "net": net,
        "optimizer": optimizer,
        "schedule": schedule,
        "torch": torch.Generator().manual_seed(1),
        "numpy": np.random.default_rng(2),
        "losses": [],
        "best": {"loss": math.inf},
        "mean": torch.zeros(4),
    }

    def step(index):
        x = torch.randn(16, 4, generator=state["torch"]) + float(state["numpy"].normal())
        state["mean"].mul_(0.9).add_(x.mean(0))
        loss = (net(x).squeeze() - x.sum(1)).square().mean()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        for parameter, gradient in zip(net.parameters(), gradients):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
        state["losses"].append(loss.item())
        state["best"]["loss"] = min(state["best"]["loss"], loss.item())

    return state, step


@pytest.mark.parametrize(("every", "seconds"), [(1, 20.0), (7, 20.0), (None, 0.0), (None, 20.0)])
def test_a_loop_resumes_bit_for_bit(tmp_path, every, seconds):
    whole, step = _training()
    for index in range(30):
        step(index)
    for stop in (3, 19, 29):
        state, step = _training()
        with pytest.raises(KeyboardInterrupt):
            for index in Checkpoint(tmp_path / "c", {}).loop(
                "train", 30, state, every=every, seconds=seconds
            ):
                step(index)
                if index == stop:
                    raise KeyboardInterrupt
    state, step = _training()
    ran = 0
    for index in Checkpoint(tmp_path / "c", {}).loop("train", 30, state, every=every, seconds=seconds):
        step(index)
        ran += 1
    assert ran == {(1, 20.0): 1, (7, 20.0): 2, (None, 0.0): 1, (None, 20.0): 30}[every, seconds]
    assert state["losses"] == whole["losses"] and state["best"] == whole["best"]
    assert all(torch.equal(a, b) for a, b in zip(state["net"].parameters(), whole["net"].parameters()))
    assert torch.equal(state["mean"], whole["mean"]) and torch.equal(
        state["torch"].get_state(), whole["torch"].get_state()
    )
    assert state["numpy"].normal() == whole["numpy"].normal()
    assert state["schedule"].get_last_lr() == whole["schedule"].get_last_lr()
    # A finished loop runs no step, and gives its end state all the same.
    state, step = _training()
    assert list(Checkpoint(tmp_path / "c", {}).loop("train", 30, state)) == []
    assert state["losses"] == whole["losses"]


def test_a_loop_names_state_that_it_cannot_keep(tmp_path):
    run = Checkpoint(tmp_path / "c", {})
    with pytest.raises(InputError, match=r"state 'rate': got 0\.1 \(float\)"):
        list(run.loop("train", 3, {"rate": 0.1}))
    with pytest.raises(InputError, match="every: got 0"):
        list(run.loop("train", 3, {}, every=0))


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
    with pytest.raises(InputError, match="expected strings or numbers"):
        Checkpoint(tmp_path / "c", {}).stage("one", lambda: {(1, 2): 2})
    with pytest.raises(InputError, match="expected plain numbers or text"):
        Checkpoint(tmp_path / "c", {}).stage("one", lambda: np.array([None]))
    with pytest.raises(InputError, match="Pair"):
        Checkpoint(tmp_path / "c", {}).stage("one", lambda: Pair(1, 2))
    with pytest.raises(InputError, match=r"the key holds .*object.*expected plain values"):
        Checkpoint(tmp_path / "c", {"a": object()})


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Point:
    x: torch.Tensor
    weight: float = 1.0


@dataclass(frozen=True)
class Line:
    ends: tuple[Point, Point]
    between: Sequence[Point] = ()
    by_name: Mapping[str, Point | None] = field(default_factory=dict)
    colour: Colour = Colour.RED
    name: str | None = None
    folder: Path = Path("a")
    content: bytes = b""
    array: np.ndarray = field(default_factory=lambda: np.arange(2))
    length: float = field(init=False, default=2.0)


@dataclass(frozen=True)
class Other:
    x: int


def test_dataclasses_come_back_as_the_types_that_the_caller_names(tmp_path):
    points = [Point(torch.arange(3.0) * k, 1 / 3) for k in range(2)]
    line = Line(
        (points[0], points[1]), points, {"a": points[1], "b": None}, Colour.BLUE, "ü", Path("b/c"), b"\0\xff"
    )
    for compute in (lambda: {"line": [line]}, lambda: 1 / 0):
        (found,) = Checkpoint(tmp_path / "c", {}).stage("one", compute, dict[str, list[Line]])["line"]
        assert type(found) is Line and found.colour is Colour.BLUE and found.folder == Path("b/c")
        assert found.content == b"\0\xff" and found.name == "ü" and found.length == 2.0
        assert found.array.tolist() == [0, 1] and found.by_name["b"] is None
        for point in (found.ends[1], found.between[1], found.by_name["a"]):
            assert type(point) is Point and torch.equal(point.x, points[1].x) and point.weight == 1 / 3
    assert Checkpoint(tmp_path / "c", {}).stage("none", lambda: None, Line) is None
    mixed = [Other(1), points[1]]
    assert Checkpoint(tmp_path / "c", {}).stage("mixed", lambda: mixed, list[Other | Point])[0] == Other(1)


def test_nothing_in_a_file_chooses_a_class(tmp_path):
    run = Checkpoint(tmp_path / "c", {})
    for kind in (None, Other, list[Point], dict[str, Any]):
        with pytest.raises(InputError, match=r"'one': got a Point.*kind="):
            run.stage("one", lambda: Point(torch.ones(1)), kind)
    run.stage("one", lambda: Point(torch.ones(1)), Point)
    assert run.finished("one", Point) and not run.finished("one") and not run.finished("one", Other)
    # Under another type, or one with other fields, it is not that result: it is computed again.
    assert run.stage("one", lambda: Other(3), Other) == Other(3)

    @dataclass(frozen=True)
    class Changed:
        y: int

    Changed.__qualname__ = "Other"
    assert run.stage("one", lambda: Changed(4), Changed) == Changed(4)


def test_a_loop_keeps_lists_of_dataclasses(tmp_path):
    history: list[Other] = []
    for step in Checkpoint(tmp_path / "c", {}).loop(
        "t", 3, {"h": history}, every=1, kinds={"h": list[Other]}
    ):
        history.append(Other(step))
        if step == 1:
            break
    resumed: list[Other] = []
    left = list(
        Checkpoint(tmp_path / "c", {}).loop("t", 3, {"h": resumed}, every=1, kinds={"h": list[Other]})
    )
    assert left == [1, 2] and resumed == [Other(0)]


RUN = """
import json, sys, torch
from pathlib import Path
from lineament.core.checkpoint import Checkpoint
folder = Path(sys.argv[1])
run = Checkpoint(folder / "stages", {"seed": 0})
def log(word):
    with open(folder / "log", "a") as file:
        file.write(word + "\\n")
def start():
    log("start")
    return torch.zeros(20000)
weights, trace, generator = run.stage("start", start), [], torch.Generator().manual_seed(0)
for step in run.loop("train", 120, {"weights": weights, "generator": generator, "trace": trace}, every=1):
    weights.mul_(0.99).add_(torch.randn(20000, generator=generator))
    trace.append(weights.sum().item())
    log(str(step))
(folder / "result").write_text(json.dumps([weights.tolist()[:50], trace]))
"""


@pytest.mark.slow
def test_a_run_killed_again_and_again_gives_the_result_of_an_uninterrupted_one(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()

    def start():
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / "cut")])

    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "whole")])
    runpy.run_path(str(script))
    log = tmp_path / "cut" / "log"
    for mark in ("5", "77"):
        process = start()
        deadline = time.monotonic() + 60
        # Most of a step is spent in writing, so that this falls in the middle of it.
        while mark not in (log.read_text().split() if log.exists() else ()):
            assert time.monotonic() < deadline and process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    assert not (tmp_path / "cut" / "result").exists()
    assert start().wait(100) == 0
    assert (tmp_path / "cut" / "result").read_text() == (tmp_path / "whole" / "result").read_text()
    done = log.read_text().split()
    assert done.count("start") == 1 and len(done) < 130, "what was stored is not done again"
