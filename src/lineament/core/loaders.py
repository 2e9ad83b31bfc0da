"""Data as Python holds them: a pair of arrays, a ``Dataset``, a ``DataLoader``, a list of batches. All become batches that can be walked again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lineament.core.checks import InputError, require, show
from lineament.core.models import rows_in

_BATCH = 256
FORMS = "(inputs, targets), a Dataset, a DataLoader or other batches that can be walked again"


def batches_of(
    data: Any, *, name: str = "loader", batch_size: int = _BATCH, once: bool = False
) -> Iterable[Any]:
    """Data in any form as batches in the order of the data: a loader and a list of batches as they are, the others cut into parts.

    A tuple or list of arrays and their targets is one data set; a list of two arrays of one type whose samples are of one shape holds two batches of inputs.
    Parts of an array are views of it. ``once``: they are walked only once, so that an iterator will do.

    Raises:
        InputError: an iterator, a path, inputs and targets of other lengths, or no data at all.

    >>> x, y = torch.zeros(5, 2), torch.arange(5)
    >>> [(len(inputs), labels.tolist()) for inputs, labels in batches_of((x, y), batch_size=3)]
    [(3, [0, 1, 2]), (2, [3, 4])]
    >>> [len(inputs) for inputs in batches_of([x, x[:3]])]
    [5, 3]
    """
    if isinstance(data, (str, Path)):
        raise InputError(f"{name}: got the path {str(data)!r}, expected {FORMS}; read it with load.load_data")
    if hasattr(data, "inputs") and hasattr(data, "targets"):  # Samples
        data = (data.inputs, data.targets)
    if isinstance(data, Iterator) and not once:
        raise InputError(f"{name}: got an iterator, which can be walked only once, expected {FORMS}")
    if isinstance(data, (Tensor, np.ndarray, Mapping)):
        return _parts(_tensors(data), batch_size)
    if _is_pair(data):
        inputs, targets = (_tensors(each) for each in data)
        counts = rows_in(inputs), len(targets)
        require(
            counts[0] == counts[1],
            f"{name}: got {counts[0]} inputs and {counts[1]} targets, expected as many of one as of the other",
        )
        return _parts((inputs, targets), batch_size)
    if isinstance(data, Dataset) and (hasattr(data, "__len__") or isinstance(data, IterableDataset)):
        return DataLoader(data, batch_size)
    if not isinstance(data, Iterable):
        raise InputError(f"{name}: got {show(data)}, expected {FORMS}")
    return data


def _is_pair(data: Any) -> bool:
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not isinstance(data[1], (Tensor, np.ndarray)):
        return False
    first, second = data
    if isinstance(first, (Tensor, np.ndarray)):
        # The last batch may be shorter than the first.
        alike = str(first.dtype) == str(second.dtype) and (
            first.shape[1:] == second.shape[1:] if first.ndim > 1 else first.shape == second.shape
        )
        return isinstance(data, tuple) or not alike
    return isinstance(first, Mapping) or (
        isinstance(first, tuple) and all(isinstance(each, (Tensor, np.ndarray)) for each in first)
    )


def _tensors(value: Any) -> Any:
    """Arrays, also in a mapping or a tuple, as tensors."""
    if isinstance(value, Mapping):
        return {key: _tensors(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return tuple(map(_tensors, value))
    return torch.as_tensor(value)


def _parts(value: Any, batch_size: int) -> list[Any]:
    return [_rows(value, slice(at, at + batch_size)) for at in range(0, rows_in(value), batch_size)]


def _rows(value: Any, part: slice) -> Any:
    if isinstance(value, Mapping):
        return {key: _rows(each, part) for key, each in value.items()}
    return tuple(_rows(each, part) for each in value) if isinstance(value, tuple) else value[part]
