"""The one tensor that matters in whatever a module takes or returns: a tensor, a tuple, a dict, a dataclass.

:func:`find` gives that tensor and the path to it, :func:`put` the same structure with another tensor there (a
copy: the original and its other members stay as they are). :func:`unwrapped` undoes the wrappers of ``torch.func``.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]
# What torch.func wraps tensors in has no public name, and this module no stub.
_functorch: Any = importlib.import_module("torch._C._functorch")


def find(value: Any) -> tuple[Path, Tensor] | None:
    """The path to the first tensor of a structure and that tensor, or ``None`` where there is none.

    Tuples and lists are searched in order, dicts and dataclasses in the order of their members, depth first. A member
    named ``loss`` comes last: a model called with labels returns it before what it computed.

    >>> import torch
    >>> find((None, {"loss": torch.zeros(()), "logits": torch.ones(2)}))
    ((1, 'logits'), tensor([1., 1.]))
    """
    if isinstance(value, Tensor):
        return (), value
    for key, member in _members(value):
        found = find(member)
        if found is not None:
            return (key, *found[0]), found[1]
    return None


def _members(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, (tuple, list)):
        yield from enumerate(value)
    elif isinstance(value, Mapping):
        yield from sorted(value.items(), key=lambda item: item[0] == "loss")
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        yield from ((name, getattr(value, name, None)) for name in sorted(names, key="loss".__eq__))


def put(value: Any, path: Path, tensor: Tensor) -> Any:
    """The structure ``value`` with ``tensor`` at ``path``; containers on the way are copied, nothing is changed in place.

    >>> import torch
    >>> put((1, [torch.zeros(1), "kept"]), (1, 0), torch.ones(1))
    (1, [tensor([1.]), 'kept'])
    """
    if not path:
        return tensor
    key, rest = path[0], path[1:]
    if isinstance(value, (tuple, list)):
        items = [*value[:key], put(value[key], rest, tensor), *value[key + 1 :]]
        make: Any = getattr(type(value), "_make", type(value))  # a namedtuple takes its members one by one
        return make(items)
    if isinstance(value, Mapping):
        changed: Any = copy.copy(value) if hasattr(value, "__setitem__") else dict(value)
        changed[key] = put(value[key], rest, tensor)
        return changed
    changed = copy.copy(value)
    object.__setattr__(changed, key, put(getattr(value, key), rest, tensor))  # also where it is frozen
    return changed


def padded(tensor: Tensor) -> Tensor:
    """A tensor of sequences of several lengths (a ``TransformerEncoder`` makes one of a padding mask) with zeros up to the longest; others as they are."""
    return torch.nested.to_padded_tensor(tensor, 0.0) if tensor.is_nested else tensor


def as_ragged_as(tensor: Tensor, new: Tensor) -> Tensor:
    """What stands for the padded form of a tensor, in the lengths of that tensor.

    >>> old = torch.nested.nested_tensor([torch.zeros(1, 2), torch.zeros(3, 2)])
    >>> [len(row) for row in as_ragged_as(old, padded(old) + 1).unbind()]
    [1, 3]
    """
    if not tensor.is_nested or new.is_nested:
        return new
    rows = [row[tuple(map(slice, part.shape))] for row, part in zip(new, tensor.unbind())]
    return torch.nested.as_nested_tensor(rows, layout=tensor.layout)


def transforming() -> bool:
    """Whether a ``torch.func`` transform (``vmap``, ``grad``, ``jvp`` ...) is running right now."""
    return _functorch.maybe_current_level() is not None


def unwrapped(tensor: Tensor) -> Tensor:
    """A tensor recorded inside a ``torch.func`` transform as a plain one, once the transform is over.

    Dimensions that ``vmap`` hid come back as the leading ones, the outermost ``vmap`` first. Inside a running
    transform, and for plain tensors, this is the tensor itself.
    """
    if transforming():
        return tensor
    hidden = []
    while _functorch.is_batchedtensor(tensor) or _functorch.is_gradtrackingtensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            hidden.append(_functorch.maybe_get_bdim(tensor))
        tensor = _functorch.get_unwrapped(tensor)
    for place, dim in enumerate(reversed(hidden)):
        tensor = tensor.movedim(dim + place, place)
    return tensor
