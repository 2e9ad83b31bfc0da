"""The network and the data of an edit: read as for an audit, and split into a half that calibrates or is forgotten and a half that measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament.audit.edit_doubts import NONE, Doubt, doubt
from lineament.core import checks
from lineament.core.checks import InputError, require, show, suggest
from lineament.load.data import load_data
from lineament.load.language_models import is_language_model, load_language_model
from lineament.load.model_and_data import bring_together
from lineament.load.models import load_model
from lineament.load.token_sequences import token_sequences


@dataclass(frozen=True)
class EditOptions:
    """How an edited network's model and data are read.

    ``weights``: of a factory's network; ``samples``: read at most so many; ``length``: positions of a sequence of a text; ``share``: of the pairs that
    unlearning changes, by default the smallest that forgets; ``widths``: see :class:`lineament.edit.PruneOptions`; ``classes``, ``inputs``, ``targets``, ``split``, ``image_size``, ``normalize``: as for an audit.

    >>> EditOptions().samples
    2000
    """

    weights: str | Path | None = None
    samples: int = 2000
    length: int = 128
    share: float | None = None
    widths: str | None = None
    seed: int = 0
    device: str | None = None
    classes: Sequence[str] | None = None
    inputs: str | None = None
    targets: str | None = None
    split: str | None = None
    image_size: Any = None
    normalize: Any = None


USUAL = EditOptions()


@dataclass(frozen=True)
class EditSubject:
    """A model, and two halves of its data as it takes them; labels where there are classes."""

    model: nn.Module
    source: str
    data: str
    halves: tuple[list[Any], list[Any]]
    labels: tuple[Tensor, Tensor] | None
    classes: tuple[str, ...]
    tokenizer: Any = None  # of a language model
    words: Any = None  # the tokenizer of a classifier of texts
    notes: tuple[str, ...] = ()
    named: bool = False  # whether a command line can name the model
    doubt: Doubt = NONE  # why its answers as it was say little of what an edit costs


def edit_subject(model: Any, data: Any, options: EditOptions) -> EditSubject:
    """The network and two halves of its data, in a random order of the seed."""
    checks.number("samples", options.samples, low=4, integer=True)
    if is_language_model(model):
        own, tokenizer = load_language_model(str(model), device=options.device)
        ids = token_sequences(tokenizer, data, length=options.length, most=options.samples)
        require(
            len(ids) >= 4,
            f"data: {show(data)} holds {len(ids)} sequences of {options.length} tokens, expected at least 4",
        )
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(options.seed))]
        first, second = ([{"input_ids": part} for part in half.split(8)] for half in ids.chunk(2))
        return EditSubject(
            own, str(model), f"{data}, {len(ids)} sequences", (first, second), None, (), tokenizer
        )
    loaded = load_model(model, weights=options.weights)
    require(
        loaded.kind != "export" and loaded.batch is None,
        "model: an exported network cannot be edited; pass the module that it was made from",
    )
    size = loaded.size if options.image_size is None else options.image_size
    samples = load_data(
        data, samples=options.samples, seed=options.seed, inputs=options.inputs, targets=options.targets,
        classes=options.classes, split=options.split, image_size=size, tokenizer=loaded.tokenizer,
    )  # fmt: skip
    if options.classes is not None:
        loaded = replace(loaded, classes=())
    with bring_together(
        loaded, samples, normalize=options.normalize, device=options.device, seed=options.seed
    ) as both:
        require(len(both) >= 4, f"data: {len(both)} samples, expected at least 4")
        order = torch.randperm(len(both), generator=torch.Generator().manual_seed(options.seed))
        rows = order.chunk(2)
        halves = tuple([both.inputs(part) for part in half.split(64)] for half in rows)
        labels = (both.targets[rows[0]], both.targets[rows[1]]) if both.task == "classification" else None
        return EditSubject(
            loaded.model, loaded.source, f"{samples.source}, {len(both)} samples", halves, labels, both.classes,  # pyright: ignore[reportArgumentType]
            words=loaded.tokenizer,
            notes=both.notes, named=isinstance(model, str), doubt=doubt(both, () if options.classes else samples.classes),
        )  # fmt: skip


def others_of(retain: EditSubject, subject: EditSubject, number: int) -> tuple[Tensor, Tensor]:
    """The samples of all classes but one."""
    if retain.labels is None:
        raise InputError(
            "retain: it has no classes; expected labelled samples of the classes that are to stay"
        )
    require(
        not (retain.classes and subject.classes) or list(retain.classes) == list(subject.classes),
        f"retain: its classes are {', '.join(map(str, retain.classes[:6]))}, those of the data {', '.join(map(str, subject.classes[:6]))}; expected the same",
    )
    parts = [parts_of(x, y, number)[1] for x, y in zip(retain.halves, retain.labels)]
    inputs, labels = (torch.cat(each) for each in zip(*parts))
    require(
        len(labels) >= 8,
        f"retain: it holds {len(labels)} samples of classes that are to stay, expected at least 8",
    )
    return inputs, labels


def parts_of(batches: Sequence[Any], labels: Tensor, number: int) -> list[tuple[Any, Any]]:
    require(
        isinstance(batches[0], Tensor),
        "model: unlearning takes networks of one input, a tensor",
    )
    x, y = torch.cat(list(batches)), labels.cpu()
    there = y == number
    return [(x[there.to(x.device)], y[there]), (x[~there.to(x.device)], y[~there])]


def class_number(subject: EditSubject, label: str) -> int:
    known = [str(name) for name in subject.classes]
    if label in known:
        return known.index(label)
    highest = width_of(subject) - 1
    require(
        label.isdigit() and int(label) <= highest,
        f"label: no class {label!r}{suggest(label, known or map(str, range(highest + 1)))}",
    )
    return int(label)


def width_of(subject: EditSubject) -> int:
    """How many classes there are."""
    assert subject.labels is not None
    return max(len(subject.classes), int(torch.cat(subject.labels).max()) + 1)


def name_of(subject: EditSubject, number: int) -> str:
    return subject.classes[number] if number < len(subject.classes) else str(number)
