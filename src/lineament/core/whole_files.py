"""Tensors that lie with several processes, written as one safetensors file and read back by any number of them.

No process ever holds a divided tensor whole: its blocks go to the first process one after the other, which writes them to their place; when the file is read, each
process reads its own part. Everything else in the file is ordinary: any reader of safetensors opens it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.core.files import atomic_write
from lineament.core.shards import place_in_training, told

# Bytes that are sent and written at once.
_BLOCK = 1 << 26
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def part_of(length: int, rank: int, count: int) -> slice:
    """The indices that lie with one of ``count`` processes, as ``Shard`` divides ``length``: in order, the last ones have fewer or none.

    >>> [part_of(7, rank, 3) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """
    size = -(-length // count)
    return slice(min(rank * size, length), min((rank + 1) * size, length))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: all of an ordinary one, its part of a DTensor; to be read and written, without gradients."""
    held: Any = tensor
    with torch.no_grad():
        return held.to_local() if divided(tensor) else held.detach()


def divided(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "placements")


def dimension(tensor: Any) -> int | None:
    """The dimension along which a DTensor is divided; ``None`` of a replicated one and of an ordinary tensor."""
    return getattr(tensor.placements[0], "dim", None) if divided(tensor) else None


def save_whole(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write tensors and DTensors (of a mesh of one dimension) as one safetensors file; every process must call it, the first one writes.

    Raises:
        OSError: the file cannot be written, in all processes.

    >>> import tempfile; from safetensors.torch import load_file
    >>> path = f"{tempfile.mkdtemp()}/a.safetensors"; save_whole({"a": torch.ones(2)}, path)
    >>> load_file(path)["a"].tolist()
    [1.0, 1.0]
    """
    names = sorted(state, key=lambda name: (-state[name].element_size(), name))
    header, end = {}, 0
    for name in names:
        tensor, start = state[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end],
        }  # fmt: skip
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    with ExitStack() as stack:
        file = _together(path, lambda: _opened(stack, path))
        failure: OSError | None = None
        for block in (text, *(block for name in names for block in _blocks(state[name]))):
            if file is not None and failure is None:
                try:
                    if isinstance(block, Tensor):
                        block = block.reshape(-1).view(torch.uint8).numpy().data
                    file.write(block)
                except OSError as error:  # the others go on sending
                    failure = error
        _together(path, lambda: _closed(file, failure))


def _opened(stack: ExitStack, path: str | Path) -> Any:
    return stack.enter_context(stack.enter_context(atomic_write(path)).open("wb"))


def _closed(file: Any, failure: OSError | None) -> None:
    if failure is not None:
        raise failure
    file.close()


def _together(path: str | Path, work: Callable[[], Any]) -> Any:
    """What ``work()`` gives in the first process, ``None`` in the others; an error of the system is raised in all."""
    rank, count = place_in_training()
    found, failure = None, None
    if rank == 0:
        try:
            found = work()
        except OSError as error:
            failure = error
    said: list[Any] = [None if failure is None else failure.strerror or str(failure)]
    if count > 1:
        import torch.distributed as dist

        told(lambda: dist.broadcast_object_list(said, 0))
    if said[0] is not None:
        raise failure or OSError(f"{path}: rank 0 could not write it ({said[0]})")
    return found


def load_parts(path: str | Path, state: Mapping[str, Tensor]) -> None:
    """Fill tensors and DTensors from a safetensors file; each process reads what it holds, so that their number may be another than at saving.

    Raises:
        InputError: no safetensors file, a name missing in it, a shape unlike the tensor's.

    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/a.safetensors"; save_whole({"a": torch.ones(2)}, path)
    >>> a = torch.zeros(2); load_parts(path, {"a": a}); a.tolist()
    [1.0, 1.0]
    """
    with _file(path) as file, torch.no_grad():
        parts = {name: _named(file, name, path) for name in state}
        for name, tensor in state.items():
            shape = tuple(parts[name].get_shape())
            require(
                shape == tuple(tensor.shape),
                f"path: {name!r} in {path} is {shape}, expected {tuple(tensor.shape)}",
            )
        for name, tensor in state.items():
            along, own = dimension(tensor), local(tensor)
            if along is None:
                own.copy_(file.get_tensor(name))
            elif own.numel():
                at = part_of(tensor.shape[along], *place_in_training())
                own.copy_(parts[name][at] if along == 0 else parts[name][:, at])


def read_one(path: str | Path, name: str) -> Tensor:
    """One tensor of a safetensors file.

    Raises:
        InputError: no such file or name.

    >>> import tempfile
    >>> path = f"{tempfile.mkdtemp()}/a.safetensors"; save_whole({"a": torch.ones(2)}, path)
    >>> read_one(path, "a").tolist()
    [1.0, 1.0]
    """
    with _file(path) as file:
        _named(file, name, path)
        return file.get_tensor(name)


@contextmanager
def _file(path: str | Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    require(Path(path).is_file(), f"path: {path} is no file")
    try:
        with safe_open(str(path), "pt") as file:
            yield file
    except SafetensorError as error:
        raise InputError(f"path: {path} is no safetensors file ({error})") from error


def _named(file: Any, name: str, path: str | Path) -> Any:
    there = list(file.keys())
    if name not in there:
        raise InputError(
            f"path: {path} has no {name!r}, expected it beside {', '.join(map(repr, there[:8]))}"
        )
    return file.get_slice(name)


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's rows in order, on the CPU, some at a time; in other processes than the first what is sent there."""
    rank, count = place_in_training()
    along, own = dimension(tensor), local(tensor)
    if along is None or count == 1:
        yield own.cpu().contiguous()
        return
    import torch.distributed as dist

    held = [part_of(tensor.shape[along], owner, count) for owner in range(count)]
    step = max(1, _BLOCK * len(tensor) // max(1, tensor.numel() * tensor.element_size()))
    for start in range(0, len(tensor), step):
        stop, found = min(start + step, len(tensor)), []
        for owner, part in enumerate(held):
            first, last = (start, stop) if along else (max(start, part.start), min(stop, part.stop))
            shape = [last - first, *tensor.shape[1:]]
            if along:
                shape[along] = part.stop - part.start
            if min(shape) <= 0:
                continue
            if owner == rank:
                skipped = 0 if along else part.start
                block = own[first - skipped : last - skipped].contiguous()
            elif rank == 0:
                block = own.new_empty(shape)
            else:
                continue
            if owner and rank == owner:
                told(lambda block=block: dist.send(block, 0))
            elif owner and rank == 0:
                told(lambda block=block, owner=owner: dist.recv(block, owner))
            if rank == 0:
                found.append(block.cpu())
        yield torch.cat(found, along).contiguous() if found else own[:0].cpu()
