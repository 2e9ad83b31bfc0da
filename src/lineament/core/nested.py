"""Nests of dicts, lists and tuples over tensors, arrays and plain values: joined along the batch, or packed for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import InputError, require, show

# What safetensors stores as it is; other dtypes go as bytes.
_NATIVE = {
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
}  # fmt: skip


def join(parts: Sequence[Any]) -> Any:
    """One nest from many of the same form: tensors are concatenated along their first dimension.

    >>> join([{"a": torch.ones(1), "b": None}, {"a": torch.zeros(2), "b": None}])
    {'a': tensor([1., 0., 0.]), 'b': None}
    """
    first = parts[0]
    if isinstance(first, Tensor):
        require(
            first.ndim > 0,
            "chunked: the function returned a tensor without dimensions, expected one value a row",
        )
        return first if len(parts) == 1 else torch.cat(list(parts))
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        columns = [join(column) for column in zip(*parts)]
        make: Any = getattr(type(first), "_make", type(first))
        return make(columns)
    if is_dataclass(first) and not isinstance(first, type):
        kind: Any = type(first)
        return kind(**{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(first)})
    raise InputError(f"chunked: the function returned {show(first)}, expected tensors or a nest of tensors")


def pack(name: str, value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON with a tag for what JSON has not; tensors go into ``tensors`` under a number, bit for bit."""
    if isinstance(value, Tensor):
        require(
            value.layout == torch.strided,
            f"{name!r}: got {show(value)} with {value.layout}, expected a dense tensor",
        )
        found = value.detach().resolve_conj().resolve_neg().cpu().clone(memory_format=torch.contiguous_format)
        tag: dict[str, Any] = {"is": "tensor", "key": str(len(tensors)), "device": str(value.device)}
        if value.dtype not in _NATIVE:
            tag |= {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            found = found.reshape(-1).view(torch.uint8)
        tensors[tag["key"]] = found
        return tag
    if isinstance(value, (np.ndarray, np.generic)):
        require(
            not value.dtype.hasobject and value.dtype.names is None,
            f"{name!r}: got {show(value)}, expected plain numbers or text",
        )
        tag = {"is": "array" if isinstance(value, np.ndarray) else "number", "key": str(len(tensors))}
        tensors[tag["key"]] = torch.frombuffer(
            bytearray(np.ascontiguousarray(value).tobytes()) or bytearray(1), dtype=torch.uint8
        )
        return tag | {"dtype": value.dtype.str, "shape": list(value.shape)}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        # Hexadecimal keeps every bit, and NaN and infinities, which JSON has not.
        return {"is": "float", "hex": float(value).hex()}
    if isinstance(value, Mapping):
        pairs = [[pack(name, key, tensors), pack(name, member, tensors)] for key, member in value.items()]
        plain = all(key is None or isinstance(key, (str, int, float)) for key in value)
        require(plain, f"{name!r}: got a dict with keys {show(list(value))}, expected strings or numbers")
        return {"is": "dict", "items": pairs}
    if isinstance(value, torch.Size) or type(value) in (list, tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {"is": kind, "items": [pack(name, member, tensors) for member in value]}
    raise InputError(
        f"{name!r}: got {show(value)} ({type(value).__name__}), expected tensors, arrays, numbers, strings, or dicts, lists "
        "and tuples of them"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nest that :func:`pack` packed; raises ``KeyError``, ``TypeError`` or ``ValueError`` where that is not one."""
    if not isinstance(value, dict):
        return value
    kind = value["is"]
    if kind == "tensor":
        found = tensors[value["key"]]
        if "dtype" in value:
            found = found.view(getattr(torch, value["dtype"])).reshape(value["shape"])
        device = torch.device(value["device"])
        there = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
        return found.to(device) if there else found
    if kind in ("array", "number"):
        dtype, shape = np.dtype(value["dtype"]), tuple(value["shape"])
        count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        array = np.frombuffer(tensors[value["key"]].numpy().tobytes()[:count], dtype=dtype).reshape(shape)
        return array.copy() if kind == "array" else array[()]
    if kind == "float":
        return float.fromhex(value["hex"])
    if kind == "dict":
        return {unpack(key, tensors): unpack(member, tensors) for key, member in value["items"]}
    items = [unpack(member, tensors) for member in value["items"]]
    return items if kind == "list" else tuple(items)
