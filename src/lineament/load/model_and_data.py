"""A model and data brought together before any work: how samples become inputs, what the task is; whatever does not fit is said at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lineament.core import checks, shards
from lineament.core.checks import NotFiniteError, require, show
from lineament.core.models import called, device_of, dtype_of, frozen, logits, rows_in, usable
from lineament.core.results import Readable
from lineament.core.text_parts import unpadded
from lineament.data.samples import Samples
from lineament.load.columns import folded, in_order
from lineament.load.input_layout import Layout, find_layout, with_arguments
from lineament.load.loaded import Loaded
from lineament.load.outputs import Change, one_output, read_as_logits, reading
from lineament.load.tasks import binary, check_classes, task_of

# Numbers of dense answers that are held at once, and that tell what they are.
_AT_ONCE, _TOLD = 2**27, 2**22


@dataclass(frozen=True)
class ModelAndData(Readable):
    """One model and one data set that fit each other.

    Attributes:
        layout: how stored samples become the model's input.
        task: ``"classification"``, ``"multi-label"`` (several 0/1 labels a sample), ``"regression"``, ``"dense"`` (a class for each pixel or token)
            or ``"embedding"`` (a vector for each sample, whose labels say which are alike and need no output).
        outputs: (sample, class, label or value), the model's answers to all samples, on the CPU; logits of classes and labels. Of every pixel or token only
            the class that is named, (sample, height, width) or (sample, position); -1 behind the end of a text.
        width: how many outputs the model has (for a pixel or token).
        classes: names of classes or labels, where they are known.
        fixed_batch: whether the model takes batches of ``batch_size`` only.
        flops: floating-point operations of one sample's forward.
        notes: what was decided on the way.
    """

    model: nn.Module
    samples: Samples
    layout: Layout
    task: str
    outputs: Tensor
    classes: tuple[str, ...]
    batch_size: int
    fixed_batch: bool
    flops: float
    seed: int = 0
    notes: tuple[str, ...] = ()
    width: int = 0

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def targets(self) -> Tensor:
        return self.samples.targets

    @property
    def unit(self) -> str:
        """What is answered for: a sample, or each pixel or token of it."""
        return "sample" if self.task != "dense" else "pixel" if self.targets.ndim == 3 else "token"

    @property
    def known(self) -> Tensor:
        """Which positions of dense targets are labelled with one of the classes; what is not counts nowhere."""
        return (self.targets >= 0) & (self.targets < self.width)

    @property
    def images(self) -> bool:
        """Whether the model takes images (batch, channels, height, width) of a size worth a picture."""
        x = self.inputs(torch.tensor([0]))
        return isinstance(x, Tensor) and x.ndim == 4 and min(x.shape[-2:]) >= 4

    def inputs(self, rows: Tensor) -> Any:
        """Some samples, alike in length, as the model takes them, on its device and in its precision: a tensor, or where it takes several a tuple or a dict."""
        return self.layout.given(self.samples[rows], self.model)

    @property
    def example(self) -> Tensor:
        """A few samples that one forward takes."""
        return self.parts(torch.arange(len(self)))[0][: self.batch_size if self.fixed_batch else 2]

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

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss: cross-entropy for classes and labels, squared error for values."""
        if self.task == "dense":
            return self.losses(outputs, targets).mean()
        if self.task == "classification":
            return F.cross_entropy(outputs, targets)
        outputs, targets = (v.reshape(len(targets), -1).to(outputs.dtype) for v in (outputs, targets))
        if self.task == "multi-label":
            return F.binary_cross_entropy_with_logits(outputs, targets)
        return F.mse_loss(outputs, targets)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each sample; where each position has a class, its mean over those that are labelled."""
        if self.task == "dense":
            known = (targets >= 0) & (targets < outputs.shape[1])
            each = F.cross_entropy(outputs, targets.where(known, -100), ignore_index=-100, reduction="none")
            return each.flatten(1).sum(1) / known.flatten(1).sum(1).clamp_min(1)
        if self.task == "classification":
            return F.cross_entropy(outputs, targets, reduction="none")
        outputs, targets = (v.reshape(len(targets), -1).to(outputs.dtype) for v in (outputs, targets))
        if self.task == "multi-label":
            return F.binary_cross_entropy_with_logits(outputs, targets, reduction="none").mean(1)
        return (outputs - targets).square().mean(1)

    def answer(
        self,
        rows: Tensor,
        change: Callable[[Tensor, Tensor], Tensor] | None = None,
        *,
        by_position: bool = False,
    ) -> Tensor:
        """The model's outputs, (sample, output), without gradients, on the CPU; ``change(inputs, rows)`` alters each batch.

        ``by_position``: ``change`` is told positions in ``rows``, which may hold a sample more than once.
        """
        positions = self._positions(rows)

        def answers(at: Tensor) -> Tensor:
            x = self.inputs(rows[at])
            if change is not None:
                x = change(x, at if by_position else rows[at])
            return logits(called(self.model, x)).reshape(len(at), -1).float().cpu()

        with frozen(self.model), torch.no_grad():
            found = shards.each(positions, answers, "answers")
        return torch.cat(found)[torch.cat(positions).argsort()]

    def answered(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As ``outputs`` are, the answers to some rows, and the loss of each; of dense answers only a batch is held at once."""
        if self.task != "dense":
            outputs = self.answer(rows)
            return outputs, self.losses(outputs, self.targets[rows])
        said, losses = torch.full_like(self.outputs[rows], -1), torch.zeros(len(rows))
        positions = self._positions(rows)

        def named(at: Tensor) -> tuple[Tensor, Tensor]:
            output = logits(called(self.model, self.inputs(rows[at]))).float().cpu()
            return output.argmax(1).to(said.dtype), self.losses(output, self._targets(rows[at]))

        with frozen(self.model), torch.no_grad():
            for at, (name, lost) in zip(positions, shards.each(positions, named, "answers")):
                losses[at] = lost
                said[(at, *map(slice, name.shape[1:]))] = name
        return said, losses

    def _targets(self, rows: Tensor) -> Tensor:
        """Targets of rows alike in length; those of tokens end where the texts do."""
        found, lengths = self.targets[rows], self.samples.lengths
        return found if lengths is None or self.unit != "token" else found[:, : int(lengths[rows].max())]

    def parts(self, rows: Tensor) -> list[Tensor]:
        """The rows in batches; sequences of one length go together, so that no padding is ever looked at."""
        return [rows[at] for at in self._positions(rows)]

    def _positions(self, rows: Tensor) -> list[Tensor]:
        every = torch.arange(len(rows))
        if self.samples.lengths is None:
            return list(every.split(self.batch_size))
        own = self.samples.lengths[rows]
        return [part for n in own.unique() for part in every[own == n].split(self.batch_size)]

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
    """Samples in batches: a sequence, so that it has a length and can be walked again."""

    def __init__(self, subject: ModelAndData, rows: Tensor):
        self.subject = subject
        self.parts = subject.parts(rows)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: Any) -> Any:
        rows = self.parts[number]
        return self.subject.inputs(rows), self.subject._targets(rows).to(device_of(self.subject.model))


@contextmanager
def bring_together(
    loaded: Loaded,
    samples: Samples,
    *,
    task: str = "auto",
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    seed: int = 0,
    output: str | int | None = None,
    answers: Tensor | None = None,
    fewest_classes: int = 2,
) -> Iterator[ModelAndData]:
    """Fit a model and data to each other while the block runs.

    Outputs are taken for what they are (:mod:`lineament.load.outputs`): in the block the model answers with logits, also where it ends in a
    softmax or a sigmoid, or has one output for two classes.

    Args:
        task: ``"classification"``, ``"multi-label"``, ``"regression"``, ``"dense"``, ``"embedding"`` (only where it is asked for), or ``"auto"``: by the
            targets and the outputs.
        normalize: (mean, deviation) per channel, for images scaled to [0, 1]; by default the model's own.
        output: which of several outputs is the answer, see :func:`lineament.load.outputs.one_output`.
        answers: what the model answers to all samples, where that is known already.
        fewest_classes: that samples of a classifier must be of.

    Raises:
        InputError: no layout of the data that the model takes, outputs that are no logits, labels without an output, NaN in the
            outputs, fewer classes than ``fewest_classes``.
    """
    checks.one_of("task", task, ("auto", "classification", "multi-label", "regression", "dense", "embedding"))
    model = loaded.model
    place(model, device)
    samples = with_arguments(model, _one_map(samples, task))
    notes = [*loaded.notes, *samples.notes]
    if loaded.batch is not None:
        batch_size = loaded.batch
        keep = len(samples) // batch_size * batch_size
        require(
            keep > 0,
            f"data: {len(samples)} samples, expected at least {batch_size}: the model was exported for that batch",
        )
        samples = samples[:keep]
    mean, std = _normalization(normalize) or (loaded.mean, loaded.std)
    with one_output(model, output), unpadded(model) if loaded.tokenizer is not None else nullcontext():
        layout, note = find_layout(model, samples, mean, std, loaded.batch or 2)
        notes.append(note)
        start = ModelAndData(
            model, samples, layout, task, torch.zeros(0), (), batch_size, loaded.batch is not None, 1.0, seed
        )
        if layout.classes is not None:
            found, change = _each_position_answered(start, loaded.classes, notes)
        else:
            require(
                task != "dense",
                f"task: 'dense' was asked for, and targets are {show(samples.targets)}, expected a class for each pixel (sample, height, width) or token (sample, position)",
            )
            found, change = _answered(start, loaded.classes, notes, answers, fewest_classes)
        with read_as_logits(model, change):
            yield found


def _one_map(samples: Samples, task: str) -> Samples:
    """The samples with binary masks that have an axis of one channel, or are stored as real numbers, as class numbers (sample, height, width)."""
    y = samples.targets
    masks = y[:, 0] if y.ndim == 4 and y.shape[1] == 1 else y
    if (
        task not in ("auto", "dense")
        or masks.ndim != 3
        or not (binary(masks) or not masks.is_floating_point())
    ):
        return samples
    return replace(samples, targets=masks.long())


def place(model: nn.Module, device: str | torch.device | None) -> None:
    """Move a model to a device; ``None`` leaves it where it is.

    Raises:
        InputError: a device that cannot be used here.
    """
    if device is not None:
        with usable(device):
            model.to(device)


def _answered(
    start: ModelAndData, own_classes: tuple[str, ...], notes: list[str], known: Tensor | None, fewest: int
) -> tuple[ModelAndData, Change | None]:
    """The same with the model's outputs, the task and the classes, if outputs and targets fit; and what makes logits of the outputs."""
    samples, layout = start.samples, start.layout
    # Other names than the model's own may be a user's words for the same classes; only some of them, a mistake.
    if {*map(folded, own_classes)} & {*map(folded, samples.classes)}:
        before = len(samples.notes)
        samples = in_order(samples, own_classes)
        notes += samples.notes[before:]
    outputs = start.answer(torch.arange(len(samples))) if known is None else known
    bad = int((~torch.isfinite(outputs)).flatten(1).any(1).sum())
    if bad:
        some = layout.picture(samples.inputs[:64])
        raise NotFiniteError(
            f"model: it answers {bad} of {len(outputs)} samples with NaN or infinite values; check its weights and the data's scale "
            f"(the inputs lie between {float(some.min()):.3g} and {float(some.max()):.3g})"
        )
    task, samples, said = task_of(start.task, outputs, samples)
    read = reading(outputs, task, dtype_of(start.model))
    outputs = outputs if read.change is None else read.change(outputs)
    notes += [*said, *([read.said] if read.said else [])]
    width = outputs.shape[1]
    classes = samples.classes or own_classes
    if task == "classification":
        check_classes(samples, width, fewest)
    if len(classes) != width and not (samples.classes and task in ("classification", "embedding")):
        classes = ()
    example = start.inputs(start.example)
    found = replace(
        start,
        samples=samples,
        task=task,
        outputs=outputs,
        classes=tuple(classes),
        flops=_flops(start.model, example),
        notes=tuple(notes),
    )
    change = read.change
    return found, None if change is None else lambda z: change(z.reshape(len(z), -1))


def _each_position_answered(
    start: ModelAndData, own_classes: tuple[str, ...], notes: list[str]
) -> tuple[ModelAndData, Change]:
    """The same with the class that the model names at each pixel or token; and what makes logits (batch, class, ...) of the outputs."""
    samples, axis = start.samples, start.layout.classes or 1
    require(
        start.task in ("auto", "dense"),
        f"task: {start.task!r} was asked for, and targets are a class at each position ({show(samples.targets)}); expected 'dense'",
    )
    if {*map(folded, own_classes)} & {*map(folded, samples.classes)}:
        before = len(samples.notes)
        samples = in_order(samples, own_classes, dense=True)
        notes += samples.notes[before:]
    with frozen(start.model), torch.no_grad():
        some = start.parts(torch.arange(len(start)))[0][: start.batch_size if start.fixed_batch else 2]
        first = logits(called(start.model, start.inputs(some))).movedim(axis, -1).flatten(0, -2)
    # What the outputs are is told by some positions: all of them may be many.
    some = first[:: max(1, first.numel() // _TOLD)].float().cpu()
    read = reading(some, "classification", dtype_of(start.model))
    if read.said:
        notes.append(read.said)

    def change(output: Tensor) -> Tensor:
        z = output.movedim(axis, -1)
        if read.change is not None:
            z = read.change(z.reshape(-1, z.shape[-1])).reshape(*z.shape[:-1], -1)
        return z.movedim(-1, 1)

    width, shape = max(first.shape[1], 2), samples.targets.shape
    fit = max(1, _AT_ONCE // (math.prod(shape[1:]) * width))
    found = replace(
        start,
        samples=samples,
        batch_size=start.batch_size if start.fixed_batch else min(start.batch_size, fit),
        task="dense",
        outputs=torch.full(shape, -1, dtype=torch.int16 if width < 2**15 else torch.int32),
        width=width,
        flops=_flops(start.model, start.inputs(start.example)),
    )
    require(
        bool(found.known.flatten(1).any(1).any()),
        f"targets: none of them is one of the model's {width} classes, counted from 0",
    )
    with read_as_logits(start.model, change):
        outputs, losses = found.answered(torch.arange(len(found)))
    bad = int((~torch.isfinite(losses)).sum())
    if bad:
        raise NotFiniteError(
            f"model: it answers {bad} of {len(losses)} samples with NaN or infinite values; check its weights and the data's scale"
        )
    classes = samples.classes or own_classes
    notes.append(f"taken as dense: a class for each {found.unit}, of {width}")
    classes = tuple(classes) if len(classes) == width else ()
    return replace(found, outputs=outputs, classes=classes, notes=tuple(notes)), change


def _normalization(normalize: Any) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if normalize is None:
        return None
    require(len(normalize) == 2, f"normalize: got {show(normalize)}, expected (mean, deviation)")
    mean, std = (
        tuple(float(v) for v in ([values] if isinstance(values, (int, float)) else values))
        for values in normalize
    )
    require(
        len(mean) == len(std) and len(mean) > 0 and all(s > 0 for s in std),
        f"normalize: got mean {mean} and deviation {std}, expected as many of each and deviations above 0",
    )
    return mean, std


def _flops(model: nn.Module, example: Any) -> float:
    """Floating-point operations of one sample's forward; at least the weights' count, where none is known."""
    weights = float(sum(p.numel() for p in model.parameters()))
    try:
        with frozen(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            called(model, example)
        return max(counter.get_total_flops() / rows_in(example), weights)
    except Exception:
        return max(2 * weights, 1.0)
