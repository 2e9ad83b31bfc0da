"""Where the blocks of a past lie: counted from each row's first real token and anew in each packed document.

A block never straddles two documents and never holds padding, so a row gives in a batch what it gives alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, require, show


@dataclass(frozen=True)
class Blocks:
    """The blocks of ``keys`` tokens and where the queries stand among them; ``rows`` is 1 where all rows of a batch agree.

    ``starts`` and ``stops``: [rows, blocks], the tokens of each block. ``own``: [rows, queries], the block of each query, -1 for padding;
    ``first``: the first block of its document; ``within``: its place in its block. ``regular``: block n starts at token n ``size``.
    """

    size: int
    keys: int
    offset: int
    starts: Tensor
    stops: Tensor
    own: Tensor
    first: Tensor
    within: Tensor
    regular: bool

    @property
    def count(self) -> int:
        """How many blocks there are in the longest row."""
        return self.starts.shape[1]

    @property
    def begins(self) -> Tensor:
        """The first key that each query may see, [rows, queries]."""
        return self.starts.gather(1, self.first.clamp(min=0))

    def past(self, queries: slice = slice(None)) -> Tensor:
        """Which blocks lie before the query's own in its document, [rows, queries, blocks]."""
        number_of = torch.arange(self.count, device=self.own.device)
        return (number_of < self.own[:, queries, None]) & (number_of >= self.first[:, queries, None])

    def of_keys(self) -> Tensor:
        """The block of each key, -1 for padding, [rows, keys]."""
        position = torch.arange(self.keys, device=self.starts.device)
        if self.regular:
            return (position // self.size)[None]
        inside = (position >= self.starts[..., None]) & (position < self.stops[..., None])
        return torch.where(inside.any(1), inside.byte().argmax(1), -1)

    def split(self, x: Tensor) -> Tensor:
        """[batch, heads, keys, size] as [batch, heads, blocks, block size, size], zero where a block is short."""
        batch, heads, keys, width = x.shape
        if self.regular:
            padded = F.pad(x, (0, 0, 0, self.count * self.size - keys)) if keys % self.size else x
            return padded.unflatten(2, (self.count, self.size))
        tokens, real = self._tokens()
        index = tokens.flatten(1)[:, None, :, None].expand(batch, heads, -1, width)
        return x.gather(2, index).unflatten(2, tokens.shape[1:]) * real[:, None, ..., None].to(x.dtype)

    def joined(self, x: Tensor) -> Tensor:
        """The adjoint of :meth:`split`: back to [batch, heads, keys, size]."""
        batch, heads, _, _, width = x.shape
        if self.regular:
            return x.flatten(2, 3)[:, :, : self.keys]
        tokens, real = self._tokens()
        index = tokens.flatten(1)[:, None, :, None].expand(batch, heads, -1, width)
        kept = (x * real[:, None, ..., None].to(x.dtype)).flatten(2, 3)
        return x.new_zeros(batch, heads, self.keys, width).scatter_add_(2, index, kept)

    def means(self, k: Tensor) -> Tensor:
        """The mean key of each block in at least float32, [batch, heads, blocks, size]."""
        wide = k if k.dtype == torch.float64 else k.float()
        lengths = (self.stops - self.starts).clamp(min=1)
        return self.split(wide).sum(3) / lengths[:, None, :, None]

    def _tokens(self) -> tuple[Tensor, Tensor]:
        tokens = self.starts[..., None] + torch.arange(self.size, device=self.starts.device)
        return tokens.clamp(max=self.keys - 1), tokens < self.stops[..., None]


def lay_out(
    q: Tensor,
    k: Tensor,
    block_size: int,
    *,
    offset: int | None = None,
    documents: Tensor | None = None,
    padding: Tensor | None = None,
) -> Blocks:
    """The blocks of the keys [batch, heads, keys, size], and the place of the queries, the first of which is key number ``offset``."""
    number("block_size", block_size, low=1, integer=True)
    queries, keys = q.shape[2], k.shape[2]
    require(
        queries <= keys,
        f"q: {queries} queries are more than the {keys} keys, expected keys for all past tokens",
    )
    first = keys - queries if offset is None else number("offset", offset, low=0, integer=True)
    require(
        first + queries <= keys,
        f"offset: {first} places the last of {queries} queries behind the last of {keys} keys",
    )
    # What follows the last query is not seen.
    keys = first + queries
    real, labels = _real(padding, q, k, keys), _labels(documents, q, k, keys)
    if labels is not None:
        return _packed(real, labels, block_size, keys, first)
    ends = None if real is None else row_ends(real)
    return placed(block_size, keys, first, ends, q.device)


def row_ends(real: Tensor) -> tuple[Tensor, Tensor]:
    """The first real token of each row and the place behind its last, [rows, 1] each; holes are refused."""
    length = real.sum(1, keepdim=True)
    begin = real.int().argmax(1, keepdim=True)
    position = torch.arange(real.shape[1], device=real.device)
    span = (position >= begin) & (position < begin + length)
    require(
        torch.equal(span, real), "padding: the mask has holes, expected padding at the ends of a row only"
    )
    return begin, begin + length


def placed(
    size: int, keys: int, offset: int, ends: tuple[Tensor, Tensor] | None, device: torch.device
) -> Blocks:
    """The blocks of rows that hold one document each, between its ``ends``, or of rows without padding."""
    position = torch.arange(offset, keys, device=device)[None]
    starts = torch.arange(0, keys, size, device=device)[None]
    if ends is None:
        own = position // size
        stops = (starts + size).clamp(max=keys)
        return Blocks(size, keys, offset, starts, stops, own, torch.zeros_like(own), position % size, True)
    begin, end = ends
    starts = (starts + begin).minimum(end)
    real = (position >= begin) & (position < end)
    own = torch.where(real, (position - begin) // size, -1)
    within = (position - begin) % size
    return Blocks(
        size, keys, offset, starts, (starts + size).minimum(end), own, torch.zeros_like(own), within, False
    )


def _packed(real: Tensor | None, labels: Tensor, size: int, keys: int, offset: int) -> Blocks:
    device = labels.device
    shape = (max(1 if x is None else x.shape[0] for x in (real, labels)), keys)
    real = torch.ones(shape, dtype=torch.bool, device=device) if real is None else real.expand(shape)
    row_ends(real)
    labels = labels.expand(shape)
    before = F.pad(real, (1, 0))[:, :-1]
    fresh = real & (~before | (labels != F.pad(labels, (1, 0))[:, :-1]))
    position = torch.arange(keys, device=device).expand(shape)
    opened = torch.where(fresh, position, 0).cummax(1).values
    opens = real & ((position - opened) % size == 0)
    own = opens.cumsum(1) - 1
    count = max(int(opens.sum(1).max()), 1)
    place = torch.where(real, own, count)
    starts = own.new_zeros(shape[0], count + 1).scatter_(1, torch.where(opens, own, count), position)[
        :, :count
    ]
    lengths = own.new_zeros(shape[0], count + 1).scatter_add_(1, place, real.long())[:, :count]
    asked = slice(offset, keys)
    return Blocks(
        size,
        keys,
        offset,
        starts,
        starts + lengths,
        torch.where(real, own, -1)[:, asked],
        torch.where(real, own.gather(1, opened), 0)[:, asked],
        ((position - opened) % size)[:, asked],
        False,
    )


def _real(padding: Tensor | None, q: Tensor, k: Tensor, keys: int) -> Tensor | None:
    if padding is None:
        return None
    fits = isinstance(padding, Tensor) and padding.ndim == 2
    require(
        fits and padding.shape[0] in (1, k.shape[0]) and padding.shape[1] >= keys,
        f"padding: got {show(padding)}, expected the 2-D mask [batch, {keys} keys] of a tokenizer, 1 for real tokens",
    )
    real = padding[:, :keys].to(device=q.device).bool()
    return None if bool(real.all()) else real


def _labels(documents: Tensor | None, q: Tensor, k: Tensor, keys: int) -> Tensor | None:
    if documents is None:
        return None
    expected = f"documents: got {show(documents)}, expected [batch, {keys} keys] document numbers, or cumulative lengths from 0 to {keys}"
    require(isinstance(documents, Tensor) and not documents.is_floating_point(), expected)
    documents = documents.to(q.device)
    if documents.ndim == 1:
        rising = bool((documents.diff() >= 0).all()) and len(documents) > 1
        require(rising and int(documents[0]) == 0 and int(documents[-1]) >= keys, expected)
        position = torch.arange(keys, device=q.device)
        documents = torch.searchsorted(documents[1:].contiguous(), position, right=True)[None]
    require(documents.ndim == 2 and documents.shape[0] in (1, k.shape[0]), expected)
    require(documents.shape[1] >= keys, expected)
    labels = documents[:, :keys].long()
    return None if bool((labels == labels[:, :1]).all()) else labels
