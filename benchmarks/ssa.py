"""Attention over the best blocks against PyTorch's own over the whole past: a prompt, a training step's two branches, and one decoded token.

A group is four query heads on one key head; a prompt has a quarter of the 32 heads, which changes both sides alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lineament.bench import Row, compare, quick
from lineament.modules.sparse_attention import attend, attend_both
from lineament.modules.sparse_attention.cache import BlockLayer, attend_cached
from lineament.modules.sparse_attention.options import LayerBudget

SLUG = "ssa"
BLOCK, SIZE = 64, 64


def tensors(heads: int, keys: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, tokens), (keys, tokens), (keys, tokens))
    q, k, v = (torch.randn(1, *shape, SIZE, generator=generator) for shape in shapes)
    return q, k, v


def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def bound(tokens: int, blocks: int) -> float:
    """FLOPs of causal attention over those of selection and chosen blocks."""
    return 2 * tokens / (4 * BLOCK * blocks + tokens / BLOCK)


def stepped(function: Callable[[], Tensor], *inputs: Tensor) -> Callable[[], None]:
    """The forward and the backward pass."""

    def step() -> None:
        for x in inputs:
            x.grad = None
        function().sum().backward()

    return step


def prompts(repeats: int) -> Iterator[Row]:
    for tokens, target in ((1024, None),) if quick() else ((16_384, 2.5), (32_768, 5.0)):
        q, k, v = tensors(8, 2, tokens)

        def sparse(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            with torch.no_grad():
                return attend(q, k, v, block_size=BLOCK, blocks=8).output

        yield compare(
            SLUG, f"prompt of {tokens:,} tokens, 8 blocks of {BLOCK}", sparse, "scaled_dot_product_attention, causal",
            lambda q=q, k=k, v=v: whole(q, k, v), target=target, repeats=repeats,
            note=f"counted in FLOPs the bound is {bound(tokens, 8):.1f}",
        )  # fmt: skip


def branches(repeats: int) -> Iterator[Row]:
    tokens = 1024 if quick() else 16_384
    q, k, v = (x.requires_grad_() for x in tensors(4, 1, tokens))

    def both() -> Tensor:
        found = attend_both(q, k, v, block_size=BLOCK, blocks=8)
        return found.full + F.smooth_l1_loss(found.full, found.sparse)

    yield compare(
        SLUG, f"attention of a training step, both branches, forward and backward, {tokens:,} tokens", stepped(both, q, k, v),
        "full attention alone", stepped(lambda: whole(q, k, v), q, k, v), target=None if quick() else 1 / 1.5, repeats=repeats,
        note=f"counted in FLOPs the bound is {1 / (1 + 1 / bound(tokens, 8)):.2f}",
    )  # fmt: skip


@torch.no_grad()
def decoding(repeats: int) -> Iterator[Row]:
    tokens, blocks = (2048, 8) if quick() else (32_768, 16)
    _, k, v = tensors(32, 8, tokens)
    ours, theirs = BlockLayer(), DynamicLayer()
    for layer in (ours, theirs):
        layer.update(k, v)
    q, new, _ = tensors(32, 8, 1)
    budget = LayerBudget(BLOCK, blocks, "sparse", "group_softmax", 0, 0)

    def token() -> None:
        with torch.no_grad():
            ours.update(new, new)
            attend_cached(q, ours, budget, scale=None, padding=None)
            ours.crop(-1)

    def copied() -> None:
        keys, values = theirs.update(new, new)
        F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        theirs.keys, theirs.values = keys[:, :, :-1], values[:, :, :-1]

    reach = 2 * tokens / (tokens / BLOCK + 2 * BLOCK * blocks)
    for peer, other, target in (
        ("scaled_dot_product_attention on a kept cache", lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 8.0),
        ("scaled_dot_product_attention on a DynamicCache", copied, 20.0),
    ):  # fmt: skip
        yield compare(
            SLUG, f"one token after {tokens:,}, {blocks} blocks of {BLOCK}", token, peer, other, target=None if quick() else target,
            repeats=repeats, warmup=3, note=f"counted in bytes the bound is {reach:.1f} on a kept cache",
        )  # fmt: skip


def rows(repeats: int = 3) -> Iterator[Row]:
    yield from decoding(5 * repeats)
    yield from branches(repeats)
    yield from prompts(repeats)
