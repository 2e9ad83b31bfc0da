"""The training of `lineament train`: its options composed around the one loop, with SAM, USEFUL before it and TrAct below it."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.cli.train_embedding import Recognised, made, split_classes
from lineament.cli.train_options import Options
from lineament.cli.train_result import RECOGNITION, Fitted, far_words
from lineament.core import checks
from lineament.core.checkpoint import Checkpoint
from lineament.core.checks import require
from lineament.learn.projection.training import EmbeddingTraining, Following
from lineament.learn.tract.layer import tract
from lineament.learn.useful.early_outputs import unusable
from lineament.learn.useful.resampling import find_slow, refuse_unusable
from lineament.train.callbacks import Rate, Rows, Validation
from lineament.train.loop import Epoch, Run, epochs
from lineament.train.processes import OneProcess, Processes


class View:
    """Some rows of inputs that a function makes when they are asked for."""

    def __init__(self, inputs: Callable[[Tensor], Tensor], rows: Tensor):
        self.inputs, self.rows = inputs, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.inputs(self.rows[rows])


def fit(
    model: nn.Module,
    inputs: Callable[[Tensor], Tensor],
    targets: Int[Tensor, "samples"],
    options: Options,
    *,
    processes: OneProcess | None = None,
    checkpoint: Checkpoint | None = None,
    record: Callable[[list[dict[str, Any]]], None] = lambda history: None,
    note: Callable[[str], None] = lambda line: None,
) -> Fitted:
    """Train a classifier with cross-entropy, or an embedding; the model is then at its last epoch's weights, in eval mode.

    Args:
        inputs: gives the rows asked for as the model takes them.
        targets: the class of each sample; every class from 0 to the highest must be there.
        checkpoint: stores each epoch (and the early stage of USEFUL, as a whole) and goes on from there; given to the first process.
        record: called by the first process after each epoch with the history so far.
        note: called with a line for each epoch.
    """
    targets = _targets(targets) if options.embedding is None else checks.labels("targets", targets).cpu()
    processes = processes or Processes()
    model.to(processes.device)
    before: list[dict[str, Any]] = []
    if options.embedding is None:
        train, held = split(targets, options.validation, options.seed)
        data, validation = ((View(inputs, rows), targets[rows]) for rows in (train, held))
        trained, loss = model, F.cross_entropy
        judged: list[Any] = [Validation(validation)] if len(held) else []
    else:
        train, held = split_classes(targets, options.embedding.validation_classes, options.seed)
        trained = made(model, inputs(train[:2]), targets[train], options)
        labels = targets[train].unique(return_inverse=True)[1]
        data, loss = ({"inputs": View(inputs, train), "labels": labels}, labels), EmbeddingTraining.mean
        trained.to(processes.device)
        recognised = [Recognised(View(inputs, held), targets[held])] if len(held) else []
        judged = [Following(), *recognised]
        before = [each.of(trained, options.batch_size, processes.device) for each in recognised]
    # What is not finite is judged by the loop, which knows the step.
    group = "world" if processes.count > 1 else None
    first = nullcontext() if options.tract is None else tract(model, lam=options.tract, nonfinite="pass", process_group=group)  # fmt: skip
    walk = functools.partial(
        epochs, loss=loss, epochs=options.epochs, batch_size=options.batch_size, seed=options.seed, nonfinite=options.on_nan,
        processes=processes,
    )  # fmt: skip
    with first as changed:
        early = None
        if options.useful is not None:
            early = _early(model, data, train, options, walk, processes, checkpoint, note)
        begun = _Begun(note)
        shown = [] if early is None else [Rows(early.pop("rows"))]
        history: list[dict[str, Any]] = []
        for done in walk(
            trained, data, optimizer=options.make, callbacks=[*shown, Rate(options.factor), *judged, begun], checkpoint=checkpoint
        ):  # fmt: skip
            history.append(_entry(done))
            if begun.first is not None and done.epoch > begun.first:
                if processes.first:
                    record(history)
                note(_said(history[-1], options.epochs))
    model.eval()
    return Fitted(
        options=options,
        history=tuple(history),
        samples=len(train),
        validation_samples=len(held),
        early=early,
        tract_layer=getattr(changed, "layer", None),
        processes=processes.count,
        device=str(processes.device),
        trained=trained if isinstance(trained, EmbeddingTraining) else None,
        held_out=() if options.embedding is None else tuple(targets[held].unique().tolist()),
        before=before[0] if before else None,
    )


class _Begun:
    """The first epoch that this process trains, others having been stored by an earlier one."""

    def __init__(self, note: Callable[[str], None]):
        self.note, self.first = note, None

    def on_epoch(self, run: Run) -> None:
        if self.first is None:
            self.first = run.epoch
            if run.epoch:
                self.note(f"an earlier run was cut off; going on after epoch {run.epoch}")


def _early(
    model: nn.Module,
    data: Any,
    train: Tensor,
    options: Options,
    walk: Callable[..., Iterator[Epoch]],
    processes: OneProcess,
    checkpoint: Checkpoint | None,
    note: Callable[[str], None],
) -> dict[str, Any]:
    """USEFUL's first stages: the rows to train on, the slow ones twice; the model is at its initial weights again."""
    name = "useful"
    if processes.agreed(checkpoint is not None and checkpoint.finished(name)):
        return dict(processes.agreed(None if checkpoint is None else checkpoint.stage(name, dict[str, Any])))
    note("USEFUL: training early to find the examples that are learned late (started anew if interrupted)")
    start = time.perf_counter()

    def errors(model: nn.Module, rows: Tensor, count: int) -> Iterator[float]:
        plain = functools.partial(options.make, plain=True)
        for done in walk(model, data, optimizer=plain, callbacks=[Rows(rows), Rate(options.factor)]):
            assert done.accuracy is not None
            yield 1 - done.accuracy

    # By their numbers in the data, which find_slow does not know.
    refuse_unusable("training", train[unusable(model, data)].tolist(), len(train))
    separating = "auto" if options.useful is None else options.useful
    early = find_slow(model, errors, data, epochs=options.epochs, separating=separating, seed=options.seed)
    found = {
        "epoch": early.epoch,
        "errors": list(early.errors),
        "slow": int(early.selection.mask.sum()),
        "slow_by_class": early.selection.counts[:, 1].tolist(),
        "rows": early.selection.indices(2),
        "seconds": time.perf_counter() - start,
    }
    # Each process has found the same up to rounding; it must be the same.
    found = processes.agreed(found)
    if checkpoint is not None:
        checkpoint.stage(name, lambda: found)
    note(
        f"USEFUL: separated after epoch {found['epoch']}; {found['slow']} of {len(train)} examples are shown twice from now on"
    )
    return dict(found)


def _entry(done: Epoch) -> dict[str, Any]:
    return {
        "epoch": done.epoch,
        "lr": done.lr,
        "train_loss": done.loss,
        "train_accuracy": done.accuracy,
        "skipped": done.skipped,
        "validation_loss": done.measured.get("validation_loss"),
        "validation_accuracy": done.measured.get("validation_accuracy"),
        **{name: value for name, value in done.measured.items() if name in RECOGNITION},
        "seconds": done.seconds,
    }


def _said(entry: dict[str, Any], count: int) -> str:
    said = f"epoch {entry['epoch']}/{count}: loss {entry['train_loss']:.4g}"
    if entry["validation_accuracy"] is not None:
        said += f", validation accuracy {entry['validation_accuracy']:.1%}"
    if entry.get("validation_tar3") is not None:
        said += f", TAR {entry['validation_tar3']:.1%} {far_words(entry)} and R@1 {entry['validation_recall']:.1%} on classes held out"
    return said + (f", {entry['skipped']} steps skipped" if entry["skipped"] else "")


def split(targets: Int[Tensor, "samples"], share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to train on and to validate on: of each class the same share at random, at least one to train on.

    >>> train, held = split(torch.tensor([0, 1]).repeat(10), 0.2, seed=0)
    >>> len(train), len(held), torch.tensor([0, 1]).repeat(10)[held].tolist()
    (16, 4, [0, 1, 0, 1])
    """
    if share == 0:
        return torch.arange(len(targets)), torch.arange(0)
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(len(targets), dtype=torch.bool)
    for label in range(int(targets.max()) + 1):
        own = (targets == label).nonzero()[:, 0]
        count = min(round(share * len(own)), len(own) - 1)
        held[own[torch.randperm(len(own), generator=generator)[: max(count, 0)]]] = True
    require(
        bool(held.any()),
        f"validation: a share of {share} of {len(targets)} samples in {int(targets.max()) + 1} classes holds none out; give a larger share, or 0",
    )
    return (~held).nonzero()[:, 0], held.nonzero()[:, 0]


def _targets(targets: Any) -> Tensor:
    targets = checks.labels("targets", targets).cpu()
    counts = torch.bincount(targets)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    require(
        not empty,
        f"targets: class {empty[0] if empty else ''} has no example (labels run from 0 to {len(counts) - 1}); number the classes without gaps",
    )
    require(len(counts) > 1, "targets: all of class 0, expected at least two classes")
    return targets
