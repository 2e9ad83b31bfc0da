"""Texts as a text classifier takes them: ids of its own tokenizer, rows of several lengths side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import InputError, require
from lineament.data.samples import Samples

TASKS = ("classes", "tokens", "masked")
# What columns of texts are called.
TEXTS = ("text", "sentence", "review", "content", "document", "prompt", "body", "title")
NONE = (
    "texts are read for a text classifier only: a Hugging Face directory of one, or a pair (model, tokenizer)"
)


@dataclass(frozen=True)
class TextReader:
    """What makes samples of texts: a tokenizer, and whether texts have a target (``"classes"``), their words (``"tokens"``) or hidden words (``"masked"``)."""

    tokenizer: Any
    task: str = "classes"
    seed: int = 0


def text_samples(texts: Sequence[str], tokenizer: Any, **rest: Any) -> Samples:
    """Samples of texts: their ids, padded on the right, each with its length; ``rest`` are the other fields.

    Longer texts than the tokenizer allows are cut there, and their number is said.

    Raises:
        InputError: no tokenizer.
    """
    require(tokenizer is not None, f"data: it holds texts, and {NONE}")
    most = tokenizer.model_max_length if tokenizer.model_max_length < 2**20 else None
    rows = [tokenizer(text, truncation=most is not None, max_length=most)["input_ids"] for text in texts]
    whole = [len(tokenizer.tokenize(t)) for t, r in zip(texts, rows) if len(r) == most] if most else []
    cut = sum(n + tokenizer.num_special_tokens_to_add() > (most or 0) for n in whole)
    empty = next((k for k, row in enumerate(rows) if not row), None)
    require(
        empty is None,
        f"data: of text {0 if empty is None else empty + 1}, {texts[empty or 0][:40]!r}, the tokenizer makes no token",
    )
    padding = tokenizer.pad_token_id or 0
    ids, lengths = padded([torch.tensor([row]) for row in rows], padding)
    found = Samples(inputs=ids, lengths=lengths, argument="input_ids", **rest)
    notes = [
        f"{len(texts):,} texts are read as {between(lengths)} tokens each, those of one length together, so that none is padded"
    ]
    if cut:
        notes.append(
            f"{cut} of {len(texts)} texts are cut after {most} tokens, the most that the model takes"
        )
    return replace(found, notes=(*found.notes, *notes))


def between(lengths: Tensor) -> str:
    """How long samples are, from the shortest to the longest.

    >>> between(torch.tensor([3, 8, 5])), between(torch.tensor([8, 8]))
    ('3 to 8', '8')
    """
    low, high = int(lengths.min()), int(lengths.max())
    return f"{low} to {high}" if low < high else str(high)


def padded(parts: Sequence[Tensor], padding: float = 0) -> tuple[Tensor, Tensor]:
    """Batches of several widths in one tensor, and the width of each row before.

    Raises:
        InputError: they differ in another dimension than the second.

    >>> rows, lengths = padded([torch.ones(1, 2), torch.ones(2, 3)])
    >>> rows[0].tolist(), lengths.tolist()
    ([1.0, 1.0, 0.0], [2, 3, 3])
    """
    shapes = sorted({tuple(part.shape[2:]) for part in parts})
    if len(shapes) > 1 or any(part.ndim < 2 for part in parts):
        found = sorted({tuple(part.shape[1:]) for part in parts})
        raise InputError(
            f"data: samples have shapes {found[0]} and {found[-1]}, expected all alike, or sequences that differ in length only"
        )
    width = max(part.shape[1] for part in parts)
    whole = parts[0].new_full((sum(map(len, parts)), width, *parts[0].shape[2:]), padding)
    start = 0
    for part in parts:
        whole[start : start + len(part), : part.shape[1]] = part
        start += len(part)
    return whole, torch.cat([torch.full((len(part),), part.shape[1]) for part in parts])
