"""What a dictionary of features makes of activations: which features are on, and how strongly; and what every dictionary can do.

A dictionary writes an activation x of d numbers as a sum of few **atoms** (directions of x's space) with weights, its **codes**. ``measure/``,
``explain/`` and ``audit/`` take any dictionary by the protocol :class:`Dictionary`; the wing ``dictionaries/`` has the kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lineament.core.checks import require, show


@dataclass(frozen=True)
class Codes:
    """The features that are on in each row, and their values; what is not listed is zero.

    Rows with fewer features than others are filled up with places of value 0, whose index means nothing. No index of a value other than 0
    occurs twice in a row. The order within a row is free.

    Attributes:
        indices: (..., active) int64, which feature, in [0, width).
        values: (..., active), how strongly.
        width: how many features the dictionary has.

    >>> codes = Codes(torch.tensor([[2, 0]]), torch.tensor([[1.5, 0.0]]), 4)
    >>> codes.dense().tolist(), codes.count().tolist()
    ([[0.0, 0.0, 1.5, 0.0]], [1])
    """

    indices: Tensor
    values: Tensor
    width: int

    def __post_init__(self) -> None:
        require(
            self.indices.shape == self.values.shape and self.indices.ndim > 0,
            f"codes: got indices of shape {tuple(self.indices.shape)} and values of shape {tuple(self.values.shape)}, expected the same",
        )

    @classmethod
    def of_dense(cls, dense: Tensor) -> Codes:
        """The codes of a tensor (..., width): its values other than zero, as many places a row as the fullest row needs.

        >>> Codes.of_dense(torch.tensor([[0.0, -2.0], [0.0, 0.0]])).values.tolist()
        [[-2.0], [0.0]]
        """
        active = int((dense != 0).sum(-1).max()) if dense.numel() else 0
        indices = dense.detach().abs().topk(active, -1).indices
        return cls(indices, dense.gather(-1, indices), dense.shape[-1])

    @classmethod
    def joined(cls, parts: Sequence[Codes]) -> Codes:
        """One after the other along the first dimension.

        >>> one, two = Codes.of_dense(torch.tensor([[1.0, 0.0]])), Codes.of_dense(torch.tensor([[1.0, 2.0]]))
        >>> Codes.joined([one, two]).dense().tolist()
        [[1.0, 0.0], [1.0, 2.0]]
        """
        require(len(parts) > 0, "codes: got none, expected at least one part to join")
        most = max(part.indices.shape[-1] for part in parts)
        wide = [
            torch.nn.functional.pad(each, (0, most - each.shape[-1]))
            for part in parts
            for each in (part.indices, part.values)
        ]
        return cls(torch.cat(wide[::2]), torch.cat(wide[1::2]), parts[0].width)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: Any) -> Codes:
        """The codes of some rows."""
        return Codes(self.indices[rows], self.values[rows], self.width)

    def dense(self) -> Tensor:
        """(..., width): every feature's value. It takes width / active times the memory."""
        out = self.values.new_zeros(*self.values.shape[:-1], self.width)
        return out.scatter_add(-1, self.indices, self.values)

    def count(self) -> Tensor:
        """How many features are on in each row, after relu: the L0 of the row."""
        return (self.values != 0).sum(-1)

    def column(self, feature: int) -> Tensor:
        """(...): the value of one feature in each row.

        >>> Codes(torch.tensor([[2, 0]]), torch.tensor([[1.5, 0.5]]), 4).column(2).tolist()
        [1.5]
        """
        require(
            0 <= feature < self.width, f"feature: got {show(feature)}, expected one of 0 to {self.width - 1}"
        )
        return (self.values * (self.indices == feature)).sum(-1)


@runtime_checkable
class Dictionary(Protocol):
    """What every dictionary can do; ``tests/contracts/test_dictionaries.py`` holds its members to it.

    Attributes:
        site: where in the model its activations pass, as :func:`lineament.sites` names it; ``None`` where that was not said.
        atoms: (width, d), the directions that :meth:`decode` adds up, in the units of x.
    """

    site: str | None

    @property
    def atoms(self) -> Tensor: ...

    def encode(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., width): every feature's value, also those that are zero. For few features; :meth:`codes` is for many."""
        ...

    def codes(self, x: Tensor) -> Codes:
        """(..., d) -> the same values as :meth:`encode`, sparse; no tensor of rows x width is made at once."""
        ...

    def decode(self, codes: Codes | Tensor) -> Tensor:
        """Codes, or their dense tensor, back to (..., d): values @ atoms + a constant."""
        ...

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tensors (safetensors) and ``config.json``."""
        ...

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Any:
        """The dictionary that :meth:`save_pretrained` wrote."""
        ...
