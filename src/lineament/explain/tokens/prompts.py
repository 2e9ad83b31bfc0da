"""A prompt as ids, and the question that every attribution answers: why this token after this prompt?

Everything that can be wrong with a prompt, a target or a contrast is said here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lineament.core import checks
from lineament.core.text_parts import one_token, refuse_padding
from lineament.explain.tokens.next_token import NextToken, not_nan


@dataclass(frozen=True)
class Reading:
    """How a prompt is read.

    Attributes:
        target_prefix: what an encoder-decoder has generated so far (text or ids); for several prompts one for all or one each.
        scope: for an encoder-decoder, ``"source"`` or ``"all"``: whether the target prefix is scored too.
        span: score only positions ``span[0] ... span[1] - 1``.
        protect: ids that are neither replaced nor scored, besides the special ones.

    >>> Reading(span=(2, 5)).scope
    'source'
    """

    target_prefix: Any = None
    scope: str = "source"
    span: tuple[int, int] | None = None
    protect: Sequence[int] = ()


@dataclass(frozen=True)
class Prompt:
    """One context: its ids, which positions may be replaced and scored, and how many belong to an encoder's source."""

    ids: Int[Tensor, "tokens"]
    scored: Bool[Tensor, "tokens"]
    source: int
    tokens: tuple[str, ...]

    @property
    def places(self) -> Int[Tensor, "scored"]:
        return self.scored.nonzero()[:, 0]

    def spread(self, scores: Float[Tensor, "scored"]) -> Float[Tensor, "tokens"]:
        """Scores of the scored positions among all positions; 0 elsewhere."""
        wide = scores.new_zeros(len(self.ids))
        wide[self.places] = scores
        return wide


@dataclass(frozen=True)
class Question:
    """A model, a prompt, and the token, or class, asked about; with ``contrast``, why it rather than that one.

    ``vocabulary`` is how many tokens there are, ``answers`` how many of them, or how many classes, the model chooses among.
    """

    face: NextToken
    prompt: Prompt
    target: int
    contrast: int | None
    probability: float
    vocabulary: int
    answers: int

    @property
    def rows(self) -> Int[Tensor, "1 tokens"]:
        return self.prompt.ids.to(self.face.device)[None]

    def value(self, scores: Float[Tensor, "rows vocabulary"]) -> Float[Tensor, "rows"]:
        """f = log p(target), or log p(target) - log p(contrast)."""
        own = scores[:, self.target]
        return not_nan(own - (scores.logsumexp(1) if self.contrast is None else scores[:, self.contrast]))

    def values(self, rows: Int[Tensor, "rows tokens"], batch_size: int | str) -> Float[Tensor, "rows"]:
        """:meth:`value` of rows of ids, in float64."""
        found = self.face.logits(
            [rows], [self.prompt.source], then=lambda s, index: self.value(s).double(), batch_size=batch_size
        )
        return found.cpu()


def is_batch(prompt: Any) -> bool:
    """Whether several prompts were given: a list of texts, or of lists or tensors of ids."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and not isinstance(prompt[0], int)


def ask(face: NextToken, prompt: Any, target: Any, contrast: Any, reading: Reading) -> list[Question]:
    """One question for each prompt, checked with as few forwards as the prompts' lengths allow.

    Raises:
        InputError: as :func:`read`; where there are several prompts the error says which one it is about; a target or contrast that is not one token.
    """
    several = is_batch(prompt)
    every = list(prompt) if several else [prompt]
    prefixes = [reading.target_prefix] * len(every)
    if several and is_batch(reading.target_prefix):
        prefixes = _per_prompt("target_prefix", reading.target_prefix, len(every))
    targets, contrasts = (
        _per_prompt(what, value, len(every)) for what, value in (("target", target), ("contrast", contrast))
    )
    prompts = []
    for k, (given, prefix) in enumerate(zip(every, prefixes)):
        try:
            prompts.append(read(face, given, replace(reading, target_prefix=prefix)))
        except checks.InputError as error:
            if not several:
                raise
            raise checks.InputError(f"prompt {k} of {len(every)} (from 0): {error}") from error
    with face.ready():
        first = not_nan(face.logits([p.ids[None] for p in prompts], [p.source for p in prompts])).cpu()
    found, size = [], first.shape[1]
    for p, row, wanted, other in zip(prompts, first, targets, contrasts):
        own = int(row.argmax()) if wanted is None else token_id(face, "target", wanted, size, p)
        if other is not None:
            other = token_id(face, "contrast", other, size, p)
            checks.require(
                other != own,
                f"contrast: got {answer_text(face, other)!r} (id {other}), which is the target itself; choose another token",
            )
        chance = probability(row[None], torch.tensor([own]), None if other is None else torch.tensor([other]))
        tokens = (face.vocabulary or len(face.tokenizer or ()) or size) if face.classifier else size
        found.append(Question(face, p, own, other, float(chance), tokens, size))
    return found


def probability(
    scores: Float[Tensor, "rows vocabulary"],
    target: Int[Tensor, "rows"],
    contrast: Int[Tensor, "rows"] | None,
) -> Float[Tensor, "rows"]:
    """p(target), or with a contrast p(target) / (p(target) + p(contrast)); float64 where the odds need it."""
    own = not_nan(scores.gather(1, target[:, None])[:, 0])
    if contrast is not None:
        return torch.sigmoid((own - not_nan(scores.gather(1, contrast[:, None])[:, 0])).double())
    return not_nan((own - scores.logsumexp(1)).double().exp())


def read(face: NextToken, prompt: Any, reading: Reading | None = None) -> Prompt:
    """The prompt (text, or ids as a list or a vector), checked.

    Raises:
        InputError: an empty prompt, one token, more than the model takes, ids outside the vocabulary, text without a tokenizer.
    """
    reading = reading or Reading()
    checks.one_of("scope", reading.scope, ("source", "all"))
    ids = _ids(face, "prompt", prompt)
    source = 0
    if face.encoder_decoder:
        source = len(ids)
        start = getattr(face.config, "decoder_start_token_id", None)
        start = start if isinstance(start, int) else getattr(face.config, "bos_token_id", None)
        checks.require(
            isinstance(start, int), "model: its configuration names no decoder_start_token_id; set one"
        )
        prefix = reading.target_prefix
        prefix = [] if prefix is None else _ids(face, "target_prefix", prefix, specials=False).tolist()
        ids = torch.cat([ids, torch.tensor([start, *prefix])])
    else:
        checks.require(
            reading.target_prefix is None,
            "target_prefix: it is for an encoder-decoder; a causal model continues the prompt, so append it there",
        )
    refuse_padding(
        "prompt",
        face.tokenizer,
        ids[: source or len(ids)],
        "give each prompt without padding, several as a list",
    )
    most, longest = face.most_tokens, max(source, len(ids) - source)
    checks.require(
        most is None or longest <= most,
        f"prompt: it has {longest} tokens and the model takes at most {most}; shorten it",
    )
    scored = ~torch.isin(ids, torch.tensor(sorted(face.special | set(reading.protect)), dtype=torch.long))
    if face.encoder_decoder:
        scored[source:] &= reading.scope == "all"
        scored[source] = False
    span = reading.span
    if span is not None:
        inside = isinstance(span, (tuple, list)) and len(span) == 2 and 0 <= span[0] < span[1] <= len(ids)
        checks.require(
            inside,
            f"span: got {checks.show(span)}, expected (start, stop) with 0 <= start < stop <= {len(ids)}",
        )
        scored[: span[0]] = False
        scored[span[1] :] = False
    count = int(scored.sum())
    checks.require(
        count >= 2,
        f"prompt: {count} of its {len(ids)} tokens can be scored (special tokens are not), expected at least 2",
    )
    return Prompt(ids, scored, source, tuple(shown(face.tokenizer, ids)))


def _ids(face: NextToken, what: str, prompt: Any, *, specials: bool = True) -> Tensor:
    if isinstance(prompt, str):
        checks.require(
            prompt.strip() != "" or not specials, f"{what}: got an empty text, expected at least two tokens"
        )
        checks.require(
            face.tokenizer is not None,
            f"{what}: got text and no tokenizer; give the model's tokenizer, or ids",
        )
        ids = torch.tensor(face.tokenizer(prompt, add_special_tokens=specials)["input_ids"], dtype=torch.long)
        checks.require(
            ids.ndim == 1, f"{what}: the tokenizer gave {checks.show(ids)}, expected one row of ids"
        )
    else:
        listed = isinstance(prompt, (list, tuple)) and all(type(i) is int for i in prompt)
        checks.require(
            listed or isinstance(prompt, Tensor),
            f"{what}: got {checks.show(prompt)}, expected text or a list of token ids",
        )
        ids = torch.as_tensor(prompt).detach().cpu()
        ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
        if ids.numel():
            checks.tensor(what, ids, shape=("tokens",), floating=False)
        ids = ids.long().clone()
    checks.require(not specials or len(ids) > 0, f"{what}: got no tokens, expected at least two")
    refuse_unknown_ids(face, what, ids.tolist())
    return ids


def refuse_unknown_ids(face: NextToken, what: str, ids: Sequence[int]) -> None:
    """Raise where an id lies outside the model's vocabulary."""
    size = face.vocabulary
    wrong = [i for i in ids if i < 0 or (size is not None and i >= size)]
    checks.require(
        not wrong or size is None,
        f"{what}: got id {max(wrong, default=0)}, expected ids from 0 to {(size or 1) - 1}; is this the model's own tokenizer?",
    )


def token_id(face: NextToken, what: str, token: Any, vocabulary: int, p: Prompt | None = None) -> int:
    """One token as an id: an id, or a text that is one token where it follows the prompt.

    Raises:
        InputError: text of no or several tokens (they are listed), a word that the tokenizer does not have, or an id outside the vocabulary.
    """
    if isinstance(token, str) and face.classifier:
        checks.one_of(what, token, face.classes)
        return face.classes.index(token)
    if isinstance(token, str):
        checks.require(face.tokenizer is not None, f"{what}: got text and no tokenizer; give an id")
        ids = one_token(face.tokenizer, text_before(face, p), token)
        pieces = shown(face.tokenizer, ids)
        checks.require(
            len(ids) > 0,
            f"{what}: got {token!r}, of which the tokenizer makes no token; expected text that is one token, or an id",
        )
        checks.require(
            len(ids) == 1,
            f"{what}: {token!r} is {len(ids)} tokens ({', '.join(map(repr, pieces))}), expected one; choose one of them, or explain the whole with "
            "`explain_continuation`",
        )
        # A tokenizer without the word gives its token for unknown words, which is no answer to what was asked.
        known = ids[0] != getattr(face.tokenizer, "unk_token_id", None) and ids[0] not in face.special
        checks.require(
            known or token.strip() == pieces[0].strip(),
            f"{what}: {token!r} is not in the tokenizer's vocabulary, which reads it as {pieces[0]!r}; expected a token that it has, or an id",
        )
        token = ids[0]
    if isinstance(token, Tensor) and token.numel() == 1 and not token.is_floating_point():
        token = int(token)
    return checks.number(what, token, low=0, high=vocabulary - 1, integer=True)


def text_before(face: NextToken, p: Prompt | None) -> str:
    """What the next token continues, as text: the prompt, or what a decoder has said so far."""
    if p is None:
        return "\n"
    ids = p.ids[p.source + 1 if face.encoder_decoder else 0 :].tolist()
    return str(face.tokenizer.decode([i for i in ids if i not in face.special]))


def _per_prompt(what: str, value: Any, count: int) -> list[Any]:
    """One value for each prompt: the same for all, or a sequence of as many."""
    if isinstance(value, Tensor) and value.ndim == 1:
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return [value] * count
    checks.require(
        len(value) == count,
        f"{what}: got {len(value)} for {count} prompts, expected one each or one for all",
    )
    return list(value)


def answer_text(face: NextToken, answer: int) -> str:
    """A token, or of a classifier a class, as text."""
    if face.classifier:
        return face.classes[answer] if answer < len(face.classes) else str(answer)
    return shown(face.tokenizer, [answer])[0]


def shown(tokenizer: Any, ids: Sequence[int] | Tensor) -> list[str]:
    """Each token as text of its own; ids in angle brackets without a tokenizer."""
    values = [int(i) for i in ids]
    if tokenizer is None:
        return [f"<{i}>" for i in values]
    return [tokenizer.decode([i]) for i in values]
