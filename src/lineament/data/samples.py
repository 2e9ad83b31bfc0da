"""The one record of data: inputs with their targets, and what is known about each sample.

Every data set here, and every reader of users' data in :mod:`lineament.load`, returns :class:`Samples`. It is a map-style ``Dataset``, so a
``DataLoader`` takes it; ``samples[rows]`` is a part of it with everything that belongs to those rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lineament.core.results import Readable


@dataclass(frozen=True, eq=False)
class Samples(Readable, Dataset[tuple[Tensor, Tensor]]):
    """Some samples of a data set, in memory; its length is their number.

    Attributes:
        inputs: (sample, ...), as they are stored. Images of the data sets here are (sample, channel, height, width), bytes or in [0, 1].
        targets: int64 class labels, or real values.
        classes: the classes' names; where there are none, classes are called by their numbers.
        groups: the number of each sample's group, or ``None``. group_names: the groups' names.
        extras: further tensors with one row a sample: masks, the position of a signal, ...
        others: further inputs of a model that takes several, by the argument's name, or by its place (``"1"`` is the second).
        argument: the name of the argument that ``inputs`` are for, where the model takes them by name.
        columns: the names of the columns that ``inputs`` (sample, column) are, where it has any.
        lengths: of sequences that are not alike in length, how much of each row is its own; what stands behind is padding.
        index: which samples of the data set these are, of ``total``.
        source: where they are from. notes: what was decided on the way.

    >>> two = Samples(torch.zeros(2, 1, 8, 8), torch.tensor([0, 1]), ("cat", "dog"), extras={"weight": torch.tensor([0.5, 2.0])})
    >>> len(two), two.classes[int(two.targets[1])], two[1:].extras["weight"].tolist()
    (2, 'dog', [2.0])
    """

    inputs: Tensor
    targets: Tensor
    classes: tuple[str, ...] = ()
    groups: Tensor | None = None
    group_names: tuple[str, ...] = ()
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    others: Mapping[str, Tensor] = field(default_factory=dict)
    argument: str = ""
    columns: tuple[str, ...] = ()
    lengths: Tensor | None = None
    index: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    total: int = 0
    source: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.index):
            object.__setattr__(self, "index", torch.arange(len(self.targets)))
        if not self.total:
            object.__setattr__(self, "total", len(self.targets))

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, rows: Any) -> Any:
        """``(input, target)`` for a number; Samples for a slice, a mask, or several numbers."""
        if isinstance(rows, int):
            return self.inputs[rows], self.targets[rows]
        rows = rows if isinstance(rows, slice) else torch.as_tensor(rows)
        return self._each(lambda value: value[rows])

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """``(inputs, targets)``, to be unpacked."""
        return self.inputs, self.targets

    def to(self, device: str | torch.device) -> Samples:
        """The same samples on another device."""
        return self._each(lambda value: value.to(device))

    def _each(self, change: Any) -> Samples:
        """The same record with every tensor that has one row a sample changed."""
        return replace(
            self,
            inputs=change(self.inputs),
            targets=change(self.targets),
            groups=None if self.groups is None else change(self.groups),
            extras={name: change(value) for name, value in self.extras.items()},
            others={name: change(value) for name, value in self.others.items()},
            lengths=None if self.lengths is None else change(self.lengths),
            index=change(self.index),
        )

    def to_dict(self) -> dict[str, Any]:
        """Shapes and counts, for a report."""
        labels = self.targets.ndim == 1 and not self.targets.is_floating_point()
        return {
            "source": self.source,
            "inputs": list(self.inputs.shape),
            "targets": torch.bincount(self.targets).tolist() if labels else list(self.targets.shape),
            "groups": None if self.groups is None else torch.bincount(self.groups).tolist(),
            "extras": {name: list(value.shape) for name, value in self.extras.items()},
        }

    def plot(self, ax: Any = None, count: int = 8) -> Any:
        """The first images side by side; other inputs as a matrix, one row a sample."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        first = self.inputs[:count].float().cpu()
        if first.ndim == 4 and first.shape[1] in (1, 3):
            strip = torch.cat(list(first), 2).movedim(0, -1).numpy()
            strip = strip / 255 if self.inputs.dtype == torch.uint8 else strip.clip(0, 1)
            ax.imshow(strip, cmap="gray", vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
        else:
            ax.imshow(first.flatten(1).numpy(), cmap="coolwarm", aspect="auto")
            ax.set(xlabel="coordinate", ylabel="sample")
        return ax
