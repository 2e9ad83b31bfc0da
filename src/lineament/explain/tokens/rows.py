"""Rows of ids of several lengths in few forwards: padded where the model takes a mask, one forward a length where it does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# What goes through one forward: ids, mask, how many columns are an encoder's source, and the rows' places among all.
Group = tuple[Tensor, Tensor | None, int, Tensor]


def grouped(rows: Sequence[Tensor], pad_at: int | None, most: int | str) -> Iterator[Group]:
    """Rows of a causal model or a function, with those of one prompt together.

    Args:
        rows: (rows, tokens) for each prompt.
        pad_at: the column before which shorter rows are filled up; ``None`` for a model that takes no mask.
        most: rows in one forward, by which prompts of like length share it.

    >>> [ids.tolist() for ids, *_ in grouped([torch.tensor([[1, 2]]), torch.tensor([[3]])], 0, 8)]
    [[[0, 3], [1, 2]]]
    """
    places = _places(rows)
    if len({r.shape[1] for r in rows}) == 1:
        yield torch.cat(list(rows)), None, 0, torch.cat(places)
    elif pad_at is not None:
        for chosen in _of_like_length(rows, most):
            parts = [rows[i] for i in chosen]
            ids, mask = _padded(parts, max(r.shape[1] for r in parts), pad_at)
            yield ids, None if bool(mask.all()) else mask, 0, torch.cat([places[i] for i in chosen])
    else:
        for length in sorted({r.shape[1] for r in rows}):
            chosen = [i for i, r in enumerate(rows) if r.shape[1] == length]
            yield torch.cat([rows[i] for i in chosen]), None, 0, torch.cat([places[i] for i in chosen])


def grouped_sources(rows: Sequence[Tensor], sources: Sequence[int]) -> Iterator[Group]:
    """Rows of an encoder-decoder, source and target prefix side by side.

    Encoders number their positions from the left, whatever the mask, so that a source is padded on its right; target prefixes of several
    lengths go through one forward a length.
    """
    places = _places(rows)
    if len({(r.shape[1], s) for r, s in zip(rows, sources)}) == 1:
        yield torch.cat(list(rows)), None, sources[0], torch.cat(places)
        return
    prefixes = [r.shape[1] - s for r, s in zip(rows, sources)]
    for prefix in sorted(set(prefixes)):
        chosen = [i for i, p in enumerate(prefixes) if p == prefix]
        source = max(sources[i] for i in chosen)
        padded = [_padded([rows[i]], source + prefix, sources[i]) for i in chosen]
        ids, mask = (torch.cat([pair[j] for pair in padded]) for j in (0, 1))
        yield ids, mask, source, torch.cat([places[i] for i in chosen])


def _places(rows: Sequence[Tensor]) -> list[Tensor]:
    return list(torch.arange(sum(map(len, rows))).split([len(r) for r in rows]))


def _of_like_length(rows: Sequence[Tensor], most: int | str) -> list[list[int]]:
    """Which prompts share a forward of at most so many rows: neighbours by length, so that little is padded."""
    groups: list[list[int]] = [[]]
    held = 0
    for i in sorted(range(len(rows)), key=lambda i: rows[i].shape[1]):
        if groups[-1] and isinstance(most, int) and held + len(rows[i]) > most:
            groups.append([])
            held = 0
        groups[-1].append(i)
        held += len(rows[i])
    return groups


def _padded(rows: Sequence[Tensor], width: int, at: int) -> tuple[Tensor, Tensor]:
    """Rows of one width with their mask; what is missing is put in before column ``at``."""
    ids, mask = [], []
    for r in rows:
        present, missing = torch.ones_like(r), r.new_zeros(len(r), width - r.shape[1])
        # Any id will do: what is masked is not looked at.
        ids.append(torch.cat([r[:, :at], missing, r[:, at:]], 1))
        mask.append(torch.cat([present[:, :at], missing, present[:, at:]], 1))
    return torch.cat(ids), torch.cat(mask)
