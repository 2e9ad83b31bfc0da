"""Edges into queries, keys and values: they sum to the edge into the attention's input, and each is the way through that projection alone."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.language_models import FAMILIES, prompts, tiny

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture, record
from lineament.explain.patching.edges import edge_patching
from lineament.explain.patching.metrics import logit_difference

METRIC = logit_difference([5, 6, 7], [8, 9, 10])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rules", ["gradient", "relp", "relp+ah", "attnlrp", ["ln", "epsilon"]])
def test_queries_keys_and_values_sum_to_the_attentions_input_and_heads_to_them(family, rules):
    model, (clean, corrupt) = tiny(family, torch.float64), prompts()
    options = {"rules": rules, "normalise": False}
    whole = edge_patching(model, clean, corrupt, METRIC, **options)
    split = edge_patching(model, clean, corrupt, METRIC, inputs="qkv", **options)
    fine = edge_patching(model, clean, corrupt, METRIC, inputs="qkv heads", **options)
    groups = {"llama": 2, "qwen2": 1, "qwen3": 2, "gemma2": 2, "gemma3": 2}.get(family, 4)
    assert [n for n in split.downstream if "0" in n] == ["q 0", "k 0", "v 0", "mlp 0"]
    assert len(fine.downstream) == 2 * (4 + 2 * groups + 1) + 1
    close = {"atol": 1e-6, "rtol": 1e-6, "equal_nan": True}

    def column(result, name):
        return result.per_example[:, :, list(result.downstream).index(name)]

    for layer in range(2):
        total = sum(column(split, f"{part} {layer}") for part in "qkv")
        torch.testing.assert_close(total, column(whole, f"attn {layer}"), **close)
        for part, count in (("q", 4), ("k", groups), ("v", groups)):
            by_head = [column(fine, f"{part} {layer}.{head}") for head in range(count)]
            torch.testing.assert_close(sum(by_head), column(split, f"{part} {layer}"), **close)
        for name in (f"mlp {layer}", "logits"):
            torch.testing.assert_close(column(fine, name), column(whole, name), **close)
        into = torch.stack([column(split, f"{part} {layer}").nan_to_num().abs().max() for part in "qkv"])
        assert into[2] > 0 and (into[:2] > 0).all() == (rules != "relp+ah")


def test_one_head_of_queries_alone_is_its_gradient_through_the_norm():
    model, (clean, corrupt) = tiny("gpt2", torch.float64), prompts()
    found = edge_patching(
        model, clean, corrupt, METRIC, rules="gradient", inputs="qkv heads", heads=True, normalise=False
    )
    block = model.transformer.h[1]
    with capture(model, ["transformer.h.1.attn:q"], gradients=True) as acts:
        score = METRIC(model(corrupt).logits).sum()
    back = acts.gradients(score)["transformer.h.1.attn:q"][:, :, 3]
    x = record(model, corrupt, "transformer.h.1:in")["transformer.h.1:in"].requires_grad_()
    query = block.attn.c_attn(block.ln_1(x))[..., 18:24]
    c = torch.autograd.grad(query, x, back)[0]
    z = [
        record(model, ids, "transformer.h.0.attn:z")["transformer.h.0.attn:z"][:, :, 2]
        for ids in (clean, corrupt)
    ]
    moved = (z[0] - z[1]) @ model.transformer.h[0].attn.c_proj.weight[12:18]
    row, column = list(found.upstream).index("head 0.2"), list(found.downstream).index("q 1.3")
    torch.testing.assert_close(found.per_example[:, row, column], (moved * c).sum((1, 2)).detach())


def test_heads_downstream_need_no_heads_upstream():
    model, (clean, corrupt) = tiny("gemma2"), prompts()
    assert "q 1.3" in edge_patching(model, clean, corrupt, METRIC, inputs="qkv heads").downstream
    with pytest.raises(InputError, match="inputs: got 'qk'"):
        edge_patching(model, clean, corrupt, METRIC, inputs="qk")
