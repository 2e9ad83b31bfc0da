"""A text as sequences of token ids, all of one length: what a language model is shown when its activations are studied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import InputError, number, require
from lineament.core.files import like_files
from lineament.load.hub import first_line

# Letters tokenised at once: tokenizers take time beyond linear in very long texts.
_LETTERS = 200_000


def token_sequences(
    tokenizer: Any, path: str | Path, *, length: int = 128, most: int | None = None
) -> Tensor:
    """(sequences, length) ids of a text file, one after the other, each behind the tokenizer's BOS where it has one; or ids from an ``.npy`` file.

    Args:
        length: positions of a sequence. most: read so many sequences at most, from the beginning.

    Raises:
        InputError: no such file, no UTF-8, a text shorter than one sequence, an array of another form.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ids.npy"
    >>> np.save(path, np.arange(12).reshape(3, 4))
    >>> token_sequences(None, path, most=2).shape
    torch.Size([2, 4])
    """
    number("length", length, low=2, integer=True)
    path = Path(path)
    require(
        path.is_file(),
        f"data: {str(path)!r} {'is a folder' if path.is_dir() else f'does not exist{like_files(path)}'}; expected a text file, or an .npy file of token ids",
    )
    if path.suffix == ".npy":
        try:
            found = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.int64))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(f"data: {str(path)!r} is no array of token ids ({first_line(error)})") from error
        require(
            found.ndim == 2 and found.numel() > 0,
            f"data: {str(path)!r} has shape {tuple(found.shape)}, expected (sequences, positions)",
        )
        return found[:most]
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data: {str(path)!r} cannot be read as UTF-8 text ({error})") from error
    bos = getattr(tokenizer, "bos_token_id", None)
    inner = length - (bos is not None)
    ids: list[int] = []
    for start in range(0, len(text), _LETTERS):
        ids += tokenizer(text[start : start + _LETTERS], add_special_tokens=False, verbose=False)["input_ids"]
        if most is not None and len(ids) >= most * inner:
            break
    count = len(ids) // inner
    require(count > 0, f"data: {str(path)!r} has {len(ids)} tokens, expected at least {inner}, one sequence")
    rows = torch.tensor(ids[: count * inner]).view(count, inner)[:most]
    return rows if bos is None else torch.cat([torch.full((len(rows), 1), bos), rows], 1)
