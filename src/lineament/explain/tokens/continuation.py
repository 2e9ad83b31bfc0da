"""A whole continuation explained: every generated token a question of its own, all of them asked together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lineament.core import checks
from lineament.explain.tokens.attribution import reagent
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.prompts import Prompt, read, shown
from lineament.explain.tokens.results import ContinuationAttribution


def explain_continuation(
    model: Any,
    tokenizer: Any,
    prompt: Any,
    continuation: Any = None,
    *,
    max_new_tokens: int = 10,
    stride: int = 1,
    explain: Callable[..., Any] = reagent,
    **options: Any,
) -> ContinuationAttribution:
    """Attribute every token of a continuation: to the prompt, and to what was generated before it.

    The continuation is generated once (greedily), and all its tokens are explained together, as so many prompts.

    Args:
        continuation: text or ids; ``None`` generates at most ``max_new_tokens`` tokens and stops at the end token.
        stride: explain every stride-th token only (the paper's sequence experiments: 2).
        explain: :func:`reagent`, or :func:`~lineament.explain.tokens.baselines.attribute_tokens` with its ``method``.
        options: of ``explain``. Of an encoder-decoder what was generated is scored with ``scope="all"``.

    >>> def next_number(ids):
    ...     return torch.nn.functional.one_hot((ids[:, -1] + 1) % 10, 10) * 0.9 + 0.01
    >>> found = explain_continuation(next_number, None, [3, 4, 5], max_new_tokens=2, min_steps=30)
    >>> found.continuation, found.matrix.argmax(1).tolist()
    ((6, 7), [2, 3])
    """
    checks.number("stride", stride, low=1, integer=True)
    checks.number("max_new_tokens", max_new_tokens, low=1, integer=True)
    face = NextToken(model, tokenizer)
    context = read(face, prompt)
    if continuation is None:
        made = _greedy(face, context, max_new_tokens)
    elif isinstance(continuation, str):
        checks.require(tokenizer is not None, "continuation: got text and no tokenizer; give ids")
        made = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
    else:
        made = [int(i) for i in continuation]
    ended = "the model ended at once" if continuation is None else f"got {checks.show(continuation)}"
    checks.require(len(made) > 0, f"continuation: no tokens to explain ({ended}), expected at least one")
    _refuse_unfit(face, context, made)
    positions = list(range(0, len(made), stride))
    if face.encoder_decoder:
        prompts: Any = [context.ids[: context.source]] * len(positions)
        options["target_prefix"] = [made[:i] for i in positions]
    else:
        prompts = [torch.cat([context.ids, torch.tensor(made[:i], dtype=torch.long)]) for i in positions]
    steps = explain(model, tokenizer, prompts, [made[i] for i in positions], **options)
    ids = torch.cat([context.ids, torch.tensor(made, dtype=torch.long)])
    width = max(len(a.tokens) for a in steps)
    matrix = torch.zeros(len(steps), width, dtype=steps[0].scores.dtype)
    for row, a in zip(matrix, steps):
        row[: len(a.scores)] = a.scores
    return ContinuationAttribution(
        tuple(shown(tokenizer, ids[:width])), matrix, tuple(positions), tuple(made), tuple(shown(tokenizer, made)), tuple(steps)
    )  # fmt: skip


def _refuse_unfit(face: NextToken, context: Prompt, made: list[int]) -> None:
    size, most = face.vocabulary, face.most_tokens
    wrong = [i for i in made if i < 0 or (size is not None and i >= size)]
    checks.require(
        not wrong,
        f"continuation: got id {wrong[0] if wrong else ''}, expected ids from 0 to {(size or 1) - 1}; is this the model's own tokenizer?",
    )
    # The last token is asked about and never an input.
    before = len(context.ids) - context.source
    checks.require(
        most is None or before + len(made) - 1 <= most,
        f"continuation: with its {len(made)} tokens and the {before} before it the model would read {before + len(made) - 1}, and it takes at most {most}; "
        "shorten one of them",
    )


def _greedy(face: NextToken, context: Prompt, most: int) -> list[int]:
    """The most probable continuation, up to an end token."""
    ends = getattr(face.config, "eos_token_id", None)
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    limit = face.most_tokens
    made: list[int] = []
    with face.ready():
        while len(made) < most:
            row = torch.cat([context.ids, torch.tensor(made, dtype=torch.long)])[None]
            if limit is not None and row.shape[1] - context.source >= limit:
                break
            token = int(face.logits([row], [context.source]).argmax())
            if token in ends:
                break
            made.append(token)
    return made
