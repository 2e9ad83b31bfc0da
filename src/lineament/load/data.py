"""Users' data as they have it: `.npz`, image folders, Hugging Face data sets, scikit-learn's digits.

:func:`load` reads at most a budget of samples, chosen at random from a seed, so that memory is bounded by the budget and
not by the data: compressed arrays are read as a stream, images are opened one by one. Values stay as they are stored
(uint8 images stay uint8); how they become a model's input is decided where the model is known.
Names of classes, groups and files are the user's and stay raw here; what shows them makes them printable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import InputError, require, show, suggest
from lineament.data.digits import digit_images
from lineament.data.samples import Samples
from lineament.data.shortcut_digits import shortcut_digits

_TABLES = ("dataset_dict.json", "dataset_info.json", "state.json")


class Budget:
    """Which samples to read: at most ``samples`` of however many there are, in ascending order.

    >>> Budget(3, seed=0).choose(2).tolist(), len(Budget(3, seed=0).choose(100))
    ([0, 1], 3)
    """

    def __init__(self, samples: int, seed: int):
        self.samples, self.seed = samples, seed

    def choose(self, total: int) -> np.ndarray:
        require(total > 0, "DATA: it is empty; expected at least one sample")
        if total <= self.samples:
            return np.arange(total)
        chosen = np.random.default_rng(self.seed).choice(total, self.samples, replace=False)
        return np.sort(chosen)


def load(
    data: str | Path,
    *,
    samples: int = 2000,
    seed: int = 0,
    inputs: str | None = None,
    targets: str | None = None,
    groups: str | None = None,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Samples:
    """Read a sample of a user's data.

    Args:
        data: an ``.npz`` file, a folder with one folder of images per class, a Hugging Face data set saved to disk or by name,
            ``"digits"`` (scikit-learn's) or ``"shortcut-digits"`` (the same with a planted mark, see
            :mod:`lineament.data.shortcut_digits`).
        samples: read at most so many, chosen at random.
        seed: of that choice.
        inputs, targets: names of the arrays or columns; found by their usual names by default.
        groups: the array or column that names each sample's group, or a ``.npy`` or ``.txt`` file with one entry a sample.
        classes: names of the classes 0, 1, ...
        split: of a Hugging Face data set; ``test``, ``validation`` or ``train`` by default, whichever is there first.
        image_size: bring the images of a folder or a Hugging Face data set to this (height, width).

    Raises:
        InputError: a missing or corrupt file, no such array, lengths that differ, labels that are no labels.

    >>> digits = load("digits", samples=100)
    >>> tuple(digits.inputs.shape), digits.total, len(digits.classes)
    ((100, 1, 8, 8), 1797, 10)
    """
    checks.number("samples", samples, low=1, integer=True)
    checks.number("seed", seed, low=0, integer=True)
    size = _size(image_size)
    path = Path(data)
    budget = Budget(samples, seed)
    options = {"inputs": inputs, "targets": targets, "groups": groups}
    if str(data) in ("digits", "shortcut-digits"):
        found = _builtin(str(data), budget, seed)
    elif path.is_dir() and any((path / name).is_file() for name in _TABLES):
        from lineament.load.hub_data import saved

        found = saved(path, budget, split=split, size=size, **options)
    elif path.is_dir():
        from lineament.load.folders import image_folder

        found = image_folder(path, budget, size=size)
    elif path.is_file():
        from lineament.load.arrays import npz

        require(
            path.suffix.lower() == ".npz",
            f"DATA: {str(data)!r} is a file of kind {path.suffix or 'unknown'!r}, expected an .npz file, a folder of images by "
            "class, a Hugging Face data set or 'digits'; numpy.savez('data.npz', x=..., y=...) makes one",
        )
        found = npz(path, budget, **options)
    else:
        is_path = path.suffix in (".npz", ".npy", ".h5", ".pkl", ".zip") or str(data).startswith(
            (".", "/", "~")
        )
        require(
            not is_path and bool(str(data)),
            f"DATA: {str(data)!r} does not exist; expected an .npz file, a folder of images by class, "
            "a Hugging Face data set (a folder or a name) or 'digits'",
        )
        from lineament.load.hub_data import named

        found = named(str(data), budget, split=split, size=size, **options)
    if groups is not None and (found.groups is None or str(data) == "shortcut-digits"):
        found = with_groups(found, groups_file(groups, found.total)[found.index.numpy()])
    if classes is not None:
        found = replace(found, classes=tuple(str(name) for name in classes))
    return checked(found)


def checked(samples: Samples) -> Samples:
    """The same samples, if they can be used.

    Raises:
        InputError: no samples, not as many targets or groups as inputs, NaN or infinite values (names the first sample).
    """
    require(len(samples.inputs) > 0, "DATA: it is empty; expected at least one sample")
    require(
        len(samples.inputs) == len(samples.targets),
        f"DATA: {len(samples.inputs)} inputs and {len(samples.targets)} targets, expected as many of one as of the other",
    )
    for what, value in (("inputs", samples.inputs), ("targets", samples.targets)):
        if value.is_floating_point():
            bad = (~torch.isfinite(value)).reshape(len(value), -1).any(1)
            if bool(bad.any()):
                first = int(samples.index[int(bad.nonzero()[0])])
                raise InputError(
                    f"DATA: the {what} hold NaN or infinite values in {int(bad.sum())} of {len(bad)} samples read, "
                    f"first in sample {first}; clean the data first"
                )
    require(
        samples.groups is None or len(samples.groups) == len(samples.targets),
        f"DATA: {0 if samples.groups is None else len(samples.groups)} groups for {len(samples.targets)} samples",
    )
    return samples


def coded(what: str, values: np.ndarray, names: tuple[str, ...] = ()) -> tuple[Tensor, tuple[str, ...]]:
    """Targets as a tensor, int64 for class labels and float32 for values, and the names of the classes.

    Args:
        what: how an error calls them.
        values: (sample,) class names, which become classes in sorted order, or class numbers; or (sample, ...) real values.
        names: the classes' names, where ``values`` are numbers.

    Raises:
        InputError: rows instead of single class numbers, or values of another kind.

    >>> coded("y", np.array(["dog", "cat", "dog"]))
    (tensor([1, 0, 1]), ('cat', 'dog'))
    """
    if values.dtype.kind in "SU":
        found, number = np.unique(values, return_inverse=True)
        return torch.from_numpy(number.reshape(-1).astype(np.int64)), tuple(_text(v) for v in found)
    if values.dtype.kind in "iub":
        if values.ndim == 2 and values.shape[1] == 1:
            values = values[:, 0]
        require(
            values.ndim == 1,
            f"{what}: got {show(values)}, expected one class number a sample (one-hot rows: pass their argmax)",
        )
        return torch.from_numpy(values.astype(np.int64)), names
    require(
        values.dtype.kind == "f",
        f"{what}: got {show(values)}, expected class numbers, class names or real values",
    )
    return torch.from_numpy(values.astype(np.float32)), names


def with_groups(samples: Samples, values: np.ndarray) -> Samples:
    """The same samples with the group of each: strings, integers or truth values, one a sample.

    Raises:
        InputError: not one entry a sample, or more than 200 different ones.
    """
    require(
        values.ndim == 1 and len(values) == len(samples),
        f"groups: got {show(values)}, expected one entry for each of {len(samples)} samples",
    )
    found, number = np.unique(values, return_inverse=True)
    require(
        len(found) <= 200,
        f"groups: got {len(found)} different values in {len(values)} samples, expected at most 200 groups",
    )
    return replace(
        samples,
        groups=torch.from_numpy(number.reshape(-1).astype(np.int64)),
        group_names=tuple(_text(v) for v in found),
    )


def groups_file(groups: str, total: int) -> np.ndarray:
    """Groups from a ``.npy`` file or a text file with one group a line, (total,).

    Raises:
        InputError: no such file, one that cannot be read without a pickle, or not ``total`` entries.
    """
    path = Path(groups)
    require(
        path.is_file() and path.suffix in (".npy", ".txt"),
        f"--groups: {groups!r} is neither an array of the data nor a .npy or .txt file with one entry a sample",
    )
    try:
        text = path.suffix == ".txt"
        values = np.array(path.read_text("utf-8").splitlines()) if text else np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"--groups: {groups!r} cannot be read ({error})") from error
    require(
        values.ndim == 1 and len(values) == total,
        f"--groups: {groups!r} holds {show(values)}, expected one entry for each of {total} samples",
    )
    return values


def named_one(what: str, given: str | None, usual: Sequence[str], there: Sequence[str]) -> str:
    """The array or column to read: the one asked for, else the first usual name that is there.

    Raises:
        InputError: the one asked for is not there (names the nearest), or none with a usual name is.

    >>> named_one("inputs", None, ("x", "images"), ("labels", "Images"))
    'Images'
    """
    if given is not None:
        require(given in there, f"--{what}: {given!r} is not in the data{suggest(given, there)}")
        return given
    lower = {name.lower(): name for name in reversed(list(there))}
    for name in usual:
        if name in lower:
            return lower[name]
    raise InputError(
        f"DATA: no array called {', '.join(map(repr, usual[:4]))} ...; it holds {', '.join(map(repr, there))}; "
        f"say which with --{what} NAME"
    )


def _builtin(name: str, budget: Budget, seed: int) -> Samples:
    whole = digit_images() if name == "digits" else shortcut_digits("test", seed=seed)
    return whole[budget.choose(len(whole))]


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else tuple(value)
    require(len(pair) == 2, f"image_size: got {show(value)}, expected one number or (height, width)")
    for side in pair:
        checks.number("image_size", side, low=1, integer=True)
    return pair[0], pair[1]


def _text(value: Any) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
