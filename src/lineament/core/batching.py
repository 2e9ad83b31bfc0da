"""Run in chunks, halve them when memory runs out, show progress, and resume what was killed.

A :class:`Checkpoint` stores each finished stage of a long run as safetensors and JSON, written whole or not at all. A run that is
killed at any moment and started again takes the finished stages from disk and repeats the one that was cut off; since every stage draws
its randomness from its own seed, the result is that of an uninterrupted run, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lineament.core import checks
from lineament.core.files import write_json, writing

T = TypeVar("T")

_OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory", "DefaultCPUAllocator")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out: ``MemoryError``, CUDA's, or the CPU allocator's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def chunked(function: Callable[..., Any], *tensors: Tensor, batch_size: int | str = "auto") -> Any:
    """Apply a function to chunks of tensors along their first dimension, and join what it returns.

    Args:
        function: takes as many tensors as are given; returns a tensor whose first dimension is the chunk's, or a nest of
            dicts, lists and tuples of such tensors.
        tensors: all of the same length.
        batch_size: samples at a time, or ``"auto"``: all at once, halved each time memory runs out.

    Raises:
        InputError: no tensors, unequal or zero lengths. What ``function`` raises passes; out-of-memory too once one sample is too much.

    >>> chunked(lambda x: {"square": x * x}, torch.arange(5.0), batch_size=2)["square"].tolist()
    [0.0, 1.0, 4.0, 9.0, 16.0]
    """
    checks.require(len(tensors) > 0, "chunked: got no tensors, expected at least one")
    lengths = [len(t) for t in tensors]
    checks.require(
        len(set(lengths)) == 1, f"chunked: got tensors of lengths {lengths}, expected the same length"
    )
    checks.require(lengths[0] > 0, "chunked: got empty tensors, expected at least one sample")
    total = lengths[0]
    size = total if batch_size == "auto" else checks.number("batch_size", batch_size, low=1, integer=True)
    parts: list[Any] = []
    start = 0
    while start < total:
        try:
            parts.append(function(*(t[start : start + size] for t in tensors)))
            start += size
        except Exception as error:
            if batch_size != "auto" or size == 1 or not is_out_of_memory(error):
                raise
            # The traceback holds the frames, and those the tensors that did not fit.
            error.__traceback__ = None
            size = (min(size, total - start) + 1) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return _join(parts)


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """The same items, with a progress bar on standard error where that is a terminal.

    >>> list(progress([1, 2], "counting"))
    [1, 2]
    """
    if not sys.stderr.isatty():
        yield from iterable
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(iterable, description, total=total, console=Console(stderr=True), transient=True)


class Checkpoint:
    """The finished stages of a run that can be killed: a folder that knows which configuration it belongs to.

    Args:
        folder: made when the first stage ends; stages of another configuration found there are discarded.
        key: everything that decides the result (JSON values), the run's configuration.

    >>> import tempfile; folder = Path(tempfile.mkdtemp()) / "stages"
    >>> Checkpoint(folder, {"seed": 0}).stage("train", lambda: {"loss": 0.5, "weights": torch.ones(2)})["loss"]
    0.5
    >>> Checkpoint(folder, {"seed": 0}).stage("train", lambda: 1 / 0)["weights"]
    tensor([1., 1.])
    """

    def __init__(self, folder: str | Path, key: Mapping[str, Any]):
        self.folder = Path(folder)
        self._digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        marker = self.folder / "key.json"
        try:
            self.resumed = json.loads(marker.read_text(encoding="utf-8")) == self._digest
        except (OSError, ValueError):
            self.resumed = False
        if not self.resumed and self.folder.exists():
            shutil.rmtree(self.folder)

    def stage(self, name: str, compute: Callable[[], T]) -> T:
        """The stored result of this stage, or ``compute()``, stored.

        Args:
            name: unique in the run, and always the same for the same stage.
            compute: returns a nest of dicts with string keys, lists and tuples over tensors, NumPy arrays, numbers, strings, booleans
                and ``None``; it must draw its randomness from seeds of its own.
        """
        path = self._path(name)
        if path.exists():
            try:
                return self._read(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError):
                # Cut off, edited or of another version: worth nothing, so the stage is done again.
                path.unlink()
        result = compute()
        self._write(path, result)
        # Read back what was stored, so that a fresh and a resumed run go on from the very same objects.
        return self._read(path)

    def finished(self, name: str) -> bool:
        """Whether an earlier run finished this stage."""
        return self._path(name).exists()

    def finish(self) -> None:
        """Remove the folder: the run's result is written elsewhere."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, name: str) -> Path:
        safe = "".join(c if c.isalnum() or c in "-_" else "-" for c in name)[:60]
        return self.folder / f"{safe}-{hashlib.sha256(name.encode()).hexdigest()[:8]}.safetensors"

    def _write(self, path: Path, result: Any) -> None:
        tensors: dict[str, Tensor] = {}
        structure = _pack(result, tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / "key.json"
        if not marker.exists():
            write_json(marker, self._digest)
        with writing(path) as temporary:
            save_file(tensors, temporary, metadata={"structure": json.dumps(structure)})

    @staticmethod
    def _read(path: Path) -> Any:
        with safe_open(path, framework="pt") as file:
            structure = json.loads(file.metadata()["structure"])
            # A copy: the file's mapped memory must not outlive the file.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return _unpack(structure, tensors)


def _join(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, Mapping):
        return {key: _join([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(_join(list(column)) for column in zip(*parts))
    raise checks.InputError(f"chunked: the function returned {checks.show(first)}, expected tensors")


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON with a tag for what JSON has not; tensors go into ``tensors`` under a number."""
    if isinstance(value, (Tensor, np.ndarray)):
        key = str(len(tensors))
        tensor = (
            value.detach().cpu()
            if isinstance(value, Tensor)
            else torch.from_numpy(np.ascontiguousarray(value))
        )
        # safetensors refuses tensors that share memory.
        tensors[key] = tensor.clone(memory_format=torch.contiguous_format)
        return {"is": "tensor" if isinstance(value, Tensor) else "array", "key": key}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        # Hexadecimal keeps every bit, and NaN and infinities, which JSON has not.
        return {"is": "float", "hex": value.hex()}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        checks.require(
            all(isinstance(k, str) for k in value), f"stage: got {checks.show(value)}, expected string keys"
        )
        return {"is": "dict", "items": [[k, _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {"is": kind, "items": [_pack(item, tensors) for item in value]}
    raise checks.InputError(
        f"stage: got {checks.show(value)} ({type(value).__name__}), expected tensors, arrays, numbers, strings or nests of them"
    )


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind = value["is"]
    if kind == "tensor":
        return tensors[value["key"]]
    if kind == "array":
        return tensors[value["key"]].numpy()
    if kind == "float":
        return float.fromhex(value["hex"])
    if kind == "dict":
        return {k: _unpack(v, tensors) for k, v in value["items"]}
    items = [_unpack(item, tensors) for item in value["items"]]
    return items if kind == "list" else tuple(items)
