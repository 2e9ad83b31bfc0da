"""Sparse attention for the decoders of transformers as they are: ``with sparse_attention(model, block_size=64, blocks=8): model.generate(...)``.

Importing this file registers ``"lineament_sparse"`` as attention and as mask. Without a mask function of its own transformers would drop the padding; this
one hands on the 2-D mask, padding and packed documents in one. Layers with a sliding window stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from lineament.core.checks import require, show
from lineament.modules.sparse_attention.attend import full_attention, sparse_output
from lineament.modules.sparse_attention.branch import Branch
from lineament.modules.sparse_attention.cache import attend_cached, layer_of
from lineament.modules.sparse_attention.nsa import BRANCHES, nsa
from lineament.modules.sparse_attention.options import IN_CONFIG, ON_MODULE, Budget, budget_of
from lineament.modules.sparse_attention.selection import select

NAME = "lineament_sparse"
# transformers 4 passes `is_causal` otherwise.
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5


@contextmanager
def sparse_attention(
    model: nn.Module,
    *,
    block_size: int | Sequence[int] = 64,
    blocks: int | Sequence[int] = 8,
    mode: str | Sequence[str] = "sparse",
    scoring: str = "group_softmax",
    sinks: int = 0,
    recent: int = 0,
    selection: str = "exact",
) -> Iterator[Budget]:
    """Inside, the model's layers read ``blocks`` blocks of ``block_size`` tokens a query, or their whole past with ``mode="full"``.

    Args:
        model: any decoder of transformers that takes part in its attention interface, also wrapped. Its weights and forward stay.
        block_size, blocks, mode: one value, or one a layer; the yielded budget may be changed between calls.
        scoring, sinks, recent, selection: see :func:`lineament.modules.select`.

    Yields:
        The budget; its ``kept`` names the layers that stay as they are, with their sliding window.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> model, tokens = LlamaForCausalLM(LlamaConfig(**shape)).eval(), torch.arange(9)[None]
    >>> with sparse_attention(model, block_size=2, blocks=5) as budget:
    ...     whole = model(tokens).logits
    ...     budget.blocks = 1
    ...     local = model(tokens).logits
    >>> known = model(tokens).logits
    >>> bool(torch.allclose(whole, known, atol=1e-5)), bool(torch.allclose(local, known, atol=1e-5))
    (True, False)
    """
    modules = attention_modules(model)
    budget = Budget(block_size, blocks, mode, scoring, sinks, recent, kept_layers(modules), selection)
    for module in modules:
        budget.of(module.layer_idx)
    with running(modules, budget):
        yield budget


@contextmanager
def running(modules: Sequence[Any], budget: Budget) -> Iterator[None]:
    """Inside, these attention layers follow the budget; afterwards all is as before, also after an exception."""
    configs = {id(m.config): m.config for m in modules}.values()
    places = [(vars(m), ON_MODULE) for m in modules]
    places += [
        (vars(config), key) for config in configs for key in (IN_CONFIG, "_attn_implementation_internal")
    ]
    before = [(where, key, key in where, where.get(key)) for where, key in places]
    try:
        for module in modules:
            setattr(module, ON_MODULE, budget)
        for config in configs:
            # Another model may share the configuration: it stays with full attention.
            setattr(config, IN_CONFIG, None)
            config._attn_implementation = NAME
        yield
    finally:
        for where, key, there, value in before:
            if there:
                where[key] = value
            else:
                where.pop(key, None)


def install(
    model: nn.Module,
    *,
    block_size: int | Sequence[int] = 64,
    blocks: int | Sequence[int] = 8,
    mode: str | Sequence[str] = "sparse",
    scoring: str = "group_softmax",
    sinks: int = 0,
    recent: int = 0,
    selection: str = "exact",
) -> None:
    """Give the model sparse attention for good: the options are kept in its configuration, and saved with it.

    ``from_pretrained(folder, attn_implementation="lineament_sparse")`` opens it so, once this file is imported; without that word the
    folder is an ordinary checkpoint with full attention.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> model = LlamaForCausalLM(LlamaConfig(**shape))
    >>> install(model, block_size=16, blocks=4)
    >>> model.config.lineament_sparse["blocks"]
    4
    """
    modules = attention_modules(model)
    budget = Budget(block_size, blocks, mode, scoring, sinks, recent, kept_layers(modules), selection)
    for module in modules:
        budget.of(module.layer_idx)
    for config in {id(m.config): m.config for m in modules}.values():
        setattr(config, IN_CONFIG, budget.for_config())
        config._attn_implementation = NAME


def attention_modules(model: nn.Module) -> list[Any]:
    """The attention layers of a decoder; what cannot be served is refused."""
    found = [m for m in model.modules() if hasattr(m, "config") and hasattr(m, "layer_idx") and hasattr(m, "is_causal")]  # fmt: skip
    owners = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    name = type(owners[0] if owners else model).__name__
    texts = [m.config.get_text_config(decoder=True) for m in owners]
    require(
        not any(getattr(config, "is_encoder_decoder", False) for config in texts),
        f"model: {name} is an encoder-decoder, expected a decoder with causal attention only",
    )
    found = [m for m in found if any(m.config is config for config in texts)]
    takes_part = bool(found) and all(type(m)._can_set_attn_implementation() for m in owners)
    require(
        takes_part, f"model: {name} does not take part in the attention interface of transformers, expected a decoder that does"
    )  # fmt: skip
    require(
        all(m.is_causal and getattr(m.config, "is_causal", True) for m in found),
        f"model: {name} has attention that is not causal, expected a decoder with causal attention only",
    )
    config = found[0].config
    require(
        getattr(config, "attn_logit_softcapping", None) is None,
        f"model: {name} caps its attention logits (attn_logit_softcapping), which sparse attention does not",
    )
    require(
        not any(hasattr(m, "sinks") for m in found),
        f"model: {name} has learned attention sinks, which sparse attention does not know",
    )
    require(
        not getattr(config, "output_attentions", False),
        "model: output_attentions is set, but sparse attention keeps no weights; expected output_attentions=False",
    )
    return found


def kept_layers(modules: Sequence[Any]) -> tuple[int, ...]:
    """The layers that attend within a window or a chunk."""
    kept = tuple(m.layer_idx for m in modules if _windowed(m))
    require(
        len(kept) < len(modules),
        "model: all its layers attend within a sliding window and stay as they are, expected layers with their whole past",
    )
    return kept


def _windowed(module: Any) -> bool:
    types = getattr(module.config, "layer_types", None)
    if types is not None:
        return types[module.layer_idx] in ("sliding_attention", "chunked_attention")
    if hasattr(module, "sliding_window"):
        return module.sliding_window is not None
    # Without types a model with a window uses it in all layers, unless it has a switch.
    on = getattr(module.config, "use_sliding_window", True)
    return on and getattr(module.config, "sliding_window", None) is not None


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function, [batch, tokens, heads, size]; a ``gate``, [batch, heads, tokens, 1], multiplies the output, three are NSA's."""
    if BEFORE_5 and (query.shape[2] == 1 or attention_mask is not None) and not getattr(module, "is_cross_attention", False):  # fmt: skip
        # There it only says whether PyTorch's attention is to make the mask.
        options.pop("is_causal", None)
    _refuse(module, dropout, options)
    budget, layer = budget_of(module), module.layer_idx
    if _windowed(module):
        if attention_mask is None or attention_mask.ndim == 4:
            options.pop("gate", None)
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, **options
            )
        budget = None
    require(
        attention_mask is None or attention_mask.ndim == 2,
        f"attention_mask: got {show(attention_mask)}, expected the 2-D mask of a tokenizer, 1 for real tokens",
    )
    padding = None if attention_mask is None else attention_mask > 0
    documents = _documents(options, query, key, padding)
    if documents is None and attention_mask is not None and bool((attention_mask > 1).any()):
        # A mask of our own also numbers the documents.
        documents = attention_mask
    total = key.shape[2] if attention_mask is None else attention_mask.shape[1]
    past = {"offset": total - query.shape[2], "documents": documents, "padding": padding}
    gate = options.get("gate")
    if gate is not None and gate.shape[-1] == 3:
        require(not isinstance(budget, Branch), "aligned: NSA has no full attention of its own to align with, expected a model with one gate a head")  # fmt: skip
        out = _nsa(module, query, key, value, gate, past, scaling)
        return out.transpose(1, 2).contiguous(), None
    if isinstance(budget, Branch):
        out = budget.attended(module, query, key, value, past, scaling, gate)
        return out.transpose(1, 2).contiguous(), None
    wanted = None if budget is None else budget.of(layer)
    if wanted is None or wanted.mode == "full" or wanted.blocks * wanted.block_size >= total:
        out = full_attention(query, key, value, scale=scaling, **past)
    elif (cached := layer_of(key)) is not None and documents is None:
        out = attend_cached(query, cached, wanted, scale=scaling, padding=padding)
    else:
        selection = select(query, key, scale=scaling, **wanted.choosing(), **past)
        out, _ = sparse_output(query, key, value, selection, scale=scaling, backend="auto", lse=False)
    out = out if gate is None else gate * out
    return out.transpose(1, 2).contiguous(), None


def _nsa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    past: dict[str, Any],
    scale: float | None,
) -> Tensor:
    """The three gated branches; full attention takes their place where the mode is ``"full"``."""
    budget = (budget_of(module) or Budget(mode="full")).of(module.layer_idx)
    return nsa(
        query, key, value, gate, block_size=budget.block_size, blocks=budget.blocks, window=module.config.window_size,
        full=BRANCHES if budget.mode == "full" else (), scale=scale, **past,
    )  # fmt: skip


def _refuse(module: Any, dropout: float, options: dict[str, Any]) -> None:
    name = type(module).__name__
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    require(bool(causal), f"{name}: its attention is not causal, expected causal attention")
    require(
        dropout == 0,
        f"{name}: got dropout {dropout} in attention, expected 0; set it to 0 in the model's configuration",
    )
    for word, told in {
        "softcap": "caps its attention logits, which sparse attention does not",
        "s_aux": "has learned attention sinks, which sparse attention does not know",
        "position_bias": "adds a bias to its attention logits, which sparse attention does not",
    }.items():
        require(options.get(word) is None, f"{name}: {told}")
    require(
        not options.get("output_attentions"),
        "output_attentions: sparse attention keeps no weights, expected output_attentions=False",
    )


def _documents(options: dict[str, Any], query: Tensor, key: Tensor, padding: Tensor | None) -> Tensor | None:
    """The packed documents by their cumulative lengths or by positions that start again."""
    lengths = options.get("cu_seq_lens_q")
    if lengths is not None:
        return lengths
    positions = options.get("position_ids")
    tokens = query.shape[2]
    if positions is None or positions.shape[1:] != (tokens,) or key.shape[2] != tokens:
        return None
    again = positions[:, 1:] != positions[:, :-1] + 1
    if padding is not None:
        again = again & padding[:, 1:] & padding[:, :-1]
    return F.pad(again.long().cumsum(1), (1, 0)) if bool(again.any()) else None


def mask_forward(
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor | None:
    """[batch, tokens up to the last query]: 0 for padding, else the number of the token's document from 1; None where all is one document.

    A window or chunk gives the 4-D mask of PyTorch's attention instead.
    """

    def windowed() -> Tensor | None:
        return sdpa_mask(
            batch_size=batch_size, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
            attention_mask=attention_mask, **options,
        )  # fmt: skip

    if kv_offset:
        return windowed()
    places = options.get("cache_position")  # as transformers 4 tells it
    total = int(options.get("q_offset", 0)) + options["q_length"] if places is None else int(places[-1]) + 1
    device = options.get("device") if places is None else places.device
    labels = torch.ones(batch_size, total, dtype=torch.long, device=device)
    if mask_function is not causal_mask_function:
        row = torch.arange(batch_size, device=device)[:, None]
        head, at = torch.zeros_like(row), torch.arange(total, device=device).expand(batch_size, total)
        ahead = mask_function(row, head, at[:, :-1], at[:, 1:])
        require(not bool(ahead.any()), "attention_mask: it is not causal, expected a causal mask")
        fresh = ~mask_function(row, head, at[:, 1:], at[:, :-1])
        labels[:, 1:] += fresh.cumsum(1)
        opened = F.pad(torch.where(fresh, at[:, 1:], 0), (1, 0)).cummax(1).values
        if not bool(mask_function(row, head, at, opened).all()):
            return windowed()
    if attention_mask is not None:
        labels = labels * attention_mask[:, :total].to(labels)
    plain = kv_length == total and bool((labels == 1).all())
    return None if plain else labels


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, mask_forward)
