"""One piece of work in several processes: each takes its share of the samples, and what they find is merged.

Inside :func:`shared` the processes that ``torchrun`` started, or that made a process group themselves, run the same code on the same data.
What is costly and divides (batches, chunks of a curvature product, points of a landscape, texts) is divided: each process takes every n-th item
(:func:`each`, :func:`mine`), and all get what all found (:func:`merged`, :func:`summed`). Everything else each of them computes for itself. Whatever
they tell each other goes through the CPU (Gloo), with an account of how the work went, so that an error in one of them is raised in all, and one
that has ended is named. Outside of :func:`shared` there is one process, and nothing is sent.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import reduce
from itertools import islice
from operator import add
from typing import Any, TypeVar

import torch
from torch import Tensor

from lineament.core.batching import progress
from lineament.core.checks import InputError

T = TypeVar("T")
S = TypeVar("S")

# A process that has not answered for so long is taken for lost; one may compute alone for some minutes.
TIMEOUT = timedelta(minutes=30)


class LostProcess(RuntimeError):
    """One of the processes that work together has ended, or answers no more."""


class _Shards:
    """The processes that work together: here, this one alone."""

    rank, count, lost = 0, 1, ""

    def refuse(self) -> None:
        pass


class _Group(_Shards):
    def __init__(self) -> None:
        import torch.distributed as dist

        self.rank, self.count = dist.get_rank(), dist.get_world_size()
        self.group: Any = dist.new_group(backend="gloo", timeout=TIMEOUT)
        introduce(self.group)

    def exchanged(self, content: bytes) -> list[Any]:
        """What every process passed, by rank."""
        import torch.distributed as dist

        held: list[Any] = [None] * self.count
        self.carried(lambda: dist.all_gather_object(held, content, group=self.group))
        return held

    def carried(self, send: Callable[[], Any]) -> None:
        if not self.lost:
            try:
                send()
                return
            except Exception as error:
                self.lost = _why(str(error), self.rank, self.count)
        self.refuse()

    def refuse(self) -> None:
        """Raise where a process has been lost; the first of those that are left says so."""
        if self.lost:
            error: Any = LostProcess(self.lost)
            error.speaks = _leads()
            raise error


_ONE, _ALONE = _Shards(), _Shards()
_now: _Shards = _ONE
# The machine and the number of every process of this work, by rank, and this one's rank.
_places: list[tuple[str, int]] = []
_own = 0


def started() -> int:
    """How many processes the launcher started for one piece of work; 1 inside :func:`shared`, which divides the work itself.

    >>> started()
    1
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if _now is _ONE else 1


def count() -> int:
    """Among how many processes work is divided."""
    return _now.count


def place() -> tuple[int, int]:
    """Which of how many processes this one is, counted from 0."""
    return _now.rank, _now.count


def first() -> bool:
    """Whether this process is the one that reads and writes files."""
    return _now.rank == 0


def noted(note: Callable[[str], None]) -> Callable[[str], None]:
    """A progress callback that is called in the first process only."""
    return note if first() else lambda line: None


def own_device(device: Any) -> Any:
    """The device of this process: where a kind is named (``"cuda"``), that of its number on this machine."""
    if _now.count == 1 or device is None:
        return device
    named = torch.device(device)
    return (
        named
        if named.type == "cpu" or named.index is not None
        else f"{named.type}:{os.environ.get('LOCAL_RANK', _now.rank)}"
    )


def _why(said: str, own: int, count: int) -> str:
    late = "timed out" in said.lower()
    for _ in range(20):  # the connection closes a moment before the process is gone
        if gone() or late:
            break
        time.sleep(0.05)
    if gone():
        names = [f"rank {rank} of {count} (process {_places[rank][1]})" for rank in gone()]
        return f"{' and '.join(names)} ended or was stopped before the work was done"
    others = f"a rank other than {own} of {count}"
    if late:
        return f"{others} has not answered for {TIMEOUT.total_seconds() / 60:.0f} minutes"
    return f"{others} cannot be reached any more ({' '.join(said.split())[:200]})"


def told(send: Callable[[], T]) -> T:
    """A message of a training; where a process that :func:`introduce` made known has ended, the others say which.

    Raises:
        LostProcess: a process has ended.

    >>> told(lambda: 1)
    1
    """
    try:
        return send()
    except RuntimeError as error:
        words = ("connection", "peer", "timed out", "socket", "closed")
        if not any(word in str(error).lower() for word in words):
            raise
        raise LostProcess(_why(str(error), *place_in_training())) from error


def introduce(group: Any = None) -> None:
    """Let the processes of a group know each other, so that they can tell which has ended."""
    global _own
    import torch.distributed as dist

    held: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(held, (socket.gethostname(), os.getpid()), group=group)
    _places[:], _own = held, dist.get_rank(group)


def gone() -> list[int]:
    """The ranks of the processes on this machine that run no longer."""
    return [
        rank
        for rank, (host, process) in enumerate(_places)
        if rank != _own and host == socket.gethostname() and not _running(process)
    ]


def ended() -> str:
    """What to say of the processes that have ended, in the first of those that are left; ``""`` in the others."""
    return " and ".join(f"rank {rank}" for rank in gone()) if _leads() else ""


def _leads() -> bool:
    """Whether no process before this one is left."""
    return set(range(_own)) <= set(gone())


@contextmanager
def shared() -> Iterator[None]:
    """Divide work among the processes of ``torchrun``, or of the process group there is, while the block runs; all of them must enter it.

    Raises:
        InputError: the processes cannot find each other.

    >>> with shared():
    ...     count(), each([1, 2], lambda x: x * x)
    (1, [1, 4])
    """
    global _now
    import torch.distributed as dist

    grouped = dist.is_available() and dist.is_initialized()
    if _now is not _ONE or (dist.get_world_size() if grouped else started()) == 1:
        yield
        return
    if not dist.is_available():
        raise InputError(
            f"processes: {started()} were started, and this PyTorch cannot connect them; start one"
        )
    if not grouped:
        try:
            dist.init_process_group("gloo", timeout=TIMEOUT)
        except ValueError as error:
            raise InputError(
                f"processes: WORLD_SIZE says {started()}, and they cannot find each other ({error}); start them by torchrun"
            ) from error
    group = _now = _Group()
    try:
        yield
    finally:
        # A process that has lost another waits for none; who speaks of it is asked later.
        if not group.lost:
            _now = _ONE
            dist.destroy_process_group(None if not grouped else group.group)


@contextmanager
def _alone() -> Iterator[None]:
    """Work that this process does for all: what it calls is not divided again."""
    global _now
    before, _now = _now, _ALONE
    try:
        yield
    finally:
        _now = before


def together(what: str, compute: Callable[[], T], *, device: Any = "cpu") -> list[T]:
    """What ``compute()`` gives in each process, by rank, in all of them; an error of one is raised in all.

    Args:
        what: the work's name, by which processes notice that they are not doing the same.
        device: where tensors come to lie.

    Raises:
        LostProcess: a process has ended.
    """
    if _now.count == 1:
        return [compute()]
    _now.refuse()
    error = None
    try:
        content = _packed((what, None, compute()))
    except LostProcess:
        raise
    except Exception as failure:
        if hasattr(failure, "speaks"):  # it was raised in all
            raise
        error, content = failure, _packed((what, _sendable(failure), None))
    assert isinstance(_now, _Group)
    found = [_unpacked(each, device) for each in _now.exchanged(content)]
    failed = [(rank, said) for rank, (_, said, _) in enumerate(found) if said is not None]
    kinds = [kind for kind, _, _ in found]
    if failed:
        rank, said = failed[0]
        same = len(failed) == _now.count and len({(type(e), str(e)) for _, e in failed}) == 1
        _raise(error if same and error is not None else _of_rank(said, rank), rank, error)
    if len(set(kinds)) > 1:
        other = next(rank for rank, kind in enumerate(kinds) if kind != kinds[0])
        text = f"rank {other} of {_now.count} came to {kinds[other]!r} and rank 0 to {kinds[0]!r}, so that their work cannot be merged"
        _raise(RuntimeError(text), 0)
    return [value for _, _, value in found]


def _raise(error: Any, speaker: int, cause: Exception | None = None) -> None:
    """Raise what all processes raise, of which one says it."""
    error.speaks = speaker == _now.rank
    if cause is None or cause is error:
        raise error
    raise error from cause


def guarded(what: str, compute: Callable[[], T]) -> T:
    """``compute()``; where it fails in one process, the same error is raised in all, wherever they are in it."""
    own: list[T] = []
    together(what, lambda: own.append(compute()))
    return own[0]


def agreed(what: str, compute: Callable[[], T]) -> T:
    """What ``compute()`` gives in the first process, in all; no other runs it."""
    return together(what, lambda: compute() if first() else None)[0]  # pyright: ignore


def alike(what: str, value: str) -> None:
    """Make sure that all processes hold the same.

    Raises:
        InputError: they do not.
    """
    found = together(what, lambda: value)
    other = next((rank for rank, each in enumerate(found) if each != found[0]), None)
    if other is not None:
        text = f"{what}: rank {other} of {len(found)} has another than rank 0, expected the same in all; seed what is drawn at random, and do not shuffle"
        _raise(InputError(text), 0)


def mine(items: Iterable[T]) -> Iterator[T]:
    """This process's share: every n-th item."""
    return islice(items, _now.rank, None, _now.count)


def each(items: Iterable[T], work: Callable[[T], S], what: str = "items", *, bar: bool = False) -> list[S]:
    """``work(item)`` of every item, in their order, each computed by one of the processes; ``bar``: with a progress bar named ``what``."""
    items = list(items)
    n = _now.count
    shown: Callable[[list[T]], Iterable[T]] = (lambda some: progress(some, what)) if bar else iter
    if n == 1 or len(items) < 2:
        return [work(item) for item in shown(items)]

    def own() -> list[S]:
        share = list(mine(items))
        with _alone():
            return [work(item) for item in shown(share)]

    return _in_order(together(f"{what}, {len(items)}", own))


def interleaved(own: list[T]) -> list[T]:
    """What all found of their shares (:func:`mine`), in the order of the items."""
    return own if _now.count == 1 else _in_order(together("joining lists", lambda: own))


def _in_order(found: list[list[T]]) -> list[T]:
    n = len(found)
    return [found[at % n][at // n] for at in range(sum(map(len, found)))]


def merged(stream: T, *, device: Any = "cpu") -> T:
    """A statistic of all samples, from what each process gathered of its share (``a + b`` joins two)."""
    if _now.count == 1:
        return stream
    found: list[Any] = together(f"merging {type(stream).__name__}", lambda: stream, device=device)
    return reduce(add, found)


def summed(what: str, compute: Callable[[], Tensor]) -> Tensor:
    """The sum of what ``compute()`` gives over the processes, the same bits in all; tensors of one shape."""
    if _now.count == 1:
        return compute()
    import torch.distributed as dist

    group = _now
    assert isinstance(group, _Group)
    own = guarded(what, compute)
    total = own.detach().to("cpu", copy=True).contiguous()
    group.carried(lambda: dist.all_reduce(total, group=group.group))
    return total.to(own.device)


def gathered(rows: Tensor) -> Tensor:
    """The rows of all processes of a training, by rank, as many of each and without gradients; its own where there is no process group.

    >>> gathered(torch.ones(2, 1)).shape
    torch.Size([2, 1])
    """
    import torch.distributed as dist

    if place_in_training()[1] == 1:
        return rows.detach()
    held = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    told(lambda: dist.all_gather(held, rows.detach().contiguous()))
    return torch.cat(held)


def joined(rows: Tensor) -> Tensor:
    """The rows of all processes of a training, by rank, with gradients; its own where there is no process group.

    The gradient of a process's own rows is the sum of what the losses of all processes say of them, so that parameters whose gradients are then averaged
    over the processes (DistributedDataParallel) get that of the processes' mean loss. Numbers of rows may differ; all processes must call it.

    >>> joined(torch.ones(2, 1)).shape
    torch.Size([2, 1])
    """
    if place_in_training()[1] == 1:
        return rows
    found: Any = _Joined.apply(rows)
    return found


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        import torch.distributed as dist

        sizes = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
        told(lambda: dist.all_gather(sizes, torch.tensor([len(rows)], device=rows.device)))
        counts = [int(size) for size in sizes]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        held = [torch.empty_like(padded) for _ in counts]
        told(lambda: dist.all_gather(held, padded))
        ctx.counts = counts
        return torch.cat([part[:n] for part, n in zip(held, counts)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        import torch.distributed as dist

        # A reduce-scatter of unequal parts: half of what an all-reduce sends.
        given, own = grads[0].contiguous(), ctx.counts[dist.get_rank()]
        each = given.new_empty(len(ctx.counts) * own, *given.shape[1:])
        told(lambda: dist.all_to_all_single(each, given, [own] * len(ctx.counts), ctx.counts))
        return each.view(len(ctx.counts), *given[:own].shape).sum(0)


def totals(values: Tensor, *, largest: bool = False) -> Tensor:
    """The sum of a tensor over the processes of a training, or its largest values; of one shape in all.

    Where the loss is one and the same in all processes, the gradient of each process's own terms is right.

    >>> totals(torch.ones(2)).tolist()
    [1.0, 1.0]
    """
    if place_in_training()[1] == 1:
        return values
    found: Any = _Totals.apply(values, largest)
    return found


class _Totals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, largest: bool) -> Tensor:
        import torch.distributed as dist

        found = values.clone(memory_format=torch.contiguous_format)
        told(lambda: dist.all_reduce(found, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM))
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


def place_in_training() -> tuple[int, int]:
    """The rank of this process and the number of processes of a training; (0, 1) where there is no process group.

    >>> place_in_training()
    (0, 1)
    """
    import torch.distributed as dist

    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)


def _packed(value: Any) -> bytes:
    content = io.BytesIO()
    torch.save(value, content)
    return content.getvalue()


def _unpacked(content: bytes, device: Any = "cpu") -> Any:
    # Written a moment ago by a process of the same command.
    return torch.load(io.BytesIO(content), map_location=device, weights_only=False)


def _sendable(error: Exception) -> Exception:
    """The error, without what cannot be sent, or one that says the same."""
    try:
        bare = type(error)(*error.args)
        _unpacked(_packed(bare))
        return bare
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def _of_rank(error: Exception, rank: int) -> Exception:
    text = f"rank {rank} of {_now.count}: {error}"
    try:
        named = type(error)(text)
        if str(named) == text:
            return named
    except Exception:
        pass
    return RuntimeError(f"rank {rank} of {_now.count}: {type(error).__name__}: {error}")


def _running(process: int) -> bool:
    """Whether a process of this machine runs: neither ended nor stopped."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZXT"
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return False
    try:
        os.kill(process, 0)
    except OSError:
        return False
    return True
