"""A model's data as sequences that can be taken by index: token ids, images, vectors; which of their positions count; and what loss is differentiated.

A **sequence** is one sample of the data. At a site it gives one row (a vector), or a row for each token or position of a map. Padding and special tokens
stay in the context and give no rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.data import DataLoader, default_collate

from lineament.core import checks
from lineament.core.checks import InputError, require, show
from lineament.core.models import class_logits, device_of, dtype_of, logits, moved
from lineament.load.data import load_data

SOURCES = ("labels", "sampled", "max_logit")
Gradient = str | Callable[[Tensor, "Batch"], Tensor]
_IDS, _MASK = "input_ids", "attention_mask"
_CACHED, _ELEMENTS = 2**17, 2**24  # logits taken at once: on a CPU, elsewhere


@dataclass(frozen=True)
class Batch:
    """Some sequences, on the model's device.

    Attributes:
        inputs: what the model is called with: a tensor, or a mapping of arguments.
        labels: aligned with the logits, negative where there is none: the next tokens, or the targets. ``None`` without targets.
        ids: (batch, positions) token ids; ``None`` where the inputs are no tokens.
        mask: (batch, positions), which tokens give rows; ``None``: all positions do.
        index: the sequences' places in the data.
    """

    inputs: Any
    labels: Tensor | None
    ids: Tensor | None
    mask: Tensor | None
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def call(self, model: nn.Module) -> Any:
        """The model's output."""
        return model(**self.inputs) if isinstance(self.inputs, Mapping) else model(self.inputs)

    def logits(self, output: Any) -> Tensor:
        """The output's logits, classes last; those of a single logit as two classes."""
        found = logits(output)
        return class_logits(found) if found.ndim == 2 and found.shape[1] == 1 else found


class Sequences:
    """Data in any of their forms, for one model.

    Args:
        data: token ids (sequences, positions); a mapping of arguments with ``input_ids``; ``(inputs, targets)``; a ``Dataset`` of any of these; a
            ``DataLoader`` (its data set is taken by index, with its ``collate_fn``); batches that can be walked again, which are taken in their
            order; a path that :func:`lineament.load.load_data` reads.
        exclude: ``"special"``: the model's BOS, EOS and padding tokens give no rows; token ids, or ``None``.

    >>> data = Sequences(nn.Embedding(9, 2), torch.tensor([[1, 2, 3], [4, 5, 6]]))
    >>> batch = data.take(torch.tensor([1]))
    >>> len(data), batch.labels.tolist(), batch.mask.tolist()
    (2, [[5, 6, -1]], [[True, True, True]])
    """

    def __init__(self, model: nn.Module, data: Any, *, exclude: str | Collection[int] | None = "special"):
        self.device, self.dtype = device_of(model), dtype_of(model)
        self._excluded = _special_tokens(model, exclude)
        self._places = _takes_positions(model)
        if isinstance(data, (str, Path)):
            data = load_data(data, samples=2**31)
        if isinstance(data, Sequences):
            data = data.data
        self.collate: Callable[[list[Any]], Any] = _collated
        loader = data
        if isinstance(loader, DataLoader) and {"__getitem__", "__len__"} <= set(dir(loader.dataset)):
            self.collate = loader.collate_fn if loader.batch_size is not None else _collated
            data = loader.dataset
        if hasattr(data, "inputs") and hasattr(data, "targets"):
            data = (data.inputs, data.targets)
        if (
            isinstance(data, (tuple, list))
            and len(data) == 2
            and not isinstance(data[0], (tuple, list, Mapping))
        ):
            data = tuple(torch.from_numpy(v) if isinstance(v, np.ndarray) else v for v in data)
            require(
                all(isinstance(v, (Tensor, Mapping)) for v in data),
                f"data: got {show(data)}, expected (inputs, targets) as tensors or arrays",
            )
        if isinstance(data, np.ndarray):
            data = torch.from_numpy(data)
        self.data: Any = data
        # A list holds batches, unless its entries are single texts.
        listed = isinstance(data, list) and not (
            data and isinstance(data[0], Mapping) and torch.as_tensor(data[0].get(_IDS, [[]])).ndim == 1
        )
        self.indexed = isinstance(data, (Tensor, Mapping, tuple)) or (
            hasattr(data, "__getitem__") and not listed
        )
        require(
            self.indexed or (isinstance(data, Iterable) and not isinstance(data, Iterator)),
            f"data: got {show(data)}, expected token ids, (inputs, targets), a Dataset, a DataLoader or batches that can be walked again",
        )
        require(not self.indexed or len(self) > 0, "data: it is empty; expected at least one sequence")

    def __len__(self) -> int:
        data = self.data[0] if isinstance(self.data, tuple) else self.data
        data = next(iter(data.values())) if isinstance(data, Mapping) else data
        return len(data)

    def take(self, index: Tensor) -> Batch:
        """The sequences at these places."""
        data = self.data
        if isinstance(data, (Tensor, Mapping, tuple)):
            return self._batch(_rows(data, index), index)
        return self._batch(self.collate([data[i] for i in index.tolist()]), index)

    def walk(self, batch_size: int, order: Tensor | None = None) -> Iterator[Batch]:
        """All sequences, by index in the given order, or as the batches come."""
        if self.indexed:
            order = torch.arange(len(self)) if order is None else order
            yield from (self.take(part) for part in order.split(batch_size))
            return
        seen = 0
        for raw in self.data:
            batch = self._batch(raw, torch.zeros(0, dtype=torch.long))
            count = len(batch.ids if batch.ids is not None else _first(batch.inputs))
            yield replace(batch, index=torch.arange(seen, seen + count))
            seen += count

    def _batch(self, raw: Any, index: Tensor) -> Batch:
        targets = None
        if isinstance(raw, (tuple, list)):
            raw, targets = raw[0], (raw[1] if len(raw) > 1 else None)
        if isinstance(raw, Mapping):
            inputs = {key: value for key, value in raw.items() if isinstance(value, Tensor)}
            named = [key for key in ("labels", "label") if key in inputs]
            for key in named:
                targets = inputs.pop(key)
        else:
            require(isinstance(raw, Tensor), f"data: got a batch {show(raw)}, expected tensors")
            inputs = raw
        inputs = moved(inputs, self.device)
        first = inputs.get(_IDS) if isinstance(inputs, Mapping) else inputs
        ids = first if isinstance(first, Tensor) and _are_ids(first) else None
        if ids is None and isinstance(inputs, Tensor):
            inputs = inputs.to(self.dtype) if inputs.is_floating_point() else inputs
        if ids is None:
            labels = None if targets is None else moved(torch.as_tensor(targets), self.device)
            return Batch(inputs, labels, None, None, index)
        there = inputs.get(_MASK) if isinstance(inputs, Mapping) else None
        there = torch.ones_like(ids, dtype=torch.bool) if there is None else there.bool()
        if (
            isinstance(inputs, Mapping)
            and self._places
            and "position_ids" not in inputs
            and not bool(there[:, 0].all())
        ):
            # Padding before the text must not move the text's positions.
            inputs = {**inputs, "position_ids": (there.long().cumsum(1) - 1).clamp_min(0)}
        labels = targets
        if labels is None or (isinstance(labels, Tensor) and labels.shape == ids.shape):
            following = (ids if labels is None else moved(labels, self.device))[:, 1:]
            known = there[:, 1:] & there[:, :-1] & (following >= 0)
            labels = F.pad(following.masked_fill(~known, -1), (0, 1), value=-1)
        else:
            labels = moved(torch.as_tensor(labels), self.device)
        mask = there if self._excluded is None else there & ~torch.isin(ids, self._excluded)
        return Batch(inputs, labels, ids, mask, index)


def objective(gradient: Gradient, output: Any, batch: Batch, seed: int) -> Tensor:
    """The scalar whose gradient is taken, **summed** over tokens, so that a row's gradient does not hang on the batch it came in.

    Args:
        gradient: ``"labels"``: the cross-entropy of the data's own labels or next tokens; ``"sampled"``: of labels drawn from the model's output, which
            leak nothing of the data's (each sequence draws from ``(seed, its index)``); ``"max_logit"``: the largest logits; or a function of
            (logits, batch) that returns a scalar.

    Raises:
        InputError: another word, labels that are not there, a function that returns no scalar.
    """
    scores = batch.logits(output)
    if callable(gradient):
        found = gradient(scores, batch)
        require(
            isinstance(found, Tensor) and found.numel() == 1,
            f"gradient: the function returned {show(found)}, expected a scalar tensor, summed over tokens",
        )
        return found.reshape(())
    mask = batch.mask if batch.mask is not None and batch.mask.shape == scores.shape[:-1] else None
    if gradient == "max_logit":
        best = scores.amax(-1)
        return (best if mask is None else best * mask).sum()
    if gradient == "labels":
        labels = batch.labels
        if labels is None:
            raise InputError(
                "gradient: 'labels' needs targets, and the data have none; give (inputs, targets), or use 'sampled'"
            )
    else:
        labels = _sampled(scores.detach(), batch, seed)
        if batch.ids is not None and labels.shape == batch.ids.shape:
            labels = labels.masked_fill(~_present(batch), -1)
    require(
        labels.shape == scores.shape[:-1],
        f"gradient: got labels of shape {tuple(labels.shape)} for logits {tuple(scores.shape)}, expected one for each",
    )
    return _CrossEntropy.apply(scores.flatten(0, -2), labels.flatten().long())  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    """The summed cross-entropy; rows of negative labels count nowhere.

    Its gradient is made beside it, some rows at a time while their logits are in the cache: with a large vocabulary the passes over the logits of separate
    log-softmax, loss and backward take as long as a few layers.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor) -> Tensor:
        slope = torch.empty_like(scores)
        wide = torch.float32 if scores.dtype in (torch.bfloat16, torch.float16) else scores.dtype
        total = scores.new_zeros((), dtype=wide)
        most = max(1, (_CACHED if scores.device.type == "cpu" else _ELEMENTS) // scores.shape[-1])
        for rows in (slice(start, start + most) for start in range(0, len(scores), most)):
            part, there = scores[rows].to(wide), (labels[rows] >= 0)[:, None]
            told = labels[rows, None].clamp_min(0)
            shares = slope[rows]
            if wide == scores.dtype:
                torch.softmax(part, -1, out=shares)
            else:
                shares = part.softmax(-1)
            # The largest share is at least 1 / classes, so that its logarithm is never that of 0.
            losses = part.amax(1, keepdim=True) - shares.amax(1, keepdim=True).log() - part.gather(1, told)
            total += losses.masked_fill(~there, 0).sum()
            shares.scatter_add_(1, told, part.new_full(told.shape, -1))
            shares.masked_fill_(~there, 0)
            if wide != scores.dtype:
                slope[rows] = shares
        ctx.save_for_backward(slope)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        (slope,) = ctx.saved_tensors
        return (slope if bool(grads[0] == 1) else slope * grads[0].to(slope.dtype)), None


def checked_gradient(gradient: Any) -> Any:
    """The argument ``gradient``, or why it cannot be used."""
    if gradient is None or callable(gradient):
        return gradient
    require(
        gradient != "kl",
        "gradient: the KL divergence to the clean output is at its minimum at the clean activation, where its gradient is zero; "
        f"expected one of {', '.join(map(repr, SOURCES))} or a function",
    )
    return checks.one_of("gradient", gradient, SOURCES)


def _sampled(scores: Tensor, batch: Batch, seed: int) -> Tensor:
    """Labels drawn from the softmax of the logits: of each sequence the same, whichever others and however much padding are beside it."""
    shape = scores.shape[:-1]
    uniform = torch.zeros(shape, dtype=torch.float64)
    there = torch.ones(shape, dtype=torch.bool) if batch.ids is None else _present(batch).cpu()
    for row, place in enumerate(batch.index.tolist()):
        count = int(there[row].sum()) if len(shape) > 1 else 1
        drawn = torch.from_numpy(np.random.default_rng([seed, place]).random(count))
        if len(shape) > 1:
            uniform[row][there[row]] = drawn
        else:
            uniform[row] = drawn[0]
    shares = scores.double().softmax(-1).cumsum(-1)
    places = torch.searchsorted(shares, (uniform.to(shares.device) * shares[..., -1])[..., None], right=True)
    return places.squeeze(-1).clamp_max(scores.shape[-1] - 1)


def _present(batch: Batch) -> Tensor:
    mask = batch.inputs.get(_MASK) if isinstance(batch.inputs, Mapping) else None
    assert batch.ids is not None
    return torch.ones_like(batch.ids, dtype=torch.bool) if mask is None else mask.bool()


def _are_ids(value: Tensor) -> bool:
    return value.ndim == 2 and value.dtype in (torch.int64, torch.int32, torch.int16)


def _special_tokens(model: nn.Module, exclude: Any) -> Tensor | None:
    if exclude is None:
        return None
    if isinstance(exclude, str):
        checks.one_of("exclude", exclude, ("special",))
        config: Any = getattr(model, "config", None)
        told = [getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        exclude = [
            i for each in told for i in (each if isinstance(each, Sequence) else [each]) if isinstance(i, int)
        ]
    return torch.tensor(sorted(set(exclude)), dtype=torch.long, device=device_of(model)) if exclude else None


def _takes_positions(model: nn.Module) -> bool:
    return "position_ids" in signature(model.forward).parameters


def _rows(data: Any, index: Tensor) -> Any:
    if isinstance(data, Mapping):
        return {key: _rows(value, index) for key, value in data.items()}
    if isinstance(data, tuple):
        return tuple(_rows(value, index) for value in data)
    return data[index] if isinstance(data, Tensor) else torch.as_tensor(data)[index]


def _first(value: Any) -> Any:
    return next(iter(value.values())) if isinstance(value, Mapping) else value


def _collated(items: list[Any]) -> Any:
    """``default_collate``; token ids of several lengths are padded behind, with a mask."""
    if isinstance(items[0], Mapping) and _IDS in items[0]:
        rows = [torch.as_tensor(item[_IDS]) for item in items]
        masks = [torch.as_tensor(item.get(_MASK, torch.ones_like(row))) for item, row in zip(items, rows)]
        return {_IDS: nn.utils.rnn.pad_sequence(rows, True), _MASK: nn.utils.rnn.pad_sequence(masks, True)}
    return default_collate(items)
