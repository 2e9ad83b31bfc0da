"""Why this token after this prompt? The one question that every token attribution answers, asked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.explain.tokens.next_token import NextToken, not_nan
from lineament.explain.tokens.prompts import Prompt, different, read_all, token_id


@dataclass(frozen=True)
class Question:
    """A model, a prompt, and the token asked about; with ``contrast``, why it rather than that one."""

    face: NextToken
    prompt: Prompt
    target: int
    contrast: int | None
    probability: float
    vocabulary: int

    @property
    def rows(self) -> Int[Tensor, "1 tokens"]:
        return self.prompt.ids.to(self.face.device)[None]

    def value(self, scores: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows"]:
        """log p(target), or log p(target) - log p(contrast)."""
        own = scores[:, self.target]
        return not_nan(own - (scores.logsumexp(1) if self.contrast is None else scores[:, self.contrast]))

    def values(self, rows: Int[Tensor, "rows tokens"], batch_size: int | str) -> Float[Tensor, "rows"]:
        """:meth:`value` of rows of ids, in float64."""
        found = self.face.logits(
            [rows], [self.prompt.source], then=lambda s, index: self.value(s).double(), batch_size=batch_size
        )
        return found.cpu()

    def spread(self, scores: Float[Tensor, "scored"]) -> Float[Tensor, "tokens"]:
        """Scores of the scored positions among all positions; 0 elsewhere."""
        wide = scores.new_zeros(len(self.prompt.ids))
        wide[self.prompt.places] = scores
        return wide


def ask(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    targets: Sequence[Any],
    contrasts: Sequence[Any],
    prefixes: Sequence[Any],
    **reading: Any,
) -> list[Question]:
    """Questions to one model, one for each prompt, checked with as few forwards as the prompts' lengths allow.

    Raises:
        InputError: as :func:`lineament.explain.tokens.prompts.read`; a target or contrast that is no one token.
    """
    face = model if isinstance(model, NextToken) else NextToken(model, tokenizer)
    read_ones = read_all(face, prompts, prefixes, several=len(prompts) > 1, **reading)
    with face.ready():
        every = face.logits([p.ids[None] for p in read_ones], [p.source for p in read_ones])
        every = not_nan(every).cpu()
    found = []
    for p, first, target, contrast in zip(read_ones, every, targets, contrasts):
        wanted = int(first.argmax()) if target is None else token_id(face, "target", target, len(first))
        other = None
        if contrast is not None:
            other = different(face, token_id(face, "contrast", contrast, len(first)), wanted)
        log_p = first.log_softmax(0)
        chance = log_p[wanted].exp() if other is None else torch.sigmoid(log_p[wanted] - log_p[other])
        found.append(Question(face, p, wanted, other, float(chance), len(first)))
    return found
