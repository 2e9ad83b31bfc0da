"""Epochs and steps of a training: each decides its own randomness and rate, sees what is not finite, and agrees with the other processes.

An epoch's orders and random states follow from the seed and its number, the rate from the step's, so that the weights, the optimizer's state
and the history are all that a killed run needs to go on with the bits of an uninterrupted one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import require
from lineament.core.models import dtype_of, frozen, logits
from lineament.learn.useful.early_outputs import unusable
from lineament.learn.useful.resampling import UpsamplingSampler, find_slow, refuse_unusable
from lineament.train.options import Options
from lineament.train.processes import Processes, reseed
from lineament.train.step import NotFinite, step

Inputs = Callable[[Tensor], Tensor]


class Loop:
    """Epochs of one model on one data set."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        targets: Tensor,
        options: Options,
        processes: Processes,
        checkpoint: Checkpoint | None,
        note: Callable[[str], None],
    ):
        self.model, self.inputs, self.targets = model, inputs, targets
        self.options, self.processes, self.checkpoint, self.note = options, processes, checkpoint, note
        self.wrapped = processes.wrapped(model, unused=processes.count > 1 and self._has_unused())
        self.stored = processes.agreed(checkpoint is not None)

    def early(self, train: Tensor) -> dict[str, Any]:
        """USEFUL's first stages: the rows of ``train`` to train on, the slow ones twice; the model is at its initial weights again."""
        name = "useful"
        if self.stored and self.processes.agreed(
            self.checkpoint is not None and self.checkpoint.finished(name)
        ):
            found = None if self.checkpoint is None else self.checkpoint.stage(name, dict[str, Any])
            return dict(self.processes.agreed(found))
        self.note(
            "USEFUL: training early to find the examples that are learned late (started anew if interrupted)"
        )
        start = time.perf_counter()

        def walk(_model: nn.Module, rows: Tensor, epochs: int) -> Iterator[float]:
            optimizer = self.options.make(self.model, plain=True)
            for epoch in range(epochs):
                yield 1 - self.epoch(optimizer, train[rows], epoch, epochs)["train_accuracy"]

        batches = _Batches(self, train)
        # By their numbers in the data, which find_slow does not know.
        refuse_unusable("training", train[unusable(self.model, batches)].tolist(), len(train))
        early = find_slow(
            self.model,
            walk,
            batches,
            epochs=self.options.epochs,
            separating=self.options.useful if self.options.useful is not None else "auto",
            seed=self.options.seed,
        )
        found = {
            "epoch": early.epoch,
            "errors": list(early.errors),
            "slow": int(early.selection.mask.sum()),
            "slow_by_class": early.selection.counts[:, 1].tolist(),
            "rows": early.selection.indices(2),
            "seconds": time.perf_counter() - start,
        }
        # Each process has found the same up to rounding; it must be the same.
        found = self.processes.agreed(found)
        if self.checkpoint is not None:
            self.checkpoint.stage(name, lambda: found)
        self.note(
            f"USEFUL: separated after epoch {found['epoch']}; {found['slow']} of {len(train)} examples are shown twice from now on"
        )
        return dict(found)

    def run(
        self, rows: Tensor, validation: Tensor, record: Callable[[list[dict[str, Any]]], None]
    ) -> list[dict[str, Any]]:
        """All epochs that are left; the history of all."""
        history: list[dict[str, Any]] = []
        optimizer = self.options.make(self.model)
        epochs, begun = self.options.epochs, False
        for epoch in self._epochs({"model": self.model, "optimizer": optimizer, "history": history}):
            if epoch and not begun:
                self.note(f"an earlier run was cut off; going on after epoch {epoch}")
            begun = True
            start = time.perf_counter()
            entry = self.epoch(optimizer, rows, epoch, epochs)
            entry |= self.judge(validation)
            entry["seconds"] = time.perf_counter() - start
            history.append(entry)
            if self.processes.first:
                record(history)
            said = f"epoch {epoch + 1}/{epochs}: loss {entry['train_loss']:.4g}"
            if entry["validation_accuracy"] is not None:
                said += f", validation accuracy {entry['validation_accuracy']:.1%}"
            self.note(said + (f", {entry['skipped']} steps skipped" if entry["skipped"] else ""))
        return history

    def epoch(self, optimizer: Optimizer, rows: Tensor, epoch: int, epochs: int) -> dict[str, Any]:
        """One pass over ``rows`` (some perhaps twice); what it saw of them."""
        options, processes = self.options, self.processes
        reseed(options.seed, epoch, processes.rank)
        sampler = UpsamplingSampler(rows, seed=options.seed, rank=processes.rank, replicas=processes.count)
        sampler.set_epoch(epoch)
        parts = list(torch.tensor(list(sampler)).split(options.batch_size // processes.count))
        # Batch norm cannot take a batch of one; in another epoch that example is in another batch.
        if len(parts) > 1 and len(parts[-1]) == 1:
            parts.pop()
        self.model.train()
        self.wrapped.train()
        loss, right, seen, skipped = 0.0, 0.0, 0.0, 0
        for number, part in enumerate(parts):
            for group in optimizer.param_groups:
                group["lr"] = options.rate((epoch + number / len(parts)) / epochs)
            x, y = self.batch(part)
            try:
                value, scores = self.step(optimizer, x, y)
            except NotFinite as found:
                require(
                    options.on_nan == "skip",
                    f"training: the {found} is NaN or infinite at step {number + 1} of epoch {epoch + 1} (step "
                    f"{epoch * len(parts) + number + 1} in all); lower the learning rate, check the scale of the data, or pass on_nan='skip' (--on-nan skip)",
                )
                skipped += 1
                continue
            loss += value * len(y)
            right += float((scores.argmax(1) == y).sum())
            seen += len(y)
        require(
            skipped < len(parts),
            f"training: all {len(parts)} steps of epoch {epoch + 1} had a NaN or infinite loss or gradient and were skipped; "
            "lower the learning rate, or check the scale of the data",
        )
        loss, right, seen = processes.summed([loss, right, seen])
        return {
            "epoch": epoch + 1,
            "lr": options.rate(epoch / epochs),
            "train_loss": loss / seen,
            "train_accuracy": right / seen,
            "skipped": skipped,
        }

    def step(self, optimizer: Optimizer, x: Tensor, y: Tensor) -> tuple[float, Tensor]:
        """One step; the loss and the scores before it. Where something is not finite, all is as it was."""

        def compute() -> tuple[Tensor, Tensor]:
            scores = logits(self.wrapped(x))
            return F.cross_entropy(scores, y), scores

        return step(
            self.model,
            optimizer,
            compute,
            backward=self.processes.accelerator.backward,
            # Averaged gradients are the same in all processes, and so is the decision; a loss is each one's own.
            judge_loss=self.processes.count == 1,
        )

    def _has_unused(self) -> bool:
        """Whether a parameter gets no gradient from a batch; what the pass does to buffers is put back."""
        x, y = self.batch(torch.arange(min(len(self.targets), self.options.batch_size)))
        held = [b.clone() for b in self.model.buffers()]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if not trained:
            return False
        with frozen(self.model, training=True, requires_grad=None):
            loss = F.cross_entropy(logits(self.model(x)), y)
            found = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            for buffer, before in zip(self.model.buffers(), held):
                buffer.copy_(before)
        return any(gradient is None for gradient in found)

    def judge(self, rows: Tensor) -> dict[str, Any]:
        """Loss and accuracy on some rows, each process on its share."""
        if not len(rows):
            return {"validation_loss": None, "validation_accuracy": None}
        loss, right = 0.0, 0.0
        with frozen(self.model), torch.no_grad():
            for part in rows[self.processes.rank :: self.processes.count].split(self.options.batch_size):
                if not len(part):
                    continue
                x, y = self.batch(part)
                scores = logits(self.model(x)).float()
                loss += float(F.cross_entropy(scores, y, reduction="sum"))
                right += float((scores.argmax(1) == y).sum())
        loss, right = self.processes.summed([loss, right])
        return {
            "validation_loss": loss / len(rows) if math.isfinite(loss) else None,
            "validation_accuracy": right / len(rows),
        }

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        device = self.processes.device
        x = self.inputs(rows)
        x = x.to(device, dtype_of(self.model)) if x.is_floating_point() else x.to(device)
        return x, self.targets[rows].to(device)

    def _epochs(self, state: dict[str, Any]) -> Iterator[int]:
        """The epochs that are left, with ``state`` as the last stored one left it, in every process."""
        epochs = self.options.epochs
        if not self.stored:
            yield from range(epochs)
            return
        walk = (
            iter(()) if self.checkpoint is None else self.checkpoint.loop("training", epochs, state, every=1)
        )
        first = next(walk, epochs)
        if self.processes.count > 1:
            plain = {
                key: holder if isinstance(holder, list) else holder.state_dict()
                for key, holder in state.items()
            }
            first, found = self.processes.agreed((first, plain))
            if self.checkpoint is None:
                walk = iter(range(first + 1, epochs))
                state["model"].load_state_dict(found["model"])
                state["optimizer"].load_state_dict(found["optimizer"])
                state["history"][:] = found["history"]
        if first < epochs:
            yield first
            yield from walk


class _Batches(Sequence[tuple[Tensor, Tensor]]):
    """Some rows in their order, in batches that can be walked again."""

    def __init__(self, loop: Loop, rows: Tensor):
        self.loop, self.parts = loop, list(rows.split(loop.options.batch_size))

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: Any) -> Any:
        return self.loop.batch(self.parts[number])
