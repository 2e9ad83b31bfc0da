"""The cache for decoding: the numbers of attention without a cache, after all that a generation does to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tests.unit.modules.sparse_attention.models import made, prompts
from torch import Tensor

from lineament.modules.sparse_attention import BlockCache, attend
from lineament.modules.sparse_attention.cache import BlockLayer, attend_cached
from lineament.modules.sparse_attention.options import LayerBudget

CHOICES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dot": {"scoring": "dot"},
    "forced": {"sinks": 1, "recent": 1},
    "sinks": {"sinks": 2},
    "odd blocks": {"block_size": 5},
    "own block": {"blocks": 1},
    "single tokens": {"block_size": 1, "blocks": 4},
    "released": {"selection": "released"},
}


def tensors(tokens: int, rows: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(rows, heads, tokens, 8, dtype=dtype) for heads in (6, 2, 2)]


def decoded(
    layer: BlockLayer, q: Tensor, k: Tensor, v: Tensor, steps: list[int], options: dict, padding: Any = None
):
    found, at = [], layer.get_seq_length()
    budget = LayerBudget(**{"block_size": 4, "blocks": 3, "mode": "sparse", "scoring": "group_softmax", "sinks": 0, "recent": 0, **options})  # fmt: skip
    for step in steps:
        part = slice(at, at + step)
        layer.update(k[:, :, part], v[:, :, part])
        seen = None if padding is None else padding[:, : at + step]
        found.append(attend_cached(q[:, :, part], layer, budget, scale=0.4, padding=seen))
        at += step
    return torch.cat(found, 2)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", CHOICES)
def test_any_steps_give_attention_without_a_cache(name: str, padded: bool):
    q, k, v = tensors(60)
    padding = torch.arange(60) >= torch.tensor([[3], [9]]) if padded else None
    options = {"block_size": 4, "blocks": 3, **CHOICES[name]}
    known = attend(q, k, v, **options, padding=padding, scale=0.4).output
    for steps in ([60], [1] * 60, [11, 1, 1, 2, 35, *([1] * 10)]):
        torch.testing.assert_close(decoded(BlockLayer(), q, k, v, steps, options, padding), known)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype):
    q, k, v = tensors(40, dtype=dtype)
    known = attend(q, k, v, block_size=4, blocks=3, scale=0.4).output
    found = decoded(BlockLayer(), q, k, v, [30, *([1] * 10)], {})
    assert found.dtype == dtype
    torch.testing.assert_close(found, known, rtol=0, atol=0.03)


@pytest.mark.parametrize("padded", [False, True])
def test_cropping_forgets_the_blocks_that_are_no_longer_complete(padded: bool):
    q, k, v = tensors(40)
    padding = torch.arange(40) >= torch.tensor([[3], [9]]) if padded else None
    layer, wrong = BlockLayer(), [x + 3 for x in (q, k, v)]
    decoded(layer, q, k, v, [20], {}, padding)
    for length in (20, 18, 11):
        decoded(layer, *wrong, [1] * (25 - layer.get_seq_length()), {}, padding)
        layer.crop(length - 25)
        assert layer.get_seq_length() == length
    decoded(layer, *wrong, [14], {}, padding)
    # transformers 4 tells the length that stays.
    layer.crop(11)
    found = decoded(layer, q, k, v, [1] * 29, {}, padding)
    known = attend(q, k, v, block_size=4, blocks=3, scale=0.4, padding=padding).output
    torch.testing.assert_close(found, known[:, :, 11:])


@pytest.mark.parametrize("padded", [False, True])
def test_rows_are_reordered_repeated_and_selected_with_their_blocks(padded: bool):
    q, k, v = tensors(40)
    padding = torch.arange(40) >= torch.tensor([[3], [9]]) if padded else None
    known = attend(q, k, v, block_size=4, blocks=3, scale=0.4, padding=padding).output
    changes = {
        (1, 0): lambda x: x.reorder_cache(torch.tensor([1, 0])),
        (0, 0, 1, 1): lambda x: x.batch_repeat_interleave(2),
        (1,): lambda x: x.batch_select_indices(torch.tensor([1])),
    }
    for order, change in changes.items():
        layer, rows = BlockLayer(), list(order)
        decoded(layer, q, k, v, [20, 1], {}, padding)
        change(layer)
        moved = [x[rows] for x in (q, k, v)]
        found = decoded(layer, *moved, [1] * 19, {}, None if padding is None else padding[rows])
        torch.testing.assert_close(found, known[rows][:, :, 21:])


def test_it_grows_by_doubling_and_never_copies_otherwise():
    layer, token, sizes = BlockLayer(), torch.ones(1, 2, 1, 8), []
    for _ in range(1500):
        keys, _ = layer.update(token, token)
        sizes.append(keys.untyped_storage().nbytes() // 64)
    assert sorted(set(sizes)) == [256, 512, 1024, 2048]
    assert layer.keys is not None and layer.keys.shape == (1, 2, 1500, 8)


def test_reset_forgets_and_other_block_sizes_are_summed_anew():
    q, k, v = tensors(40)
    layer = BlockLayer()
    decoded(layer, *(x + 1 for x in (q, k, v)), [25], {})
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.keys is None
    decoded(layer, q, k, v, [25], {})
    known = attend(q, k, v, block_size=8, blocks=2, scale=0.4).output
    found = decoded(layer, q, k, v, [1] * 15, {"block_size": 8, "blocks": 2})
    torch.testing.assert_close(found, known[:, :, 25:])


def test_gradients_pass_through_a_cache():
    model, tokens = made("llama"), prompts(1, 30)
    cache = BlockCache(model.config)
    model(tokens[:, :20], past_key_values=cache)
    model(tokens[:, 20:], past_key_values=cache).logits.square().mean().backward()
    known = transformers.DynamicCache(config=model.config)
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(tokens[:, :20], past_key_values=known)
    model(tokens[:, 20:], past_key_values=known).logits.square().mean().backward()
    for one, two in zip(found, model.parameters()):
        torch.testing.assert_close(one, two.grad)
