"""A prompt as ids: what is scored, what is protected, and which token is asked about; everything that can be wrong with it is said here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lineament.core import checks
from lineament.explain.tokens.next_token import NextToken


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


def is_batch(prompt: Any) -> bool:
    """Whether several prompts were given: a list of texts, or of lists or tensors of ids."""
    return isinstance(prompt, (list, tuple)) and len(prompt) > 0 and not isinstance(prompt[0], int)


def read(
    model: NextToken,
    prompt: Any,
    *,
    target_prefix: Any = None,
    scope: str = "source",
    span: tuple[int, int] | None = None,
    protect: Iterable[int] = (),
) -> Prompt:
    """The prompt, checked.

    Args:
        prompt: text, or ids as a list or a vector.
        target_prefix: what an encoder-decoder has generated so far (text or ids).
        scope: for an encoder-decoder, ``"source"`` or ``"all"`` (source and target prefix).
        span: score only positions ``span[0] ... span[1] - 1``.
        protect: ids that are neither replaced nor scored, besides the special ones.

    Raises:
        InputError: an empty prompt, one token, more than the model takes, ids outside the vocabulary, text without a tokenizer.
    """
    checks.one_of("scope", scope, ("source", "all"))
    ids = _ids(model, "prompt", prompt)
    source = 0
    if model.encoder_decoder:
        source = len(ids)
        start = getattr(model.config, "decoder_start_token_id", None)
        start = start if isinstance(start, int) else getattr(model.config, "bos_token_id", None)
        checks.require(
            isinstance(start, int), "model: its configuration names no decoder_start_token_id; set one"
        )
        prefix = (
            []
            if target_prefix is None
            else _ids(model, "target_prefix", target_prefix, specials=False).tolist()
        )
        ids = torch.cat([ids, torch.tensor([start, *prefix])])
    else:
        checks.require(
            target_prefix is None,
            "target_prefix: it is for an encoder-decoder; a causal model continues the prompt, so append it there",
        )
    _refuse_padding(model, ids[: source or len(ids)])
    most = model.most_tokens
    longest = max(source, len(ids) - source)
    checks.require(
        most is None or longest <= most,
        f"prompt: it has {longest} tokens and the model takes at most {most}; shorten it",
    )
    protected = torch.tensor(sorted(model.special | set(protect)), dtype=torch.long)
    scored = ~torch.isin(ids, protected)
    if model.encoder_decoder:
        scored[source] = False
        if scope == "source":
            scored[source:] = False
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
    return Prompt(ids, scored, source, tuple(shown(model.tokenizer, ids)))


def _refuse_padding(model: NextToken, ids: Tensor) -> None:
    """Padding that came with the ids has no mask here and would be read as text."""
    named = [
        getattr(model.tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos", "cls", "unk")
    ]
    padding = named[0]
    if padding is None or padding in named[1:] or not len(ids):
        return
    count = int((ids == padding).sum())
    checks.require(
        count == 0,
        f"prompt: it holds {count} padding tokens ({shown(model.tokenizer, [padding])[0]!r}, id {padding}), which would be read as text; give each prompt "
        "without padding, several as a list",
    )


def read_all(
    model: NextToken, prompts: Sequence[Any], prefixes: Sequence[Any], *, several: bool, **reading: Any
) -> list[Prompt]:
    """:func:`read` for each prompt; where there are several, an error says which one it is about."""
    found = []
    for k, (prompt, prefix) in enumerate(zip(prompts, prefixes)):
        try:
            found.append(read(model, prompt, target_prefix=prefix, **reading))
        except checks.InputError as error:
            if not several:
                raise
            raise checks.InputError(f"prompt {k} of {len(prompts)} (from 0): {error}") from error
    return found


def _ids(model: NextToken, what: str, prompt: Any, *, specials: bool = True) -> Tensor:
    if isinstance(prompt, str):
        checks.require(
            prompt.strip() != "" or not specials, f"{what}: got an empty text, expected at least two tokens"
        )
        checks.require(
            model.tokenizer is not None,
            f"{what}: got text and no tokenizer; give the model's tokenizer, or ids",
        )
        ids = torch.tensor(
            model.tokenizer(prompt, add_special_tokens=specials)["input_ids"], dtype=torch.long
        )
        checks.require(
            ids.ndim == 1, f"{what}: the tokenizer gave {checks.show(ids)}, expected one row of ids"
        )
    else:
        listed = isinstance(prompt, (list, tuple)) and all(
            isinstance(i, int) and not isinstance(i, bool) for i in prompt
        )
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
    size = model.vocabulary
    if size is not None and len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= size):
        wrong = int(ids.max()) if int(ids.max()) >= size else int(ids.min())
        raise checks.InputError(
            f"{what}: got id {wrong}, expected ids from 0 to {size - 1}; is this the model's own tokenizer?"
        )
    return ids


def token_id(model: NextToken, what: str, token: Any, vocabulary: int) -> int:
    """One token as an id: an id, or a text that is one token.

    Raises:
        InputError: text of no or several tokens (they are listed), a word that the tokenizer does not have, or an id outside the vocabulary.
    """
    if isinstance(token, str):
        checks.require(model.tokenizer is not None, f"{what}: got text and no tokenizer; give an id")
        ids = model.tokenizer(token, add_special_tokens=False)["input_ids"]
        pieces = ", ".join(repr(t) for t in shown(model.tokenizer, ids))
        checks.require(
            len(ids) > 0,
            f"{what}: got {token!r}, of which the tokenizer makes no token; expected text that is one token, or an id",
        )
        checks.require(
            len(ids) == 1,
            f"{what}: {token!r} is {len(ids)} tokens ({pieces}), expected one; choose one of them, or explain the whole with "
            "explain_continuation (--continuation on the command line)",
        )
        # A tokenizer without the word gives its token for unknown words, which is no answer to what was asked.
        unknown = getattr(model.tokenizer, "unk_token_id", None)
        known = ids[0] != unknown and ids[0] not in model.special
        checks.require(
            known or token.strip() == shown(model.tokenizer, ids)[0].strip(),
            f"{what}: {token!r} is not in the tokenizer's vocabulary, which reads it as {shown(model.tokenizer, ids)[0]!r}; expected a token that it has, "
            "or an id",
        )
        token = ids[0]
    if isinstance(token, Tensor) and token.numel() == 1 and not token.is_floating_point():
        token = int(token)
    return checks.number(what, token, low=0, high=vocabulary - 1, integer=True)


def per_prompt(what: str, value: Any, count: int) -> list[Any]:
    """One value for each prompt: the same for all, or a sequence of as many."""
    if isinstance(value, Tensor) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        checks.require(
            len(value) == count,
            f"{what}: got {len(value)} for {count} prompts, expected one each or one for all",
        )
        return list(value)
    return [value] * count


def paired(prompts: Any, prefixes: Any, several: bool) -> tuple[list[Any], list[Any]]:
    """The prompts, and one target prefix for each: the same for all, or one each."""
    every = list(prompts)
    if several and isinstance(prefixes, (list, tuple)) and not (prefixes and isinstance(prefixes[0], int)):
        return every, per_prompt("target_prefix", prefixes, len(every))
    return every, [prefixes] * len(every)


def shown(tokenizer: Any, ids: Sequence[int] | Tensor) -> list[str]:
    """Each token as text of its own; ids in angle brackets without a tokenizer."""
    values = [int(i) for i in ids]
    if tokenizer is None:
        return [f"<{i}>" for i in values]
    return [tokenizer.decode([i]) for i in values]


def different(model: NextToken, contrast: int, target: int) -> int:
    """The contrast, refused where it is the target."""
    checks.require(
        contrast != target,
        f"contrast: got {shown(model.tokenizer, [contrast])[0]!r} (id {contrast}), which is the target itself; choose another token",
    )
    return contrast
