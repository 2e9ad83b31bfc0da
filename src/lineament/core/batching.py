"""Run in chunks, halve them when memory runs out, and show progress."""

from __future__ import annotations

import gc
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields, is_dataclass
from datetime import timedelta
from itertools import accumulate, chain
from typing import Any, TypeVar

import torch
from torch import Tensor

from lineament.core.checks import InputError, number, require, show, tensor

T = TypeVar("T")

_FIRST_LINE, _LAST_LINE = 10.0, 300.0  # seconds between lines of progress

# CPU allocators of several systems, CUDA, cuBLAS and MPS say it so.
_OUT_OF_MEMORY = (
    "not enough memory",
    "can't allocate memory",
    "out of memory",
    "alloc_failed",
    "defaultcpuallocator",
)

# The chunk that fitted, by what was run and on how large rows.
_fitted: weakref.WeakKeyDictionary[Any, dict[Any, int]] = weakref.WeakKeyDictionary()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: ``MemoryError``, CUDA's, or the CPU allocator's ``RuntimeError``.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), is_out_of_memory(RuntimeError("shape"))
    (True, False)
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _OUT_OF_MEMORY)


def auto_batch(
    function: Callable[[int, int], T],
    count: int,
    *,
    batch_size: int | str = "auto",
    memory: Any = None,
    most: int | None = None,
) -> Iterator[T]:
    """``function(start, stop)`` over ranges that make up ``range(count)``, in order, none too large for the memory.

    With ``"auto"`` the first range is everything; each time memory runs out, the range is tried again at half the size.

    Args:
        function: must be repeatable: a range that failed halfway is run again, in parts.
        batch_size: ``"auto"``, or the rows at a time, which are then never changed.
        memory: an object under which the size that fitted is remembered for the next call (the default: ``function``).
        most: with ``"auto"``, never more rows than this, where smaller parts are faster.

    Raises:
        InputError: not a batch size. Out-of-memory errors pass when one row is too much, or when ``batch_size`` is a number.

    >>> list(auto_batch(lambda start, stop: (start, stop), 5, batch_size=2))
    [(0, 2), (2, 4), (4, 5)]
    """
    number("count", count, low=0, integer=True)
    auto = batch_size == "auto"
    if isinstance(batch_size, str) and not auto:
        raise InputError(f"batch_size: got {show(batch_size)}, expected 'auto' or an integer of at least 1")
    owner, detail = _memory_of(function if memory is None else memory)
    sizes = _fitted.setdefault(owner, {}) if auto and owner is not None else {}
    if auto:
        size = min(max(count, 1), sizes.get(detail, count or 1), most or max(count, 1))
    else:
        size = number("batch_size", batch_size, low=1, integer=True)
    start = 0
    while start < count:
        stop = min(start + size, count)
        try:
            result = function(start, stop)
        except Exception as error:
            if not auto or stop - start == 1 or not is_out_of_memory(error):
                raise
            size = (stop - start + 1) // 2
            sizes[detail] = size
            # The traceback holds the frames, and those the tensors that did not fit.
            error.__traceback__ = None
            del error
        else:
            start = stop
            yield result
            del result
            continue
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def chunked(
    function: Callable[..., Any], *tensors: Tensor, batch_size: int | str = "auto", most: int | None = None
) -> Any:
    """Apply a function to chunks of tensors along their first dimension, and join what it returns.

    Args:
        function: takes as many tensors as are given; returns a tensor whose first dimension is the chunk's, or
            dicts, lists, tuples and dataclasses of such tensors. It must be repeatable.
        tensors: all of the same length.
        batch_size: rows at a time, or ``"auto"``: all at once, halved each time memory runs out. The size that fitted is where
            the next call with the same function and rows of the same shape begins.
        most: as for :func:`auto_batch`.

    Raises:
        InputError: no tensors, unequal or zero lengths. What ``function`` raises passes; out-of-memory too once one row is too much.

    >>> chunked(lambda x: {"square": x * x}, torch.arange(5.0), batch_size=2)["square"].tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    require(len(tensors) > 0, "chunked: got no tensors, expected at least one")
    for each in tensors:
        tensor("chunked", each, finite=False, empty=True)
        if each.ndim == 0:
            raise InputError(f"chunked: got {show(each)}, expected at least one dimension")
    lengths = [len(each) for each in tensors]
    require(len(set(lengths)) == 1, f"chunked: got tensors of lengths {lengths}, expected the same length")
    require(lengths[0] > 0, "chunked: got empty tensors, expected at least one sample")

    def run(start: int, stop: int) -> Any:
        return function(*(each[start:stop] for each in tensors))

    rows = tuple((each.shape[1:], each.dtype, each.device) for each in tensors)
    parts = auto_batch(run, lengths[0], batch_size=batch_size, memory=(function, rows), most=most)
    return _concatenated(list(parts))


def _concatenated(parts: Sequence[Any]) -> Any:
    """One value from many of the same form: tensors are concatenated along their first dimension."""
    first = parts[0]
    if isinstance(first, Tensor):
        require(
            first.ndim > 0,
            "chunked: the function returned a tensor without dimensions, expected one value a row",
        )
        return first if len(parts) == 1 else torch.cat(list(parts))
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: _concatenated([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        columns = [_concatenated(column) for column in zip(*parts)]
        make: Any = getattr(type(first), "_make", type(first))
        return make(columns)
    if is_dataclass(first) and not isinstance(first, type):
        kind: Any = type(first)
        return kind(
            **{f.name: _concatenated([getattr(part, f.name) for part in parts]) for f in fields(first)}
        )
    raise InputError(
        f"chunked: the function returned {show(first)}, expected tensors, or dicts, lists, tuples and dataclasses of them"
    )


def _memory_of(memory: Any) -> tuple[Any, Any]:
    """What lives as long as the memory of a size should, and what tells its entries apart.

    A bound method belongs to its object; a closure, of which every call of the code around makes another, to its code.
    """
    function, rows = memory if isinstance(memory, tuple) else (memory, None)
    owner = getattr(function, "__self__", None)
    if owner is not None:
        return (owner, (getattr(function, "__name__", ""), rows)) if _lasting(owner) else (None, rows)
    owner = getattr(function, "__code__", function)
    return (owner, rows) if _lasting(owner) else (None, rows)


def _lasting(owner: Any) -> bool:
    try:
        hash(owner)
        weakref.ref(owner)
    except TypeError:
        return False
    return True


_shown = threading.Lock()
_say: ContextVar[Callable[[str], None] | None] = ContextVar("say", default=None)


def progress(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    *,
    before: Callable[[T], int] | None = None,
    work: Sequence[float] | None = None,
) -> Generator[T, None, None]:
    """The same items, with a progress bar on standard error where that is a terminal, or lines where :func:`progress_lines` asks for them.

    ``before`` tells of the first item how many came before it, where an earlier process may have done some: ``int`` of numbered steps. ``work`` says how much each
    of all items is, in any unit; equal by default.

    >>> list(progress([1, 2], "counting"))
    [1, 2]
    """
    bar, say = sys.stderr.isatty(), _say.get()
    # Two bars at once would write over each other: the one inside stays silent, and so do all processes but the first.
    if os.environ.get("RANK", "0") != "0" or not (bar or say) or not _shown.acquire(blocking=False):
        yield from iterable
        return
    begun = time.monotonic()
    try:
        items, done = iter(iterable), 0
        if before is not None:
            for first in items:
                items, done = chain([first], items), before(first)
                break
        behind = list(accumulate(work, initial=0.0)) if work is not None else range((total or 0) + 1)
        if bar:
            yield from _with_bar(items, description, total, done, behind)
        elif say is not None:
            yield from _with_lines(items, description, total, done, say, begun, behind)
    finally:
        _shown.release()


@contextmanager
def progress_lines(say: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, a long :func:`progress` that is not seen on a terminal tells ``say`` how far it is: after 10 s, then the more rarely the longer it takes,
    but every five minutes.

    >>> with progress_lines(print):
    ...     list(progress([1, 2], "counting"))  # too short for a line
    [1, 2]
    """
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def _with_bar(
    items: Iterator[T], description: str, total: int | None, done: int, behind: Sequence[float]
) -> Iterator[T]:
    """``behind`` is the work behind after so many items."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        task = shown.add_task(description, total=None if total is None else behind[-1])
        shown.update(task, completed=done if total is None else behind[done])
        for count, item in enumerate(items, done + 1):
            yield item
            shown.update(task, completed=count if total is None else behind[min(count, total)])


def _with_lines(
    items: Iterator[T],
    description: str,
    total: int | None,
    done: int,
    say: Callable[[str], None],
    begun: float,
    behind: Sequence[float],
) -> Iterator[T]:
    last = begun
    for count, item in enumerate(items, done + 1):
        yield item
        now = time.monotonic()
        if now - last >= min(max(_FIRST_LINE, (now - begun) / 10), _LAST_LINE):
            last = now
            line = f"{description}: {count:,}"
            if total is not None:
                at = behind[min(count, total)]
                pace = (now - begun) / max(at - behind[done], 1e-12)
                line += f" of {total:,}, about {timedelta(seconds=round(pace * (behind[-1] - at)))} left"
            say(line)
