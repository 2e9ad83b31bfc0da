"""What can be explained token by token: anything that gives the next token's probabilities, or a text's class.

Four kinds have one interface here: a causal language model, an encoder-decoder (source and target prefix side by side in one row of ids), a text classifier, whose classes are then the tokens that it could say, and a
plain function ``ids -> probabilities``, such as a model behind an API. Prompts of several lengths go through few forwards, padded where the model
takes a mask; a prefix that all rows share is computed once and comes from the key-value cache.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from lineament.core import checks
from lineament.core.batching import auto_batch
from lineament.core.models import device_of, frozen, logits, masks_to_nan, unwrapped
from lineament.core.text_parts import unpadded

# More rows than this in one forward are no faster on a CPU, and their logits no longer fit its caches.
_ROWS_ON_CPU = 64
# Below this many tokens, bringing a cached prefix to every row costs more than computing it again.
_WORTH_CACHING = 8
# What goes through one forward: ids, mask, how many columns are an encoder's source, and the rows' indices among all.
Group = tuple[Tensor, Tensor | None, int, Tensor]


class NextToken:
    """One interface for whatever predicts the next token.

    Args:
        model: a causal or encoder-decoder ``nn.Module`` (Hugging Face's, or one that returns logits for ids), or a function from ids
            (batch, tokens) to next-token probabilities or log-probabilities (batch, vocabulary).
        tokenizer: of the model; ``None`` where prompts are given as ids.
        classifier: whether it names a text's class and no next token; ``None`` tells it by the name of transformers' classes.

    Raises:
        InputError: something that is neither a module nor a function.

    >>> uniform = NextToken(lambda ids: torch.full((len(ids), 4), 0.25))
    >>> uniform.logits([torch.tensor([[0, 1], [2, 3]])]).softmax(1)[0].tolist()
    [0.25, 0.25, 0.25, 0.25]
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, classifier: bool | None = None):
        model = unwrapped(model)
        checks.require(
            callable(model),
            f"model: got {checks.show(model)}, expected a language model or a function from ids to next-token probabilities",
        )
        checks.require(
            not type(model).__name__.endswith("ForMaskedLM"),
            f"model: {type(model).__name__} is a masked language model, which has no next token; give a causal or encoder-decoder one "
            "(a masked one can fill in for replaced tokens: sampler=MlmSampler(...))",
        )
        self.model, self.tokenizer = model, tokenizer
        self.is_module = isinstance(model, nn.Module)
        self.config: Any = getattr(model, "config", None) if self.is_module else None
        named = type(model).__name__.endswith("ForSequenceClassification")
        self.classifier = named if classifier is None else classifier
        encoder_decoder = bool(getattr(self.config, "is_encoder_decoder", False))
        self.encoder_decoder = encoder_decoder and not self.classifier
        self.device = device_of(model) if isinstance(model, nn.Module) else torch.device("cpu")
        self._takes = _parameters(model.forward if isinstance(model, nn.Module) else model)
        # Padding on the left moves what some classifiers read: their texts go by length.
        pads = self.is_module and not self.classifier
        self._pads = pads and {"attention_mask", "position_ids"} <= self._takes
        self._prefix: tuple[int, Any] | None = None
        self.forwards = 0

    @classmethod
    def of(cls, model: Any, tokenizer: Any = None) -> NextToken:
        """The model itself where it is a ``NextToken`` already."""
        return model if isinstance(model, cls) else cls(model, tokenizer)

    @property
    def text_config(self) -> Any:
        get = getattr(self.config, "get_text_config", None)
        return get() if callable(get) else self.config

    @property
    def vocabulary(self) -> int | None:
        """How many tokens the model scores, as far as it is known before a forward."""
        return self._size("vocab_size")

    @property
    def classes(self) -> tuple[str, ...]:
        """Of a classifier, the classes as its configuration names them."""
        named = getattr(self.config, "id2label", None) or {}
        return tuple(str(named[key]) for key in sorted(named)) if self.classifier else ()

    @property
    def most_tokens(self) -> int | None:
        """The longest context that the model's positions allow, or ``None``."""
        return self._size("max_position_embeddings", "n_positions", "max_seq_len")

    def _size(self, *names: str) -> int | None:
        found = (getattr(self.text_config, name, None) for name in names)
        return next((n for n in found if isinstance(n, int) and n > 0), None)

    @property
    def special(self) -> frozenset[int]:
        """Ids that are never replaced, scored or proposed: begin, end, padding, unknown and the tokenizer's other special ones."""
        ids = set(getattr(self.tokenizer, "all_special_ids", None) or ())
        if self.tokenizer is None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
                found = getattr(self.config, name, None)
                ids |= set(found) if isinstance(found, (list, tuple)) else {found}
        return frozenset(i for i in ids if isinstance(i, int))

    @contextmanager
    def ready(self, *, gradients: bool = False) -> Iterator[NextToken]:
        """The model in eval mode and nothing recorded, and all as it was afterwards; ``gradients`` allows some to be taken inside."""
        with torch.inference_mode(not gradients), torch.no_grad():
            if isinstance(self.model, nn.Module):
                with frozen(self.model, requires_grad=False if gradients else None), unpadded(self.model):
                    yield self
            else:
                yield self

    @contextmanager
    def sharing(
        self, ids: Int[Tensor, "tokens"], use_cache: bool | None = None, *, uneven: bool = False
    ) -> Iterator[None]:
        """Within the block every row begins with these ids, so that their keys and values are computed once.

        Args:
            use_cache: ``None`` decides by the length and by whether the model keeps a cache that can be repeated over rows.
            uneven: whether rows of several lengths will come. They are padded behind the prefix, where a sliding window would count the
                padding; such models then go without.
        """
        wanted = len(ids) >= _WORTH_CACHING if use_cache is None else use_cache and len(ids) > 0
        windows = (
            getattr(self.text_config, name, None) for name in ("sliding_window", "attention_chunk_size")
        )
        wanted = wanted and not (uneven and any(windows)) and not self.encoder_decoder and self._pads
        cache = None
        if wanted and {"past_key_values", "use_cache"} <= self._takes:
            output = self.model(input_ids=ids[None].to(self.device), use_cache=True, **self._last_only())
            cache = getattr(output, "past_key_values", None)
        self._prefix = (len(ids), cache) if hasattr(cache, "batch_repeat_interleave") else None
        try:
            yield
        finally:
            self._prefix = None

    def logits(
        self,
        rows: Sequence[Int[Tensor, "_ _"]],
        sources: Sequence[int] | None = None,
        *,
        then: Callable[[Tensor, Tensor], Tensor] | None = None,
        batch_size: int | str = "auto",
    ) -> Tensor:
        """The next token's logits after each row, or what ``then`` makes of them.

        Args:
            rows: one (rows, tokens) tensor of ids for each prompt; the lengths may differ.
            sources: for an encoder-decoder, how many of each prompt's columns are its source; the rest is the target prefix.
            then: ``then(logits, index)`` is applied to each chunk, ``index`` naming its rows among all, so that (rows, vocabulary)
                is never held whole. It returns one entry a row.
            batch_size: rows at a time, or ``"auto"``: 64 on a CPU, elsewhere all at once, halved when memory runs out.

        Returns:
            (all rows, vocabulary) in float32 (float64 for a float64 model), in the order of ``rows``; or ``then``'s results.

        Raises:
            InputError: the model's output is no distribution over a vocabulary, or holds NaN.
        """
        if batch_size == "auto" and self.device.type == "cpu":
            batch_size = _ROWS_ON_CPU
        found: list[tuple[Tensor, Tensor]] = []
        for group in self.groups([r.to(self.device) for r in rows], sources, batch_size):

            def one(start: int, stop: int, group: Group = group) -> tuple[Tensor, Tensor]:
                ids, mask, source, index = group
                part = index[start:stop]
                scores = self._forward(ids[start:stop], None if mask is None else mask[start:stop], source)
                return part, scores if then is None else then(scores, part)

            found += list(auto_batch(one, len(group[0]), batch_size=batch_size, memory=self._forward))
        index = torch.cat([part for part, _ in found])
        values = found[0][1] if len(found) == 1 else torch.cat([value for _, value in found])
        # Prompts were sorted by length; most often there is one, and then no copy is made.
        in_order = bool((index[1:] > index[:-1]).all())
        return values if in_order else values[index.argsort().to(values.device)]

    def groups(
        self, rows: Sequence[Tensor], sources: Sequence[int] | None, most: int | str
    ) -> Iterator[Group]:
        """Rows of several lengths by forward, those of one prompt together: padded where the model takes a mask, else one forward a length.

        >>> [ids.tolist() for ids, *_ in NextToken(len).groups([torch.tensor([[1, 2]]), torch.tensor([[3]])], None, 8)]
        [[[3]], [[1, 2]]]
        """
        sources = [0] * len(rows) if sources is None else sources
        index = torch.arange(sum(map(len, rows))).split([len(r) for r in rows])
        if len({(r.shape[1], s) for r, s in zip(rows, sources)}) == 1:
            yield torch.cat(list(rows)), None, sources[0], torch.cat(index)
            return
        for chosen in self._sharing_a_forward(rows, sources, most):
            source, width = max(sources[i] for i in chosen), max(rows[i].shape[1] for i in chosen)
            if self.encoder_decoder:
                # Encoders number their positions from the left, whatever the mask: a source is padded on its right.
                width = source + rows[chosen[0]].shape[1] - sources[chosen[0]]
            padded = [
                _padded(rows[i], width, sources[i] if self.encoder_decoder else self._pad_at or 0)
                for i in chosen
            ]
            ids, mask = (torch.cat([pair[j] for pair in padded]) for j in (0, 1))
            whole = not self.encoder_decoder and bool(mask.all())
            yield ids, None if whole else mask, source, torch.cat([index[i] for i in chosen])

    @property
    def _pad_at(self) -> int | None:
        """The column before which shorter rows are filled up; ``None`` for a model that takes no mask."""
        if not self._pads or self.encoder_decoder or masks_to_nan(self.model):
            return None
        # What follows the shared prefix is padded on its left, not what comes before it.
        return self._prefix[0] if self._prefix else 0

    def _sharing_a_forward(
        self, rows: Sequence[Tensor], sources: Sequence[int], most: int | str
    ) -> list[list[int]]:
        """Which prompts go through one forward: neighbours by length, so that little is padded, or those of one length."""
        groups: list[list[int]] = []
        if not self.encoder_decoder and self._pad_at is not None:
            held = 0
            for i in sorted(range(len(rows)), key=lambda i: rows[i].shape[1]):
                if not groups or (isinstance(most, int) and held + len(rows[i]) > most):
                    groups.append([])
                    held = 0
                groups[-1].append(i)
                held += len(rows[i])
            return groups
        lengths = [r.shape[1] - s for r, s in zip(rows, sources)]
        return [[i for i, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]

    def needs_weights(self, what: str) -> None:
        """Refuse a function, or a module without an embedding that can be found."""
        found = getattr(self.model, "get_input_embeddings", None) if self.is_module else None
        checks.require(
            callable(found),
            f"model: this needs {what}, which {checks.show(self.model)} does not show; give a transformers model, or a "
            "method that asks for probabilities only: reagent, occlusion, lime, kernel_shap, bayesian, random",
        )

    def _forward(self, ids: Tensor, mask: Tensor | None, source: int) -> Tensor:
        self.forwards += 1
        if not self.is_module:
            return _as_logits(self.model(ids), len(ids))
        return self.last(self.model(**self.inputs(ids, mask, source)), len(ids))

    def inputs(self, ids: Tensor, mask: Tensor | None = None, source: int = 0) -> dict[str, Any]:
        """What the model is called with for these rows."""
        if self.encoder_decoder:
            mask = torch.ones_like(ids[:, :source]) if mask is None else mask[:, :source]
            both = {"input_ids": ids[:, :source], "decoder_input_ids": ids[:, source:]}
            return {**both, "attention_mask": mask, **self._without_cache()}
        first = "input_ids"
        if first not in self._takes:
            first = next(iter(inspect.signature(self.model.forward).parameters))
        inputs: dict[str, Any] = {first: ids}
        if mask is not None:
            inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0)}
        if self._prefix is None:
            return inputs | self._without_cache() | self._last_only()
        length, cache = self._prefix
        cache = copy.deepcopy(cache)
        cache.batch_repeat_interleave(len(ids))
        inputs = {k: v if k == "attention_mask" else v[:, length:] for k, v in inputs.items()}
        return inputs | {"past_key_values": cache, "use_cache": True} | self._last_only()

    def _without_cache(self) -> dict[str, Any]:
        return {"use_cache": False} if "use_cache" in self._takes else {}

    def _last_only(self) -> dict[str, Any]:
        return {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}

    def last(self, output: Any, count: int) -> Tensor:
        """The last position's logits of a model's output, in float32 at least."""
        scores = logits(output)
        scores = scores[:, -1] if scores.ndim == 3 else scores
        checks.require(
            scores.ndim == 2 and len(scores) == count,
            f"model: its logits are {checks.show(scores)} for {count} rows of ids, expected (batch, tokens, vocabulary) or (batch, vocabulary)",
        )
        return scores if scores.dtype == torch.float64 else scores.float()


def not_nan(values: Tensor) -> Tensor:
    """Return ``values`` unless the model's numbers behind them are NaN."""
    if bool(torch.isnan(values).any()):
        raise checks.InputError("model: its logits hold NaN for this prompt; are its weights finite?")
    return values


def _padded(rows: Tensor, width: int, at: int) -> tuple[Tensor, Tensor]:
    """Rows of this width with their mask; what is missing is put in before column ``at``. Any id will do: masked ones are not looked at."""
    present, missing = torch.ones_like(rows), rows.new_zeros(len(rows), width - rows.shape[1])
    ids, mask = (torch.cat([part[:, :at], missing, part[:, at:]], 1) for part in (rows, present))
    return ids, mask


def _parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


def _as_logits(output: Any, count: int) -> Tensor:
    """What a function answered, as logits whose softmax are its probabilities."""
    checks.require(
        isinstance(output, Tensor) and output.ndim == 2 and len(output) == count and output.shape[1] > 1,
        f"model: the function returned {checks.show(output)} for {count} rows of ids, expected next-token probabilities of shape "
        f"({count}, vocabulary)",
    )
    scores = not_nan(output if output.dtype == torch.float64 else output.float())
    if bool((scores >= 0).all()):
        total = scores.sum(1)
        if torch.allclose(total, torch.ones_like(total), atol=1e-3):
            return scores.log()
    elif bool((scores <= 1e-4).all()) and bool((scores.logsumexp(1).abs() < 1e-3).all()):
        return scores
    raise checks.InputError(
        "model: the function's rows are neither probabilities (each at least 0, sum 1) nor log-probabilities; "
        "return logits.softmax(-1)"
    )
