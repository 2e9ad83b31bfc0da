"""Data as Python holds them: a pair of arrays, a ``Dataset``, a ``DataLoader``; inputs may be several, texts, or sequences of several lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from lineament.core.checks import InputError, require, show
from lineament.core.models import rows_in
from lineament.data.samples import Samples
from lineament.load.columns import Choose, as_targets, find_column, with_groups
from lineament.load.texts import TEXTS, TextReader, padded, text_samples

_INPUTS = (
    "image", "images", "pixel_values", "img", "x", "inputs", "input", "data", "features", "input_ids", "input_values", "tokens", "words", *TEXTS,
)  # fmt: skip
_TARGETS = ("label", "labels", "y", "target", "targets", "class", "ner_tags", "tags", "pos_tags")
# What stands behind the end of a row of targets, and counts nowhere.
_IGNORED = -100
# The inputs of a sample or a batch by name, the main one first, and its target.
Fields = tuple[dict[str, Any], Any]


def in_memory(
    data: Any, choose: Choose, *, samples: int, groups: Any = None, reader: TextReader | None = None
) -> Samples:
    """The chosen samples of a pair of tensors or arrays, of Samples, or of a ``Dataset``; of a ``DataLoader`` or a list of batches the first.

    Where inputs are several, as a tuple or a dictionary, the first or that of a usual name is the main one.

    Raises:
        InputError: data of another form.

    >>> in_memory((np.zeros((2, 3)), ["cat", "dog"]), choose=np.arange, samples=10).classes
    ('cat', 'dog')
    """
    if isinstance(data, Dataset) and not isinstance(data, Samples) and hasattr(data, "__len__"):
        # Only what was chosen is fetched: a data set can be larger than the memory.
        total = len(data)  # pyright: ignore[reportArgumentType]
        rows = choose(total)
        some = _joined([_one(_fields(data[int(row)])) for row in rows], reader)
        some = _named(replace(some, index=torch.from_numpy(rows), total=total), data)
        return some if groups is None else with_groups(some, np.asarray(groups)[rows])
    if isinstance(data, (DataLoader, IterableDataset)) or _are_batches(data):
        batches: list[Fields] = []
        for batch in DataLoader(data, batch_size=1) if isinstance(data, IterableDataset) else data:
            batches.append(_fields(batch))
            if sum(len(each[1]) for each in batches) >= samples:
                break
        require(bool(batches), "data: it is empty; expected at least one sample")
        joined = _joined(batches, reader)[:samples]
        whole = _named(replace(joined, total=len(joined)), getattr(data, "dataset", data))
    else:
        whole = data if isinstance(data, Samples) else _joined([_pair(data, reader)], reader)
    whole = whole if groups is None else with_groups(whole, np.asarray(groups))
    return whole[choose(len(whole))]


def _are_batches(data: Any) -> bool:
    """Whether a list holds batches as loaders make them: each with as many targets, in an array, as inputs."""
    return isinstance(data, list) and all(
        isinstance(each, (tuple, list))
        and len(each) >= 2
        and isinstance(each[0], (Tensor, np.ndarray, Mapping))
        and isinstance(each[1], (Tensor, np.ndarray))
        and each[1].ndim > 0
        and rows_in(each[0]) == len(each[1])
        for each in data
    )


def _pair(data: Any, reader: TextReader | None = None) -> Fields:
    if reader is not None and reader.task == "masked" and _is_text(data):
        return {"": data}, [0] * len(data)
    require(
        isinstance(data, (tuple, list)) and len(data) == 2,
        f"data: got {show(data)}, expected a pair (inputs, targets), a Dataset, a DataLoader or batches of such pairs, or a path",
    )
    inputs, targets = _fields(data, pair=True)
    first = next(iter(inputs.values()))
    count = len(first) if hasattr(first, "__len__") else 0
    require(count == len(targets), f"data: {count} inputs and {len(targets)} targets, expected as many")
    return inputs, targets


def _fields(item: Any, *, pair: bool = False) -> Fields:
    """Inputs and target of a sample or a batch as data sets give them: the first two of several, or by their usual names."""
    if isinstance(item, Mapping):
        target = find_column("targets", None, _TARGETS, list(map(str, item)))
        return _by_name({name: value for name, value in item.items() if name != target}), item[target]
    if not isinstance(item, (tuple, list)) or len(item) < 2:
        raise InputError(f"data: a sample is {show(item)}, expected (input, target), or a dictionary of both")
    first, second, *_ = item
    if isinstance(first, Mapping):
        # What stands apart from the target is all input: without a usual name the first is the main one.
        return _by_name(first, any(name.lower() in _INPUTS for name in first)), second
    held = isinstance(first, (tuple, list)) and all(isinstance(v, (Tensor, np.ndarray)) for v in first)
    if held and len(first) > 1 and (isinstance(first, tuple) or not _one_each(first, second, pair)):
        return {str(place): value for place, value in enumerate(first)}, second
    return {"": first}, second


def _one_each(arrays: Sequence[Any], targets: Any, pair: bool) -> bool:
    """Whether a list holds one array a sample, and not several inputs: a batch as loaders make it has as many rows in each of these."""
    count = _count(targets)
    return count == len(arrays) and (pair or any(len(array) != count for array in arrays))


def _count(targets: Any) -> int:
    """How many targets there are; 0 for a single one."""
    return 0 if getattr(targets, "ndim", 1) == 0 or not hasattr(targets, "__len__") else len(targets)


def _by_name(inputs: Mapping[str, Any], usual: bool = True) -> dict[str, Any]:
    several = len(inputs) > 1 and usual
    main = find_column("inputs", None, _INPUTS, list(map(str, inputs))) if several else next(iter(inputs), "")
    require(bool(inputs), "data: the inputs are an empty dictionary, expected at least one")
    others = {name: value for name, value in inputs.items() if name != main and not _is_text(value)}
    return {main: inputs[main], **others}


def _one(fields: Fields) -> Fields:
    """A sample as a batch of one."""
    inputs, target = fields
    return {name: _row(value) for name, value in inputs.items()}, _row(target)


def _row(value: Any) -> Any:
    return [value] if isinstance(value, str) or _is_text(value) else torch.as_tensor(value)[None]


def _is_text(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(isinstance(v, str) for v in value)


def _joined(batches: Sequence[Fields], reader: TextReader | None) -> Samples:
    """Samples of several batches in one, sequences of several lengths padded."""
    main, *others = batches[0][0]
    if reader is not None and reader.task != "classes" and not _numbers(batches[0][0][main]):
        return _token_targets([(inputs[main], target) for inputs, target in batches], reader)
    targets = _targets([target for _, target in batches])
    labels, names = as_targets("data", np.asarray(targets))
    rest: dict[str, Any] = {"targets": labels, "classes": names, "source": "arrays"}
    given = [inputs[main] for inputs, _ in batches]
    if all(map(_is_text, given)):
        texts = [text for part in given for text in part]
        require(
            len(texts) == len(labels), f"data: {len(texts)} texts and {len(labels)} targets, expected as many"
        )
        return text_samples(texts, None if reader is None else reader.tokenizer, **rest)
    x, lengths = _concatenated(given)
    fields = {name: _concatenated([inputs[name] for inputs, _ in batches])[0] for name in others}
    require(len(x) == len(labels), f"data: {len(x)} inputs and {len(labels)} targets, expected as many")
    mask = fields.get("attention_mask")
    if mask is not None and mask.ndim == 2 and bool((mask.long().cumprod(1) == mask).all()):
        # Padding on the right, and where it begins is said.
        lengths = mask.long().sum(1)
    notes = []
    if lengths is not None:
        notes.append(
            f"sequences of {int(lengths.min())} to {int(lengths.max())} steps, those of one length together, so that none is padded"
        )
    return Samples(
        x, others=fields, argument="" if main.isdigit() else main, lengths=lengths, notes=tuple(notes), **rest
    )


def _numbers(value: Any) -> bool:
    """Whether inputs are ids, and neither texts nor words."""
    while isinstance(value, (list, tuple)) and len(value):
        value = value[0]
    return not isinstance(value, str)


def _token_targets(batches: Sequence[tuple[Any, Any]], reader: TextReader) -> Samples:
    """Texts whose words have tags, or whose words are hidden."""
    from lineament.load.token_targets import listed, masked_samples, tagged_samples

    texts = [text for part, _ in batches for text in part]
    if reader.task == "masked":
        whole = [text if isinstance(text, str) else " ".join(text) for text in texts]
        return masked_samples(whole, reader, source="texts")
    tags = [tag.tolist() if isinstance(tag, Tensor) else tag for _, part in batches for tag in part]
    return tagged_samples(list(map(listed, texts)), list(map(listed, tags)), reader, source="texts")


def _concatenated(parts: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
    """Batches in one tensor, and where they differ in length the length of each row."""
    tensors = []
    for part in parts:
        one_each = isinstance(part, (list, tuple)) and any(isinstance(v, (Tensor, np.ndarray)) for v in part)
        tensors += [_tensor(v)[None] for v in part] if one_each else [_tensor(part)]
    if len({tuple(part.shape[1:]) for part in tensors}) == 1:
        return torch.cat(tensors), None
    return padded(tensors)


def _tensor(value: Any) -> Tensor:
    x = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    if x.dtype == torch.uint8:
        return x
    return x.float() if x.is_floating_point() or x.dtype == torch.bool else x.long()


def _targets(parts: Sequence[Any]) -> Any:
    parts = [part.detach().cpu() if isinstance(part, Tensor) else part for part in parts]
    if all(isinstance(part, Tensor) for part in parts):
        if len({part.shape[1:] for part in parts}) > 1 and all(part.ndim == 2 for part in parts):
            return padded(parts, _IGNORED)[0]
        return torch.cat(parts)
    return [name for part in parts for name in part] if len(parts) > 1 else parts[0]


def _named(samples: Samples, data: Any) -> Samples:
    """With the names of the classes that a ``Dataset`` carries as ``classes``, as torchvision's do."""
    while isinstance(data, Subset):
        data = data.dataset
    names: Any = getattr(data, "classes", None)
    whole = samples.targets.ndim == 1 and not samples.targets.is_floating_point()
    fits = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    if samples.classes or not whole or not fits or len(names) <= int(samples.targets.max()):
        return samples
    return replace(samples, classes=tuple(names))
