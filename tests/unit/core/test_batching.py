"""Chunks, out-of-memory, and runs that are killed and resumed."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lineament.core.batching import Checkpoint, auto_batch, chunked, is_out_of_memory, progress
from lineament.core.checks import InputError

Pair = namedtuple("Pair", "a b")


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


def test_auto_remembers_what_fitted():
    tried = []

    class Model:
        def __call__(self, x):
            tried.append(len(x))
            if len(x) > 3:
                raise MemoryError
            return x

        def method(self, x):
            return self(x)

    model = Model()
    chunked(model, torch.arange(16.0))
    assert tried == [16, 8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    tried.clear()
    chunked(model, torch.arange(4.0))
    assert tried == [2, 2]
    tried.clear()
    chunked(model, torch.ones(4, 1))  # rows of another shape may be larger or smaller
    chunked(Model(), torch.arange(4.0))
    assert tried == [4, 2, 2, 4, 2, 2]
    tried.clear()
    chunked(model.method, torch.arange(4.0))
    chunked(model.method, torch.arange(4.0))
    assert tried == [4, 2, 2, 2, 2]


def test_auto_batch_covers_the_range_once():
    def work(start, stop):
        if stop - start > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return list(range(start, stop))

    assert [row for part in auto_batch(work, 23) for row in part] == list(range(23))
    assert list(auto_batch(work, 0)) == []
    with pytest.raises(InputError, match="batch_size: got 'large', expected 'auto'"):
        list(auto_batch(work, 3, batch_size="large"))


def test_gradients_flow_through_chunks_and_dataclasses_join():
    @dataclass
    class Scores:
        mean: torch.Tensor
        none: None = None

    x = torch.randn(5, 2, requires_grad=True)
    found = chunked(lambda t: Scores(t.square().mean(1)), x, batch_size=2)
    assert isinstance(found, Scores) and found.none is None
    (gradient,) = torch.autograd.grad(found.mean.sum(), x)
    torch.testing.assert_close(gradient, x)
    with pytest.raises(InputError, match="without dimensions"):
        chunked(lambda t: t.sum(), x, batch_size=2)
    with pytest.raises(InputError, match=r"returned 3\.0, expected tensors"):
        chunked(lambda t: 3.0, x)
    with pytest.raises(InputError, match="no tensors"):
        chunked(lambda: 1)


@pytest.mark.slow
def test_progress_shows_on_a_terminal_only_and_once_at_a_time():
    code = """
        import sys, time
        from lineament.core.batching import progress
        for outer in progress(range(2), "outer", total=2):
            for inner in progress(range(3), "inner"):
                time.sleep(0.06)
        for step in progress(range(5), "cut short"):
            break
        print(list(progress(iter("ab"), "again")))
    """
    master, slave = os.openpty()
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=slave,
        timeout=100,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(slave)
    shown = b""
    os.set_blocking(master, False)
    with contextlib.suppress(OSError):
        while chunk := os.read(master, 65536):
            shown += chunk
    os.close(master)
    assert done.returncode == 0 and done.stdout == b"['a', 'b']\n"
    assert b"outer" in shown and b"inner" not in shown


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
def test_a_run_killed_at_any_moment_gives_the_result_of_an_uninterrupted_one(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(RUN))
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()

    def start(folder, pause):
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / folder), str(pause)])

    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "whole"), "0"])
    runpy.run_path(str(script))
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


LOOP = """
import json, sys, time, torch
from pathlib import Path
from lineament.core.batching import Checkpoint
folder = Path(sys.argv[1])
run = Checkpoint(folder / "stages", {"seed": 0})
generator = torch.Generator().manual_seed(0)
weights, trace = torch.zeros(20000), []
for step in run.loop("train", 120, {"weights": weights, "generator": generator, "trace": trace}, every=1):
    weights.mul_(0.99).add_(torch.randn(20000, generator=generator))
    trace.append(weights.sum().item())
    (folder / "step").write_text(str(step))
(folder / "result").write_text(json.dumps([weights.tolist()[:50], trace]))
"""


@pytest.mark.slow
def test_a_loop_killed_again_and_again_gives_the_result_of_an_uninterrupted_one(tmp_path, monkeypatch):
    script = tmp_path / "run.py"
    script.write_text(LOOP)
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()

    def start(name):
        return subprocess.Popen([sys.executable, str(script), str(tmp_path / name)])

    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "whole")])
    runpy.run_path(str(script))
    step = tmp_path / "cut" / "step"
    for mark in (5, 77):
        process = start("cut")
        deadline = time.monotonic() + 60
        # Most of a step is spent in writing, so that this falls in the middle of it.
        while int((step.read_text() if step.exists() else "") or -1) < mark:
            assert time.monotonic() < deadline and process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait(60)
    assert not (tmp_path / "cut" / "result").exists()
    assert start("cut").wait(100) == 0
    assert (tmp_path / "cut" / "result").read_text() == (tmp_path / "whole" / "result").read_text()
