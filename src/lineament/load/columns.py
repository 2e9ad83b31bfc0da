"""What readers of every form share: which samples to read, which array or column holds what, labels from what is stored there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import InputError, require, show, suggest
from lineament.data.samples import Samples

# Data sets by name that are always there.
BUILT_IN = ("digits", "shortcut-digits")
# Given how many samples there are, the numbers of those to read.
Choose = Callable[[int], np.ndarray]


def chosen_rows(total: int, *, samples: int, seed: int) -> np.ndarray:
    """At most ``samples`` of ``total`` rows, at random from ``seed``, in ascending order.

    >>> chosen_rows(2, samples=3, seed=0).tolist(), len(chosen_rows(100, samples=3, seed=0))
    ([0, 1], 3)
    """
    require(total > 0, "data: it is empty; expected at least one sample")
    if total <= samples:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).choice(total, samples, replace=False))


def find_column(argument: str, given: str | None, usual: Sequence[str], there: Sequence[str]) -> str:
    """The array or column to read: the one asked for, else the first usual name that is there.

    Raises:
        InputError: the one asked for is not there (names the nearest), or none with a usual name is.

    >>> find_column("inputs", None, ("x", "images"), ("labels", "Images"))
    'Images'
    """
    if given is not None:
        require(given in there, f"{argument}: {given!r} is not in the data{suggest(given, there)}")
        return given
    lower = {name.lower(): name for name in reversed(list(there))}
    for name in usual:
        if name in lower:
            return lower[name]
    raise InputError(
        f"{argument}: the data has no array called {', '.join(map(repr, usual[:4]))} ...; say which of {', '.join(map(repr, there))} it is"
    )


def as_inputs(what: str, values: np.ndarray) -> Tensor:
    """Bytes and whole numbers as they are, which may be token ids, real numbers as float32.

    Raises:
        InputError: no numbers.
    """
    require(
        values.dtype.kind in "iubf",
        f"inputs: {what} holds {values.dtype}, expected images or numbers; choose another",
    )
    if values.dtype != np.uint8:
        values = values.astype(np.int64 if values.dtype.kind in "iu" else np.float32)
    return torch.from_numpy(values)


def as_targets(what: str, values: np.ndarray, names: tuple[str, ...] = ()) -> tuple[Tensor, tuple[str, ...]]:
    """Targets as a tensor, int64 for class labels and float32 for real values, and the names of the classes.

    Args:
        what: how an error calls them.
        values: (sample,) class names or class numbers; (sample, label) 0s and 1s; or (sample, ...) real values.
        names: the classes' names in the order of their numbers; by default names among ``values`` are numbered in sorted order.

    Raises:
        InputError: rows instead of single class numbers, values of another kind, or a class name that is not in ``names``.

    >>> as_targets("y", np.array(["dog", "cat", "dog"]))
    (tensor([1, 0, 1]), ('cat', 'dog'))
    >>> as_targets("y", np.array(["dog", "cat", "dog"]), ("dog", "cat"))
    (tensor([0, 1, 0]), ('dog', 'cat'))
    """
    if values.dtype.kind in "SU":
        found, number = np.unique(values, return_inverse=True)
        labels = torch.from_numpy(number.reshape(-1).astype(np.int64))
        own = tuple(_text(v) for v in found)
        if not names:
            return labels, own
        unknown = [name for name in own if name not in names]
        require(
            not unknown,
            f"targets: {what} holds the class {unknown[0] if unknown else ''!r}, which is not among the data's own {len(names)} class names"
            f"{suggest(unknown[0], names) if unknown else ''}",
        )
        return torch.tensor([names.index(name) for name in own])[labels], names
    if values.dtype.kind == "f":
        return torch.from_numpy(values.astype(np.float32)), names
    require(
        values.dtype.kind in "iub",
        f"targets: {what} holds {show(values)}, expected class numbers, class names or real values",
    )
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    require(
        values.ndim in (1, 3)
        or (values.ndim == 2 and bool(((values == 0) | (values == 1)).all() or (values == -100).any()))
        or (values.ndim == 4 and values.shape[1] == 1),
        f"targets: {what} holds {show(values)}, expected one class number a sample (or one for each pixel or token of it; -100 where a token has none), or a row of 0s and 1s",
    )
    return torch.from_numpy(values.astype(np.int64)), names


def in_order(samples: Samples, classes: Sequence[str], *, dense: bool = False) -> Samples:
    """The same samples with their classes in the given order, the order of a model's outputs: labels follow their names.

    ``dense``: targets (sample, position) are class numbers, not a row of 0s and 1s; those of pixels always are.

    Samples without names of their own, or with names of which none is given (folder codes, say), keep their numbers and take the given names.

    Raises:
        InputError: some names of the data are given and others are not, one is given twice, or other names are not as many.

    >>> two = Samples(torch.zeros(2, 1), torch.tensor([0, 1]), ("cat", "dog"))
    >>> in_order(two, ("dog", "emu", "cat")).targets.tolist(), in_order(two, ("Katze", "Hund")).targets.tolist()
    ([2, 0], [0, 1])
    """
    names, own = tuple(map(str, classes)), samples.classes
    if not own or (samples.targets.is_floating_point() and samples.targets.ndim == 1):
        return replace(samples, classes=names)
    exact = {name: number for number, name in enumerate(names)}
    alike = {folded(name): number for name, number in exact.items()}
    numbers = [exact.get(name, alike.get(folded(name))) for name in own]
    missing = [name for name, number in zip(own, numbers) if number is None]
    if len(missing) == len(own):
        require(
            len(names) == len(own),
            f"classes: none of the {len(names)} names is one of the data's {len(own)} classes ({', '.join(own[:4])}{' ...' if len(own) > 4 else ''}); "
            "expected the data's names in the order of the model's outputs",
        )
        note = f"the data's classes {', '.join(own[:4])}{' ...' if len(own) > 4 else ''} are called by the given names, in this order"
        return replace(samples, classes=names, notes=(*samples.notes, note))
    require(
        not missing,
        f"classes: the data's class {missing[0] if missing else ''!r} is not among the {len(names)} names given"
        f"{suggest(missing[0], names) if missing else ''}; expected every class of the data, in the order of the model's outputs",
    )
    numbers = [number for number in numbers if number is not None]
    order = torch.tensor(numbers)
    for name, number in zip(own, numbers):
        once = names.count(names[number]) == 1 and numbers.count(number) == 1
        require(once, f"classes: {name!r} is there twice, expected one name for each class of the data")
    targets = samples.targets
    if targets.ndim == 1 or targets.ndim == 3 or dense:
        # A number that is no class's, such as that of what is to be ignored, stays.
        known = (targets >= 0) & (targets < len(own))
        targets = order[targets.where(known, 0)].where(known, targets.where(targets < 0, -100))
    else:
        targets = targets.new_zeros(len(targets), len(names)).index_copy(1, order, targets)
    note = (
        "" if numbers == list(range(len(own))) else "the data's classes were put in the order of the model's"
    )
    return replace(samples, targets=targets, classes=names, notes=(*samples.notes, *([note] if note else [])))


def folded(name: str) -> str:
    """A class name without what differs between a folder's and a model's way to write it."""
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


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
    numbers = torch.from_numpy(number.reshape(-1).astype(np.int64))
    return replace(samples, groups=numbers, group_names=tuple(_text(v) for v in found))


def groups_file(groups: str, total: int) -> np.ndarray:
    """Groups from a ``.npy`` file or a text file with one group a line, (total,).

    Raises:
        InputError: one that cannot be read without a pickle, or not ``total`` entries.
    """
    path = Path(groups)
    try:
        text = path.suffix == ".txt"
        values = np.array(path.read_text("utf-8").splitlines()) if text else np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"groups: {groups!r} cannot be read ({error})") from error
    require(
        values.ndim == 1 and len(values) == total,
        f"groups: {groups!r} holds {show(values)}, expected one entry for each of {total} samples",
    )
    return values


def _text(value: object) -> str:
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)
