"""Files of arrays, read as streams: only the chosen rows are ever held, and nothing is unpickled."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.load.checkpoints import read_checkpoint, tensors_by_path


class Arrays(Protocol):
    """Arrays by name, of which some rows can be read."""

    def names(self) -> list[str]: ...
    def form(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]: ...
    def rows(self, name: str, rows: np.ndarray) -> np.ndarray: ...


class NpzFile:
    """The arrays of an `.npz` archive."""

    def __init__(self, archive: zipfile.ZipFile):
        self.archive = archive

    def names(self) -> list[str]:
        return [name.removesuffix(".npy") for name in self.archive.namelist() if name.endswith(".npy")]

    def form(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        with self.archive.open(f"{name}.npy") as file:
            shape, _, dtype = npy_header(file, name)
        return shape, dtype

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        with self.archive.open(f"{name}.npy") as file:
            return npy_rows(file, name, rows, self.archive.getinfo(f"{name}.npy").file_size)


class NpyFiles:
    """The `.npy` files of a folder, by their names without the ending."""

    def __init__(self, folder: Path):
        self.files = {path.stem: path for path in sorted(folder.glob("*.npy"))}

    def names(self) -> list[str]:
        return list(self.files)

    def form(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        with self.files[name].open("rb") as file:
            shape, _, dtype = npy_header(file, name)
        return shape, dtype

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        with self.files[name].open("rb") as file:
            return npy_rows(file, name, rows, self.files[name].stat().st_size)


class Tensors:
    """The tensors of a `.pt` or `.safetensors` file: a dictionary of them, or a pair of inputs and targets; lists of names as arrays of names."""

    def __init__(self, path: Path):
        content = read_checkpoint(path, "data")
        if isinstance(content, (list, tuple)) and len(content) >= 2:
            content = {"inputs": content[0], "targets": content[1]}
        self.held: dict[str, Any] = dict(tensors_by_path(content))
        if isinstance(content, Mapping):
            words = {k: v for k, v in content.items() if isinstance(v, (list, tuple)) and v}
            self.held |= {k: np.array(v) for k, v in words.items() if all(isinstance(w, str) for w in v)}

    def names(self) -> list[str]:
        return list(self.held)

    def form(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        value = self.held[name]
        return tuple(value.shape), np.dtype(np.float32) if isinstance(value, Tensor) else value.dtype

    def rows(self, name: str, rows: np.ndarray) -> np.ndarray:
        found = self.held[name][rows]
        if not isinstance(found, Tensor):
            return found
        return (found.float() if found.is_floating_point() and found.itemsize < 4 else found).numpy()


def npy_header(file: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, memory order and dtype; the file stands before the values then.

    Raises:
        InputError: a damaged header, or Python objects.
    """
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, fortran, dtype = read(file)
    except ValueError as error:
        raise InputError(f"data: array {name!r} has a damaged header ({error})") from error
    require(
        not dtype.hasobject,
        f"data: array {name!r} holds Python objects, which only a pickle can restore and which are never loaded; "
        "save numbers or strings instead (numpy.savez with arrays of a fixed dtype)",
    )
    return shape, fortran, dtype


def npy_rows(file: IO[bytes], name: str, rows: np.ndarray, size: int) -> np.ndarray:
    """Some rows of an array in a file of ``size`` bytes, without holding the others."""
    shape, fortran, dtype = npy_header(file, name)
    require(
        len(shape) > 0 and (not len(rows) or int(rows[-1]) < shape[0]),
        f"data: array {name!r} has shape {shape}, expected at least {int(rows[-1]) + 1 if len(rows) else 0} entries",
    )
    # A header may claim any size: what the file holds is known before anything of that size is made.
    whole_size = math.prod(shape) * dtype.itemsize
    require(size >= whole_size, f"data: array {name!r} ends too early; the file is cut off")
    if fortran and len(shape) > 1:
        whole = _exactly(file, whole_size, name)
        return np.frombuffer(whole, dtype).reshape(shape, order="F")[rows].copy()
    return streamed_rows(file, name, rows, shape, dtype)


def streamed_rows(
    file: IO[bytes], name: str, rows: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray:
    """Some rows of values that lie one after another from here on."""
    width = math.prod(shape[1:]) * dtype.itemsize
    try:
        found = np.empty((len(rows), *shape[1:]), dtype)
    except MemoryError as error:
        raise InputError(
            f"DATA: {len(rows)} entries of array {name!r} take {len(rows) * width / 2**30:,.1f} GiB, more memory than there is; read fewer `samples`"
        ) from error
    if not width or not len(rows):
        return found
    block = max(1, (1 << 22) // width)
    taken = 0
    for start in range(0, shape[0], block):
        if taken == len(rows):
            break
        count = min(block, shape[0] - start)
        values = np.frombuffer(_exactly(file, count * width, name), dtype).reshape(count, *shape[1:])
        last = int(np.searchsorted(rows, start + count))
        found[taken:last] = values[rows[taken:last] - start]
        taken = last
    return found


def _exactly(file: IO[bytes], size: int, name: str) -> bytes:
    data = file.read(size)
    require(len(data) == size, f"data: array {name!r} ends too early; the file is cut off")
    return data
