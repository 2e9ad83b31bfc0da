"""Arrays in an `.npz` file, read as a stream: only the chosen rows are ever held."""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lineament.core.checks import InputError, require
from lineament.data.samples import Samples
from lineament.load.columns import Choose, as_inputs, as_targets, find_column, with_groups

_INPUTS = ("x", "images", "inputs", "data", "image", "features", "x_test", "x_val", "x_train")
_TARGETS = ("y", "labels", "targets", "label", "target", "y_test", "y_val", "y_train")
_NAMES = ("classes", "class_names", "label_names", "names")


def read_arrays(
    path: Path, choose: Choose, *, inputs: str | None, targets: str | None, groups: str | None
) -> Samples:
    """Samples from the named arrays of an `.npz` file.

    Raises:
        InputError: a corrupt file, arrays of Python objects (which only a pickle could restore), unequal lengths.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            there = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
            require(
                len(there) > 0,
                f"data: {str(path)!r} holds no arrays; numpy.savez(path, x=..., y=...) writes them",
            )
            first = find_column("inputs", inputs, _INPUTS, there)
            second = find_column("targets", targets, _paired(first), there)
            shape, total = _header(archive, first)[0], _header(archive, second)[0]
            require(
                len(total) > 0,
                f"targets: array {second!r} is a single number, expected one target a sample",
            )
            require(
                len(shape) >= 2 and shape[0] == total[0],
                f"data: array {first!r} has shape {shape} and {second!r} {total}, expected as many samples in both",
            )
            rows = choose(total[0])
            x, y = _rows(archive, first, rows), _rows(archive, second, rows)
            # Names are numbered by all of them: a rare one that was not chosen keeps its place.
            every = np.unique(_rows(archive, second, np.arange(total[0]))) if y.dtype.kind in "SU" else ()
            group = None
            if groups is not None:
                group = _rows(archive, find_column("groups", groups, (), there), rows)
            names = next((n for n in _NAMES if n in there and n not in (first, second)), None)
            values = np.empty(0)
            if names is not None:
                values = _rows(archive, names, np.arange(_header(archive, names)[0][0]))
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        raise InputError(f"data: {str(path)!r} is corrupt or no .npz file ({error})") from error
    listed = tuple(map(str, values)) if values.dtype.kind == "U" and values.ndim == 1 else ()
    if not listed and len(every):
        listed = as_targets("", np.asarray(every))[1]
    labels, classes = as_targets(f"array {second!r}", y, listed)
    found = Samples(
        inputs=as_inputs(f"array {first!r}", x),
        targets=labels,
        index=torch.from_numpy(rows),
        total=total[0],
        source=path.name,
        classes=classes,
        notes=(f"inputs are array {first!r} {tuple(shape)}, targets array {second!r}",),
    )
    return found if group is None else with_groups(found, group)


def _paired(inputs: str) -> tuple[str, ...]:
    """Targets that belong to these inputs come first: ``y_test`` with ``x_test``."""
    tail = inputs.lower().partition("_")[2]
    mine = tuple(f"{name}_{tail}" for name in ("y", "labels", "targets")) if tail else ()
    return (*mine, *_TARGETS)


def _open(archive: zipfile.ZipFile, name: str) -> tuple[IO[bytes], tuple[int, ...], bool, np.dtype[Any]]:
    file = archive.open(f"{name}.npy")
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
    return file, shape, fortran, dtype


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
    file, shape, _, dtype = _open(archive, name)
    file.close()
    return shape, dtype


def _rows(archive: zipfile.ZipFile, name: str, rows: np.ndarray) -> np.ndarray:
    """Some rows of an array, without holding the others."""
    file, shape, fortran, dtype = _open(archive, name)
    total = next(iter(shape), 0)
    with file:
        require(
            len(shape) > 0 and (not len(rows) or int(rows[-1]) < shape[0]),
            f"data: array {name!r} has shape {shape}, expected at least {int(rows[-1]) + 1 if len(rows) else 0} entries",
        )
        # A header may claim any size: what the archive holds is known before anything of that size is made.
        whole_size = math.prod(shape) * dtype.itemsize
        require(
            archive.getinfo(f"{name}.npy").file_size >= whole_size,
            f"data: array {name!r} ends too early; the file is cut off",
        )
        if fortran and len(shape) > 1:
            whole = _exactly(file, whole_size, name)
            return np.frombuffer(whole, dtype).reshape(shape, order="F")[rows].copy()
        width = math.prod(shape[1:]) * dtype.itemsize
        try:
            found = np.empty((len(rows), *shape[1:]), dtype)
        except MemoryError as error:
            raise InputError(
                f"data: {len(rows)} entries of array {name!r} take {len(rows) * width / 2**30:,.1f} GiB, more memory than there is; read fewer `samples`"
            ) from error
        if not width or not len(rows):
            return found
        block = max(1, (1 << 22) // width)
        taken = 0
        for start in range(0, total, block):
            if taken == len(rows):
                break
            size = min(block, total - start)
            values = np.frombuffer(_exactly(file, size * width, name), dtype).reshape(size, *shape[1:])
            last = int(np.searchsorted(rows, start + size))
            found[taken:last] = values[rows[taken:last] - start]
            taken = last
        return found


def _exactly(file: IO[bytes], size: int, name: str) -> bytes:
    data = file.read(size)
    require(len(data) == size, f"data: array {name!r} ends too early; the file is cut off")
    return data
