"""What a training does besides its steps: rates, augmentation, weights, curricula, measurements, early stopping.

A callback is any object with some of the methods that :func:`lineament.train.loop.fit` names; these are the ones that several trainings need.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.stats import beta
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import dtype_of, frozen
from lineament.train.batches import Batch, moved, source
from lineament.train.loop import Run, outputs_of, total


class Rate:
    """Before each step, every learning rate is ``factor(done)`` times what the optimizer began with; ``done`` is the share of the training behind it.

    >>> Rate(lambda done: 1.0 if done < 0.5 else 0.1).factor(0.75)
    0.1
    """

    def __init__(self, factor: Callable[[float], float]):
        self.factor = factor

    def on_batch(self, run: Run, batch: Batch) -> None:
        factor = self.factor(run.done)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor


class Cosine(Rate):
    """The rate falls to zero along half a cosine, after it rose linearly over the share ``warmup`` of the training.

    >>> Cosine().factor(0.5), round(Cosine(warmup=0.5).factor(0.25), 4)
    (0.5, 0.4268)
    """

    def __init__(self, warmup: float = 0.0):
        checks.number("warmup", warmup, low=0, high=1)

        def factor(done: float) -> float:
            rising = min(1.0, done / warmup) if warmup else 1.0
            return rising * 0.5 * (1 + math.cos(math.pi * done))

        super().__init__(factor)


class Schedule:
    """A scheduler of ``torch.optim.lr_scheduler``, which steps once an epoch, or once a step.

    Args:
        make: ``make(optimizer, total)``; ``total`` is the number of times that the scheduler will step.
        by: ``"epoch"`` or ``"step"``.

    >>> from torch.optim.lr_scheduler import OneCycleLR
    >>> schedule = Schedule(lambda optimizer, total: OneCycleLR(optimizer, max_lr=0.1, total_steps=total), by="step")
    """

    def __init__(self, make: Callable[[Any, int], Any], by: str = "epoch"):
        self.make, self.by = make, checks.one_of("by", by, ("epoch", "step"))
        self.schedulers: list[Any] = []

    def on_start(self, run: Run) -> None:
        total = run.epochs if self.by == "epoch" else run.epochs * (run.batches or 1)
        self.schedulers = [self.make(optimizer, total) for optimizer in run.optimizers]

    def on_step(self, run: Run) -> None:
        for scheduler in self.schedulers if self.by == "step" else ():
            scheduler.step()

    def on_epoch_end(self, run: Run) -> None:
        for scheduler in self.schedulers if self.by == "epoch" else ():
            scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return {"schedulers": [s.state_dict() for s in self.schedulers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for scheduler, held in zip(self.schedulers, state["schedulers"]):
            scheduler.load_state_dict(held)


class Rows:
    """Which samples an epoch shows: indices, some perhaps repeated, or a function that says them for each epoch (a curriculum).

    Args:
        rows: indices, or ``rows(epoch)`` with epochs counted from 0; ``None`` for all samples.
        shuffle: ``False`` shows them in their order.

    >>> curriculum = Rows(lambda epoch: torch.arange(10 * (epoch + 1)))  # ten more samples an epoch
    >>> curriculum.rows(2).tolist()[-1]
    29
    """

    def __init__(
        self, rows: Int[Tensor, "rows"] | Callable[[int], Tensor] | None = None, *, shuffle: bool = True
    ):
        self.rows, self.shuffle = rows, shuffle

    def on_start(self, run: Run) -> None:
        checks.require(
            run.data.indexed, "Rows: the data are batches of a loader, which has an order of its own"
        )
        run.shuffle = self.shuffle
        self.on_epoch(run)

    def on_epoch(self, run: Run) -> None:
        if self.rows is not None:
            rows = self.rows if isinstance(self.rows, Tensor) else self.rows(run.epoch)
            checks.tensor("rows", rows, shape=("rows",), floating=False)
            good = bool((rows >= 0).all() and (rows < len(run.data)).all())
            checks.require(
                good,
                f"rows: got indices from {int(rows.min())} to {int(rows.max())}, expected indices of samples",
            )
            run.rows = rows.cpu()


class Augment:
    """What the model sees instead of a batch's inputs: ``function(inputs, generator)``.

    >>> augment = Augment(lambda x, generator: x + 0.1 * torch.randn(x.shape, generator=generator))
    """

    def __init__(self, function: Callable[[Tensor, torch.Generator], Tensor]):
        self.function = function

    def on_batch(self, run: Run, batch: Batch) -> None:
        batch.inputs = self.function(batch.inputs, run.generator)


class MixUp:
    """Each batch is mixed with a permutation of itself, λ x + (1 - λ) x' with λ ~ Beta(α, α), and the loss is λ of the one and 1 - λ of the other.

    Zhang et al. 2018, arXiv 1710.09412.

    >>> MixUp(0.2).alpha
    0.2
    """

    def __init__(self, alpha: float):
        self.alpha = checks.number("alpha", alpha, low=0, open_low=True)

    def on_batch(self, run: Run, batch: Batch) -> None:
        draw = float(torch.rand((), generator=run.generator, dtype=torch.float64))
        share = float(beta.ppf(draw, self.alpha, self.alpha))
        partner = torch.randperm(len(batch), generator=run.generator).to(run.device)
        batch.inputs = share * batch.inputs + (1 - share) * batch.inputs[partner]
        batch.mixed = share, batch.targets[partner]


class ExampleWeights:
    """Each sample's loss is multiplied by its weight over the mean weight of the samples shown; the loss has to take ``reduction="none"``.

    >>> weigh = ExampleWeights(torch.tensor([1.0, 3.0]))  # the second sample counts three times as much
    """

    def __init__(self, weights: Float[Tensor, "samples"]):
        self.weights = checks.tensor("weights", weights, shape=("samples",), floating=True)
        self.scaled = weights

    def on_epoch(self, run: Run) -> None:
        self.scaled = (self.weights / self.weights[run.rows].mean()).float()

    def on_batch(self, run: Run, batch: Batch) -> None:
        checks.require(
            batch.rows is not None,
            "ExampleWeights: the data are batches of a loader, whose samples have no number",
        )
        batch.weights = self.scaled[batch.rows].to(run.device)


class ClipGradients:
    """Scale the gradients down to a joint norm of at most ``norm`` before each step.

    >>> ClipGradients(1.0).norm
    1.0
    """

    def __init__(self, norm: float):
        self.norm = checks.number("norm", norm, low=0, open_low=True)

    def on_gradients(self, run: Run) -> None:
        nn.utils.clip_grad_norm_(run.model.parameters(), self.norm)


class Autocast:
    """Mixed precision: forward passes and losses in bfloat16 where that is safe, weights in their own dtype.

    >>> callbacks = [Autocast(), ClipGradients(1.0)]
    """

    def on_start(self, run: Run) -> None:
        run.autocast = torch.autocast(run.device.type, torch.bfloat16)


class Accumulate:
    """Pass a batch in so many parts and step with the sum of their gradients: what a small memory holds, with the step of the whole batch.

    The loss must be a mean over samples; batch norm in training mode sees each part alone.

    >>> Accumulate(4).parts
    4
    """

    def __init__(self, parts: int):
        self.parts = checks.number("parts", parts, low=1, integer=True)

    def on_start(self, run: Run) -> None:
        run.parts = self.parts


class Measure:
    """After every ``every`` epochs and the last one, functions of the model, which is then in eval mode.

    >>> measure = Measure(every=10, norm=lambda model: sum(float(p.norm()) for p in model.parameters()))
    """

    def __init__(self, *, every: int = 1, **functions: Callable[[nn.Module], Any]):
        self.every, self.functions = checks.number("every", every, low=1, integer=True), functions

    def on_epoch_end(self, run: Run) -> dict[str, Any]:
        if (run.epoch + 1) % self.every and run.epoch + 1 < run.epochs:
            return {}
        with frozen(run.model, requires_grad=None):
            return {name: function(run.model) for name, function in self.functions.items()}


class Validation:
    """Loss and accuracy on other data after each epoch: ``validation_loss`` (``None`` where it is not finite) and ``validation_accuracy``.

    Args:
        data: in any form that :func:`~lineament.train.loop.fit` takes.
        batch_size: that of the training by default.

    >>> from lineament.train.loop import fit
    >>> x = torch.eye(2); y = torch.tensor([0, 1])
    >>> sgd = lambda model: torch.optim.SGD(model.parameters(), lr=1.0)
    >>> done = fit(nn.Linear(2, 2), (x, y), optimizer=sgd, epochs=20, callbacks=[Validation((x, y))])
    >>> done.curve("validation_accuracy")[-1]
    1.0
    """

    def __init__(self, data: Any, *, batch_size: int | None = None):
        self.data, self.batch_size = source(data), batch_size

    def on_epoch_end(self, run: Run) -> dict[str, Any]:
        loss, seen, processes = 0.0, 0, run.processes
        right: list[Tensor | None] = []
        with frozen(run.model), torch.no_grad():
            for batch in self.data.in_order(
                self.batch_size or run.batch_size, processes.rank, processes.count
            ):
                targets = batch.targets = moved(batch.targets, run.device)
                outputs = outputs_of(run.model, moved(batch.inputs, run.device, dtype_of(run.model))).float()
                loss += len(batch) * float(run.loss(outputs, targets))
                right.append(batch.right(outputs))
                seen += len(batch)
        # A process without a share of few samples has no wrong ones.
        loss, hits, seen = processes.summed([loss, total(right) if right else 0.0, seen])
        return {
            "validation_loss": loss / seen if math.isfinite(loss) else None,
            "validation_accuracy": hits / seen if math.isfinite(hits) else None,
        }


class KeepBest:
    """Keep the weights of the epoch at which a measurement was best, the first at ties; the model ends with them.

    Args:
        name: what to judge by: ``"loss"``, ``"accuracy"``, or what a callback before this one measures.
        lower: whether lower is better; by default it is for names that end in ``loss``.
        patience: stop after so many epochs without a better one.

    >>> callbacks = [Validation((torch.eye(2), torch.tensor([0, 1]))), KeepBest(patience=5)]
    """

    def __init__(
        self, name: str = "validation_accuracy", *, lower: bool | None = None, patience: int | None = None
    ):
        self.name, self.patience = name, patience
        self.sign = -1 if (name.endswith("loss") if lower is None else lower) else 1
        self.best, self.epoch, self.weights = -math.inf, 0, {}

    def on_epoch_end(self, run: Run) -> None:
        checks.one_of("name", self.name, run.measured)
        value = run.measured[self.name]
        if value is not None and self.sign * value > self.best:
            self.best, self.epoch = self.sign * value, run.epoch
            self.weights = {k: v.detach().clone() for k, v in run.model.state_dict().items()}
        run.stop |= self.patience is not None and run.epoch - self.epoch >= self.patience

    def on_end(self, run: Run) -> None:
        if self.weights:
            run.model.load_state_dict(self.weights)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.epoch, self.weights = state["best"], state["epoch"], state["weights"]
