"""How stored samples become the model's input, found by trying what is possible."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.core.models import called, device_of, dtype_of, frozen, logits, weight_of
from lineament.core.sites.depth import layer_kind
from lineament.data.samples import Samples
from lineament.load.hub import first_line


@dataclass(frozen=True)
class Expected:
    """The input of the first layer with weights: ``size`` channels or features, whether images, in words, and whether signals."""

    size: int
    images: bool | None
    text: str
    signals: bool = False


@dataclass(frozen=True)
class Layout:
    """How stored samples become the model's input: which axis holds the channels, and the normalisation.

    ``classes`` is the axis of the outputs that holds the classes, where there is an answer for each position.
    """

    kind: str
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: int | None = None

    def given(self, samples: Samples, model: nn.Module) -> Any:
        """Samples, alike in length, as a model takes them, on its device and in its precision; whole numbers stay what they are.

        A tensor, or where the model takes several inputs, a tuple or a dict of them.
        """

        samples = _cut(samples)
        return _arranged(self.apply(samples.inputs), samples, model)

    def steps(self, samples: Samples, model: nn.Module) -> str:
        """Everything that is done to a stored sample on its way into the model, in order."""
        raw = _cut(samples).inputs
        x = self.apply(raw)
        found = [] if self.kind in ("as it is", "token ids") else [self.kind]
        if raw.dtype == torch.uint8 and self.kind != "token ids":
            found.append("divided by 255")
        if self.mean and x.ndim == 4:
            mean, std = (", ".join(f"{v:.4g}" for v in values) for values in (self.mean, self.std))
            found.append(f"less mean {mean} and over deviation {std}")
        wanted = dtype_of(model) if x.is_floating_point() else x.dtype
        form = f"{tuple(x.shape[1:])} {str(wanted).removeprefix('torch.')}"
        stored = f"{tuple(raw.shape[1:])} {str(raw.dtype).removeprefix('torch.')}"
        how = ", ".join(found) or ("as token ids" if self.kind == "token ids" else "unchanged")
        return f"samples, stored as {stored}, go in as {form}: {how}"

    def apply(self, raw: Tensor) -> Tensor:
        if self.kind == "token ids":
            return raw.long()
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
        if self.kind == "no channel":
            return x[:, 0]
        if self.kind == "one channel":
            return x[:, None]
        if self.kind.startswith("channels last"):
            return x.movedim(-1, 1)
        if self.kind == "colour as grey":
            colour = x.movedim(-1, 1) if x.shape[-1] in (3, 4) else x
            return (colour[:, :3] * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        return x


def taken(model: nn.Module, samples: Samples) -> Callable[[Tensor], Any]:
    """How some rows of the samples, alike in length, go into the model: as they are where it takes them so, else in the layout that is found.

    >>> taken(nn.Linear(2, 1), Samples(torch.ones(3, 2), torch.zeros(3)))(torch.tensor([0, 2])).tolist()
    [[1.0, 1.0], [1.0, 1.0]]
    """
    held = with_arguments(model, samples)

    def plain(rows: Tensor) -> Any:
        some = _cut(held[rows])
        return _arranged(some.inputs, some, model)

    if held.inputs.dtype != torch.uint8:
        try:
            with frozen(model), torch.no_grad():
                called(model, plain(torch.tensor([0])))
            return plain
        except (RuntimeError, IndexError, ValueError, TypeError):
            pass
    layout, _ = find_layout(model, held, (), (), 2)
    return lambda rows: layout.given(held[rows], model)


def _arranged(x: Tensor, samples: Samples, model: nn.Module) -> Any:
    """Inputs with the samples' further ones as a model takes them: a tensor, a tuple or a dict, on its device and in its precision."""

    def brought(value: Tensor) -> Tensor:
        value = value.to(device_of(model))
        return value.to(dtype_of(model)) if value.is_floating_point() else value

    others = {name: brought(value) for name, value in samples.others.items()}
    if samples.argument:
        return {samples.argument: brought(x), **others}
    return (brought(x), *(others[place] for place in sorted(others, key=int))) if others else brought(x)


def _cut(samples: Samples) -> Samples:
    """The rows without what stands behind the longest of them."""
    if samples.lengths is None:
        return samples
    width, most = samples.inputs.shape[1], int(samples.lengths.max())
    others = {
        name: value[:, :most] if value.ndim > 1 and value.shape[1] == width else value
        for name, value in samples.others.items()
    }
    targets = samples.targets
    if targets.ndim == 2 and targets.shape[1] == width:
        targets = targets[:, :most]
    return replace(samples, inputs=samples.inputs[:, :most], targets=targets, others=others)


def with_arguments(model: nn.Module, samples: Samples) -> Samples:
    """The samples with those further inputs that the model's forward takes, by its own names.

    >>> two = Samples(torch.zeros(1, 2), torch.zeros(1), others={"mask": torch.ones(1, 2), "row": torch.ones(1)}, argument="x")
    >>> class Masked(nn.Module):
    ...     def forward(self, values, mask): return values * mask
    >>> found = with_arguments(Masked(), two)
    >>> found.argument, list(found.others), found.notes
    ('values', ['mask'], ("'row' is no argument of Masked.forward and is left out",))
    """
    if all(name.isdigit() for name in samples.others):
        return replace(samples, argument="") if not samples.argument or not samples.others else samples
    taken = list(inspect.signature(model.forward).parameters.values())
    named = [p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if not named:
        # forward(**batch) takes whatever the batch holds.
        return samples
    required = [p for p in taken if p.default is p.empty]
    if not {samples.argument, *samples.others} & set(named) and len(required) == 1 + len(samples.others):
        # Other names for as many: in the order in which they were given.
        places = {str(place): value for place, value in enumerate(samples.others.values(), 1)}
        return replace(samples, others=places, argument="")
    others = {name: value for name, value in samples.others.items() if name in named}
    spare = ", ".join(repr(name) for name in samples.others if name not in others)
    notes = [f"{spare} is no argument of {type(model).__name__}.forward and is left out"] if spare else []
    argument = samples.argument if samples.argument in named else named[0]
    return replace(
        samples, others=others, argument=argument if others else "", notes=(*samples.notes, *notes)
    )


def find_layout(
    model: nn.Module, samples: Samples, mean: tuple[float, ...], std: tuple[float, ...], count: int
) -> tuple[Layout, str]:
    """The first layout of the first samples that the model takes, and what was decided."""
    some = samples[:count]
    if samples.lengths is not None:
        some = samples[(samples.lengths == samples.lengths[0]).nonzero()[:count, 0]]
    raw = some.inputs
    wanted = expected_input(model)
    tried: list[str] = []
    unlike, refused = "", None
    # Of nn.Embedding, nn.EmbeddingBag and what is called as they are.
    sizes = (getattr(m, "num_embeddings", None) for m in model.modules())
    vocabulary = max((size for size in sizes if isinstance(size, int)), default=0)
    kinds = _candidates(raw, wanted)
    stored = samples.inputs
    whole = not raw.is_floating_point() or bool((stored.isfinite() & (stored == stored.round())).all())
    if vocabulary and whole:
        low, high = int(stored.min()), int(stored.max())
        if low >= 0 and high < vocabulary:
            # Columns of a table come as real numbers, and may be meant so.
            kinds = [*kinds, "token ids"] if raw.is_floating_point() else ["token ids", *kinds]
        else:
            tried.append(f"token ids from {low} to {high}: its embeddings have {vocabulary} rows")
    for kind in kinds:
        layout = Layout(kind, mean, std)
        x = layout.apply(raw)
        if mean and x.ndim == 4 and len(mean) not in (1, x.shape[1]):
            tried.append(f"{tuple(x.shape)}: {len(mean)} means for {x.shape[1]} channels")
            continue
        try:
            with frozen(model), torch.no_grad():
                output = called(model, layout.given(some, model))
        except InputError as error:
            # A module of ours that takes no such numbers (a shared table, real ones as ids); another form may do.
            refused = refused or error
            continue
        except Exception as error:
            tried.append(f"{tuple(x.shape)}: {first_line(error)[:160]}")
            continue
        output = logits(output)
        places = _cut(some).targets.shape[1:]
        axis = None if some.targets.is_floating_point() else _classes_axis(output.shape, places)
        if (output.ndim not in (1, 2) and axis is None) or len(output) != len(x):
            # Another form of the same numbers may give what is expected.
            wanted_output = (
                f"logits (batch, classes, {', '.join(map(str, places))}) of the targets' size"
                if len(places) == 2
                else "one row of logits or values a sample"
            )
            unlike = (
                unlike or f"model: it answers {len(x)} samples with {show(output)}, expected {wanted_output}"
            )
            continue
        return replace(layout, classes=axis), layout.steps(some, model)
    if refused is not None:
        raise refused
    require(not unlike, unlike)
    raise InputError(
        f"data: samples of shape {tuple(samples.inputs.shape[1:])} do not fit the model, which expects {wanted.text}; tried "
        + "; ".join(tried)
        + ". Bring the data to that shape (the size of images by `image_size`)"
        # Of a table, which columns were read and why others were not.
        + (f"; of the table: {'; '.join(samples.notes)}" if samples.columns else "")
    )


def _classes_axis(outputs: Sequence[int], places: Sequence[int]) -> int | None:
    """Which axis of outputs holds the classes of each place, or ``None`` where they do not answer for each; of texts the last, if both could.

    >>> _classes_axis((8, 21, 64, 64), (64, 64)), _classes_axis((8, 64, 9), (64,)), _classes_axis((8, 9), (64,))
    (1, 2, None)
    """
    fits = [k for k in (1, len(outputs) - 1) if (*outputs[1:k], *outputs[k + 1 :]) == tuple(places)]
    if not places or len(outputs) != len(places) + 2 or not fits:
        return None
    return fits[-1] if len(places) == 1 else fits[0]


def expected_input(model: nn.Module) -> Expected:
    """What the first convolution or linear layer says about the input.

    >>> expected_input(nn.Sequential(nn.Conv2d(3, 8, 3))).text
    'images with 3 channels (batch, 3, height, width)'
    """
    config = getattr(model, "config", None)
    side = getattr(config, "image_size", None)
    for module in model.modules():
        kind = layer_kind(module)
        if kind == "convolution":
            channels = weight_of(module).shape[1] * int(getattr(module, "groups", 1))
            size = f", {side}, {side}" if isinstance(side, int) else ", height, width"
            return Expected(channels, True, f"images with {channels} channels (batch, {channels}{size})")
        if isinstance(module, nn.Conv1d):
            channels = module.in_channels
            return Expected(
                channels, False, f"signals with {channels} channels (batch, {channels}, steps)", True
            )
        if isinstance(module, nn.Linear):
            return Expected(
                module.in_features, None, f"{module.in_features} features in its first linear layer"
            )
    return Expected(-1, None, "an input that its layers do not tell")


def _candidates(raw: Tensor, wanted: Expected) -> list[str]:
    """Layouts in the order of trust: first those whose channels fit the first convolution."""
    shape = tuple(raw.shape[1:])
    if wanted.signals and len(shape) in (1, 2):
        # A signal without a channel would be taken for one sample of many channels.
        kinds = {"as it is": shape[0], "channels last": shape[-1]} if len(shape) == 2 else {"one channel": 1}
    elif len(shape) == 2:
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
        if shape[0] == 1:
            kinds["no channel"] = 0
    else:
        kinds = {"as it is": shape[0] if shape else 1, "flat": math.prod(shape)}
    exact = [kind for kind, size in kinds.items() if size == wanted.size]
    if wanted.images is True:
        kinds = {kind: size for kind, size in kinds.items() if not kind.endswith("flat")}
    return [*exact, *(kind for kind in kinds if kind not in exact)]
