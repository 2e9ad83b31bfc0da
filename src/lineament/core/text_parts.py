r"""Text as a model reads it, in parts and in batches: the tokens of a piece that follows other text, and padding that is no text.

SentencePiece puts a space before every text, so that ``" Paris"`` alone is ``▁ ▁Paris`` and ``"Paris"`` is ``▁Paris``; behind a prompt the model
reads ``▁Paris`` and ``Paris``. The tokens of a piece are therefore those that it adds to the text before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import require


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


@contextmanager
def unpadded(model: Any) -> Iterator[None]:
    """A block in which a classifier of rows that hold no padding reads each to its end.

    transformers' causal classifiers (GPT-2's, Llama's) take a row's last token that is not the padding's, and no batch at all where their
    configuration names no padding token.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    before = getattr(config, "pad_token_id", -1)
    if before is not None:
        yield
        return
    config.pad_token_id = -1
    try:
        yield
    finally:
        config.pad_token_id = before


def refuse_padding(what: str, tokenizer: Any, ids: Tensor, instead: str) -> None:
    """Refuse ids with padding in them that comes without a mask: it would be read as text.

    A padding token that has another meaning too (GPT-2's end of text) is padding where it stands more than once at an end of a row.

    Raises:
        InputError: which says how many there are, and what to give ``instead``.
    """
    padding, *others = (
        getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "unk")
    )
    if padding is None:
        return
    found = ids.reshape(-1, ids.shape[-1]) == padding
    if padding in others:
        # Runs of it from either end; one alone may begin or end the text.
        runs = [side.long().cumprod(1) for side in (found, found.flip(1))]
        found = torch.cat([run * (run.sum(1, keepdim=True) > 1) for run in runs], 1)
    count = int(found.sum())
    require(
        count == 0,
        f"{what}: it holds {count} padding tokens ({tokenizer.decode([padding])!r}, id {padding}), which would be read as text; {instead}",
    )


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
