"""Where language models with different tokenizers meet in a text: at the ends of the words that every one of them cuts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import InputError, require, show
from lineament.measure.alignment.steps import Step


def text_steps(
    texts: Sequence[str], tokenizers: Sequence[Any], *, positions: int, seed: int = 0
) -> list[Step]:
    """Texts for several language models: at the ends of the words that every tokenizer cuts there.

    Raises:
        InputError: a tokenizer that does not say which characters its tokens stand for; texts without a common place.
    """
    texts = checks.listed("data", texts, "texts")
    require(
        all(isinstance(text, str) for text in texts),
        f"data: got {show(texts)}, expected texts, as there are tokenizers",
    )
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    steps = []
    for rows in order.split(16):
        cut = [[_tokens(tokenizer, texts[int(row)]) for row in rows] for tokenizer in tokenizers]
        kept, places = [], []
        for at, row in enumerate(rows.tolist()):
            ends = [
                {end: token for token, end in enumerate(net[at][1]) if _word_ends(texts[row], end)}
                for net in cut
            ]
            common = sorted(set.intersection(*map(set, ends)))
            if len(common) > positions:
                generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
                some = torch.randperm(len(common), generator=generator)[:positions].sort().values
                common = [common[i] for i in some.tolist()]
            if common:
                kept.append(at)
                places.append([[end[place] for place in common] for end in ends])
        if not kept:
            continue
        longest = max(len(each[0]) for each in places)
        present = torch.tensor([[k < len(each[0]) for k in range(longest)] for each in places])
        index = [
            torch.tensor([each[n] + [0] * (longest - len(each[n])) for each in places])
            for n in range(len(tokenizers))
        ]
        inputs = [_padded([net[at][0] for at in kept]) for net in cut]
        steps.append(Step(inputs, rows[kept], index, present))
    require(
        bool(steps), "data: in no text do the tokenizers end a word at the same place; expected plain texts"
    )
    return steps


def _tokens(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Token ids, and where in the text each ends (0 where it stands for nothing)."""
    try:
        found = tokenizer(text, return_offsets_mapping=True)
    except NotImplementedError as error:
        raise InputError(
            f"tokenizers: {type(tokenizer).__name__} does not say which characters a token stands for, expected a fast tokenizer"
        ) from error
    return list(found["input_ids"]), [end if end > start else 0 for start, end in found["offset_mapping"]]


def _word_ends(text: str, end: int) -> bool:
    return end > 0 and not text[end - 1].isspace() and (end == len(text) or text[end].isspace())


def _padded(ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    longest = max(map(len, ids))
    return {
        "input_ids": torch.tensor([[*each, *[0] * (longest - len(each))] for each in ids]),
        "attention_mask": torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids]),
    }
