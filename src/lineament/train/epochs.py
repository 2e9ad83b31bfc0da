"""A plain training loop over tensors in memory, one epoch at a time, as USEFUL's stages walk it.

What decides the result is in the arguments and in one
generator, so that a run that was killed goes on from its checkpoint with the bits of an uninterrupted one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from scipy.stats import beta
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.models import device_of, logits
from lineament.train.step import NotFinite, step


@dataclass(frozen=True)
class Fit:
    """``fit(model, rows, epochs)`` trains with cross-entropy and yields the training error (of the batches as they were seen).

    Args:
        inputs, targets: the data; rows are moved to the model's device batch by batch.
        optimizer: makes the optimizer from the model.
        schedule: makes a scheduler from the optimizer and the number of epochs; it steps once an epoch.
        augment: ``augment(batch, generator)``, what the network is to see of a batch of ``inputs``.
        mixup: α of Beta(α, α); 0 for none (Zhang et al. 2018).
        weights: of the examples' losses, relative to their mean.
        seed: of the orders, the augmentation and MixUp.
        nonfinite: what a loss or gradient that is NaN or infinite does: ``"raise"``, or ``"skip"`` the step (weights, optimizer and batch-norm
            statistics stay as they were).
        record: called with the model after each epoch; what it returns is appended to ``records``.
        run, name: store the loop's state there under this name, and go on from it.

    >>> x = torch.tensor([[-1.0], [1.0]]); net = nn.Linear(1, 2)
    >>> fit = Fit(x, torch.tensor([0, 1]), lambda net: torch.optim.SGD(net.parameters(), lr=1.0))
    >>> list(fit(net, torch.arange(2), 5))[-1]
    0.0
    """

    inputs: Tensor
    targets: Int[Tensor, "samples"]
    optimizer: Callable[[nn.Module], Optimizer]
    schedule: Callable[[Optimizer, int], Any] | None = None
    batch_size: int = 128
    augment: Callable[[Tensor, torch.Generator], Tensor] | None = None
    mixup: float = 0.0
    weights: Float[Tensor, "samples"] | None = None
    seed: int = 0
    nonfinite: str = "raise"
    record: Callable[[nn.Module], Any] | None = None
    records: list[Any] = field(default_factory=list)
    run: Checkpoint | None = None
    name: str = "training"

    def __post_init__(self) -> None:
        checks.tensor("inputs", self.inputs, finite=False)
        checks.labels("targets", self.targets, count=len(self.inputs))
        checks.number("batch_size", self.batch_size, low=1, integer=True)
        checks.number("mixup", self.mixup, low=0)
        checks.one_of("nonfinite", self.nonfinite, ("raise", "skip"))
        if self.weights is not None:
            checks.tensor("weights", self.weights, shape=(len(self.inputs),), floating=True)

    def __call__(
        self,
        model: nn.Module,
        rows: Int[Tensor, "rows"] | None = None,
        epochs: int = 1,
        *,
        weights: Float[Tensor, "samples"] | None = None,
    ) -> Iterator[float]:
        rows = torch.arange(len(self.inputs)) if rows is None else rows
        checks.tensor("rows", rows, shape=("rows",), floating=False)
        weights = self.weights if weights is None else weights
        if weights is not None:
            weights = (weights / weights[rows].mean()).float()
        optimizer = self.optimizer(model)
        schedule = None if self.schedule is None else self.schedule(optimizer, epochs)
        generator = torch.Generator().manual_seed(self.seed)
        errors: list[float] = []
        steps: Iterator[int] = iter(range(epochs))
        if self.run is not None:
            state: dict[str, Any] = {"model": model, "optimizer": optimizer, "generator": generator}
            state |= {"errors": errors, "records": self.records}
            if schedule is not None:
                state["schedule"] = schedule
            steps = self.run.loop(self.name, epochs, state)
        given = 0
        for _ in progress(steps, self.name, epochs):
            # Those of a killed run that goes on here.
            yield from errors[given:]
            errors.append(self._epoch(model, optimizer, rows, weights, generator, len(errors) + 1))
            if schedule is not None:
                schedule.step()
            if self.record is not None:
                self.records.append(self.record(model))
            given = len(errors)
            yield errors[-1]
        yield from errors[given:]

    def _epoch(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rows: Tensor,
        weights: Tensor | None,
        generator: torch.Generator,
        epoch: int,
    ) -> float:
        device = device_of(model)
        model.train()
        wrong, seen = 0, 0
        parts = list(rows[torch.randperm(len(rows), generator=generator)].split(self.batch_size))
        norms = any(isinstance(m, _NormBase) for m in model.modules())
        # Batch norm cannot take a batch of one; in another epoch that example is in another batch.
        if norms and len(parts) > 1 and len(parts[-1]) == 1:
            parts.pop()
        for number, chosen in enumerate(parts, 1):
            x, y = self.inputs[chosen], self.targets[chosen].to(device)
            x = (x if self.augment is None else self.augment(x, generator)).to(device)
            scale = None if weights is None else weights[chosen].to(device)
            share, other = 1.0, y
            if self.mixup:
                draw = float(torch.rand((), generator=generator, dtype=torch.float64))
                share = float(beta.ppf(draw, self.mixup, self.mixup))
                partner = torch.randperm(len(x), generator=generator).to(device)
                x, other = share * x + (1 - share) * x[partner], y[partner]
            compute = functools.partial(_mixed_loss, model, x, y, other, share, scale)
            try:
                _, scores = step(model, optimizer, compute)
            except NotFinite as found:
                checks.require(
                    self.nonfinite == "skip",
                    f"{self.name}: the {found} is NaN or infinite at step {number} of epoch {epoch}; lower the learning rate, check "
                    "the scale of the data and the weights, or pass nonfinite='skip'",
                )
                continue
            wrong += int((scores.argmax(1) != (y if share >= 0.5 else other)).sum())
            seen += len(y)
        checks.require(
            seen > 0,
            f"{self.name}: all {len(parts)} steps of epoch {epoch} had a NaN or infinite loss or gradient and were skipped",
        )
        return wrong / seen


def _mixed_loss(
    model: nn.Module, x: Tensor, y: Tensor, other: Tensor, share: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The mean loss, of two targets by their shares and weighed by ``scale``; and the scores."""
    scores = logits(model(x))
    losses = F.cross_entropy(scores, y, reduction="none")
    if share < 1:
        losses = share * losses + (1 - share) * F.cross_entropy(scores, other, reduction="none")
    return (losses if scale is None else scale * losses).mean(), scores
