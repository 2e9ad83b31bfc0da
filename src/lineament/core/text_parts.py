r"""The tokens of a piece of text where it follows other text: tokenised by itself it would get a beginning of its own.

SentencePiece puts a space before every text, so that ``" Paris"`` alone is ``▁ ▁Paris`` and ``"Paris"`` is ``▁Paris``; behind a prompt the model
reads ``▁Paris`` and ``Paris``. The tokens of a piece are therefore those that it adds to the text before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def tail_tokens(tokenizer: Any, before: str, piece: str) -> list[int]:
    """The ids of ``piece`` behind ``before``.

    Where the two grow together (``"hou"`` and ``"se"``), so that the tokens before would change, the piece is read as at the beginning of a word.

    >>> class Marked:  # as SentencePiece does: every text gets a space before it, and words begin with one
    ...     def __call__(self, text, **_): return {"input_ids": [len(word) for word in f" {text}".split(" ")[1:]]}
    >>> Marked()(" Paris")["input_ids"], tail_tokens(Marked(), "it is", " Paris")
    ([0, 5], [5])
    """
    return next(_readings(tokenizer, before, piece))


def one_token(tokenizer: Any, before: str, piece: str) -> list[int]:
    """As :func:`tail_tokens`; or another reading of the piece, by itself or behind a line break, where only that is a single token."""
    readings = list(_readings(tokenizer, before, piece))
    return next((ids for ids in readings if len(ids) == 1), readings[0])


def _readings(tokenizer: Any, before: str, piece: str) -> Iterator[list[int]]:
    alone = _ids(tokenizer, piece)
    if not before:
        # Nothing is before it: it begins the text.
        yield alone
    for context in filter(None, (before, "\n")):
        head, whole = _ids(tokenizer, context), _ids(tokenizer, context + piece)
        if whole[: len(head)] == head:
            yield whole[len(head) :]
    yield alone


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
