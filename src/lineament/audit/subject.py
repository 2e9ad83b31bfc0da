"""What every lens looks at: one model and one data set that fit each other (:mod:`lineament.load.model_and_data` makes them fit)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lineament.core.models import device_of, dtype_of, frozen, logits
from lineament.data.samples import Samples
from lineament.load.input_layout import Layout


@dataclass(frozen=True)
class Subject:
    """What a lens is given. ``outputs`` (sample, class or value) are the model's answers to all samples, on the CPU."""

    model: nn.Module
    samples: Samples
    layout: Layout
    task: str
    sites: tuple[str, ...]
    outputs: Tensor
    classes: tuple[str, ...]
    batch_size: int
    fixed_batch: bool
    flops: float
    method: str = "norm_grad"
    gaze_site: str | None = None
    seed: int = 0
    notes: tuple[str, ...] = ()
    faithfulness: str = "scores"
    fresh: Callable[[int], nn.Module] | None = None
    cache: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> Tensor:
        return self.samples.targets

    @property
    def images(self) -> bool:
        """Whether the model takes images (batch, channels, height, width) of a size worth a picture."""
        shape = self.inputs(torch.tensor([0])).shape
        return len(shape) == 4 and min(shape[-2:]) >= 4

    def inputs(self, rows: Tensor) -> Tensor:
        """Some samples as the model takes them, on its device and in its precision."""
        return self.layout.apply(self.samples.inputs[rows]).to(
            device=device_of(self.model), dtype=dtype_of(self.model)
        )

    def batches(self, rows: Tensor | None = None) -> Batches:
        """Batches ``(inputs, targets)`` that can be walked as often as one likes."""
        return Batches(self, torch.arange(len(self)) if rows is None else rows)

    def subset(self, count: int, salt: int = 0) -> Tensor:
        """At most ``count`` samples, spread over the classes, the same for the same seed."""
        if self.fixed_batch:
            count = max(self.batch_size, count // self.batch_size * self.batch_size)
        count = min(count, len(self))
        generator = torch.Generator().manual_seed((self.seed * 1000 + salt) % 2**63)
        order = torch.randperm(len(self), generator=generator)
        if self.task == "classification" and count < len(self):
            # One of each class before the second of any: a small subset still holds every class.
            rank = torch.zeros(len(order), dtype=torch.long)
            seen: dict[int, int] = {}
            for position, row in enumerate(order.tolist()):
                label = int(self.targets[row])
                rank[position] = seen[label] = seen.get(label, -1) + 1
            order = order[torch.argsort(rank, stable=True)]
        return order[:count].sort().values

    def affordable(self, work: float, passes: float, most: int, least: int = 16) -> int:
        """How many samples fit into ``work`` floating-point operations when each is passed forward ``passes`` times."""
        count = int(work / max(self.flops * passes, 1.0))
        return max(least, min(most, count, len(self)))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss: cross-entropy for classes, squared error for values."""
        if self.task == "classification":
            return F.cross_entropy(outputs, targets)
        return F.mse_loss(
            outputs.reshape(len(targets), -1), targets.reshape(len(targets), -1).to(outputs.dtype)
        )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample."""
        if self.task == "classification":
            return F.cross_entropy(outputs, targets, reduction="none")
        error = outputs.reshape(len(targets), -1) - targets.reshape(len(targets), -1).to(outputs.dtype)
        return error.square().mean(1)

    def answer(self, rows: Tensor, change: Any = None) -> Tensor:
        """The model's outputs for some samples, without gradients, on the CPU; ``change`` alters each input batch."""
        found = []
        with frozen(self.model), torch.no_grad():
            for part in self.parts(rows):
                x = self.inputs(part)
                if change is not None:
                    x = change(x, part)
                found.append(logits(self.model(x)).float().cpu())
        return torch.cat(found)

    def parts(self, rows: Tensor) -> Iterator[Tensor]:
        yield from rows.split(self.batch_size)

    def display(self, row: int) -> Tensor:
        """A sample as a picture (height, width) or (height, width, 3) with values in [0, 1]."""
        image = self.layout.picture(self.samples.inputs[row : row + 1])[0]
        low, high = image.min(), image.max()
        if float(low) < 0 or float(high) > 1:
            image = (image - low) / (high - low).clamp_min(1e-12)
        return image[0] if len(image) == 1 else image[:3].movedim(0, -1)

    def class_name(self, number: int) -> str:
        return self.classes[number] if number < len(self.classes) else str(number)


class Batches(Sequence[tuple[Tensor, Tensor]]):
    """A subject's samples in batches: a sequence, so that it has a length and can be walked again."""

    def __init__(self, subject: Subject, rows: Tensor):
        self.subject = subject
        self.parts = list(rows.split(subject.batch_size))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: Any) -> Any:
        rows = self.parts[number]
        return self.subject.inputs(rows), self.subject.targets[rows].to(device_of(self.subject.model))
