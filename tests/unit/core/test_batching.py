"""Chunks, out-of-memory, and progress bars."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch

from lineament.core import batching
from lineament.core.batching import auto_batch, chunked, is_out_of_memory, progress, progress_lines
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


def test_progress_is_told_in_lines_where_they_are_asked_for(monkeypatch):
    clock, said = [0.0], []
    monkeypatch.setattr(batching.time, "monotonic", lambda: clock[0])

    def walk(steps, seconds, **options):
        for step in progress(steps, "working", 1000, **options):
            clock[0] += seconds
            yield step

    assert len(list(walk(range(1000), 1.0))) == 1000 and said == []  # nobody asked
    with progress_lines(said.append):
        assert list(walk(range(9), 1.0)) == list(range(9)) and said == []  # too short
        assert len(list(walk(iter(range(400, 1000)), 60.0, before=int))) == 600
        for _ in walk(range(2), 20.0):
            list(walk(range(2), 20.0))  # the one inside stays silent
    *said, first, second = said
    assert said[0] == "working: 401 of 1,000, about 9:59:00 left"
    assert (first, second) == (
        "working: 1 of 1,000, about 16:39:00 left",
        "working: 2 of 1,000, about 16:38:00 left",
    )
    # Every minute, later every tenth of the time so far, and at least every five minutes.
    steps = [int(line.split()[1]) for line in said]
    gaps = [b - a for a, b in pairwise(steps)]
    assert gaps[:9] == [1] * 9 and gaps == sorted(gaps) and gaps[-1] == 5 and steps[-1] > 995


def test_what_is_left_follows_the_work_of_each_item(monkeypatch):
    clock, said, work = [0.0], [], [20.0, 20.0, 100.0, 20.0]
    monkeypatch.setattr(batching.time, "monotonic", lambda: clock[0])
    with progress_lines(said.append):
        for step in progress(iter(range(1, 4)), "working", 4, before=int, work=work):
            clock[0] += work[step] * 3
    assert said == [
        "working: 2 of 4, about 0:06:00 left",
        "working: 3 of 4, about 0:01:00 left",
        "working: 4 of 4, about 0:00:00 left",
    ]


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
