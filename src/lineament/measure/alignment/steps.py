"""The batches that several networks are given, of one source of data or of one for each: the same samples in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import require
from lineament.data.samples import Samples
from lineament.load.data import load_data
from lineament.load.input_layout import find_layout, with_arguments
from lineament.train.batches import Indexed, source

_BATCH = 64


@dataclass
class Step:
    """One batch: the inputs of each network, the samples' numbers, and at which tokens they meet where they do not everywhere."""

    inputs: list[Any]
    samples: Tensor
    places: list[Tensor] | None = None  # of each network (sample, place), indices of tokens
    present: Tensor | None = None  # (sample, place)


def steps_of(models: Sequence[nn.Module], data: Any, others: Any = None, *, seed: int = 0) -> Iterable[Step]:
    """The batches of a user's data for each network: of one source, or of one for each with the same samples in the same order.

    Data that can be indexed are walked in an order drawn from ``seed``, so that the images of a batch are any images.

    Raises:
        InputError: sources whose numbers of samples or targets differ.
    """
    if isinstance(data, (str, Path, Samples)):
        samples = data if isinstance(data, Samples) else load_data(data, samples=2**31)
        views = [Indexed(_Given(with_arguments(model, samples), model), samples.targets) for model in models]
    else:
        views = [source(_batched(data))] * len(models)
    if others is not None:
        views = [views[0], *[source(_batched(others))] * (len(models) - 1)]
    if all(isinstance(view, Indexed) for view in views):
        counts = [len(view) for view in views]
        require(
            len(set(counts)) == 1,
            f"data: {counts[0]} samples for one network and {max(counts[1:])} for the other, expected the same samples",
        )
        return _Shuffled(views, seed)
    return _Streamed(views)


class _Given:
    """Stored samples as one network takes them, by their numbers."""

    def __init__(self, samples: Samples, model: nn.Module):
        self.samples, self.model = samples, model
        self.layout, _ = find_layout(model, samples, (), (), 2)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: Any) -> Any:
        return self.layout.given(self.samples[rows], self.model)


class Parts(Sequence[Step]):
    """Steps of stored samples, made when they are asked for; ``parts`` are the samples' numbers."""

    parts: list[Tensor]

    def __len__(self) -> int:
        return len(self.parts)


class _Shuffled(Parts):
    def __init__(self, views: Sequence[Any], seed: int):
        self.views = views
        order = torch.randperm(len(views[0]), generator=torch.Generator().manual_seed(seed))
        self.parts = list(order.split(_BATCH))
        if len(self.parts) > 1 and len(self.parts[-1]) == 1:  # which would have no other to be exchanged with
            self.parts[-2:] = [torch.cat(self.parts[-2:])]

    def __getitem__(self, number: Any) -> Any:
        rows = self.parts[number]
        first = self.views[0].take(rows)
        batches = [first, *(first if view is self.views[0] else view.take(rows) for view in self.views[1:])]
        _same_targets([batch.targets for batch in batches])
        return Step([batch.inputs for batch in batches], rows)


class _Streamed:
    def __init__(self, views: Sequence[Any]):
        self.views = views

    def __iter__(self) -> Iterator[Step]:
        seen = 0
        own = list(dict.fromkeys(self.views))
        walks = [iter(view.in_order(_BATCH)) for view in own]
        ended = object()
        while True:
            batches = [next(walk, ended) for walk in walks]
            if all(batch is ended for batch in batches):
                return
            require(
                not any(batch is ended for batch in batches),
                "data: one of the two sources ends before the other, expected the same samples in the same batches",
            )
            _same_targets([batch.targets for batch in batches])  # pyright: ignore[reportAttributeAccessIssue]
            count = len(batches[0])  # pyright: ignore[reportArgumentType]
            by = {id(view): batch for view, batch in zip(own, batches)}
            inputs = [by[id(view)].inputs for view in self.views]  # pyright: ignore[reportAttributeAccessIssue]
            yield Step(inputs, torch.arange(seen, seen + count))
            seen += count


def _same_targets(targets: Sequence[Any]) -> None:
    found = {_hash(each) for each in targets}
    require(
        len(found) == 1,
        "data: the two sources have other targets in one batch, expected the same samples in the same order (do not shuffle them)",
    )


def _hash(value: Any) -> str:
    value = torch.as_tensor(value).detach().cpu().contiguous()
    return hashlib.sha256(str(tuple(value.shape)).encode() + value.double().numpy().tobytes()).hexdigest()


def _batched(data: Any) -> Any:
    """Inputs alone, without targets, as a pair or as batches of pairs."""
    if isinstance(data, Tensor):
        return data, torch.zeros(len(data), dtype=torch.long)
    if isinstance(data, list) and data and all(isinstance(each, Tensor) for each in data) and len(data) != 2:
        return [(each, torch.zeros(len(each), dtype=torch.long)) for each in data]
    return data
