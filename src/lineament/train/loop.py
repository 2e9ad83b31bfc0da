"""The one training loop: :func:`fit` trains a model to the end, :func:`epochs` does the same epoch by epoch.

Everything beyond "shuffle, forward, backward, step" is a callback (:mod:`lineament.train.callbacks`). The order of the samples and whatever
callbacks draw come from one generator, dropout and the like from a random state that is set for each epoch, so that a training that was killed
goes on from its checkpoint with the bits of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from lineament.core import checks
from lineament.core.batching import progress
from lineament.core.checkpoint import Checkpoint
from lineament.core.models import answered, device_of, dtype_of, frozen, logits, made_trainable
from lineament.core.results import Readable
from lineament.train.batches import Batch, is_labels, moved, source
from lineament.train.processes import OneProcess, Processes, randomness

_HALF = (torch.float16, torch.bfloat16)
_HOOKS = ("on_start", "on_epoch", "on_batch", "on_gradients", "on_step", "on_epoch_end", "on_end")


@dataclass(frozen=True)
class Epoch(Readable):
    """What one epoch came to; ``loss`` and ``accuracy`` are means over the batches as they were trained on.

    Attributes:
        epoch: its number, from 1.
        accuracy: ``None`` where the targets are no class labels.
        lr: the learning rate of its first step.
        skipped: steps that were left out because their loss or gradient was NaN or infinite.
        seconds: its duration, callbacks included.
        measured: what the callbacks measured after it, by name.
    """

    epoch: int
    loss: float
    accuracy: float | None
    lr: float
    skipped: int = 0
    seconds: float = 0.0
    measured: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All values in one level."""
        return {**{k: v for k, v in vars(self).items() if k != "measured"}, **self.measured}


@dataclass(frozen=True)
class Trained(Readable):
    """A finished training: one record for each epoch."""

    history: tuple[Epoch, ...]

    def curve(self, name: str) -> list[Any]:
        """The values of all epochs of a field of :class:`Epoch`, or of what a callback measured under this name (``None`` where it did not)."""
        rows = [record.to_dict() for record in self.history]
        checks.one_of("name", name, dict.fromkeys(key for row in rows for key in row))
        return [row.get(name) for row in rows]

    def to_dict(self) -> dict[str, Any]:
        return {"history": [record.to_dict() for record in self.history]}

    def plot(self, ax: Any = None, what: str = "loss") -> Any:
        """The curve of the ``"loss"`` or the ``"accuracy"``, with the validation's where it was measured."""
        checks.one_of("what", what, ("loss", "accuracy"))
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        marker = "o-" if len(self.history) <= 30 else "-"
        for name, label in ((what, "train"), (f"validation_{what}", "validation")):
            if any(r.to_dict().get(name) is not None for r in self.history):
                ax.plot([r.epoch for r in self.history], self.curve(name), marker, label=label)
        ax.set(xlabel="epoch", ylabel=what)
        ax.legend()
        return ax


class Run:
    """A training in progress: what callbacks read, and may change.

    Attributes:
        model, optimizers, loss, generator, processes, device, epochs, batch_size, seed: of this training.
        data: where its batches come from.
        rows: the samples of an epoch, by their indices, perhaps repeated. shuffle: whether they come in random order.
        epoch, batch, step: the present epoch and batch, and the steps taken before, all counted from 0.
        autocast: the context of each forward pass and loss.
        parts: pieces of a batch that are passed one after the other in a step.
        value, outputs: the loss and the outputs of the last step's batch, before that step.
        measured: loss, accuracy and what callbacks measured of the epoch that has just ended.
        history: the records of the epochs before.
        stop: set it to end the training after the present epoch.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        optimizer: Optimizer | Callable[[nn.Module], Any],
        epochs: int = 1,
        batch_size: int = 64,
        loss: Callable[..., Tensor] = F.cross_entropy,
        callbacks: Sequence[Any] = (),
        seed: int = 0,
        nonfinite: str = "raise",
        processes: Processes | None = None,
    ):
        checks.require(
            isinstance(model, nn.Module), f"model: got {checks.show(model)}, expected a torch.nn.Module"
        )
        checks.require(
            any(p.requires_grad for p in model.parameters()),
            "model: it has no parameter that asks for gradients; there is nothing to train",
        )
        made_trainable(chain(model.parameters(), model.buffers()))
        self.model, self.loss, self.callbacks = model, loss, tuple(callbacks)
        self.epochs = checks.number("epochs", epochs, low=1, integer=True)
        self.batch_size = checks.number("batch_size", batch_size, low=1, integer=True)
        self.seed = checks.seed("seed", seed)
        self.nonfinite = checks.one_of("nonfinite", nonfinite, ("raise", "skip"))
        self.processes = processes or OneProcess(device_of(model))
        count = self.processes.count
        checks.require(
            batch_size % count == 0,
            f"batch_size: got {batch_size}, expected a multiple of the {count} processes",
        )
        self.device = self.processes.device
        if processes is not None:
            model.to(self.device)
        self.data = source(data)
        self.rows, self.shuffle = torch.arange(len(self.data)), True
        made: Any = optimizer if isinstance(optimizer, Optimizer) else optimizer(model)
        self.optimizers: tuple[Optimizer, ...] = tuple(made) if isinstance(made, (tuple, list)) else (made,)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.epoch = self.batch = self.step = 0
        self.value, self.outputs, self.stop = math.nan, torch.empty(0), False
        self.measured: dict[str, Any] = {}
        self.history: list[Epoch] = []
        self.norms = any(isinstance(m, _NormBase) for m in model.modules())
        self.forward: nn.Module = model
        self.autocast: Any = nullcontext()
        self.parts = 1
        self._hooks = {name: [getattr(c, name) for c in callbacks if hasattr(c, name)] for name in _HOOKS}

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; of several the first."""
        return self.optimizers[0]

    @property
    def batches(self) -> int | None:
        """The batches of an epoch; ``None`` for data without a length."""
        return self.data.count(self)

    @property
    def done(self) -> float:
        """The share of the training that lies behind, from 0 to 1."""
        return (self.epoch + self.batch / (self.batches or self.batch + 1)) / self.epochs

    def has(self, hook: str) -> bool:
        """Whether some callback has this method."""
        return bool(self._hooks[hook])

    def call(self, hook: str, *arguments: Any) -> None:
        for function in self._hooks[hook]:
            result = function(self, *arguments)
            if hook == "on_epoch_end":
                self.measured |= result or {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "history": [dict(vars(record)) for record in self.history],
            "callbacks": [c.state_dict() if hasattr(c, "state_dict") else None for c in self.callbacks],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, held in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(held)
        self.generator.set_state(state["generator"].cpu())
        self.step = state["step"]
        self.history[:] = [Epoch(**record) for record in state["history"]]
        for callback, held in zip(self.callbacks, state["callbacks"]):
            if held is not None:
                callback.load_state_dict(held)


def fit(
    model: nn.Module,
    data: Any,
    *,
    optimizer: Optimizer | Callable[[nn.Module], Any],
    epochs: int = 1,
    batch_size: int = 64,
    loss: Callable[..., Tensor] = F.cross_entropy,
    callbacks: Sequence[Any] = (),
    seed: int = 0,
    nonfinite: str = "raise",
    checkpoint: Checkpoint | None = None,
    name: str = "training",
    processes: Processes | None = None,
) -> Trained:
    """Train a model; it ends with the weights of its last epoch (or those that a callback chose), in the modes in which it came.

    Args:
        data: a pair (inputs, targets) of tensors or arrays, where the inputs may be a mapping whose entries are keyword arguments of the model;
            :class:`~lineament.data.samples.Samples`; a ``Dataset``; a ``DataLoader`` or other batches (inputs, targets) that can be walked again.
        optimizer: an optimizer, or a function that makes one of the model (or several that step together). One that needs a closure will do, so SAM does.
        batch_size: of all processes together. A last batch of one is left out where the model has batch norm.
        loss: ``loss(outputs, targets)``, a mean over the batch.
        callbacks: objects with some of the methods ``on_start(run)``, ``on_epoch(run)``, ``on_batch(run, batch)``, ``on_gradients(run)`` (before the
            step), ``on_step(run)`` (after it), ``on_epoch_end(run)`` (may return what it measured, by name) and ``on_end(run)``, called in the order of the
            list with a :class:`Run`; with ``state_dict`` and ``load_state_dict`` where a resumed training needs what they hold. A context manager among
            them is entered for the whole training.
        seed: of the samples' order, of what callbacks draw, and of dropout and the like. Global random states are left as they were.
        nonfinite: what a NaN or infinite loss or gradient does: ``"raise"``, or ``"skip"`` the step. In both cases weights, optimizer and batch-norm
            statistics stay as they were before that step.
        checkpoint, name: store every epoch under this name, and go on after the last one that is stored.
        processes: where to train, one device or several; by default in this process, on the model's device.

    Returns:
        :class:`Trained`, with one :class:`Epoch` for each epoch.

    Raises:
        InputError: data or options that cannot be used; NotFiniteError: a NaN or infinite loss, gradient or weight.

    >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)); y = (x[:, 0] > 0).long()
    >>> net = nn.Linear(4, 2); _ = [nn.init.zeros_(p) for p in net.parameters()]
    >>> done = fit(net, (x, y), optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.5), epochs=5)
    >>> len(done.history), done.history[-1].accuracy > 0.9
    (5, True)
    """
    run = Run(
        model, data, optimizer=optimizer, epochs=epochs, batch_size=batch_size, loss=loss, callbacks=callbacks,
        seed=seed, nonfinite=nonfinite, processes=processes,
    )  # fmt: skip
    return Trained(tuple(_epochs(run, checkpoint, name)))


def epochs(
    model: nn.Module,
    data: Any,
    *,
    checkpoint: Checkpoint | None = None,
    name: str = "training",
    **options: Any,
) -> Iterator[Epoch]:
    """The training of :func:`fit`, epoch by epoch: yields each record when its epoch is done, and trains no further than it is asked to.

    The options are those of :func:`fit`. A training that goes on from a checkpoint first yields the records that are stored there.

    >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
    >>> walk = epochs(nn.Linear(1, 2), (x, y), optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=1.0), epochs=100)
    >>> next(record.epoch for record in walk if record.accuracy == 1.0) < 5
    True
    """
    return _epochs(Run(model, data, **options), checkpoint, name)


@torch.inference_mode(False)
def _epochs(run: Run, checkpoint: Checkpoint | None, name: str) -> Iterator[Epoch]:
    given = 0
    with ExitStack() as stack:
        for callback in run.callbacks:
            if hasattr(callback, "__enter__"):
                stack.enter_context(callback)
        stack.callback(run.model.zero_grad, set_to_none=True)
        run.forward = run.processes.wrapped(run.model, unused=run.processes.count > 1 and _has_unused(run))
        stack.callback(run.processes.unwrapped, run.forward)
        run.call("on_start")
        for number in progress(_left(run, checkpoint, name), name, run.epochs):
            yield from run.history[given:]
            run.epoch = number
            run.history.append(_epoch(run, name))
            given = len(run.history)
            yield run.history[-1]
            if run.stop:
                break
        yield from run.history[given:]
        run.call("on_end")
    bad = [key for key, p in run.model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise checks.NotFiniteError(
            f"{name}: the last step left NaN or infinite weights in {bad[:1]}; lower the learning rate"
        )


def _left(run: Run, checkpoint: Checkpoint | None, name: str) -> Iterator[int]:
    """The epochs that are left, with everything as the last stored one left it, in every process."""
    processes = run.processes
    if not processes.agreed(checkpoint is not None):
        yield from range(run.epochs)
        return
    # Only the first process has the checkpoint.
    walk: Iterator[int] = iter(())
    if checkpoint is not None:
        walk = checkpoint.loop(name, run.epochs, {"run": run}, every=1)
    first = next(walk, run.epochs)
    if processes.count > 1:
        first, state = processes.agreed((first, run.state_dict()))
        if checkpoint is None:
            run.load_state_dict(state)
            walk = iter(range(first + 1, run.epochs))
    if first < run.epochs:
        yield first
        yield from walk


def _epoch(run: Run, name: str) -> Epoch:
    start, processes, dtype = time.perf_counter(), run.processes, dtype_of(run.model)
    loss, seen, skipped, lr = 0.0, 0, 0, math.nan
    right: list[Tensor | None] = []
    run.batch, run.stop = 0, False
    changed = run.has("on_batch")
    with randomness(run.seed, run.epoch, processes.rank), _modes_kept(run.model):
        run.call("on_epoch")
        buffers = [*run.model.buffers()]
        parameters = [p for each in run.optimizers for group in each.param_groups for p in group["params"]]
        run.forward.train()
        for number, batch in enumerate(run.data.batches(run)):
            run.batch = number
            batch.targets = moved(batch.targets, run.device)
            if changed:
                batch.inputs = moved(batch.inputs, run.device)
                run.call("on_batch", batch)
            batch.inputs = moved(batch.inputs, run.device, dtype)
            lr = run.optimizer.param_groups[0]["lr"] if math.isnan(lr) else lr
            bad = _step(run, batch, parameters, buffers)
            if bad:
                if run.nonfinite == "raise":
                    raise checks.NotFiniteError(
                        f"{name}: the {bad} is NaN or infinite at step {run.batch + 1} of epoch {run.epoch + 1} (step {run.step + 1} in all); lower "
                        "the learning rate, check the scale of the data, or pass nonfinite='skip'"
                    )
                skipped += 1
                continue
            run.step += 1
            loss += run.value * len(batch)
            right.append(batch.right(run.outputs))
            seen += len(batch)
            run.call("on_step")
        if not seen:
            said = f"all {skipped} steps of epoch {run.epoch + 1} had a NaN or infinite loss or gradient and were skipped; lower the learning rate, or check the scale of the data"
            raise checks.NotFiniteError(
                f"{name}: {said if skipped else f'the data gave no batch in epoch {run.epoch + 1}'}"
            )
        loss, hits, seen = processes.summed([loss, total(right), seen])
        run.measured = {"loss": loss / seen, "accuracy": None if math.isnan(hits) else hits / seen}
        run.call("on_epoch_end")
    measured = dict(run.measured)
    loss, accuracy = measured.pop("loss"), measured.pop("accuracy")
    return Epoch(run.epoch + 1, loss, accuracy, float(lr), skipped, time.perf_counter() - start, measured)


class _NotFinite(Exception):
    pass


def _step(run: Run, batch: Batch, parameters: list[Any], buffers: list[Tensor]) -> str:
    """Take one step; or say what is not finite, with everything as it was before."""
    held = [b.clone() for b in buffers]
    first: list[Any] = []

    def closure() -> Tensor:
        # Called once for each pass that the optimizer makes.
        for parameter in parameters:
            parameter.grad = None
        losses, answers = [], []
        for part in batch.split(run.parts):
            with run.autocast:
                outputs = outputs_of(run.forward, part.inputs)
                if not run.step and not first:
                    _refuse_other_labels(run, part, outputs)
                loss = part.objective(run.loss, outputs)
                loss = loss if part is batch else loss * (len(part) / len(batch))
            run.processes.backward(loss)
            losses.append(loss.detach())
            answers.append(outputs.detach())
        loss = losses[0] if len(losses) == 1 else torch.stack(losses).sum()
        if not first:
            # A model that answers with its own loss gives one number a part.
            whole = answers[0] if len(answers) == 1 else torch.cat([*map(torch.atleast_1d, answers)])
            first.extend((float(loss), whole))
        # Averaged gradients are the same in all processes, and so is the decision; a loss is each one's own.
        if run.processes.count == 1 and not math.isfinite(first[0]):
            raise _NotFinite("loss")
        if not _finite(parameters):
            raise _NotFinite("gradient")
        run.call("on_gradients")
        return loss

    try:
        run.optimizer.step(closure)  # pyright: ignore[reportArgumentType, reportCallIssue]
        for other in run.optimizers[1:]:
            other.step()
    except _NotFinite as found:
        with torch.no_grad():
            for buffer, before in zip(buffers, held):
                buffer.copy_(before)
        return str(found)
    run.value, run.outputs = first
    return ""


def outputs_of(model: nn.Module, inputs: Any) -> Tensor:
    """The logits (or whatever single tensor a model answers with) of a batch's inputs."""
    return logits(model(**inputs)) if isinstance(inputs, Mapping) else answered(model, inputs, "inputs")


def _finite(parameters: list[nn.Parameter]) -> bool:
    # The sum of all elements is finite only where each of them is, and takes one pass without a copy.
    elsewhere: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        dense = gradient.coalesce().values() if gradient.is_sparse else gradient
        part = dense.sum(dtype=torch.float32) if dense.dtype in _HALF else dense.sum()
        if not part.is_cpu:
            elsewhere.setdefault((part.device, part.dtype), []).append(part)
        elif not math.isfinite(abs(part.item())):
            return False
    return all(math.isfinite(abs(torch.stack(parts).sum().item())) for parts in elsewhere.values())


def total(right: list[Tensor | None]) -> float:
    """How many are right in all batches; NaN where that is not known of one."""
    known = [each for each in right if each is not None]
    return float(torch.cat(known).sum()) if known and len(known) == len(right) else math.nan


def _refuse_other_labels(run: Run, batch: Batch, outputs: Tensor) -> None:
    """Labels that the model has no output for, of all the data where they can be seen."""
    if run.loss is F.cross_entropy and outputs.ndim == 2 and is_labels(batch.targets):
        every = getattr(run.data, "targets", None)
        checks.labels("targets", every if is_labels(every) else batch.targets, classes=outputs.shape[1])


def _has_unused(run: Run) -> bool:
    """Whether a parameter gets no gradient from a batch; what the pass does to buffers is put back."""
    batch = next(iter(run.data.in_order(run.batch_size)))
    trained = [p for p in run.model.parameters() if p.requires_grad]
    with randomness(run.seed), frozen(run.model, training=True, requires_grad=None):
        inputs = moved(batch.inputs, run.device, dtype_of(run.model))
        loss = run.loss(outputs_of(run.model, inputs), moved(batch.targets, run.device))
        found = torch.autograd.grad(loss, trained, allow_unused=True)
    return any(gradient is None for gradient in found)


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
