"""Values as JSON and tensors, bit for bit: numbers, text, tensors, arrays, dicts, lists, tuples, dataclasses and enums.

The JSON never names a class to import. Whoever reads it says which type it is (:func:`unpack`'s ``kind``), and dataclasses and
enums within are found through the annotations of its fields.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
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


def pack(name: str, value: Any, tensors: dict[str, Tensor], kind: Any = None) -> Any:
    """The value as JSON, with a tag for what JSON lacks; tensors go into ``tensors`` under a number.

    Args:
        name: what an error message calls the value.
        kind: its type, which must lead to every dataclass and enum in it: ``Result``, ``list[Result]``, ``dict[str, Result | None]``.

    Raises:
        InputError: a value that cannot be stored, or a dataclass that ``kind`` does not lead to.

    >>> tensors = {}
    >>> packed = pack("x", {"mean": torch.ones(2), "count": 3}, tensors)
    >>> packed["items"][1], list(tensors)
    (['count', 3], ['0'])
    """
    owner = type(value)
    if is_dataclass(owner) or issubclass(owner, enum.Enum):
        require(
            _expected(owner, kind) is not None,
            f"{name!r}: got a {owner.__qualname__}, which kind={_shown(kind)} does not lead to; name the result's type, "
            "down to each dataclass in it",
        )
        if isinstance(value, enum.Enum):
            return {"is": "enum", "name": owner.__qualname__, "member": value.name}
        hints = _hints(owner)
        items = [
            [f.name, pack(name, getattr(value, f.name), tensors, hints.get(f.name))] for f in _stored(owner)
        ]
        return {"is": "dataclass", "name": owner.__qualname__, "items": items}
    if isinstance(value, Tensor):
        # A copy of its own: safetensors refuses two names for one memory.
        plain = value.detach().to("cpu", copy=True).resolve_conj().resolve_neg().contiguous()
        tag: dict[str, Any] = {"is": "tensor", "key": str(len(tensors)), "device": str(value.device)}
        if value.dtype not in _NATIVE:
            tag |= {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
            plain = plain.reshape(-1).view(torch.uint8)
        tensors[tag["key"]] = plain
        return tag
    if isinstance(value, (np.ndarray, np.generic)):
        require(
            not value.dtype.hasobject and value.dtype.names is None,
            f"{name!r}: got {show(value)}, expected plain numbers or text",
        )
        tag = _bytes(np.ascontiguousarray(value).tobytes(), tensors)
        tag["is"] = "array" if isinstance(value, np.ndarray) else "number"
        return tag | {"dtype": value.dtype.str, "shape": list(value.shape)}
    if isinstance(value, bytes):
        return _bytes(value, tensors)
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        # Hexadecimal keeps every bit, and NaN and infinities, which JSON has not.
        return {"is": "float", "hex": float(value).hex()}
    if isinstance(value, Path):
        return {"is": "path", "text": str(value)}
    if isinstance(value, Mapping):
        plain = all(key is None or isinstance(key, (str, int, float)) for key in value)
        require(plain, f"{name!r}: got a dict with keys {show(list(value))}, expected strings or numbers")
        member = _member(kind, 0)
        items = [[pack(name, key, tensors), pack(name, item, tensors, member)] for key, item in value.items()]
        return {"is": "dict", "items": items}
    if isinstance(value, torch.Size) or type(value) in (list, tuple):
        items = [pack(name, item, tensors, _member(kind, index)) for index, item in enumerate(value)]
        return {"is": "list" if isinstance(value, list) else "tuple", "items": items}
    raise InputError(
        f"{name!r}: got {show(value)} ({type(value).__name__}), expected tensors, arrays, numbers, strings, or dicts, lists, "
        "tuples and dataclasses of them"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor], kind: Any = None) -> Any:
    """The value that :func:`pack` packed.

    Raises:
        KeyError, TypeError, ValueError: it is not one, or not of this ``kind``.

    >>> tensors = {}
    >>> unpack(pack("x", (1, [torch.ones(2)]), tensors), tensors)
    (1, [tensor([1., 1.])])
    """
    if not isinstance(value, dict):
        return value
    tag = value["is"]
    if tag in ("dataclass", "enum"):
        known = _expected(value["name"], kind)
        if known is None:
            raise TypeError(f"{value['name']} is not of the expected type {kind}")
        if tag == "enum":
            return known[value["member"]]
        if [name for name, _ in value["items"]] != [f.name for f in _stored(known)]:
            raise TypeError(f"{value['name']} has other fields now")
        hints = _hints(known)
        return known(**{name: unpack(item, tensors, hints.get(name)) for name, item in value["items"]})
    if tag == "tensor":
        found = tensors[value["key"]]
        if "dtype" in value:
            found = found.view(getattr(torch, value["dtype"])).reshape(value["shape"])
        device = torch.device(value["device"])
        there = device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())
        return found.to(device) if there else found
    if tag in ("array", "number", "bytes"):
        content = tensors[value["key"]].numpy().tobytes()[: value["length"]]
        if tag == "bytes":
            return content
        array = np.frombuffer(content, dtype=np.dtype(value["dtype"])).reshape(value["shape"])
        return array.copy() if tag == "array" else array[()]
    if tag == "float":
        return float.fromhex(value["hex"])
    if tag == "path":
        return Path(value["text"])
    if tag == "dict":
        member = _member(kind, 0)
        return {unpack(key, tensors): unpack(item, tensors, member) for key, item in value["items"]}
    items = [unpack(item, tensors, _member(kind, index)) for index, item in enumerate(value["items"])]
    return items if tag == "list" else tuple(items)


def _bytes(content: bytes, tensors: dict[str, Tensor]) -> dict[str, Any]:
    key = str(len(tensors))
    # A tensor made from a buffer cannot be empty.
    tensors[key] = torch.frombuffer(bytearray(content) or bytearray(1), dtype=torch.uint8)
    return {"is": "bytes", "key": key, "length": len(content)}


def _shown(kind: Any) -> str:
    return (
        getattr(kind, "__qualname__", str(kind))
        if isinstance(kind, type) and not typing.get_args(kind)
        else str(kind)
    )


def _stored(owner: Any) -> list[Any]:
    """The fields from which a dataclass is made again."""
    return [each for each in fields(owner) if each.init]


def _hints(owner: type) -> dict[str, Any]:
    """The types of a dataclass's fields."""
    try:
        return typing.get_type_hints(owner)
    except NameError:  # an annotation names what only a type checker imports: plain values, as far as we know
        return {}


def _alternatives(kind: Any) -> Iterator[Any]:
    """The types that an annotation, or any of several, allows: the members of unions, without ``Annotated``."""
    origin = typing.get_origin(kind)
    if isinstance(kind, tuple) or origin in (typing.Union, types.UnionType):
        for each in kind if isinstance(kind, tuple) else typing.get_args(kind):
            yield from _alternatives(each)
    elif origin is typing.Annotated:
        yield from _alternatives(typing.get_args(kind)[0])
    elif kind is not None:
        yield kind


def _expected(wanted: type | str, kind: Any) -> Any:
    """The class that ``kind`` allows for an object of this class, or for one of this name."""
    for each in _alternatives(kind):
        each = typing.get_origin(each) or each
        if isinstance(each, type) and (each is wanted or each.__qualname__ == wanted):
            return each
    return None


def _member(kind: Any, index: int) -> tuple[Any, ...]:
    """The types of what a container holds: of a dict's values, a sequence's items, a tuple's item at ``index``."""
    found = []
    for each in _alternatives(kind):
        origin, arguments = typing.get_origin(each), typing.get_args(each)
        if not isinstance(origin, type) or not arguments:
            continue
        if issubclass(origin, Mapping):
            found.append(arguments[1])
        elif origin is tuple and arguments[-1] is not Ellipsis:
            found += arguments[index : index + 1]
        else:
            found.append(arguments[0])
    return tuple(found)
