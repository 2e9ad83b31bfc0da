"""Why this token after this prompt? The one question that every token attribution answers, asked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lineament.explain.tokens.next_token import NextToken, not_nan
from lineament.explain.tokens.prompts import Prompt, different, read, token_id


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


def ask(model: Any, tokenizer: Any, prompt: Any, target: Any, contrast: Any, **reading: Any) -> Question:
    """The question, checked with one forward.

    Raises:
        InputError: as :func:`lineament.explain.tokens.prompts.read`; a target or contrast that is no one token.
    """
    face = model if isinstance(model, NextToken) else NextToken(model, tokenizer)
    p = read(face, prompt, **reading)
    with face.ready():
        first = not_nan(face.logits([p.ids[None]], [p.source])).cpu()
    wanted = int(first.argmax()) if target is None else token_id(face, "target", target, first.shape[1])
    other = None
    if contrast is not None:
        other = different(face, token_id(face, "contrast", contrast, first.shape[1]), wanted)
    log_p = first.log_softmax(1)[0]
    chance = log_p[wanted].exp() if other is None else torch.sigmoid(log_p[wanted] - log_p[other])
    return Question(face, p, wanted, other, float(chance), first.shape[1])
