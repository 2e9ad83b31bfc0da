"""Train a decoder of transformers so that it runs with full attention and with any sparse budget: ``with aligned(model, step=step) as branch``.

Shen et al. 2026, arXiv 2511.20102. The model stays what it is; any training loop can be used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn

from lineament.core.checks import number, require
from lineament.modules.sparse_attention.branch import AlignmentOptions, Branch, coins
from lineament.modules.sparse_attention.hf import attention_modules, kept_layers, running


@contextmanager
def aligned(
    model: nn.Module,
    *,
    block_size: int | Sequence[int] = 16,
    blocks: int | Sequence[int] = 16,
    p_full: float = 0.5,
    alpha: float = 10.0,
    seed: int = 0,
    step: int = 0,
    options: AlignmentOptions | None = None,
) -> Iterator[Branch]:
    """Inside, each layer computes full and sparse attention, passes one of them on by a coin, and keeps their distance in the yielded branch.

    ``loss = model(**batch).loss + branch.loss``, then ``loss.backward()``, inside or after it. With ``p_full=1, alpha=0`` it is full
    attention's training, with ``p_full=0, alpha=0`` MoBA's.

    Args:
        model: any decoder of transformers that takes part in its attention interface, also wrapped by DDP, FSDP, peft or Accelerate.
        block_size, blocks: one value, or one a layer.
        p_full: probability of the coin that passes full attention on.
        alpha: weight of the alignment.
        seed, step: the coin is drawn from both, so that all processes draw the same; give each micro-batch a step of its own to draw anew for each.
        options: the paper's ablations.

    Layers that are recomputed (non-reentrant checkpointing) count once. Other checkpointing than that of transformers needs the backward pass inside the context.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> shape = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=10)
    >>> model, tokens = LlamaForCausalLM(LlamaConfig(**shape)), torch.arange(9)[None]
    >>> with aligned(model, block_size=2, blocks=2, step=3) as branch:
    ...     loss = model(tokens, labels=tokens).loss + branch.loss
    >>> loss.backward()
    >>> sorted(branch.losses), branch.coins
    ([0, 1], {0: False, 1: False})
    """
    number("alpha", alpha, low=0)
    options = options or AlignmentOptions()
    modules = attention_modules(model)
    kept = kept_layers(modules)
    layers = [m.layer_idx for m in modules if m.layer_idx not in kept]
    branch = Branch(
        block_size, blocks, "sparse", options.scoring, kept=kept, alpha=alpha, options=options,
        coins=coins(layers, p_full, seed, step, options.coin),
    )  # fmt: skip

    @contextmanager
    def recomputing() -> Iterator[None]:
        before, branch.again = branch.again, True
        try:
            with running(modules, branch):
                yield
        finally:
            branch.again = before

    with running(modules, branch), _checkpoints(model, recomputing):
        yield branch


@contextmanager
def _checkpoints(model: nn.Module, recomputing: Any) -> Iterator[None]:
    """Layers of transformers are recomputed with the same attention, also after the context has ended."""
    name = "_gradient_checkpointing_func"
    found = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) and name in vars(m)]
    before = [vars(m)[name] for m in found]
    for function in before:
        reentrant = getattr(function, "keywords", {}).get("use_reentrant")
        require(
            reentrant is False,
            "aligned: reentrant checkpointing would drop the alignment, expected "
            "gradient_checkpointing_kwargs={'use_reentrant': False}",
        )
    try:
        for module, function in zip(found, before):
            vars(module)[name] = partial(function, context_fn=lambda: (nullcontext(), recomputing()))
        yield
    finally:
        for module, function in zip(found, before):
            vars(module)[name] = function
