"""What a choice of blocks leaves out: identities, bounds, limits, and the control selections."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tests.unit.modules.sparse_attention.models import made

from lineament.core.checks import InputError
from lineament.modules.sparse_attention import theory
from lineament.modules.sparse_attention.attend import attend, attend_both
from lineament.modules.sparse_attention.controls import control_selection
from lineament.modules.sparse_attention.perplexity import sliding_perplexity
from lineament.modules.sparse_attention.probe import attention_report
from lineament.modules.sparse_attention.selection import Selection, select
from lineament.modules.sparse_attention.theory import (
    decomposition,
    gaps,
    mass_by_distance,
    output_divergence,
    sparsity_report,
)

PASTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": torch.tensor([[0] * 5 + [1] * 18, [1] * 23])},
    "packed": {"documents": torch.tensor([[0] * 9 + [1] * 14]).expand(2, -1)},
}


def drawn(scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, heads, 23, 6, generator=generator).double() * scale for heads in (4, 2, 2))  # fmt: skip


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize("scoring", ["group_softmax", "dot"])
@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_difference_is_its_two_parts_and_within_the_bound_at_every_query(
    past: str, scoring: Any, scale: float
) -> None:
    q, k, v = drawn(scale)
    both = attend_both(q, k, v, block_size=3, blocks=3, scoring=scoring, **PASTS[past])
    parts = decomposition(q, k, v, both.selection)
    torch.testing.assert_close(both.full - both.sparse, parts.dropped - parts.rescaled)
    found = sparsity_report(q, k, v, both.selection)
    torch.testing.assert_close(found.error, (both.full - both.sparse).norm(dim=3))
    assert (found.error <= found.bound + 1e-9).all() and (found.error > 0.01).any()


@pytest.mark.parametrize("past", PASTS)
def test_report_in_tiles_is_the_report_at_once(past: str, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn()
    chosen = select(q, k, block_size=3, blocks=3, **PASTS[past])
    whole, mass = sparsity_report(q, k, v, chosen), mass_by_distance(q, k, (1, 4), **PASTS[past])
    oracle = control_selection(q, k, "oracle", block_size=3, blocks=3, **PASTS[past])
    monkeypatch.setattr(theory, "WEIGHTS", 1)
    torch.testing.assert_close(vars(sparsity_report(q, k, v, chosen)), vars(whole))
    torch.testing.assert_close(mass_by_distance(q, k, (1, 4), **PASTS[past]), mass)
    again = control_selection(q, k, "oracle", block_size=3, blocks=3, **PASTS[past])
    assert torch.equal(again.indices, oracle.indices)


def test_uniform_attention_has_its_closed_forms() -> None:
    zero = torch.zeros(1, 1, 8, 2)
    found = sparsity_report(zero, zero, torch.ones(1, 1, 8, 2), select(zero, zero, block_size=2, blocks=1))
    last = (0, 0, 7)
    assert found.entropy[last].item() == pytest.approx(math.log(8)) and found.bits[last].item() == pytest.approx(3)  # fmt: skip
    assert found.kept[last].item() == pytest.approx(0.25) and found.delta[last].item() == pytest.approx(0.75)
    assert found.divergence[last].item() == pytest.approx(math.log(4))
    assert found.first[last].item() == pytest.approx(1 / 8) and found.first_block[last].item() == pytest.approx(1 / 4)  # fmt: skip
    harmonic = [sum(1 / t for t in range(j, 9)) / 8 for j in range(1, 9)]
    torch.testing.assert_close(found.received[0, 0], torch.tensor(harmonic))
    assert found.peak.item() == pytest.approx(harmonic[0])
    mass = mass_by_distance(zero, zero, (1, 2, 4))[0]
    assert mass.sum().item() == pytest.approx(1) and mass[0].item() == pytest.approx(harmonic[0])


def test_padded_row_reports_what_it_reports_alone() -> None:
    q, k, v = drawn()
    padding = PASTS["padded"]["padding"]
    whole = sparsity_report(q, k, v, select(q, k, block_size=3, blocks=3, padding=padding))
    q, k, v = (x[:1, :, 5:] for x in (q, k, v))
    alone = sparsity_report(q, k, v, select(q, k, block_size=3, blocks=3))
    for name in ("kept", "entropy", "first", "first_block", "error", "bound", "divergence"):
        torch.testing.assert_close(getattr(whole, name)[:1, :, 5:], getattr(alone, name))
    torch.testing.assert_close(whole.received[:1, :, 5:], alone.received)


def test_more_blocks_keep_more_and_all_blocks_keep_all() -> None:
    q, k, v = drawn()
    wide = select(q, k, block_size=3, blocks=8)
    kept = [sparsity_report(q, k, v, Selection(wide.indices[..., :n], wide.layout)).kept for n in range(1, 9)]
    assert all((more >= less - 1e-12).all() for less, more in itertools.pairwise(kept))
    torch.testing.assert_close(kept[-1], torch.ones_like(kept[-1]))


@pytest.mark.parametrize("past", PASTS)
def test_oracle_keeps_the_most_and_all_controls_keep_the_budget(past: str) -> None:
    q, k, v = drawn(2.0)
    options = {"block_size": 3, "blocks": 3, **PASTS[past]}
    wanted = select(q, k, **options)
    found = {by: control_selection(q, k, by, **options) for by in ("last", "random", "oracle")}
    kept = {}
    for by, chosen in {"ours": wanted, **found}.items():
        assert torch.equal(chosen.mask().sum(-1), wanted.mask().sum(-1))
        kept[by] = sparsity_report(q, k, v, chosen).kept.unflatten(1, (2, 2)).mean(2)
    assert all((kept["oracle"] >= each - 1e-12).all() for each in kept.values())
    assert (kept["oracle"] > kept["ours"]).any()
    again = control_selection(q, k, "random", **options)
    other = control_selection(q, k, "random", **options, seed=1)
    assert torch.equal(again.indices, found["random"].indices) and not torch.equal(other.indices, again.indices)  # fmt: skip


def test_last_blocks_are_the_recent_ones() -> None:
    q, k, v = drawn()
    last = control_selection(q, k, "last", block_size=3, blocks=3)
    forced = select(q, k, block_size=3, blocks=3, recent=2)
    torch.testing.assert_close(attend(q, k, v, last).output, attend(q, k, v, forced).output)


def test_gap_is_within_capability_and_attention() -> None:
    one, two, three = drawn()[0], drawn(2.0)[0], drawn(3.0)[0].flip(2)
    found = gaps(one, two, three)
    assert (found.total <= found.capability + found.attention + 1e-12).all()
    with pytest.raises(InputError, match="expected one shape"):
        gaps(one, two, three[:1])


def test_cross_entropy_is_entropy_and_divergence() -> None:
    full, sparse = drawn()[0].flatten(0, 2), drawn()[0].flatten(0, 2).flip(1)
    p = full.softmax(-1)
    cross = -(p * sparse.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(cross, torch.special.entr(p).sum(-1) + output_divergence(full, sparse))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_layers_of_a_decoder_are_reported_and_it_is_left_as_it_was(family: str) -> None:
    model, ids = made(family).train(), torch.arange(2, 42)[None]
    before = model(ids).logits
    found = attention_report(model, ids, block_size=4, blocks=(2, 5, 10))
    assert [each.layer for each in found] == [0, 1] and model.training
    for each in found:
        assert (each.kept.diff(dim=0) >= -1e-9).all()
        torch.testing.assert_close(each.kept[-1], torch.ones(4).double())
        assert (each.kept[0] < 0.95).all() and (each.error <= each.bound).all()
    assert torch.equal(model(ids).logits, before)
    # The first layer by hand: its weights from the library's eager attention.
    model.eval().set_attn_implementation("eager")
    weights = model(ids, output_attentions=True).attentions[0]
    torch.testing.assert_close(torch.special.entr(weights).sum(-1).double().mean((0, 2)), found[0].entropy)
    torch.testing.assert_close(weights[..., 0].double().mean((0, 2)), found[0].first)


def test_every_token_but_the_first_is_counted_once_with_its_past() -> None:
    model, ids = made("llama"), torch.arange(50).repeat(2)[:77]
    found = sliding_perplexity(model, ids, context=77, stride=3)
    expected = float(model(ids[None], labels=ids[None]).loss.detach())
    assert found.tokens == 76 and found.loss == pytest.approx(expected, rel=1e-5) and math.isnan(found.error)
    windows = sliding_perplexity(model, ids, context=20, stride=7, batch_size=3)
    single = sliding_perplexity(model, ids, context=20, stride=7)
    assert windows.tokens == 76 and windows.loss == pytest.approx(single.loss, rel=1e-5)
    one = sliding_perplexity(model, ids[-20:], context=19, stride=1)
    with torch.no_grad():
        last = torch.log_softmax(model(ids[None, -19:]).logits, -1)[0, -2, ids[-1]]
    assert one.by_window[-1].item() == pytest.approx(-float(last), rel=1e-4)
    assert one.perplexity == pytest.approx(math.exp(one.loss))
    with pytest.raises(InputError, match="less than the context"):
        sliding_perplexity(model, ids, context=8, stride=8)
