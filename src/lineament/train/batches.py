"""What a training walks over: any of the forms that data come in, as batches in an order that the run decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from lineament.core import checks
from lineament.core.models import decided, ordinary

_GATHERED = 2**22


@dataclass
class Batch:
    """One batch; a callback's ``on_batch`` may change it.

    Attributes:
        inputs: a tensor, or a mapping of tensors by the model's argument names.
        rows: the indices of its samples; ``None`` for batches of a loader.
        weights: of the samples' losses.
        mixed: (λ, other targets): the loss is then λ times that of the targets and (1 - λ) times that of the others.
    """

    inputs: Any
    targets: Any
    rows: Tensor | None = None
    weights: Tensor | None = None
    mixed: tuple[float, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def split(self, parts: int) -> list[Batch]:
        """The batch in so many pieces, or as many as it has samples."""
        parts = min(parts, len(self))
        if parts < 2:
            return [self]

        def pieces(x: Any) -> Sequence[Any]:
            return [None] * parts if x is None else x.tensor_split(parts)

        inputs = self.inputs
        if isinstance(inputs, Mapping):
            columns = {name: pieces(x) for name, x in inputs.items()}
            inputs = [{name: column[k] for name, column in columns.items()} for k in range(parts)]
        else:
            inputs = pieces(inputs)
        found = map(Batch, inputs, pieces(self.targets), pieces(self.rows), pieces(self.weights))
        share, others = self.mixed or (1.0, None)
        return [
            replace(piece, mixed=None if other is None else (share, other))
            for piece, other in zip(found, pieces(others))
        ]

    def objective(self, loss: Callable[..., Tensor], outputs: Tensor) -> Tensor:
        """The mean loss of the batch, weighted and mixed as it says."""
        how = {} if self.weights is None else {"reduction": "none"}
        value = loss(outputs, self.targets, **how)
        if self.mixed is not None:
            share, others = self.mixed
            value = share * value + (1 - share) * loss(outputs, others, **how)
        return value if self.weights is None else (self.weights * value).mean()

    def right(self, outputs: Tensor) -> Tensor | None:
        """Whether each is classified correctly; ``None`` where the targets are no class labels. Of mixed targets the larger share counts."""
        labels = self.targets
        if self.mixed is not None and self.mixed[0] < 0.5:
            labels = self.mixed[1]
        return decided(outputs) == labels if outputs.ndim == 2 and is_labels(labels) else None


def is_labels(targets: Any) -> bool:
    return isinstance(targets, Tensor) and targets.ndim == 1 and targets.dtype == torch.int64


def moved(value: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Tensors, or a mapping of them, on a device; floating-point ones in a dtype."""
    if isinstance(value, Mapping):
        return {key: moved(item, device, dtype) for key, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    value = ordinary(value)
    dtype = dtype if value.is_floating_point() and dtype else value.dtype
    return value if value.device == device and value.dtype == dtype else value.to(device, dtype)


class Indexed:
    """Data whose samples are found by their indices."""

    indexed = True

    def __init__(self, inputs: Any, targets: Any):
        count = {len(v) for v in (inputs.values() if isinstance(inputs, Mapping) else (inputs,))}
        checks.require(
            count == {len(targets)},
            f"data: got {' and '.join(map(str, sorted(count)))} inputs and {len(targets)} targets, expected as many of one as of the other",
        )
        checks.require(len(targets) > 0, "data: it is empty; expected at least one sample")
        self.inputs, self.targets = inputs, targets

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Tensor) -> Batch:
        inputs = self.inputs
        inputs = {k: v[rows] for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs[rows]
        return Batch(inputs, self.targets[rows], rows)

    def count(self, run: Any) -> int:
        """The batches of an epoch, in each process."""
        each = math.ceil(len(run.rows) / run.processes.count)
        size = run.batch_size // run.processes.count
        # Batch norm cannot take a batch of one; in another epoch that sample is in another batch.
        return math.ceil(each / size) - (run.norms and each > size and each % size == 1)

    def batches(self, run: Any) -> Iterator[Batch]:
        """An epoch: each process takes every so-manieth row, after the first ones were repeated until all have as many."""
        rows, processes = run.rows, run.processes
        if run.shuffle:
            rows = rows[torch.randperm(len(rows), generator=run.generator)]
        missing = -len(rows) % processes.count
        rows = torch.cat([rows, rows.repeat(math.ceil(missing / len(rows)))[:missing]]) if missing else rows
        size = run.batch_size // processes.count
        rows = rows[processes.rank :: processes.count][: self.count(run) * size]
        # Many small batches are gathered in one go.
        whole = isinstance(self.inputs, Tensor) and isinstance(self.targets, Tensor)
        many = max(1, _GATHERED // (size * self.inputs[0].nbytes)) if whole else 1
        for block in rows.split(many * size):
            taken = self.take(block)
            if many == 1:
                yield taken
            else:
                yield from map(Batch, *(v.split(size) for v in (taken.inputs, taken.targets, block)))

    def in_order(self, batch_size: int, rank: int = 0, count: int = 1) -> Iterator[Batch]:
        """This process's share, for measurements."""
        parts = torch.arange(len(self))[rank::count].split(batch_size)
        return (self.take(rows) for rows in parts if len(rows))


class Loaded:
    """Data that come in batches of their own."""

    indexed = False

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader

    def __len__(self) -> int:
        """Nothing can be said of its samples."""
        return 0

    def count(self, run: Any) -> int | None:
        try:
            return len(self.loader)  # pyright: ignore[reportArgumentType]
        except TypeError:
            return None

    def batches(self, run: Any) -> Iterator[Batch]:
        for batch in self.loader:
            checks.require(
                isinstance(batch, (tuple, list)) and len(batch) >= 2,
                f"data: got a batch {checks.show(batch)}, expected (inputs, targets)",
            )
            inputs, targets = list(batch)[:2]
            yield Batch(inputs, targets)

    def in_order(self, batch_size: int, rank: int = 0, count: int = 1) -> Iterator[Batch]:
        return (batch for number, batch in enumerate(self.batches(None)) if number % count == rank)


class _Items:
    """One field of a map-style data set's items, by a tensor of indices; the last items read are kept for the other field."""

    def __init__(self, data: Any, memory: dict[str, Any], field: int):
        self.data, self.memory, self.field = data, memory, field

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, rows: Tensor) -> Any:
        if self.memory.get("rows") is not rows:
            fetch = getattr(self.data, "__getitems__", None)
            wanted = rows.tolist()
            items = fetch(wanted) if fetch is not None else [self.data[row] for row in wanted]
            self.memory.update(rows=rows, batch=default_collate(items))
        return self.memory["batch"][self.field]


def source(data: Any) -> Indexed | Loaded:
    """Data in any of their forms as one of the two that the loop knows."""
    if isinstance(data, Dataset) and hasattr(data, "inputs") and hasattr(data, "targets"):
        data = (data.inputs, data.targets)  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data[0], (tuple, list)):
        inputs, targets = (torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in data)
        return Indexed(inputs, targets)
    if isinstance(data, Dataset) and hasattr(data, "__len__"):
        memory: dict[str, Any] = {}
        return Indexed(_Items(data, memory, 0), _Items(data, memory, 1))
    checks.require(
        isinstance(data, (DataLoader, Iterable)) and not isinstance(data, (Iterator, Tensor, Mapping, str)),
        f"data: got {checks.show(data)}, expected (inputs, targets), a Dataset, a DataLoader or other batches that can be walked again",
    )
    return Loaded(data)  # pyright: ignore[reportArgumentType]
