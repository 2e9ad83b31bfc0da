"""Training with alignment: coins, losses by layer, the paper's switches, checkpointing, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.unit.modules.sparse_attention.models import FAMILIES, checkpointing, made, prompts
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lineament.core.checks import InputError
from lineament.modules.sparse_attention import (
    AlignmentOptions,
    aligned,
    alignment_loss,
    attend_both,
    sparse_attention,
)
from lineament.modules.sparse_attention.alignment import distance

BUDGET: dict[str, Any] = {"block_size": 4, "blocks": 3}


def step(model, *, inside: bool = True, **options):
    """Loss, branch and gradients of one step."""
    tokens = prompts(2, 26)
    model.zero_grad()
    with aligned(model, **BUDGET, **options) as branch:
        loss = model(tokens, labels=tokens).loss + branch.loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return loss.detach(), branch, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_is_the_models_loss_and_the_mean_alignment(name: str):
    model, tokens = made(name).train(), prompts(2, 26)
    for p_full, mode in ((1.0, "full"), (0.0, "sparse")):
        loss, branch, gradients = step(model, p_full=p_full)
        with sparse_attention(model, **BUDGET, mode=mode), torch.no_grad():
            plain = model(tokens, labels=tokens).loss
        assert set(branch.losses) == {0, 1} and set(branch.coins.values()) == {p_full == 1}
        assert all(float(x.detach()) > 0 for x in branch.losses.values())
        torch.testing.assert_close(loss, plain + 10 * sum(branch.losses.values()).detach() / 2)
        # Without alignment: the plain training of full attention, and MoBA's.
        model.zero_grad()
        with sparse_attention(model, **BUDGET, mode=mode):
            model(tokens, labels=tokens).loss.backward()
        known = [p.grad for p in model.parameters() if p.grad is not None]
        for one, two in zip(step(model, p_full=p_full, alpha=0)[2], known):
            torch.testing.assert_close(one, two)
        assert any(not torch.allclose(one, two) for one, two in zip(gradients, known))
    assert model.config._attn_implementation == "sdpa"


def test_both_directions_at_equal_weight_are_one_plain_distance():
    full, sparse = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for form in ("smooth_l1", "l2"):
        two_terms = alignment_loss(full, sparse, form=form).total
        plain = distance(full, sparse, form)
        torch.testing.assert_close(two_terms, 2 * plain)
        for one, two in zip(
            torch.autograd.grad(two_terms, (full, sparse)), torch.autograd.grad(plain, (full, sparse))
        ):
            torch.testing.assert_close(one, two)


def test_one_way_alignment_moves_one_branch():
    model = made("llama", num_hidden_layers=1).train()
    known = step(model, p_full=1)[0]
    for w_sparsity, w_commit in ((1.0, 0.0), (0.0, 1.0)):
        loss, branch, _ = step(
            model, p_full=1, options=AlignmentOptions(w_sparsity=w_sparsity, w_commit=w_commit)
        )
        both = float(step(model, p_full=1)[1].losses[0].detach())
        assert float(branch.losses[0].detach()) == pytest.approx(both / 2, rel=1e-5)
        assert float(loss) < float(known)
    q, k, v = (torch.randn(1, 2, 20, 4, requires_grad=True) for _ in range(3))
    both = attend_both(q, k, v, block_size=4, blocks=2)
    moved = torch.autograd.grad(
        alignment_loss(both.full, both.sparse, sparse_weight=0).total, (both.full, both.sparse)
    )
    assert moved[0].any() and not moved[1].any()


def test_l2_is_the_mean_square():
    model = made("llama").train()
    losses = {
        form: step(model, p_full=1, options=AlignmentOptions(form=form))[1].losses
        for form in ("l2", "smooth_l1")
    }
    # Where all differences are below beta, the smooth form is half of the square.
    wide = step(model, p_full=1, options=AlignmentOptions(beta=1e6))[1].losses
    for layer in (0, 1):
        torch.testing.assert_close(losses["l2"][layer], 2e6 * wide[layer], rtol=1e-4, atol=1e-9)
        assert losses["smooth_l1"][layer] <= losses["l2"][layer]


def test_the_coin_depends_on_seed_and_step_alone():
    model = made("llama").train()

    def drawn(**options) -> list[bool]:
        found = []
        for number in range(40):
            torch.manual_seed(number)
            with aligned(model, **BUDGET, step=number, **options) as branch:
                assert len(set(branch.coins.values())) == 1 or options.get("options")
                found += branch.coins.values()
        return found

    known = drawn(seed=3)
    assert drawn(seed=3) == known and drawn(seed=4) != known
    assert 20 < sum(known) < 60
    assert 5 < sum(drawn(seed=3, p_full=0.25)) < 35
    layers = drawn(seed=3, options=AlignmentOptions(coin="layer"))
    assert layers[::2] != layers[1::2]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("p_full", [0.0, 1.0])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_recomputed_layers_count_once_and_give_the_same_gradients(name: str, p_full: float, inside: bool):
    model = made(name).train()
    loss, branch, known = step(model, p_full=p_full)
    checkpointing(model, use_reentrant=False)
    again, second, found = step(model, p_full=p_full, inside=inside)
    torch.testing.assert_close(again, loss)
    assert len(second.losses) == 2
    torch.testing.assert_close(second.loss, branch.loss)
    for one, two in zip(found, known):
        torch.testing.assert_close(one, two)
    assert model.config._attn_implementation == "sdpa"


def test_reentrant_checkpointing_is_refused():
    model, tokens = made("llama").train(), prompts(1, 26)
    checkpointing(model, use_reentrant=True)
    with pytest.raises(InputError, match="use_reentrant': False"), aligned(model, **BUDGET):
        pass
    model = made("llama").train()
    layer = model.model.layers[0]
    plain = layer.forward
    layer.forward = lambda x, **kw: checkpoint(lambda y: plain(y, **kw), x, use_reentrant=True)
    with pytest.raises(InputError, match="gradients are off"), aligned(model, **BUDGET):
        model(tokens, labels=tokens)
    assert model.config._attn_implementation == "sdpa"


def test_padding_and_documents_count_as_the_rows_alone():
    model, one, two = made("llama").train(), prompts(1, 17), prompts(1, 22, seed=2)
    with aligned(model, **BUDGET, p_full=0) as branch:
        model(one)
        first = {layer: 17 * x.detach() for layer, x in branch.losses.items()}
        model(two)
        total = {layer: (first[layer] + 22 * x.detach()) / 39 for layer, x in branch.losses.items()}
        model(torch.cat([one, two], 1), position_ids=torch.cat([torch.arange(17), torch.arange(22)])[None])
        for layer, x in branch.losses.items():
            torch.testing.assert_close(x.detach(), total[layer], rtol=1e-3, atol=1e-6)
        padded = torch.cat([F.pad(one, (5, 0)), two])
        mask = (padded > 0).long()
        model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
        for layer, x in branch.losses.items():
            torch.testing.assert_close(x.detach(), total[layer], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_bfloat16_trains(name: str):
    model, tokens = made(name).train().to(torch.bfloat16), prompts(2, 26)
    with aligned(model, **BUDGET) as branch:
        loss = model(tokens, labels=tokens).loss + branch.loss
        loss.backward()
    assert branch.losses[0].dtype == torch.float32 and torch.isfinite(loss)
    model.float()
    with aligned(model, **BUDGET) as branch, torch.autocast("cpu", torch.bfloat16):
        (model(tokens, labels=tokens).loss + branch.loss).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_bad_options_are_refused():
    model = made("llama")
    for message, options in {
        "p_full: got 1.5": {"p_full": 1.5},
        "alpha: got -1": {"alpha": -1},
        "step: got -1": {"step": -1},
        "block_size: got 0": {"block_size": 0},
    }.items():
        with pytest.raises(InputError, match=message), aligned(model, **options) as branch:
            model(prompts(1, 9))
    with pytest.raises(InputError, match="coin: got 'toss'"):
        AlignmentOptions(coin="toss")  # pyright: ignore[reportArgumentType]
    with aligned(model, **BUDGET) as branch, pytest.raises(InputError, match="has not been called"):
        _ = branch.loss
