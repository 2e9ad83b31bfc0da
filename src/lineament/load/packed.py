"""The folders in which MNIST and CIFAR are distributed: IDX files, plain or gzipped, and CIFAR's python and binary batches.

CIFAR's python batches are pickles. They are read by an unpickler that admits arrays, strings, numbers and containers of these, and nothing else.
"""

from __future__ import annotations

import gzip
import math
import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from lineament.core.checks import InputError, require, suggest
from lineament.data.formats import read_cifar
from lineament.data.samples import Samples
from lineament.load.array_files import streamed_rows
from lineament.load.columns import Choose

_PLACES = (
    "",
    "raw",
    "MNIST/raw",
    "cifar-10-batches-py",
    "cifar-100-python",
    "cifar-10-batches-bin",
    "cifar-100-binary",
)
_SPLITS = {"test": "test", "t10k": "test", "val": "test", "train": "train"}


def packed_data_set(path: Path, choose: Choose, *, split: str | None) -> Samples | None:
    """The samples of a part, ``test`` by default, if a folder (or one IDX file of images) is of such a form; ``None`` otherwise.

    Raises:
        InputError: a damaged file, one that does not belong to the other, no such part.
    """
    if path.is_file():
        pair = _labels_beside(path) if "idx" in path.name and "images" in path.name else None
        if pair is None:
            return None
        part = next((part for start, part in _SPLITS.items() if path.name.startswith(start)), None)
        require(
            split in (None, part),
            f"split: got {split!r}, but {path.name!r} is one part{f', {part!r}' * bool(part)}; pass its folder, or leave it out",
        )
        return _idx(path, pair, choose, path.name)
    for place in (path / name for name in _PLACES):
        parts = _parts(place)
        if parts:
            chosen = split or ("test" if "test" in parts else next(iter(parts)))
            require(chosen in parts, f"split: {chosen!r} is not in the data{suggest(chosen, parts)}")
            found = parts[chosen](choose)
            return replace(found, notes=(*found.notes, f"split {chosen!r}"))
    return None


def packed_parts(path: Path) -> list[str]:
    """The parts of a folder of such a form.

    >>> packed_parts(Path("none"))
    []
    """
    return next((list(parts) for name in _PLACES if (parts := _parts(path / name))), [])


def _parts(folder: Path) -> dict[str, Callable[[Choose], Samples]]:
    """What a folder holds: a reader for each part."""
    there = {p.name for p in folder.iterdir() if p.is_file()} if folder.is_dir() else set()
    found: dict[str, Callable[[Choose], Samples]] = {}
    for name in sorted(there):
        pair = _labels_beside(folder / name) if "idx" in name and "images" in name else None
        part = next((part for start, part in _SPLITS.items() if name.startswith(start)), None)
        if pair is not None and part is not None:
            found[part] = lambda choose, name=name, pair=pair: _idx(folder / name, pair, choose, folder.name)
    ten = [f"data_batch_{k}" for k in range(1, 6)]
    for end, read in ((".bin", _binary), ("", _python)):
        files = {"train": [n + end for n in ten if n + end in there], "test": [f"test_batch{end}"]}
        if not files["train"] and f"test_batch{end}" not in there:
            hundred = {"train", "test", "meta"} <= there if not end else "fine_label_names.txt" in there
            files = {"train": [f"train{end}"], "test": [f"test{end}"]} if hundred else {}
        for part, names in files.items():
            if names and set(names) <= there:
                found[part] = lambda choose, names=names, read=read: read([folder / n for n in names], choose)
    return found


def _idx(images: Path, labels: Path, choose: Choose, source: str) -> Samples:
    shape: Any = _header(images)
    total: Any = _header(labels)
    require(
        len(shape) >= 2 and total == shape[:1],
        f"data: {images.name!r} holds {shape} and {labels.name!r} {total}, expected one label for each image",
    )
    rows = choose(shape[0])
    x, y = (
        _read(
            path,
            lambda file, form=form, path=path: streamed_rows(file, path.name, rows, form, np.dtype(np.uint8)),
            form,
        )
        for path, form in ((images, shape), (labels, total))
    )
    return _samples(x, y, rows, shape[0], source)


def _header(path: Path) -> tuple[int, ...]:
    def shape(file: IO[bytes]) -> Any:
        start: Any = file.read(4)
        require(
            start[:3] == b"\0\0\x08" and len(start) == 4,
            f"data: {path.name!r} starts with {start!r}, expected an IDX file of bytes",
        )
        sizes = np.frombuffer(file.read(4 * start[3]), ">u4").tolist()
        require(0 < len(sizes) == start[3], f"data: {path.name!r} ends in its header")
        return tuple(sizes)

    return _read(path, shape)


def _read(path: Path, use: Callable[[IO[bytes]], Any], form: tuple[int, ...] = ()) -> Any:
    """What ``use`` makes of an IDX file, from behind its header where the form is known; no more than is used is unpacked."""
    try:
        unpack: Any = gzip.open if path.suffix == ".gz" else open
        with unpack(path, "rb") as file:
            if form and path.suffix != ".gz":
                need = 4 + 4 * len(form) + math.prod(form)
                require(
                    path.stat().st_size == need,
                    f"data: {path.name!r} has {path.stat().st_size:,} bytes, expected {need:,} by its header; is the download whole?",
                )
            file.read(4 + 4 * len(form) if form else 0)
            return use(file)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"data: {path.name!r} cannot be read ({error})") from error


def _labels_beside(images: Path) -> Path | None:
    name = images.name.replace("images", "labels")
    return next(
        (
            p
            for p in (images.with_name(name.replace("idx3", "idx1")), images.with_name(name))
            if p.is_file() and p != images
        ),
        None,
    )


def _binary(paths: list[Path], choose: Choose) -> Samples:
    folder = paths[0].parent
    hundred = (folder / "fine_label_names.txt").is_file()
    stored = read_cifar(paths, 2 if hundred else 1)
    names = folder / ("fine_label_names.txt" if hundred else "batches.meta.txt")
    classes = tuple(names.read_text("utf-8", "replace").split()) if names.is_file() else ()
    rows = choose(len(stored["y"]))
    return _samples(stored["x"][rows], stored["y"][rows], rows, len(stored["y"]), folder.name, classes)


def _python(paths: list[Path], choose: Choose) -> Samples:
    images, labels = [], []
    for path in paths:
        held = _unpickled(path)
        x: Any = held.get("data")
        y: Any = held.get("labels", held.get("fine_labels"))
        good = isinstance(x, np.ndarray) and x.dtype == np.uint8 and x.shape[1:] == (3072,)
        if not (good and isinstance(y, (list, np.ndarray)) and len(x) == len(y)):
            raise InputError(
                f"data: {path.name!r} holds {list(held)}, expected CIFAR's 'data' of 3,072 bytes a row and as many 'labels'"
            )
        images.append(x)
        labels.append(np.asarray(y, dtype=np.int64))
    x, y = np.concatenate(images), np.concatenate(labels)
    folder, classes = paths[0].parent, ()
    for name, key in (("batches.meta", "label_names"), ("meta", "fine_label_names")):
        if (folder / name).is_file():
            classes = tuple(map(str, _unpickled(folder / name).get(key, ())))
    rows = choose(len(y))
    return _samples(x[rows].reshape(-1, 3, 32, 32), y[rows], rows, len(y), folder.name, classes)


def _samples(
    x: np.ndarray, y: np.ndarray, rows: np.ndarray, total: int, source: str, classes: tuple[str, ...] = ()
) -> Samples:
    return Samples(
        inputs=torch.from_numpy(np.array(x)),
        targets=torch.from_numpy(np.asarray(y, dtype=np.int64)),
        classes=classes,
        index=torch.from_numpy(rows),
        total=total,
        source=source,
    )


def _unpickled(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            held = _ArraysOnly(file, encoding="latin1").load()
    except InputError:
        raise
    except Exception as error:
        # A damaged pickle fails in any way.
        raise InputError(
            f"data: {str(path)!r} is damaged or no CIFAR batch ({type(error).__name__}: {error})"
        ) from error
    require(isinstance(held, dict), f"data: {str(path)!r} holds {type(held).__name__}, expected a dictionary")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in held.items()
    }


class _ArraysOnly(pickle.Unpickler):
    """Admits what arrays of numbers and strings are made of; every other name is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            # An empty array, whatever size is asked for: its values come with its state.
            return lambda kind, shape, code: np.ndarray((0,), "u1")
        if (module, name) == ("numpy", "ndarray"):
            return "ndarray"
        if (module, name) == ("numpy", "dtype"):
            return _plain_dtype
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: str(text).encode("latin1")
        raise InputError(
            f"data: a CIFAR batch names {module}.{name}, expected arrays and strings only; nothing of it was run"
        )


def _plain_dtype(code: Any, *_: Any) -> np.dtype[Any]:
    dtype = np.dtype(code)
    require(dtype.kind in "iubf", f"data: a CIFAR batch holds {dtype}, expected numbers")
    return dtype
