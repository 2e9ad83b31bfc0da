"""Attention over the best blocks against PyTorch's own over the whole past: a prompt, a training step's two branches, one decoded token,
and a report of where attention lies.

A group is four query heads on one key head; a prompt has a quarter of the 32 heads, which changes both sides alike.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from lineament.bench import Row, compare, quick, resident_mib
from lineament.modules.sparse_attention import attend, attend_both, attention_profiles
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


def layer(kind: str) -> LlamaForCausalLM:
    """A decoder of one layer, eight heads on two key heads."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=8 * SIZE,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=256,
    )
    config._attn_implementation = kind
    return LlamaForCausalLM(config).eval()


def report(side: str, tokens: int) -> Callable[[], object]:
    """Where one layer's attention lies: from one pass of ours, or as all weights, that are still to be read."""
    ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))
    if side == "ours":
        model = layer("sdpa")
        return lambda: attention_profiles(model, ids, block_size=BLOCK)
    model = layer("eager")

    @torch.no_grad()
    def weights() -> object:
        return model(ids, output_attentions=True, use_cache=False).attentions

    return weights


def peak_mib(side: str, tokens: int) -> float:
    """What a report adds to this process's peak memory, in MiB. A peak never falls: one process, one side."""
    report(side, 64)()
    run = report(side, tokens)
    before = resident_mib()
    run()
    return resident_mib() - before


def reports(repeats: int) -> Iterator[Row]:
    tokens = 512 if quick() else 8192
    found = []
    for side in ("ours", "eager"):
        command = [sys.executable, "-W", "ignore", __file__, "--peak", side, str(tokens)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found.append(f"{float(done.stdout):.0f} MiB" if done.returncode == 0 else "more than there was")
    yield compare(
        SLUG, f"attention report of a layer of 8 heads, {tokens:,} tokens", report("ours", tokens), "eager output_attentions",
        report("eager", tokens), target=None if quick() else 1.0, repeats=repeats, note=f"peak memory {found[0]} against {found[1]}",
    )  # fmt: skip


def rows(repeats: int = 3) -> Iterator[Row]:
    yield from decoding(5 * repeats)
    yield from branches(repeats)
    yield from reports(repeats)
    yield from prompts(repeats)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak_mib(sys.argv[2], int(sys.argv[3])))
    else:
        for row in rows():
            print(row)
