"""Replacements by another model, whose vocabulary is another: a masked language model's fills, another causal model's guesses.

The explained model's ids become text; each of its tokens is a span of characters; the other model sees the text with that span masked (or up to
it); and its answers come back as text, of which only those count that are exactly one token of the explained model there. The official code leaves
the last step out and feeds the other model's ids to the explained one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.models import device_of, frozen, logits, unwrapped
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.samplers import Sampler, Weighted, _ordinary

# Fills beyond the best so many are no longer plausible; then the fallback is asked.
TOP = 50
_AT_ONCE = 64
# Names of transformers' classes whose logits are no fills.
_NO_FILLS = (
    "ForCausalLM",
    "LMHeadModel",
    "ForConditionalGeneration",
    "Classification",
    "ForQuestionAnswering",
)


class Alignment:
    """How text of another tokenizer becomes single tokens of the explained model's.

    ``table[s][i]`` is the explained model's id for the other's token ``i`` behind a space (s = 1) or without (s = 0), -1 where the text is no one token.

    Raises:
        InputError: fewer than ``TOP`` tokens (or half of a smaller vocabulary) have a counterpart: the vocabularies do not align.
    """

    def __init__(self, other_tokenizer: Any, tokenizer: Any):
        for what, t in (("tokenizer", tokenizer), ("the other tokenizer", other_tokenizer)):
            checks.require(
                t is not None and hasattr(t, "decode"), f"{what}: got {checks.show(t)}, expected a tokenizer"
            )
        self.tokenizer, self.other = tokenizer, other_tokenizer
        size, special = len(other_tokenizer), set(other_tokenizer.all_special_ids)
        words = [
            "" if i in special else other_tokenizer.decode([i]).removeprefix("##").strip()
            for i in range(size)
        ]
        ordinary = _ordinary(tokenizer, len(tokenizer), frozenset())
        self.table = torch.full((2, size), -1, dtype=torch.long)
        known = [i for i, word in enumerate(words) if word]
        for space in (0, 1):
            # Behind a line break, so that no word stands at the beginning of a text.
            texts = ["\n", *("\n" + " " * space + words[i] for i in known)]
            before, *found = tokenizer(texts, add_special_tokens=False)["input_ids"]
            for i, ids in zip(known, found):
                own = ids[len(before) :]
                if len(own) == 1 and ids[: len(before)] == before and bool(ordinary[own[0]]):
                    self.table[space, i] = own[0]
        found = int((self.table >= 0).any(0).sum())
        checks.require(
            found >= min(TOP, size // 2),
            f"sampler: {found} of the other model's {size} tokens are single tokens of the explained model, expected at least "
            f"{min(TOP, size // 2)}; the vocabularies do not align, choose a model of the same language",
        )

    def spans(self, ids: Int[Tensor, "tokens"]) -> tuple[str, list[tuple[int, int]]]:
        """The text of the ids, and where each token is in it (without white space; empty where it has no characters of its own)."""
        listed = ids.tolist()
        text = self._decode(listed)
        spans, start = [], 0
        for t in range(len(listed)):
            part = self._decode(listed[: t + 1])
            # Bytes of an unfinished character decode to a mark that the whole text does not have.
            stop = len(part) if text.startswith(part) else start
            inner = text[start:stop]
            left = start + len(inner) - len(inner.lstrip())
            spans.append((left, max(left, start + len(inner.rstrip()))))
            start = stop
        return text, spans

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def candidates(
        self, scores: torch.Tensor, spaced: Bool[Tensor, "places"], original: Int[Tensor, "places"]
    ) -> tuple[Tensor, Tensor]:
        """For each place, ids of the explained model and their log-weights (-inf for what must not be proposed), best first.

        Args:
            scores: (places, the other's vocabulary) logits.
            spaced: whether the place follows white space; original: the token to be replaced.
        """
        best = scores[:, : self.table.shape[1]].log_softmax(1).topk(min(TOP, self.table.shape[1]), dim=1)
        ids = self.table[spaced.long()[:, None], best.indices]
        weights = best.values.masked_fill((ids < 0) | (ids == original[:, None]), -torch.inf)
        return ids, weights


class MlmSampler:
    """Fills of a masked language model, sampled at temperature 1, never the original token.

    Args:
        model, mlm_tokenizer: the masked model (``AutoModelForMaskedLM``) and its fast tokenizer.
        tokenizer: the explained model's.
        joint: mask all replaced tokens at once (the paper); ``False`` masks one at a time, which needs one forward a prompt instead of one a
            step.
        greedy: the best fill instead of a draw.
        fallback: a sampler for tokens without a usable fill; the default is uniform.

    Raises:
        InputError: no mask token; vocabularies that do not align.

    >>> from transformers import AutoModelForMaskedLM, AutoTokenizer  # doctest: +SKIP
    >>> mlm = AutoModelForMaskedLM.from_pretrained("./bert"), AutoTokenizer.from_pretrained("./bert")  # doctest: +SKIP
    >>> reagent(model, "The capital of France is", tokenizer=tokenizer, sampler=MlmSampler(*mlm, tokenizer))  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, mlm_tokenizer: Any, tokenizer: Any, *, joint: bool = True, greedy: bool = False,
        fallback: Sampler | None = None,
    ):  # fmt: skip
        config: Any = getattr(model, "config", None)
        fills = not type(model).__name__.endswith(_NO_FILLS) and not getattr(
            config, "is_encoder_decoder", False
        )
        checks.require(
            fills,
            f"model: {type(model).__name__} predicts next tokens and fills no masks; give a masked language model (AutoModelForMaskedLM), or use "
            "OtherModelSampler",
        )
        self.align = Alignment(mlm_tokenizer, tokenizer)
        checks.require(
            getattr(mlm_tokenizer, "mask_token_id", None) is not None,
            f"mlm_tokenizer: {type(mlm_tokenizer).__name__} has no mask token; give a masked language model's",
        )
        self.model, self.mlm_tokenizer, self.joint, self.greedy = (
            unwrapped(model),
            mlm_tokenizer,
            joint,
            greedy,
        )
        self.fallback = fallback or Weighted(_ordinary(tokenizer, len(tokenizer), frozenset()).double())
        self._single: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self._texts: dict[tuple[int, ...], tuple[str, list[tuple[int, int]]]] = {}

    def __call__(self, ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        found = self.fallback(ids, mask, generator)
        u = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
        key = tuple(ids[0].tolist())
        if not self.joint:
            if key not in self._single:
                one = torch.eye(len(key), dtype=torch.bool)
                self._single[key] = self._fills(ids[0], one)
            choices, weights = self._single[key]
            rows, places = torch.meshgrid(torch.arange(len(ids)), torch.arange(len(key)), indexing="ij")
            return self._drawn(
                found,
                rows.flatten(),
                places.flatten(),
                choices[places.flatten()],
                weights[places.flatten()],
                u,
            )
        wanted = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        choices, weights = self._fills(ids[0], wanted)
        rows, places = wanted.nonzero(as_tuple=True)
        return self._drawn(found, rows, places, choices, weights, u)

    def _drawn(
        self, found: Tensor, rows: Tensor, places: Tensor, choices: Tensor, weights: Tensor, u: Tensor
    ) -> Tensor:
        """``found`` with a draw at each place that has a choice."""
        usable = torch.isfinite(weights).any(1)
        if not bool(usable.any()):
            return found
        rows, places, choices, weights = rows[usable], places[usable], choices[usable], weights[usable]
        if self.greedy:
            at = weights.argmax(1)
        else:
            cumulated = weights.double().softmax(1).cumsum(1)
            at = (
                (cumulated < u[rows, places][:, None] * cumulated[:, -1:])
                .sum(1)
                .clamp_max(choices.shape[1] - 1)
            )
        found = found.clone()
        found[rows, places] = choices.gather(1, at[:, None])[:, 0]
        return found

    def _fills(self, ids: Tensor, wanted: Bool[Tensor, "rows tokens"]) -> tuple[Tensor, Tensor]:
        """Candidates for every wanted place of every row of masks, in the order of ``wanted.nonzero()``."""
        key = tuple(ids.tolist())
        if key not in self._texts:
            self._texts[key] = self.align.spans(ids)
        text, spans = self._texts[key]
        mark = self.mlm_tokenizer.mask_token
        texts, owners = [], []
        for r, row in enumerate(wanted):
            pieces, last = [], 0
            for t in row.nonzero()[:, 0].tolist():
                a, b = spans[t]
                # A token without characters of its own cannot be masked.
                if b > a:
                    pieces += [text[last:a], mark]
                    owners.append((r, t))
                    last = b
            texts.append("".join([*pieces, text[last:]]))
        rows, places = wanted.nonzero(as_tuple=True)
        choices = torch.zeros(len(rows), TOP, dtype=torch.long)
        weights = torch.full((len(rows), TOP), -torch.inf)
        if not owners:
            return choices, weights
        scores = self._at_masks(texts)
        checks.require(
            len(scores) == len(owners),
            f"sampler: the masked model sees {len(scores)} masks where {len(owners)} were put; is the prompt longer than it takes?",
        )
        spaced = torch.tensor([spans[t][0] > 0 and text[spans[t][0] - 1].isspace() for _, t in owners])
        found, weight = self.align.candidates(scores, spaced, ids[torch.tensor([t for _, t in owners])])
        index = {pair: i for i, pair in enumerate(zip(rows.tolist(), places.tolist()))}
        at = torch.tensor([index[pair] for pair in owners])
        choices[at, : found.shape[1]], weights[at, : found.shape[1]] = found, weight
        return choices, weights

    def _at_masks(self, texts: list[str]) -> Tensor:
        """The masked model's logits at every mask of every text, in order."""
        # Without a padding token texts go one by one.
        alone = self.mlm_tokenizer.pad_token is None
        found = []
        with torch.inference_mode(), frozen(self.model, requires_grad=None):
            size = 1 if alone else _AT_ONCE
            for part in (texts[k : k + size] for k in range(0, len(texts), size)):
                encoded = self.mlm_tokenizer(part, padding=not alone, return_tensors="pt").to(
                    device_of(self.model)
                )
                scores = logits(self.model(**encoded))
                found.append(scores[encoded["input_ids"] == self.mlm_tokenizer.mask_token_id].float().cpu())
        return torch.cat(found)


class OtherModelSampler:
    """Position t gets another causal model's most probable next word after the text before t (``inferential-m``).

    Args:
        model, other_tokenizer: the other model and its tokenizer; tokenizer: the explained model's.
        fallback: for positions where none of its best guesses is one token here; the default keeps the token.
    """

    joint = False

    def __init__(self, model: Any, other_tokenizer: Any, tokenizer: Any, *, fallback: Sampler | None = None):
        self.align, self.face, self.fallback = (
            Alignment(other_tokenizer, tokenizer),
            NextToken(model, other_tokenizer),
            fallback,
        )
        checks.require(
            not self.face.encoder_decoder,
            f"model: {type(model).__name__} is an encoder-decoder, which does not continue a text; give a causal language model",
        )
        self._made: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, ids: Tensor, mask: Tensor | None, generator: torch.Generator) -> Tensor:
        key = tuple(ids[0].tolist())
        if key not in self._made:
            self._made[key] = self._guesses(ids[0])
        guesses, known = self._made[key]
        rest = ids if self.fallback is None else self.fallback(ids, mask, generator)
        return torch.where(known, guesses, rest)

    def _guesses(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        text, spans = self.align.spans(ids)
        guesses, known = ids.clone(), torch.zeros(len(ids), dtype=torch.bool)
        rows, owners = [], []
        for t, (a, b) in enumerate(spans):
            before = self.align.other(text[:a].rstrip())["input_ids"]
            # The first token keeps itself where there is nothing before it.
            if b > a and before:
                rows.append(torch.tensor([before]))
                owners.append(t)
        if not owners:
            return guesses, known
        with self.face.ready():
            scores = self.face.logits(rows).cpu()
        at = torch.tensor(owners)
        spaced = torch.tensor([spans[t][0] > 0 and text[spans[t][0] - 1].isspace() for t in owners])
        # Unlike a replacement that is drawn, a guess may be the token itself.
        found, weights = self.align.candidates(scores, spaced, torch.full((len(at),), -1))
        usable = torch.isfinite(weights).any(1)
        guesses[at[usable]] = found[usable].gather(1, weights[usable].argmax(1)[:, None])[:, 0]
        known[at[usable]] = True
        return guesses, known
