"""One model and one data set, brought together: what every lens looks at.

Here it is decided, before any work, how stored samples become the model's input (by trying the layouts that are possible), what the
task is, which sites are looked at; and whatever does not fit is said at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lineament.audit.depth import default_sites, expected_input
from lineament.audit.models import Loaded
from lineament.core import checks
from lineament.core.checks import InputError, require, show
from lineament.core.models import device_of, dtype_of, frozen, logits
from lineament.core.sites import sites as site_names
from lineament.data.loading import Samples


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
        generator = torch.Generator().manual_seed(self.seed * 1000 + salt)
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


@dataclass(frozen=True)
class Layout:
    """How stored samples become the model's input: which axis holds the channels, and the normalisation."""

    kind: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def apply(self, raw: Tensor) -> Tensor:
        x = self.picture(raw)
        if self.mean and x.ndim == 4:
            channels = x.shape[1]
            mean, std = (
                torch.tensor(v if len(v) == channels else v[:1] * channels) for v in (self.mean, self.std)
            )
            x = (x - mean[:, None, None]) / std[:, None, None]
        return x.flatten(1) if self.kind.endswith("flat") else x

    def picture(self, raw: Tensor) -> Tensor:
        """Floating point, (sample, channel, height, width) where samples are images; bytes become [0, 1]."""
        x = raw.float() / 255 if raw.dtype == torch.uint8 else raw.float()
        if self.kind == "grey" or (self.kind == "flat" and x.ndim == 3):
            return x[:, None]
        if self.kind == "grey as colour":
            return (x[:, None] if x.ndim == 3 else x if x.shape[1] == 1 else x.movedim(-1, 1)).expand(
                -1, 3, -1, -1
            )
        if self.kind.startswith("channels last"):
            return x.movedim(-1, 1)
        if self.kind == "colour as grey":
            colour = x.movedim(-1, 1) if x.shape[-1] in (3, 4) else x
            return (colour[:, :3] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        return x


def bring_together(
    loaded: Loaded,
    samples: Samples,
    *,
    task: str = "auto",
    sites: Sequence[str] = (),
    normalize: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    device: str | torch.device | None = None,
    batch_size: int = 64,
    method: str = "norm_grad",
    gaze_site: str | None = None,
    seed: int = 0,
) -> Subject:
    """Fit a model and data to each other.

    Raises:
        InputError: no layout of the data that the model takes, outputs that are no logits, labels without an output, NaN in the
            outputs, one class only, an unknown site.
    """
    model = loaded.model
    if device is not None:
        try:
            model.to(torch.device(device))
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(
                f"--device: {str(device)!r} cannot be used here ({str(error).splitlines()[0]})"
            ) from error
    named = [name for pattern in sites for name in site_names(model, pattern)]
    if gaze_site is not None:
        named_gaze = site_names(model, gaze_site)
        require(
            len(named_gaze) == 1, f"--gaze-site: {gaze_site!r} names {len(named_gaze)} sites, expected one"
        )
    notes = list(loaded.notes) + list(samples.notes)
    if loaded.batch is not None:
        batch_size = loaded.batch
        keep = len(samples) // batch_size * batch_size
        require(
            keep > 0,
            f"DATA: {len(samples)} samples, expected at least {batch_size}: the model was exported for that batch",
        )
        samples = _first(samples, keep)
    mean, std = normalize or (loaded.mean, loaded.std)
    layout, note = _layout(model, samples, mean, std, loaded.batch or 2)
    notes.append(note)
    if loaded.classes and samples.classes and samples.classes != loaded.classes:
        samples, said = _renumbered(samples, loaded.classes)
        notes += [said] if said else []
    start = Subject(
        model,
        samples,
        layout,
        "regression",
        (),
        torch.zeros(0),
        (),
        batch_size,
        loaded.batch is not None,
        1.0,
    )
    outputs = start.answer(torch.arange(len(samples)))
    bad = int((~torch.isfinite(outputs)).flatten(1).any(1).sum())
    require(
        bad == 0,
        f"the model answers {bad} of {len(outputs)} samples with NaN or infinite values; check its weights and the data's scale "
        f"(the inputs lie between {float(layout.picture(samples.inputs[:64]).min()):.3g} and "
        f"{float(layout.picture(samples.inputs[:64]).max()):.3g})",
    )
    chosen, samples, reason = _task(task, outputs, samples)
    notes += [reason] if reason else []
    if chosen == "classification":
        counts = torch.bincount(samples.targets)
        require(
            int((counts > 0).sum()) > 1,
            f"DATA: all {len(samples)} samples read are of class {int(samples.targets[0])}, expected at least two classes",
        )
    classes = samples.classes or loaded.classes
    width = outputs.shape[1]
    require(
        chosen == "regression" or not samples.classes or len(samples.classes) <= width,
        f"DATA: {len(samples.classes)} class names for a model with {width} outputs, expected at most {width}",
    )
    if chosen == "classification" and not samples.classes and len(classes) != width:
        classes = ()
    example = start.inputs(torch.arange(min(loaded.batch or 2, len(samples))))
    return Subject(
        model=model,
        samples=samples,
        layout=layout,
        task=chosen,
        sites=tuple(dict.fromkeys(named)) or default_sites(model, example),
        outputs=outputs,
        classes=tuple(classes),
        batch_size=batch_size,
        fixed_batch=loaded.batch is not None,
        flops=_flops(model, example),
        method=method,
        gaze_site=gaze_site,
        seed=seed,
        notes=tuple(notes),
    )


@contextmanager
def two_logits(model: nn.Module, needed: bool) -> Iterator[None]:
    """A network with one output for two classes answers with the logits (0, z) while the block runs."""
    if not needed:
        yield
        return

    def widen(_: nn.Module, _args: Any, output: Any) -> Tensor:
        z = logits(output)
        z = z.reshape(len(z))
        return torch.stack([torch.zeros_like(z), z], 1)

    handle = model.register_forward_hook(widen)
    try:
        yield
    finally:
        handle.remove()


def one_output(loaded: Loaded, samples: Samples, task: str) -> bool:
    """Whether these are two classes for a network with a single output; the network is run on the first samples only."""
    if task == "regression" or samples.targets.is_floating_point() or int(samples.targets.max()) > 1:
        return False
    layout, _ = _layout(loaded.model, samples, loaded.mean, loaded.std, loaded.batch or 2)
    with frozen(loaded.model), torch.no_grad():
        x = layout.apply(samples.inputs[: loaded.batch or 2])
        out = logits(loaded.model(x.to(device=device_of(loaded.model), dtype=dtype_of(loaded.model))))
    return out.ndim == 1 or (out.ndim == 2 and out.shape[1] == 1)


def _layout(
    model: nn.Module, samples: Samples, mean: tuple[float, ...], std: tuple[float, ...], count: int
) -> tuple[Layout, str]:
    raw = samples.inputs[:count]
    wanted = expected_input(model)
    tried: list[str] = []
    for kind in _candidates(raw, wanted):
        layout = Layout(kind, mean, std)
        if mean and not (len(mean) == len(std) and all(s > 0 for s in std)):
            raise InputError(
                f"--normalize: got mean {mean} and deviation {std}, expected as many of each, deviations above 0"
            )
        x = layout.apply(raw).to(device=device_of(model), dtype=dtype_of(model))
        if mean and x.ndim == 4 and len(mean) not in (1, x.shape[1]):
            tried.append(f"{tuple(x.shape)}: {len(mean)} means for {x.shape[1]} channels")
            continue
        try:
            with frozen(model), torch.no_grad():
                output = model(x)
        except InputError:
            raise
        except Exception as error:
            tried.append(
                f"{tuple(x.shape)}: {(str(error).strip().splitlines() or [type(error).__name__])[0][:160]}"
            )
            continue
        output = logits(output)
        require(
            output.ndim in (1, 2) and len(output) == len(x),
            f"the model answers {len(x)} samples with {show(output)}, expected one row of logits or values a sample",
        )
        return layout, f"samples {tuple(samples.inputs.shape[1:])} go in as {tuple(x.shape[1:])} ({kind})"
    raise InputError(
        f"DATA: samples of shape {tuple(samples.inputs.shape[1:])} do not fit the model, which expects {wanted.text}; tried "
        + "; ".join(tried)
        + ". Bring the data to that shape (for image folders: --image-size)"
    )


def _candidates(raw: Tensor, wanted: Any) -> list[str]:
    """Layouts in the order of trust: first those whose channels fit the first convolution."""
    shape = tuple(raw.shape[1:])
    if len(shape) == 2:
        kinds = {"grey": 1, "grey as colour": 3, "flat": math.prod(shape), "as it is": 0}
    elif len(shape) == 3:
        kinds = {}
        if shape[0] in (1, 2, 3, 4) or shape[-1] not in (1, 3, 4):
            kinds["as it is"] = shape[0]
        if shape[-1] in (1, 2, 3, 4):
            kinds["channels last"] = shape[-1]
        kinds.setdefault("as it is", shape[0])
        if 1 in (shape[0], shape[-1]):
            kinds["grey as colour"] = 3
        if 3 in (shape[0], shape[-1]):
            kinds["colour as grey"] = 1
        kinds["channels last, flat" if shape[-1] in (1, 3) and shape[0] > 4 else "flat"] = math.prod(shape)
    else:
        kinds = {"as it is": shape[0] if shape else 1, "flat": math.prod(shape)}
    exact = [kind for kind, size in kinds.items() if size == wanted.size]
    if wanted.images is True:
        kinds = {kind: size for kind, size in kinds.items() if not kind.endswith("flat")}
    return [*exact, *(kind for kind in kinds if kind not in exact)]


def _task(task: str, outputs: Tensor, samples: Samples) -> tuple[str, Samples, str]:
    """The task, with targets of the kind it needs, and why."""
    checks.one_of("task", task, ("auto", "classification", "regression"))
    width = outputs.shape[1] if outputs.ndim == 2 else 1
    targets = samples.targets
    reason = ""
    if task == "auto":
        labels = not targets.is_floating_point()
        task = "classification" if labels and (width > 1 or int(targets.max()) <= 1) else "regression"
        reason = f"taken as {task}: {'whole-number' if labels else 'real-valued'} targets and {width} output{'s' * (width != 1)}"
    if task == "regression":
        values = targets.float()
        per = 1 if values.ndim == 1 else math.prod(values.shape[1:])
        require(
            per == width,
            f"DATA: {per} target value{'s' * (per != 1)} a sample for a model with {width} output{'s' * (width != 1)}; "
            "pass --task classification if the targets are classes",
        )
        return task, _with_targets(samples, values), reason
    if targets.is_floating_point():
        require(
            targets.ndim == 1 and bool((targets == targets.round()).all()),
            f"DATA: targets are {show(targets)} and not whole numbers, expected class labels; pass --task regression",
        )
        targets = targets.long()
    require(
        outputs.ndim == 2 and width > 1,
        f"the model answers with {show(outputs)}, expected a row of at least two logits a sample",
    )
    try:
        targets = checks.labels("DATA: targets", targets, classes=width)
    except InputError as error:
        raise InputError(f"{error}; the model has {width} outputs, counted from 0") from None
    return task, _with_targets(samples, targets), reason


def _renumbered(samples: Samples, classes: tuple[str, ...]) -> tuple[Samples, str]:
    """Labels in the order of the model's own names, where both have the same names."""
    if samples.targets.is_floating_point() or not set(samples.classes) <= set(classes):
        return samples, ""
    order = torch.tensor([classes.index(name) for name in samples.classes])
    from dataclasses import replace

    return (
        replace(samples, targets=order[samples.targets], classes=classes),
        "the data's classes were put in the order of the model's own names",
    )


def _with_targets(samples: Samples, targets: Tensor) -> Samples:
    from dataclasses import replace

    return replace(samples, targets=targets)


def _first(samples: Samples, count: int) -> Samples:
    from lineament.data.loading import take

    return take(samples, torch.arange(count))


def _flops(model: nn.Module, example: Tensor) -> float:
    """Floating-point operations of one sample's forward; at least the weights' count, where none is known."""
    least = float(sum(p.numel() for p in model.parameters()))
    try:
        with frozen(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example)
        return max(counter.get_total_flops() / len(example), least)
    except Exception:
        return max(2 * least, 1.0)
