"""Pairs of prompts as a model takes them: token by token of the same length, and padded so that padding changes no score."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show
from lineament.core.models import device_of, logits, masks_to_nan, unwrapped
from lineament.core.text_parts import refuse_padding
from lineament.explain.patching.metrics import Metric

Prompts = Tensor | Sequence[str]


@dataclass(frozen=True)
class PromptPair:
    """Clean and corrupt inputs of one shape, their padding, and how the model is called with them."""

    clean: Tensor
    corrupt: Tensor
    mask: Tensor | None
    keywords: dict[str, Any]
    language: bool
    tokenizer: Any = None

    def call(self, model: nn.Module, inputs: Tensor, times: int = 1) -> Tensor:
        """The logits of ``inputs``, each row repeated block by block ``times`` times, with position -1 each row's last token."""
        rows = inputs.repeat(times, *[1] * (inputs.ndim - 1)) if times > 1 else inputs
        if not self.language:
            return logits(model(rows))
        keywords = dict(self.keywords)
        for key in ("attention_mask", "position_ids"):
            if key in keywords:
                keywords[key] = keywords[key].repeat(times, 1)
        found = logits(model(input_ids=rows, **keywords))
        if self.mask is None or bool(self.mask[:, -1].all()):
            return found
        # Padding on the right: move each row's last token to the end.
        length = self.mask.sum(1)
        steps = torch.arange(found.shape[1], device=found.device)
        order = (steps + length[:, None].to(found.device)) % found.shape[1]
        return found.gather(1, order.repeat(times, 1)[..., None].expand(-1, -1, found.shape[-1]))

    def labels(self) -> list[str]:
        """The tokens of the first clean prompt, or position numbers."""
        if not self.language:
            return []
        if self.tokenizer is None:
            return [str(token) for token in self.clean[0].tolist()]
        return [str(token) for token in self.tokenizer.convert_ids_to_tokens(self.clean[0].tolist())]


def pair_prompts(
    model: nn.Module,
    clean: Prompts,
    corrupt: Prompts | None,
    metric: Metric,
    *,
    tokenizer: Any = None,
    attention_mask: Tensor | None = None,
) -> PromptPair:
    """Check and tokenise clean and corrupt prompts; ``corrupt=None`` stands for an ablation without a second run.

    Raises:
        InputError: prompts of unequal length (both tokenisations are shown), tokens outside the vocabulary, empty or over-long prompts.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model: got {show(model)}, expected a torch.nn.Module")
    require(callable(metric), f"metric: got {show(metric)}, expected a function of the logits")
    inner: Any = unwrapped(model)
    language = hasattr(inner, "get_input_embeddings") and hasattr(inner, "config")
    require(
        not language or not getattr(inner.config, "is_encoder_decoder", False),
        f"model: {type(inner).__name__} is an encoder-decoder, whose decoder reads tokens of its own; patching takes decoder-only models, or a module around "
        "this one that calls it with both and returns its logits (with its sites named)",
    )
    second = clean if corrupt is None else corrupt
    if isinstance(clean, Tensor) or isinstance(second, Tensor):
        for name, value in (("clean", clean), ("corrupt", second)):
            require(
                isinstance(value, Tensor) and value.numel() > 0 and value.ndim > 1,
                f"{name}: got {show(value)}, expected a tensor of shape (batch, ...) like the other prompts, with at least one element",
            )
        assert isinstance(clean, Tensor) and isinstance(second, Tensor)
        if clean.shape != second.shape:
            raise InputError(
                f"clean and corrupt: got {show(clean)} and {show(second)}, expected the same shape, token by token"
                + (
                    f"; first pair:\n  {_row(clean[0], tokenizer)}\n  {_row(second[0], tokenizer)}"
                    if language
                    else ""
                )
            )
        require(
            clean.dtype == second.dtype,
            f"clean and corrupt: got {show(clean)} and {show(second)}, expected the same dtype",
        )
        mask = attention_mask
        for name, value in (("clean", clean), ("corrupt", second)):
            if language and mask is None and not value.is_floating_point():
                refuse_padding(
                    name, tokenizer, value, "give attention_mask, ones at tokens and zeros at padding"
                )
    else:
        clean, second, mask = _tokenised(clean, second, tokenizer, left=not masks_to_nan(inner))
    for name, value in (("clean", clean), ("corrupt", second)):
        if value.is_floating_point():
            require(
                bool(torch.isfinite(value).all()),
                f"{name}: holds NaN or infinite values; expected finite values only",
            )
    device = device_of(model)
    # Tensors made under inference mode cannot enter a graph: copy.
    clean, second = clean.to(device).clone(), second.to(device).clone()
    keywords: dict[str, Any] = {}
    if language:
        _check_tokens(inner, clean, second)
        accepted = inspect.signature(inner.forward).parameters
        if "use_cache" in accepted:
            keywords["use_cache"] = False
        if mask is not None:
            mask = mask.to(device)
            require(
                mask.shape == clean.shape
                and bool(((mask == 0) | (mask == 1)).all())
                and bool(mask.sum(1).all()),
                f"attention_mask: got {show(mask)}, expected ones and zeros of shape {tuple(clean.shape)}, with a token in every row",
            )
            steps = mask.long().diff(dim=1)
            require(
                bool(((steps != 0).sum(1) <= 1).all()),
                "attention_mask: a row has padding in its middle, expected it on one side",
            )
            keywords["attention_mask"] = mask
            if "position_ids" in accepted:
                keywords["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)
            mask = None if bool(mask.all()) else mask
            if mask is None:
                for key in ("attention_mask", "position_ids"):
                    keywords.pop(key, None)
        right = mask is not None and not bool(mask[:, -1].all())
        if getattr(metric, "last_only", False) and "logits_to_keep" in accepted and not right:
            keywords["logits_to_keep"] = 1
    return PromptPair(clean, second, mask, keywords, language, tokenizer)


def _tokenised(
    clean: Any, corrupt: Any, tokenizer: Any, *, left: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    for name, texts in (("clean", clean), ("corrupt", corrupt)):
        fits = isinstance(texts, (list, tuple)) and len(texts) > 0 and all(isinstance(t, str) for t in texts)
        require(fits, f"{name}: got {show(texts)}, expected a tensor of tokens or a list of texts")
    require(
        tokenizer is not None,
        "tokenizer: got None, expected the model's tokenizer, because the prompts are texts",
    )
    require(
        len(clean) == len(corrupt), f"corrupt: got {len(corrupt)} prompts, expected {len(clean)} as in clean"
    )
    rows = [(tokenizer(a)["input_ids"], tokenizer(b)["input_ids"]) for a, b in zip(clean, corrupt)]
    for k, (a, b) in enumerate(rows):
        require(len(a) > 0, f"clean: prompt {k} is empty")
        if len(a) != len(b):
            raise InputError(
                f"clean and corrupt: pair {k} has {len(a)} and {len(b)} tokens, expected the same number, position by position:\n"
                f"  clean   {tokenizer.convert_ids_to_tokens(a)}\n  corrupt {tokenizer.convert_ids_to_tokens(b)}"
            )
    longest = max(len(a) for a, _ in rows)
    filler = next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)

    # On the left where that can be, since it leaves the last position the last.
    def padded(row: list[int], fill: int) -> list[int]:
        rest = [fill] * (longest - len(row))
        return rest + row if left else row + rest

    first, second = (torch.tensor([padded(list(row[side]), filler) for row in rows]) for side in (0, 1))
    mask = torch.tensor([padded([1] * len(a), 0) for a, _ in rows])
    return first, second, mask


def _check_tokens(model: Any, *batches: Tensor) -> None:
    size = model.get_input_embeddings().num_embeddings
    limit = getattr(model.config, "max_position_embeddings", None)
    for ids in batches:
        require(
            ids.ndim == 2 and not ids.is_floating_point(),
            f"prompts: got {show(ids)}, expected token numbers of shape (batch, positions)",
        )
        low, high = int(ids.min()), int(ids.max())
        require(
            low >= 0 and high < size,
            f"prompts: token {low if low < 0 else high} is outside the vocabulary of {size}",
        )
        require(
            limit is None or ids.shape[1] <= limit,
            f"prompts: {ids.shape[1]} tokens are more than the model's {limit} positions; shorten them",
        )


def _row(ids: Tensor, tokenizer: Any) -> str:
    return str(ids.tolist() if tokenizer is None else tokenizer.convert_ids_to_tokens(ids.tolist()))
