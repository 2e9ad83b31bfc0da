"""What a choice of blocks leaves out, against weights that are built as a whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lineament.core.checks import InputError
from lineament.modules.sparse_attention import (
    attend,
    attention_profile,
    decompose,
    full_attention,
    gaps,
    last_blocks,
    oracle_blocks,
    output_divergence,
    random_blocks,
    select,
    sparsity_report,
)
from lineament.modules.sparse_attention.selection import Selection

CHOICES = {"select": select, "last": last_blocks, "random": random_blocks, "oracle": oracle_blocks}
ROWS, HEADS, KEY_HEADS, TOKENS, SIZE = 2, 4, 2, 29, 8
PASTS = {
    "plain": {},
    "offset": {"offset": 9},
    "padding": {"padding": torch.tensor([[0] * 5 + [1] * 24, [1] * 27 + [0] * 2])},
    "documents": {"documents": torch.tensor([0, 7, 20, 29])},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lineament.modules.sparse_attention.weights.WEIGHTS", 1)
    monkeypatch.setattr("lineament.modules.sparse_attention.controls.SCORES", 200)


def drawn(past: dict, strength: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = TOKENS - past.get("offset", 0)
    shapes = ((HEADS, queries), (KEY_HEADS, TOKENS), (KEY_HEADS, TOKENS))
    q, k, v = (torch.randn(ROWS, *shape, SIZE, generator=generator, dtype=torch.float64) for shape in shapes)
    return strength * q, k, v


def built(q: Tensor, k: Tensor, selection: Selection, scale: float) -> tuple[Tensor, Tensor]:
    """All weights, and which keys may be seen."""
    layout = selection.layout
    at = torch.arange(layout.keys)
    seen = (at >= layout.begins[..., None]) & (at <= at[layout.offset :, None])
    seen = (seen & (layout.own >= 0)[..., None])[:, None].expand(ROWS, HEADS, -1, -1)
    logits = scale * q @ k.repeat_interleave(HEADS // KEY_HEADS, 1).mT
    return logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0), seen


@pytest.mark.parametrize("past", PASTS.values(), ids=PASTS)
@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_the_report_in_tiles_is_that_of_all_weights(choice, past):
    q, k, v = drawn(past)
    selection = choice(q, k, block_size=4, blocks=2, **past)
    full, seen = built(q, k, selection, SIZE**-0.5)
    chosen = selection.tokens().repeat_interleave(HEADS // selection.indices.shape[1], 1)
    found, parts = sparsity_report(q, k, v, selection), decompose(q, k, v, selection)
    sparse = attend(q, k, v, selection, backend="dense").output
    whole = full_attention(q, k, v, **past)
    torch.testing.assert_close(found.kept, (full * chosen).sum(-1))
    torch.testing.assert_close(found.delta, (full * (seen & ~chosen)).sum(-1))
    torch.testing.assert_close(found.entropy, torch.special.entr(full).sum(-1))
    torch.testing.assert_close(found.bits, found.entropy / math.log(2))
    torch.testing.assert_close(found.error, (whole - sparse).norm(dim=3))
    assert bool((found.error <= found.bound + 1e-12).all()) and float(found.error.max()) > 0.1
    torch.testing.assert_close(parts.full, whole)
    torch.testing.assert_close(parts.difference, whole - sparse)
    # KL(sparse weights, full weights) where a query is real.
    renormalised = torch.where(chosen, full, 0) / found.kept[..., None].clamp(min=1e-300)
    ratio = torch.where(renormalised > 0, renormalised.log() - full.clamp(min=1e-300).log(), 0)
    torch.testing.assert_close((renormalised * ratio).sum(-1), found.divergence)


@pytest.mark.parametrize("past", PASTS.values(), ids=PASTS)
def test_the_profile_in_tiles_is_that_of_all_weights(past):
    q, k, _ = drawn(past)
    selection = oracle_blocks(q, k, block_size=4, blocks=1, **past)
    layout = selection.layout
    full, seen = built(q, k, selection, SIZE**-0.5)
    real = (layout.own >= 0).expand(ROWS, -1)
    found = attention_profile(q, k, block_size=4, blocks=(1, 3, 50), **past)

    def mean(x: Tensor) -> Tensor:
        return x.sum(2) / real.sum(1).view(-1, 1, *[1] * (x.ndim - 3))

    begins = layout.begins.expand(ROWS, -1)[:, None, :, None].expand(ROWS, HEADS, -1, 1)
    at = torch.arange(layout.keys)
    back = at[layout.offset :, None] - at
    first = full.gather(3, begins)
    torch.testing.assert_close(found.entropy, mean(torch.special.entr(full).sum(-1)))
    torch.testing.assert_close(found.first, mean(first[..., 0]))
    torch.testing.assert_close(found.first_block, mean((full * (at < begins + 4)).sum(-1)))
    torch.testing.assert_close(found.received, full.sum(2) / seen.sum(2).clamp(min=1))
    by_hand = torch.stack([mean((full * (back == d)).sum(-1)) for d in at], -1)
    torch.testing.assert_close(found.distance, by_hand)
    without = full.scatter(3, begins, 0)
    torch.testing.assert_close(
        found.away, torch.stack([mean((without * (back == d)).sum(-1)) for d in at], -1)
    )
    torch.testing.assert_close(found.best[..., 2], torch.ones(ROWS, HEADS, dtype=torch.float64))
    block = torch.where(layout.of_keys() < 0, 99, layout.of_keys())
    masses = torch.stack(
        [(full * (block == n).expand(ROWS, -1)[:, None, None]).sum(-1) for n in range(layout.count)], -1
    )
    own = layout.own.clamp(min=0).expand(ROWS, -1)[:, None, :, None].expand(ROWS, HEADS, -1, 1)
    top = masses.scatter(3, own, 0).topk(2, dim=-1).values.sum(-1)
    torch.testing.assert_close(found.best[..., 1], mean(masses.gather(3, own)[..., 0] + top))
    held = found.away.cumsum(-1) / found.away.sum(-1, keepdim=True)
    reach = found.reach(0.5)[..., None]
    assert bool((held.gather(-1, reach - 1) >= 0.5 - 1e-6).all())
    assert bool(((reach < 2) | (held.gather(-1, (reach - 2).clamp(min=0)) < 0.5)).all())


def test_no_choice_of_blocks_keeps_more_than_the_oracle_and_more_blocks_keep_more():
    q, k, v = drawn({})
    kept = {}
    for name, choice in CHOICES.items():
        for blocks in (1, 2, 4, 8):
            found = sparsity_report(q, k, v, choice(q, k, block_size=4, blocks=blocks)).kept
            kept[name, blocks] = found.unflatten(1, (KEY_HEADS, -1)).mean(2)
    for name in CHOICES:
        assert bool((kept["oracle", 2] >= kept[name, 2] - 1e-12).all())
        torch.testing.assert_close(kept[name, 8], torch.ones_like(kept[name, 8]))
    for name in ("select", "last", "oracle"):
        for few, many in ((1, 2), (2, 4), (4, 8)):
            assert bool((kept[name, many] >= kept[name, few] - 1e-12).all())
    assert float((kept["oracle", 2] - kept["last", 2]).mean()) > 0.05


def test_controls_read_their_own_block_and_the_past_only():
    q, k, _ = drawn({})
    assert last_blocks(q, k, block_size=4, blocks=3).indices[0, 0, -1].tolist() == [7, 6, 5]
    one, again, other = (random_blocks(q, k, block_size=4, blocks=3, seed=s).indices for s in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    own = torch.arange(TOKENS) // 4
    assert torch.equal(one[..., 0], own.expand(ROWS, KEY_HEADS, -1)) and bool(
        (one[..., 1:] < own[:, None]).all()
    )
    with pytest.raises(InputError, match="blocks"):
        last_blocks(q, k, block_size=4, blocks=0)


@pytest.mark.parametrize("strength", [0.1, 1.0, 10.0, 1000.0])
def test_the_error_stays_below_its_bound_at_any_sharpness(strength):
    q, k, v = drawn({}, strength)
    found = sparsity_report(q, k, 100 * v, random_blocks(q, k, block_size=2, blocks=2))
    assert bool((found.error <= found.bound + 1e-10).all())
    assert bool(found.entropy.isfinite().all())


def test_the_gaps_bound_the_total():
    one, two, three = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    found = gaps(one, two, three)
    assert bool((found.total <= found.capability + found.attention).all())
    with pytest.raises(InputError, match="same shape"):
        gaps(one, two, three[:2])


def test_the_divergence_of_predictions_is_the_cross_entropy_less_the_entropy():
    full, sparse = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = output_divergence(full, sparse)
    expected = torch.nn.functional.cross_entropy(sparse, full.softmax(-1), reduction="none")
    torch.testing.assert_close(found.cross_entropy, expected)
    assert float(found.divergence.min()) > 0 and float(output_divergence(full, full).divergence.max()) < 1e-12
    barred = torch.tensor([0.0, -math.inf])
    assert output_divergence(barred, barred).divergence.item() == 0
