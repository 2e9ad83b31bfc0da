"""Named arrays of a file or a folder: `.npz`, `.npy` side by side, tensors in a `.pt` or `.safetensors` file."""

from __future__ import annotations

import inspect
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import nn

from lineament.core.checks import InputError, require
from lineament.data.samples import Samples
from lineament.load.array_files import Arrays, NpyFiles, NpzFile, Tensors
from lineament.load.columns import Choose, as_inputs, as_targets, find_column, with_groups

_INPUTS = ("x", "images", "inputs", "data", "image", "features", "x_test", "x_val", "x_train")
_TARGETS = ("y", "labels", "targets", "label", "target", "y_test", "y_val", "y_train")
_NAMES = ("classes", "class_names", "label_names", "names")


def arrays_for(model: nn.Module, data: object) -> str | None:
    """Which arrays of a file a model takes, with commas between them, where several have the names of its forward's arguments; else ``None``.

    >>> arrays_for(nn.Linear(2, 1), "none.npz") is None
    True
    """
    path = Path(str(data)) if isinstance(data, (str, Path)) else Path()
    there = _names(path)
    taken = [name for name in inspect.signature(model.forward).parameters if name in there]
    return ",".join(taken) if len(taken) > 1 else None


def arrays_of_part(path: Path, part: str) -> str | None:
    """The inputs of a part in a file of several: ``x_train`` or ``train_images`` of ``"train"``; ``None`` where there are none.

    >>> arrays_of_part(Path("none.npz"), "train") is None
    True
    """
    there = {name.lower(): name for name in reversed(_names(path))}
    usual = [name for name in _INPUTS if "_" not in name]
    either = (f"{a}_{b}" for name in usual for a, b in ((name, part), (part, name)))
    return next((there[name] for name in either if name in there), None)


def _names(path: Path) -> list[str]:
    """The arrays of a file of several, or none: what is wrong with it is said where it is read."""
    if path.suffix.lower() not in (".npz", ".pt", ".safetensors") or not path.is_file():
        return []
    try:
        if path.suffix.lower() == ".npz":
            with zipfile.ZipFile(path) as archive:
                return list(NpzFile(archive).names())
        return list(Tensors(path).names())
    except (InputError, zipfile.BadZipFile, OSError):
        return []


def read_arrays(
    path: Path, choose: Choose, *, inputs: str | None, targets: str | None, groups: str | None
) -> Samples:
    """Samples from named arrays.

    A `.npy` file is read with those beside it, by their names: ``y.npy`` or ``labels.npy`` beside ``x.npy``. A `.pt` file holds a pair of tensors or a
    dictionary of them, and is read as :func:`lineament.load.checkpoints.read_checkpoint` reads it.

    Raises:
        InputError: a corrupt file, arrays of Python objects (which only a pickle could restore), unequal lengths.
    """
    ending = path.suffix.lower()
    try:
        if ending == ".npz":
            with zipfile.ZipFile(path) as archive:
                return _samples(NpzFile(archive), path, choose, inputs, targets, groups)
        if ending == ".npy" or path.is_dir():
            files = NpyFiles(path if path.is_dir() else path.parent)
            if ending == ".npy" and inputs is None:
                inputs = path.stem
            names = [name and name.replace(".npy", "") for name in (inputs, targets, groups)]
            return _samples(files, path, choose, *names)
        return _samples(Tensors(path), path, choose, inputs, targets, groups)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError) as error:
        kind = f"no {ending} file" if ending else "no folder of .npy files"
        raise InputError(f"data: {str(path)!r} is corrupt or {kind} ({error})") from error


def _samples(
    held: Arrays, path: Path, choose: Choose, inputs: str | None, targets: str | None, groups: str | None
) -> Samples:
    there = held.names()
    require(
        len(there) > 0,
        f"data: {str(path)!r} holds no arrays; numpy.savez(path, x=..., y=...) writes them",
    )
    several = [inputs] if inputs is None or inputs in there else [part.strip() for part in inputs.split(",")]
    first, *others = [find_column("inputs", name, _INPUTS, there) for name in several]
    second = find_column("targets", targets, _paired(first), there)
    shape, total = held.form(first)[0], held.form(second)[0]
    require(
        len(total) > 0,
        f"targets: array {second!r} is a single number, expected one target a sample",
    )
    require(
        len(shape) >= 2 and shape[0] == total[0],
        f"data: array {first!r} has shape {shape} and {second!r} {total}, expected as many samples in both",
    )
    for name in others:
        form = held.form(name)[0]
        require(
            form[:1] == total[:1],
            f"data: array {name!r} has shape {form} and {second!r} {total}, expected as many samples in both",
        )
    rows = choose(total[0])
    x, y = held.rows(first, rows), held.rows(second, rows)
    # Names are numbered by all of them: a rare one that was not chosen keeps its place.
    every = np.unique(held.rows(second, np.arange(total[0]))) if y.dtype.kind in "SU" else np.empty(0)
    group = None
    if groups is not None:
        group = held.rows(find_column("groups", groups, (), there), rows)
    names = next((n for n in _NAMES if n in there and n not in (first, second)), None)
    values = np.empty(0) if names is None else held.rows(names, np.arange(held.form(names)[0][0]))
    listed = tuple(map(str, values)) if values.dtype.kind == "U" and values.ndim == 1 else ()
    if not listed and len(every):
        listed = as_targets("", every)[1]
    labels, classes = as_targets(f"array {second!r}", y, listed)
    found = Samples(
        inputs=as_inputs(f"array {first!r}", x),
        targets=labels,
        index=torch.from_numpy(rows),
        total=total[0],
        source=path.name,
        classes=classes,
        others={name: as_inputs(f"array {name!r}", held.rows(name, rows)) for name in others},
        argument=first if others else "",
        notes=(
            f"inputs are {' and '.join(f'array {name!r} {tuple(held.form(name)[0])}' for name in (first, *others))}, targets array {second!r}",
        ),
    )
    return found if group is None else with_groups(found, group)


def _paired(inputs: str) -> tuple[str, ...]:
    """Targets that belong to these inputs come first: ``y_test`` with ``x_test``."""
    head, _, tail = inputs.lower().partition("_")
    mine = tuple(f"{name}_{tail}" for name in ("y", "labels", "targets")) if tail else ()
    # Also those called the other way round: test_labels with test_images.
    theirs = tuple(f"{head}_{name}" for name in ("y", "labels", "targets")) if tail else ()
    return (*mine, *theirs, *_TARGETS)
