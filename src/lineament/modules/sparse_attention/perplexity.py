"""Perplexity of a language model on a long text, read in windows that overlap, so that every counted token has a past of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lineament.core.checks import number, require, show
from lineament.core.models import device_of, frozen
from lineament.core.results import Readable


@dataclass(frozen=True)
class Perplexity(Readable):
    """``loss``: the mean in nats a token, its standard ``error`` over windows (NaN for one window); ``perplexity``: exp(loss); ``by_window``: window means."""

    loss: float
    error: float
    perplexity: float
    tokens: int
    by_window: Tensor


@torch.no_grad()
def sliding_perplexity(
    model: nn.Module, ids: Tensor, *, context: int = 2048, stride: int = 256, batch_size: int = 1
) -> Perplexity:
    """The perplexity of the tokens ``ids``, [tokens]: windows of ``context`` tokens, each ``stride`` on, of which the new tokens count.

    Args:
        model: its call on [batch, tokens] gives logits, or an output with ``logits``.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> sliding_perplexity(LlamaForCausalLM(LlamaConfig(**shape)), torch.arange(40) % 10, context=16, stride=8).tokens
    39
    """
    require(
        ids.ndim == 1 and len(ids) > 1 and not ids.is_floating_point(),
        f"ids: got {show(ids)}, expected the tokens of one text, [tokens], at least two",
    )
    context = number("context", context, low=2, integer=True)
    stride = number("stride", stride, low=1, integer=True)
    require(stride < context, f"stride: got {stride}, expected less than the context, {context}")
    number("batch_size", batch_size, low=1, integer=True)
    # (start, stop, first counted): the first window counts all its tokens but the first.
    stops = [min(context, len(ids)), *range(context + stride, len(ids) + stride, stride)]
    windows, counted = [], 1
    for stop in (min(stop, len(ids)) for stop in stops):
        if counted < stop:
            windows.append((max(0, stop - context), stop, counted))
            counted = stop
    losses = []
    with frozen(model):
        for start in range(0, len(windows), batch_size):
            group = windows[start : start + batch_size]
            rows = torch.stack([ids[a:b] for a, b, _ in group]).to(device_of(model))
            found = model(rows)
            logits = getattr(found, "logits", found)
            for row, scores, (a, b, first) in zip(rows, logits, group):
                fresh = slice(first - a, b - a)
                losses.append(F.cross_entropy(scores[first - a - 1 : b - a - 1].float(), row[fresh], reduction="none").double())  # fmt: skip
    means, counts = torch.stack([x.mean() for x in losses]), torch.tensor([len(x) for x in losses])
    loss = float(torch.cat(losses).mean())
    many = len(means)
    weights = counts.to(means) / counts.sum()
    # Of a weighted mean of windows.
    error = (
        float(((weights * (means - loss)) ** 2).sum().mul(many / (many - 1)).sqrt()) if many > 1 else math.nan
    )
    return Perplexity(loss, error, math.exp(min(loss, 700.0)), int(counts.sum()), means)
