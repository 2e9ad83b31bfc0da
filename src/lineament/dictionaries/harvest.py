"""Activations of a model, and the loss's gradient at them, as a stream of shuffled rows that never touches the disk.

Sequences are permuted by index and fill a buffer; the rows of the b-th buffer are shuffled by (seed, b). Where a stream stands is therefore two
numbers, (buffer, row), and a resumed one gives the same rows. Without gradients the forward ends at the site; with them there is one backward through
the layers above it, parameters frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lineament.core.batching import auto_batch
from lineament.core.checks import InputError, number, require, show
from lineament.core.checks import seed as checked_seed
from lineament.core.models import frozen
from lineament.core.sites.activations import capture
from lineament.dictionaries.sequences import Batch, Gradient, Sequences, checked_gradient, objective
from lineament.dictionaries.splice import features_last, site_in

TOKENS_AT_ONCE = 4096  # positions in one forward: beyond that larger batches no longer pay on a CPU
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclass(frozen=True)
class Rows:
    """Some rows of a stream.

    Attributes:
        x: (rows, d), activations; of several sites {site: (rows, d)}.
        gradient: of the same form, of the summed loss; ``None`` where none was asked for.
        tokens: (rows), token ids, -1 where the inputs are no tokens.
        sequences, positions: (rows), where in the data each row comes from.
        after: (buffer, row): where the stream stands behind these rows.
    """

    x: Any
    gradient: Any
    tokens: Tensor
    sequences: Tensor
    positions: Tensor
    after: tuple[int, int] = (0, 0)

    def __len__(self) -> int:
        return len(self.tokens)

    def take(self, rows: Any, after: tuple[int, int] = (0, 0)) -> Rows:
        """Some of the rows."""
        x, g, *marks = (_each(lambda t: t[rows], value) for value in _fields(self))
        return Rows(x, g, *marks, after=after)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def at(self, site: str) -> Rows:
        """The rows of one of several sites."""
        x = self.x[site]
        g = None if self.gradient is None else self.gradient[site]
        return Rows(x, g, self.tokens, self.sequences, self.positions, self.after)


def harvest(
    model: nn.Module,
    data: Any,
    *,
    site: str | Sequence[str],
    gradient: Gradient | None = None,
    exclude: Any = "special",
    buffer: int | str = "1GB",
    seed: int = 0,
) -> Harvest:
    """A stream of shuffled rows of what passes at a site: iterate over it, or take :meth:`Harvest.batches`.

    Args:
        data: as :class:`lineament.dictionaries.sequences.Sequences` takes it: token ids, ``(inputs, targets)``, a ``Dataset`` or ``DataLoader``, a path.
        site: one, or several at once. Of a convolution's maps each position is a row, of heads (``:z``) each token.
        gradient: ``"labels"``, ``"sampled"``, ``"max_logit"`` or a function of (logits, batch): rows then have the gradient of that loss, summed over
            tokens, so that it does not hang on the batch, padding or what else is in it. ``None``: none, and forwards end at the site.
        exclude: ``"special"``: BOS, EOS and padding stay in the context and give no rows; token ids; ``None``.
        buffer: the memory that rows are shuffled in: bytes, or ``"500MB"``.
        seed: of the order, the shuffle and sampled labels.

    Raises:
        InputError: an unknown site, one without floating-point numbers, data or a gradient that cannot be used.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> rows = harvest(net, (torch.randn(10, 2), torch.zeros(10).long()), site="1", gradient="labels")
    >>> [(len(part), part.x.shape[1], part.gradient.shape[1]) for part in rows.batches(6)]
    [(6, 3, 3), (4, 3, 3)]
    """
    return Harvest(model, data, site=site, gradient=gradient, exclude=exclude, buffer=buffer, seed=seed)


class Harvest:
    """See :func:`harvest`.

    Attributes:
        zero_rows: rows so far whose gradient was zero, for which a gradient-aware selection is that of plain TopK.
        rows: rows so far.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        site: str | Sequence[str],
        gradient: Gradient | None = None,
        exclude: Any = "special",
        buffer: int | str = "1GB",
        seed: int = 0,
        share: tuple[int, int] = (0, 1),
    ):
        self.model, self.seed = model, checked_seed("seed", seed)
        self.several = not isinstance(site, str)
        names = [site] if isinstance(site, str) else list(site)
        self.sites = [site_in(model, None, name) for name in names]
        self.gradient = checked_gradient(gradient)
        self.bytes = _bytes(buffer)
        self.sequences = Sequences(model, data, exclude=exclude)
        self._share = share
        self.rows = self.zero_rows = 0
        self._whole: Rows | None = None
        self._per_buffer, self._positions = 0, 1

    @property
    def width(self) -> int:
        """d of the (first) site; it takes one forward if nothing was harvested yet."""
        x = self._first().x
        return (next(iter(x.values())) if self.several else x).shape[1]

    def __iter__(self) -> Iterator[Rows]:
        """One pass, a buffer at a time."""
        return self.batches(None)

    def batches(
        self, batch_size: int | None, *, after: tuple[int, int] = (0, 0), passes: int | None = 1
    ) -> Iterator[Rows]:
        """Shuffled rows, ``batch_size`` at a time (the last of a pass may be fewer; ``None``: a buffer at a time).

        Args:
            after: where to go on, as :attr:`Rows.after` says it.
            passes: how often over the data, each time in another order; ``None``: without end.
        """
        if batch_size is not None:
            number("batch_size", batch_size, low=1, integer=True)
        first, done = after
        held: Rows | None = None
        for block, rows, last in self._buffers(first, passes):
            last = last and passes is not None
            order = torch.randperm(len(rows), generator=seeded(self.seed, block))
            start, done = done, 0
            size = batch_size or max(len(rows), 1)
            if held is not None:
                need = size - len(held)
                part = rows.take(order[:need])
                held = joined([held, part], (block, need))
                start = len(part)
                if len(held) < size and not last:
                    continue
                yield held
                held = None
            while start < len(rows):
                stop = min(start + size, len(rows))
                at = (block + 1, 0) if stop == len(rows) else (block, stop)
                part = rows.take(order[start:stop], at)
                start = stop
                if len(part) < size and not last:
                    held = part
                else:
                    yield part

    def _buffers(self, first: int, passes: int | None) -> Iterator[tuple[int, Rows, bool]]:
        """(number, unshuffled rows, whether it ends a pass) from a buffer on."""
        if not self.sequences.indexed:
            yield from self._streamed(first, passes)
            return
        count = self._sequences_a_buffer()
        mine = len(range(self._share[0], len(self.sequences), self._share[1]))
        a_pass = max(1, math.ceil(mine / count))
        block = first
        while passes is None or block < passes * a_pass:
            epoch, place = divmod(block, a_pass)
            if self._whole is not None and a_pass == 1:
                rows = self._whole
            else:
                order = torch.randperm(len(self.sequences), generator=seeded(self.seed, epoch, 1))
                order = order[self._share[0] :: self._share[1]]
                rows = self.rows_of(order[place * count : (place + 1) * count])
                # Data that fit the buffer pass the model once.
                self._whole = rows if a_pass == 1 else None
            yield block, rows, place == a_pass - 1
            block += 1

    def _streamed(self, first: int, passes: int | None) -> Iterator[tuple[int, Rows, bool]]:
        """Data without an index, in their own order."""
        block, turn = 0, 0
        while passes is None or turn < passes:
            held: list[Rows] = []
            size, any_rows = 0, False
            for place, batch in enumerate(self.sequences.walk(0)):
                if place % self._share[1] != self._share[0]:
                    continue
                part = self._read(batch)
                held.append(part)
                size += _size(part)
                any_rows = True
                if size >= self.bytes:
                    if block >= first:
                        yield block, joined(held), False
                    block, held, size = block + 1, [], 0
            require(any_rows, "data: gave no batches, expected at least one")
            if held and block >= first:
                yield block, joined(held), True
            block, turn = block + 1, turn + 1

    def rows_of(self, index: Tensor) -> Rows:
        """The rows of some sequences, in their order."""

        def some(start: int, stop: int) -> Rows:
            return self._read(self.sequences.take(index[start:stop]))

        self._sequences_a_buffer()
        most = max(1, TOKENS_AT_ONCE // max(1, self._positions))
        return joined(
            list(auto_batch(some, len(index), most=most, memory=(Harvest.rows_of, self._positions)))
        )

    def _first(self) -> Rows:
        if self._whole is not None:
            return self._whole
        if not self.sequences.indexed:
            return self._read(next(iter(self.sequences.walk(0))))
        return self._read(self.sequences.take(torch.zeros(1, dtype=torch.long)))

    def _sequences_a_buffer(self) -> int:
        """How many sequences fill the buffer, by the rows that the first ones give."""
        if not self._per_buffer:
            rows = self._read(self.sequences.take(torch.arange(min(4, len(self.sequences)))), count=False)
            each = _size(rows) / max(len(rows), 1) * self._positions
            self._per_buffer = max(1, int(self.bytes // max(1, each)))
        return self._per_buffer

    def _read(self, batch: Batch, count: bool = True) -> Rows:
        """The rows of one forward (and backward)."""
        names = [site.name for site in self.sites]
        wants = self.gradient is not None
        with frozen(self.model), torch.set_grad_enabled(wants):
            with capture(self.model, names, gradients=wants, stop_early=not wants) as acts:
                output = batch.call(self.model)
            values = {name: acts[name] for name in names}
            for name, value in values.items():
                require(
                    value.is_floating_point(),
                    f"site {name!r}: {show(value)} passes there, expected floating-point numbers",
                )
            slopes: dict[str, Tensor] = {}
            if wants:
                assert self.gradient is not None
                slopes = acts.gradients(objective(self.gradient, output, batch, self.seed))
        rows, marks = {}, None
        for site in self.sites:
            last = features_last(values[site.name].detach(), site)
            marks = _marks(batch, last) if marks is None else marks
            require(
                last.shape[:-1].numel() == len(marks[0]),
                f"site: {site.name!r} gives {last.shape[:-1].numel()} rows and {names[0]!r} {len(marks[0])}; harvest sites of unequal positions one by one",
            )
            keep = marks[3]
            g = features_last(slopes[site.name], site).reshape(-1, last.shape[-1])[keep] if wants else None
            rows[site.name] = (last.reshape(-1, last.shape[-1])[keep], g)
        assert marks is not None
        self._positions = max(1, len(marks[0]) // max(1, len(batch)))
        found = [_checked(name, a, b, marks[1][marks[3]]) for name, (a, b) in rows.items()]
        x = dict(zip(names, (pair[0] for pair in found))) if self.several else found[0][0]
        g = None
        if wants:
            g = dict(zip(names, (pair[1] for pair in found))) if self.several else found[0][1]
        tokens, sequences, positions, keep = marks
        if count:
            self.rows += len(found[0][0])
            if wants:
                self.zero_rows += int((found[0][1].abs().amax(-1) == 0).sum()) if len(found[0][1]) else 0
        return Rows(x, g, tokens[keep], sequences[keep], positions[keep])


def _checked(name: str, x: Tensor, g: Tensor | None, sequences: Tensor) -> tuple[Tensor, Any]:
    """The rows, if they are finite."""
    for what, value in (("activations", x), ("gradients", g)):
        if value is None or not value.numel() or bool(torch.isfinite(value.sum())):
            continue
        bad = ~torch.isfinite(value).all(1)
        where = sorted(set(sequences[bad].tolist()))
        more = f" and {len(where) - 5} more" if len(where) > 5 else ""
        require(
            not where,
            f"site {name!r}: {what} of {int(bad.sum())} rows are NaN or infinite, in sequences {', '.join(map(str, where[:5]))}{more}; expected finite values only",
        )
    return x, g


def _marks(batch: Batch, last: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, sequences, positions of the rows of a site, and which of them count."""
    shape = last.shape[:-1]
    inner = max(1, shape[1:].numel())
    sequences = batch.index.to(last.device).repeat_interleave(inner) if len(batch.index) == shape[0] else None
    if sequences is None:
        raise InputError(
            f"site: {tuple(last.shape)} passes there for {len(batch)} sequences, expected the batch first; choose a site of the model's own layers"
        )
    positions = torch.arange(inner, device=last.device).repeat(shape[0])
    aligned = batch.ids is not None and batch.ids.shape == shape
    if not aligned:
        every = torch.ones(shape.numel(), dtype=torch.bool, device=last.device)
        return torch.full_like(sequences, -1), sequences, positions, every
    assert batch.ids is not None and batch.mask is not None
    return batch.ids.reshape(-1).long(), sequences, positions, batch.mask.reshape(-1)


def _fields(rows: Rows) -> tuple[Any, ...]:
    return rows.x, rows.gradient, rows.tokens, rows.sequences, rows.positions


def _each(change: Any, value: Any) -> Any:
    if value is None:
        return None
    return {key: change(part) for key, part in value.items()} if isinstance(value, dict) else change(value)


def joined(parts: Sequence[Rows], after: tuple[int, int] = (0, 0)) -> Rows:
    """Rows one after the other."""
    if len(parts) == 1:
        return parts[0].take(slice(None), after)

    def cat(values: Sequence[Any]) -> Any:
        if values[0] is None:
            return None
        if isinstance(values[0], dict):
            return {key: torch.cat([value[key] for value in values]) for key in values[0]}
        return torch.cat(list(values))

    x, g, *marks = (cat(values) for values in zip(*(_fields(part) for part in parts)))
    return Rows(x, g, *marks, after=after)  # pyright: ignore[reportCallIssue]


def _size(rows: Rows) -> int:
    tensors = [
        t for v in _fields(rows) if v is not None for t in (v.values() if isinstance(v, dict) else [v])
    ]
    return sum(t.nbytes for t in tensors)


def seeded(*numbers: int) -> torch.Generator:
    """A generator seeded by several numbers."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    )


def _bytes(buffer: Any) -> int:
    """A number of bytes.

    >>> _bytes("1.5 MB")
    1500000
    """
    if isinstance(buffer, str):
        told = re.fullmatch(r"\s*([\d.]+)\s*([kmg]?)b?\s*", buffer.lower())
        try:
            return int(float(told[1]) * _UNITS[told[2]]) if told else number("buffer", buffer, low=1)
        except ValueError as error:
            raise InputError(
                f"buffer: got {show(buffer)}, expected bytes such as '500MB' or 2**30"
            ) from error
    return number("buffer", buffer, low=1, integer=True)
