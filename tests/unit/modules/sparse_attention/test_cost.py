"""What a model loses with sparse attention, and its attention layer by layer, against transformers' own eager attention."""

from __future__ import annotations

import pytest
import torch
from tests.unit.modules.sparse_attention.models import FAMILIES, made, prompts
from torch.nn.functional import cross_entropy

from lineament.core.checks import InputError
from lineament.modules.sparse_attention import attention_profiles, sparse_attention, sparse_cost


@pytest.mark.parametrize("family", FAMILIES)
def test_profiles_are_those_of_the_weights_that_the_model_gives(family: str):
    model, tokens = made(family), prompts(2, 21)
    implementation = model.config._attn_implementation
    found = attention_profiles(model, tokens, block_size=4, blocks=(2, 6))
    assert model.config._attn_implementation == implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(tokens, output_attentions=True).attentions
    assert list(found) == list(range(len(weights)))
    back = torch.arange(21)[:, None] - torch.arange(21)
    for layer, full in enumerate(weights):
        own = found[layer]
        torch.testing.assert_close(own.first, full[..., 0].mean(2), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            own.entropy, torch.special.entr(full).sum(-1).mean(2), atol=1e-4, rtol=1e-4
        )
        near = torch.where(back == 3, full, 0).sum(-1).mean(2)
        torch.testing.assert_close(own.distance[..., 3], near, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(own.best[..., 1], torch.ones_like(own.first), atol=1e-5, rtol=1e-5)


def test_costs_are_those_of_separate_calls():
    model, tokens = made("llama"), prompts(3, 24)
    found = sparse_cost(model, tokens, block_size=4, blocks=(1, 2, 6), layer_blocks=2)

    def logits(**options):
        with torch.no_grad(), sparse_attention(model, block_size=4, **options):
            return model(tokens).logits[:, :-1].double()

    def loss(x):
        return cross_entropy(x.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)

    full = logits(mode="full")
    settings = [{"blocks": 1}, {"blocks": 2}, {"blocks": 6}]
    settings += [{"blocks": 2, "mode": modes} for modes in (["sparse", "full"], ["full", "sparse"])]
    rises = torch.cat([found.rise, found.layer_rise])
    divergences = torch.cat([found.divergence, found.layer_divergence])
    torch.testing.assert_close(found.full, loss(full), atol=1e-5, rtol=1e-5)
    assert found.layers == (0, 1) and len(rises) == len(settings)
    for options, rise, divergence in zip(settings, rises, divergences):
        sparse = logits(**options)
        torch.testing.assert_close(rise, loss(sparse) - loss(full), atol=1e-5, rtol=1e-4)
        kl = (full.softmax(-1) * (full.log_softmax(-1) - sparse.log_softmax(-1))).sum(-1).mean(1)
        torch.testing.assert_close(divergence, kl, atol=1e-5, rtol=1e-3)
    assert float(divergences[0].min()) > 0.01 and float(divergences[2].max()) < 1e-6


def test_a_layer_with_a_window_has_no_profile_and_no_cost():
    types = ["sliding_attention", "full_attention"]
    changes = {"use_sliding_window": True, "sliding_window": 8, "layer_types": types}
    model, tokens = made("qwen2", **changes), prompts(1, 24)
    assert list(attention_profiles(model, tokens, block_size=4)) == [1]
    assert sparse_cost(model, tokens, block_size=4, blocks=(2,), layer_blocks=2).layers == (1,)


@pytest.mark.parametrize("wrong", [torch.zeros(1, 3), torch.zeros(3, dtype=torch.long), "text"])
def test_what_is_no_tokens_is_refused(wrong):
    for ask in (sparse_cost, attention_profiles):
        with pytest.raises(InputError, match=r"input_ids: got .*expected token numbers"):
            ask(made("gpt2"), wrong)
