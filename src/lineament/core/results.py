"""What every result shares: plain data for JSON, and axes to draw on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


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
