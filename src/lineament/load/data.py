"""Users' data as they have it: tensors, arrays, a ``Dataset`` or ``DataLoader``, files of arrays, tables, folders, Hugging Face data sets.

:func:`load_data` reads at most a number of samples, chosen at random from a seed, so that memory is bounded by that number and
not by the data: compressed arrays are read as a stream, images are opened one by one. Values stay as they are stored
(uint8 images stay uint8); how they become a model's input is decided where the model is known.
Names of classes, groups and files are the user's and stay raw here; what shows them makes them printable.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset

from lineament.core import checks
from lineament.core.checks import InputError, NotFiniteError, require, show
from lineament.core.files import like_files
from lineament.data.digits import digit_images
from lineament.data.samples import Samples
from lineament.data.shortcut_digits import shortcut_digits
from lineament.load.arrays import arrays_of_part, read_arrays
from lineament.load.columns import (
    BUILT_IN,
    Choose,
    chosen_rows,
    groups_file,
    in_order,
    with_groups,
)
from lineament.load.image_sizes import brought_to
from lineament.load.in_memory import in_memory
from lineament.load.texts import TASKS, TextReader
from lineament.load.user_code import named_in

Data: TypeAlias = "str | Path | Samples | Dataset[Any] | DataLoader[Any] | tuple[Any, Any]"

_TABLES = ("dataset_dict.json", "dataset_info.json", "state.json")
_EXPECTED = (
    "arrays (.npz, .npy, .pt, .safetensors), a table (.csv, .tsv, .jsonl, .parquet), a folder of images by class or with labels.csv, of MNIST or CIFAR, "
    "a Hugging Face data set, file.py:function or 'digits'"
)
_ARRAYS = (".npz", ".npy", ".pt", ".pth", ".safetensors")
_GONE = (*_ARRAYS, ".csv", ".tsv", ".jsonl", ".parquet", ".h5", ".pkl", ".zip")


def load_data(
    data: Data,
    *,
    samples: int = 2000,
    seed: int = 0,
    inputs: str | None = None,
    targets: str | None = None,
    groups: Any = None,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    tokenizer: Any = None,
    text_task: str = "classes",
) -> Samples:
    """Read a sample of a user's data.

    Args:
        data: a pair ``(inputs, targets)`` of tensors or arrays, :class:`~lineament.data.samples.Samples`, a ``Dataset`` or ``DataLoader``
            of such pairs or of dictionaries, whose inputs may be a tuple or a dictionary of several, or texts; a path of arrays (``.npz``; ``.npy`` with those beside it; ``.pt`` or ``.safetensors`` tensors), of a table
            (``.csv``, ``.tsv``, ``.jsonl``, ``.parquet``), of a folder of images by class or with ``labels.csv``, of MNIST's or CIFAR's own files, of a Hugging Face data set;
            such a data set by name; ``"file.py:function"``, which returns any of these; ``"digits"`` (scikit-learn's) or ``"shortcut-digits"`` (the same
            with a planted mark, see :mod:`lineament.data.shortcut_digits`).
        samples: read at most so many, chosen at random; of a ``DataLoader`` the first.
        seed: of that choice.
        inputs, targets: names of the arrays or columns, of a table also several with commas between them; found by their usual names by default.
        groups: the array or column that names each sample's group, or a ``.npy`` or ``.txt`` file with one entry a sample; of data in
            memory the groups themselves.
        classes: names of the classes in the order of the model's outputs; where the data name their classes, labels follow the names.
        split: of a Hugging Face data set, MNIST or CIFAR, of arrays ``x_train``, ``x_test``, of a folder with one for each, of ``"shortcut-digits"``; ``test``, ``validation`` or
            ``train`` by default, whichever is there first. Of data without parts none is taken.
        image_size: bring images to this (height, width).
        tokenizer: of a text classifier, which makes ids of texts: of a table's column of texts, of a Hugging Face data set's, or of lists of texts.
        text_task: what has a target: ``"classes"``, each text; ``"tokens"``, each of its words (a column of words and one of tags); ``"masked"``, words that are
            hidden here, so that no targets are read.

    Raises:
        InputError: a missing or corrupt file, no such array, lengths that differ, labels that are no labels.

    >>> digits = load_data("digits", samples=100)
    >>> tuple(digits.inputs.shape), digits.total, len(digits.classes)
    ((100, 1, 8, 8), 1797, 10)
    """
    checks.number("samples", samples, low=1, integer=True)
    choose = partial(chosen_rows, samples=samples, seed=checks.seed("seed", seed))
    checks.one_of("text_task", text_task, TASKS)
    reader = None if tokenizer is None else TextReader(tokenizer, text_task, seed)
    called = isinstance(data, str)
    data = _called(data)
    if isinstance(data, (str, Path)):
        require(
            groups is None or isinstance(groups, str),
            f"groups: got {show(groups)}, expected the name of an array of the data, or a file",
        )
        file = (
            groups if groups and Path(groups).suffix in (".npy", ".txt") and Path(groups).is_file() else None
        )
        named = {"inputs": inputs, "targets": targets, "groups": None if file else groups}
        found = _read(str(data), choose, seed, split=split, size=_size(image_size), reader=reader, **named)
        if file is not None:
            found = with_groups(found, groups_file(file, found.total)[found.index.numpy()])
        require(
            groups is None or found.groups is not None,
            f"groups: {groups!r} is neither an array of the data nor a .npy or .txt file with one entry a sample",
        )
    else:
        _whole(split, "what a function or variable returns" if called else "data in memory")
        found = in_memory(data, choose, samples=samples, groups=groups, reader=reader)
    if classes is not None:
        found = in_order(found, classes, dense=text_task == "tokens")
    size = _size(image_size)
    return usable(found if size is None else brought_to(found, size))


def training_part(data: Any, *, inputs: str | None = None) -> str | None:
    """``"train"``, if data have such a part, which is not the one that is read by default.

    >>> training_part("digits") is None, training_part("someone/a-data-set")
    (True, 'train')
    """
    if not isinstance(data, (str, Path)) or str(data) in BUILT_IN:
        return None
    path = Path(data)
    if not path.exists():
        function = Path(str(data).rpartition(":")[0]).is_file()
        return None if function or path.suffix.lower() in _GONE else "train"
    from lineament.load.packed import packed_parts

    if path.is_dir():
        return "train" if (path / "dataset_dict.json").is_file() or "train" in packed_parts(path) else None
    arrays = path.suffix.lower() in _ARRAYS and inputs is None and arrays_of_part(path, "train")
    return "train" if arrays else None


def _called(data: Any) -> Any:
    """What the function returns that ``file.py:function`` names; other data as they are."""
    place, colon, name = data.rpartition(":") if isinstance(data, str) else ("", "", "")
    if not (place and colon and name.isidentifier()) or Path(data).exists():
        return data
    made = named_in("data", place, name)
    if callable(made) and not isinstance(made, (Dataset, DataLoader)):
        try:
            made = made()
        except (Exception, SystemExit) as error:
            raise InputError(
                f"data: {data}() failed ({type(error).__name__}: {error}); it must return the data without arguments"
            ) from error
    return made


def usable(samples: Samples) -> Samples:
    """The same samples, if they can be used.

    Raises:
        InputError: no samples, not as many targets as inputs, NaN or infinite values (names the first sample).
    """
    require(len(samples.inputs) > 0, "data: it is empty; expected at least one sample")
    require(
        len(samples.inputs) == len(samples.targets),
        f"data: {len(samples.inputs)} inputs and {len(samples.targets)} targets, expected as many",
    )
    for what, value in (("inputs", samples.inputs), ("targets", samples.targets)):
        bad = (~torch.isfinite(value)).reshape(len(value), -1).any(1)
        if bool(bad.any()):
            first = int(samples.index[int(bad.nonzero()[0])])
            raise NotFiniteError(
                f"data: the {what} hold NaN or infinite values in {int(bad.sum())} of {len(bad)} samples read, "
                f"first in sample {first}; clean the data first"
            )
    return samples


def _read(
    data: str,
    choose: Choose,
    seed: int,
    *,
    split: str | None,
    size: tuple[int, int] | None,
    reader: TextReader | None,
    **named: str | None,
) -> Samples:
    """Samples of what a path or a name stands for."""
    path = Path(data)
    if data in BUILT_IN:
        if data == "digits":
            _whole(split, "'digits'")
        whole = digit_images() if data == "digits" else shortcut_digits(split or "test", seed=seed)
        return whole[choose(len(whole))]
    if path.is_dir() and any((path / name).is_file() for name in _TABLES):
        from lineament.load.hub_data import saved_data_set

        return saved_data_set(path, choose, split=split, size=size, reader=reader, **named)
    if path.exists():
        from lineament.load.packed import packed_data_set

        packed = packed_data_set(path, choose, split=split)
        if packed is not None:
            return packed
    if path.exists() and split is not None:
        if (path / split).is_dir():
            return _read(str(path / split), choose, seed, split=None, size=size, reader=reader, **named)
        found = path.is_file() and path.suffix.lower() in _ARRAYS and arrays_of_part(path, split)
        require(
            bool(found) and named["inputs"] is None,
            f"split: got {split!r}, but {data!r} is not in parts of such names; leave it out"
            + (", or name the arrays" if path.suffix.lower() in _ARRAYS else ""),
        )
        named["inputs"] = found or None
    if path.is_dir():
        from lineament.load.folders import image_folder, labelled_folder

        if (path / "labels.csv").is_file():
            return labelled_folder(path, choose, size=size, **named)
        return (
            read_arrays(path, choose, **named)
            if any(path.glob("*.npy"))
            else image_folder(path, choose, size=size)
        )
    ending = path.suffix.lower()
    if path.is_file() and reader is not None and reader.task != "classes" and ending not in _ARRAYS:
        from lineament.load.token_targets import read_token_targets

        return read_token_targets(path, choose, reader, **named)
    if path.is_file():
        from lineament.load.tables import TABLES, read_table

        if ending in TABLES:
            return read_table(path, choose, reader=reader, **named)
        require(
            ending in _ARRAYS,
            f"data: {data!r} is a file of kind {path.suffix or 'unknown'!r}, expected {_EXPECTED}; "
            "numpy.savez('data.npz', x=..., y=...) makes an .npz file",
        )
        return read_arrays(path, choose, **named)
    if not data or ending in _GONE or data.startswith((".", "/", "~")):
        raise InputError(f"data: {data!r} does not exist{like_files(data)}; expected {_EXPECTED}")
    from lineament.load.hub_data import named_data_set

    return named_data_set(data, choose, split=split, size=size, reader=reader, **named)


def _whole(split: str | None, what: str) -> None:
    require(split is None, f"split: got {show(split)}, but {what} has no parts; leave it out")


def _size(value: Any) -> tuple[int, int] | None:
    if value is None:
        return None
    pair = (value, value) if isinstance(value, int) else tuple(value)
    require(len(pair) == 2, f"image_size: got {show(value)}, expected one number or (height, width)")
    for side in pair:
        checks.number("image_size", side, low=1, integer=True)
    return pair[0], pair[1]
