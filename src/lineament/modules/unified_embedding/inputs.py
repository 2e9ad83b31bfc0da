"""What the values of features may come as, brought to one form: flat ids, where each sample's bag begins, and a weight of each id.

Ids of a batch, one or several a sample; ``nn.EmbeddingBag``'s ``(input, offsets, per_sample_weights)``; nested tensors; lists, also of lists; torchrec's jagged tensors, known by their
methods, so that torchrec itself is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, require, show

EXPECTED = (
    "ids [batch] or [batch, values], strings, lists, a nested tensor, or (ids, offsets, per_sample_weights)"
)


@dataclass(frozen=True)
class Bags:
    """A feature's ids; where the bags of a batch begin (``None``: each id is one); a weight of each id; the number of bags."""

    ids: Tensor | Sequence[Any]
    offsets: Tensor | None
    weights: Tensor | None
    count: int


def by_feature(inputs: Any) -> Mapping[str, Any]:
    """{feature: its values} of a mapping, or of what has torchrec's ``keys()``, ``values()`` and ``lengths()`` (a ``KeyedJaggedTensor``).

    >>> by_feature({"user": torch.tensor([1])})
    {'user': tensor([1])}
    """
    if isinstance(inputs, Mapping):
        return inputs
    keyed = all(callable(getattr(inputs, name, None)) for name in ("keys", "values", "lengths"))
    if not keyed:
        raise InputError(
            f"inputs: got {show(inputs)}, expected {{feature: ids}}, or keys(), values() and lengths() as torchrec's KeyedJaggedTensor has them"
        )
    keys, values, lengths = list(inputs.keys()), inputs.values(), inputs.lengths()
    weights = _called(inputs, "weights_or_none")
    require(len(set(keys)) == len(keys), f"inputs: a key comes twice in {keys}")
    strides = _called(inputs, "stride_per_key") or [len(lengths) // max(1, len(keys))] * len(keys)
    require(
        len(keys) > 0 and sum(strides) == len(lengths),
        f"inputs: got {len(lengths)} lengths for {len(keys)} keys, expected one a key and sample",
    )
    _lengths(lengths, "the keys", len(values))
    parts = lengths.split(strides)
    sizes = torch.stack([part.sum() for part in parts]).tolist()
    # One id of each sample: what is looked up at once.
    if weights is None and bool((lengths == 1).all()):
        return dict(zip(keys, values.split(sizes)))
    every = [None] * len(keys) if weights is None else weights.split(sizes)
    return {
        key: (own, part.cumsum(0) - part, weight)
        for key, own, part, weight in zip(keys, values.split(sizes), parts, every)
    }


def bags_of(given: Any, name: str, device: torch.device | None = None) -> Bags:
    """One feature's values as :class:`Bags`; what comes in lists is put on ``device``.

    Raises:
        InputError: none of the forms; offsets that fall or go too far; weights of another number than the ids.

    >>> bags_of([[3, 4], [], [7]], "tags").offsets
    tensor([0, 2, 2])
    """
    if isinstance(given, Tensor):
        if given.is_nested:
            return _nested(given, name)
        require(given.ndim in (1, 2), _unlike(given, name))
        return Bags(given, None, None, len(given)) if given.ndim == 1 else _rectangular(given, None)
    if isinstance(given, tuple):
        require(1 <= len(given) <= 3, _unlike(given, name))
        return _as_embedding_bag(name, *given)
    if isinstance(given, Sequence) and not isinstance(given, (str, bytes)):
        if given and all(isinstance(bag, (list, tuple)) for bag in given):
            lengths = torch.tensor([len(bag) for bag in given], device=device)
            flat = listed([value for bag in given for value in bag], device)
            return Bags(flat, lengths.cumsum(0) - lengths, None, len(given))
        return Bags(listed(given, device), None, None, len(given))
    jagged: Any = given
    if all(callable(getattr(given, name, None)) for name in ("values", "lengths")):  # torchrec's JaggedTensor
        values, lengths = jagged.values(), jagged.lengths()
        _lengths(lengths, repr(name), len(values))
        return _as_embedding_bag(name, values, lengths.cumsum(0) - lengths, _called(given, "weights_or_none"))
    raise InputError(_unlike(given, name))


def listed(values: Sequence[Any], device: torch.device | None = None) -> Tensor | Sequence[Any]:
    """A list of whole numbers as the ids that they are in a tensor; any other list as it is.

    >>> listed([3, 4]), listed(["3", 4])
    (tensor([3, 4]), ['3', 4])
    """
    if not values or not all(type(value) is int for value in values):
        return values
    low, high = min(values), max(values)
    require(
        low >= -(1 << 63) and high < 1 << 63,
        f"inputs: got the id {low if low < -(1 << 63) else high}, expected int64; pass it as a string",
    )
    return torch.tensor(values, device=device)


def rising(offsets: Tensor, name: str, length: int) -> None:
    """Refuse offsets of bags that are no whole numbers, do not start at 0, fall, or pass the number of ids."""
    require(_whole(offsets), f"inputs: got {show(offsets)} as offsets of {name!r}, expected whole numbers [batch]")  # fmt: skip
    falling = len(offsets) and (int(offsets[0]) != 0 or bool((offsets.diff() < 0).any()))
    require(not falling, f"inputs: the offsets of {name!r} must start at 0 and not fall")
    last = int(offsets[-1]) if len(offsets) else 0
    require(last <= length, f"inputs: the offsets of {name!r} go to {last}, and there are {length} ids")
    require(
        len(offsets) > 0 or not length, f"inputs: {name!r} has {length} ids and no offset, so that no bag"
    )


def _as_embedding_bag(name: str, ids: Any, offsets: Any = None, weights: Any = None) -> Bags:
    if weights is not None:
        fitting = isinstance(weights, Tensor) and weights.is_floating_point()
        shape = ids.shape if isinstance(ids, Tensor) else (len(ids),)
        require(
            fitting and weights.shape == shape,
            f"inputs: got {show(weights)} as weights of {name!r}, expected a float for each of {show(ids)}",
        )
    if isinstance(ids, Tensor) and ids.ndim == 2:
        require(
            offsets is None, f"inputs: {name!r} has ids [batch, values] and offsets, expected one of both"
        )
        return _rectangular(ids, weights)
    flat = ids.ndim == 1 if isinstance(ids, Tensor) else isinstance(ids, Sequence)
    require(flat, _unlike(ids, name))
    if offsets is None:
        raise InputError(
            f"inputs: {name!r} has ids {show(ids)} without offsets, expected where each bag starts"
        )
    rising(offsets, name, len(ids))
    return Bags(ids, offsets, weights, len(offsets))


def _rectangular(ids: Tensor, weights: Tensor | None) -> Bags:
    """As many ids of each sample."""
    offsets = torch.arange(len(ids), device=ids.device) * ids.shape[1]
    return Bags(ids.reshape(-1), offsets, None if weights is None else weights.reshape(-1), len(ids))


def _nested(given: Tensor, name: str) -> Bags:
    require(given.ndim == 2, f"inputs: got a nested tensor of {given.ndim} dimensions for {name!r}, expected [batch, any]")  # fmt: skip
    bags: Any = given
    # Without holes the values lie one bag after the other already.
    if given.layout == torch.jagged and bags.lengths() is None:
        return Bags(bags.values(), bags.offsets()[:-1], None, len(given))
    parts = given.unbind()
    lengths = torch.tensor([len(part) for part in parts], device=given.device)
    return Bags(torch.cat(parts), lengths.cumsum(0) - lengths, None, len(parts))


def _lengths(lengths: Any, whose: str, values: int) -> None:
    require(_whole(lengths), f"inputs: got {show(lengths)} as lengths of {whose}, expected whole numbers")
    require(not bool((lengths < 0).any()), f"inputs: a length of {whose} is below 0")
    total = int(lengths.sum())
    require(total == values, f"inputs: the lengths of {whose} make {total} ids, and there are {values}")


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, Tensor) and numbers.ndim == 1 and numbers.dtype in (torch.int64, torch.int32)


def _called(given: Any, method: str) -> Any:
    found = getattr(given, method, None)
    return found() if callable(found) else None


def _unlike(given: Any, name: str) -> str:
    return f"inputs: got {show(given)} for {name!r}, expected {EXPECTED}"
