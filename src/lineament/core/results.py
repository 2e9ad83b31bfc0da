"""What every result shares: a few readable lines when printed, plain data for JSON, and axes to draw on."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

# Lines of a printed result, and letters of a line.
_LINES, _WIDTH = 16, 100


def plain(value: Any) -> Any:
    """Lists, dicts and numbers from dataclasses, tensors and tuples, as JSON takes them.

    >>> import torch
    >>> plain({"scores": torch.tensor([0.5, 1.0]), "shape": (2, 3)})
    {'scores': [0.5, 1.0], 'shape': [2, 3]}
    """
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(member) for key, member in value.items()}
    return [plain(member) for member in value] if isinstance(value, (tuple, list)) else value


def axes(ax: Any = None, **figure: Any) -> Any:
    """The given axes, or those of a new figure; matplotlib is imported only then."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(**figure)[1]


class Readable:
    """A dataclass that prints its name and one line a field: shapes and ranges instead of whole tensors. In notebooks it is a table.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Found(Readable):
    ...     method: str
    ...     scores: Tensor
    >>> Found("occlusion", torch.arange(12.0).reshape(3, 4))
    Found
      method  'occlusion'
      scores  (3, 4) float32, 0 to 11, mean 5.5
    """

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        # Where a class has one of its own, @dataclass makes no other.
        if "__repr__" not in vars(cls):
            cls.__repr__ = Readable.__repr__

    def __repr__(self) -> str:
        rows = _rows(self)
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(
            [type(self).__name__, *(f"  {name:<{width}}  {text}".rstrip() for name, text in rows)]
        )

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in _rows(self)
        )
        return f"<table><caption>{html.escape(type(self).__name__)}</caption>{rows}</table>"


def _rows(result: Any) -> list[tuple[str, str]]:
    """Name and text of each field that holds something."""
    shown = [f.name for f in fields(result) if f.repr]
    filled = [(name, value) for name in shown if not _empty(value := getattr(result, name))]
    rows = [(name, _clipped(brief(value))) for name, value in filled[:_LINES]]
    more = ", ".join(name for name, _ in filled[_LINES:])
    return [*rows, *([("also", _clipped(more))] if more else [])]


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, Sequence, Mapping)) and not len(value))


def brief(value: Any) -> str:
    """Any value in a few words: a tensor by its shape and range, a list by its length, a number in six digits.

    >>> brief(torch.tensor([0.5, 2.0])), brief(1 / 3), brief([torch.zeros(2)] * 9)
    ('[0.5, 2]', '0.333333', '9 of Tensor')
    """
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if is_dataclass(value) and not isinstance(value, type):
        known = ((f.name, getattr(value, f.name)) for f in fields(value) if f.repr)
        short = [f"{k}={brief(v)}" for k, v in known if isinstance(v, (int, float, str)) and v != ""]
        return f"{type(value).__name__}({', '.join(short[:4])})"
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key}: {brief(member)}" for key, member in list(value.items())[:6])
        return inside if len(value) <= 6 else f"{len(value)} entries: {inside}, ..."
    if isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes)):
        members = list(value)
        if len(members) <= 6 and all(isinstance(m, (int, float, str)) for m in members):
            return f"[{', '.join(map(brief, members))}]"
        kinds = sorted({type(member).__name__ for member in members})
        return f"{len(members)} of {' or '.join(kinds)}"
    if isinstance(value, (str, bytes, int, complex)) or value is None:
        return repr(value[:_WIDTH] if isinstance(value, (str, bytes)) else value)
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return type(value).__name__ + (f" {tuple(shape)} {dtype}" if isinstance(shape, tuple) and dtype else "")


def _tensor(value: Tensor) -> str:
    value = value.detach()
    what = f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if value.is_complex() or value.is_meta or value.is_sparse or value.is_quantized or not value.numel():
        return what
    if value.ndim <= 1 and value.numel() <= 6:
        numbers = [brief(number) for number in value.reshape(-1).tolist()]
        return numbers[0] if value.ndim == 0 else f"[{', '.join(numbers)}]"
    if value.dtype == torch.bool:
        return f"{what}, {int(value.sum()):,} of {value.numel():,} true"
    finite = value[torch.isfinite(value)].double()
    bad = value.numel() - finite.numel()
    spread = (
        f", {float(finite.min()):.4g} to {float(finite.max()):.4g}, mean {float(finite.mean()):.4g}"
        if finite.numel()
        else ""
    )
    return what + spread + (f"; {bad:,} not finite" if bad else "")


def _clipped(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
