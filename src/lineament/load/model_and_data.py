"""A model and data brought together before any work: the layout, the task, the sites; whatever does not fit is said at once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lineament.audit.subject import Subject
from lineament.core import checks
from lineament.core.checks import InputError, require, show
from lineament.core.models import device_of, dtype_of, frozen, logits
from lineament.core.sites.activations import sites as site_names
from lineament.core.sites.depth import default_sites
from lineament.data.samples import Samples
from lineament.load.input_layout import find_layout
from lineament.load.loaded import Loaded


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
    layout, note = find_layout(model, samples, mean, std, loaded.batch or 2)
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
            f"DATA: {f'all {len(samples)} samples read are' if len(samples) > 1 else 'the only sample is'} of class {int(samples.targets[0])}, expected samples of at least two classes",
        )
    classes = samples.classes or loaded.classes
    width = outputs.shape[1]
    require(
        chosen == "regression" or not samples.classes or len(samples.classes) <= width,
        f"DATA: {len(samples.classes)} class names for a model with {width} outputs, expected at most {width}",
    )
    if chosen == "classification" and samples.classes:
        top = int(samples.targets.max())
        require(
            top < len(samples.classes),
            f"DATA: {len(samples.classes)} class names for labels up to {top}, expected a name for each class from 0 to {top} (--classes)",
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
    layout, _ = find_layout(loaded.model, samples, loaded.mean, loaded.std, loaded.batch or 2)
    with frozen(loaded.model), torch.no_grad():
        x = layout.apply(samples.inputs[: loaded.batch or 2])
        out = logits(loaded.model(x.to(device=device_of(loaded.model), dtype=dtype_of(loaded.model))))
    return out.ndim == 1 or (out.ndim == 2 and out.shape[1] == 1)


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
    return (
        replace(samples, targets=order[samples.targets], classes=classes),
        "the data's classes were put in the order of the model's own names",
    )


def _with_targets(samples: Samples, targets: Tensor) -> Samples:
    return replace(samples, targets=targets)


def _first(samples: Samples, count: int) -> Samples:
    return samples[:count]


def _flops(model: nn.Module, example: Tensor) -> float:
    """Floating-point operations of one sample's forward; at least the weights' count, where none is known."""
    least = float(sum(p.numel() for p in model.parameters()))
    try:
        with frozen(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(example)
        return max(counter.get_total_flops() / len(example), least)
    except Exception:
        return max(2 * least, 1.0)
