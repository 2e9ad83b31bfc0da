"""Attention heads of the language-model families, against attention written out by hand from what was captured."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contracts.language_models import FAMILIES, GROUPED, SMALL, build, transformers
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture, patch, record
from lineament.core.sites.naming import sites

CONFIGS = {
    **FAMILIES,
    "llama-ungrouped": lambda: transformers.LlamaConfig(**SMALL),
    "gemma": lambda: transformers.GemmaConfig(**GROUPED),
}


@pytest.fixture(params=CONFIGS)
def family(request):
    """(model, tokens, glob of the attention blocks, output projection, key-value heads, head size)"""
    config = CONFIGS[request.param]()
    model = build(config)
    ids = torch.randint(3, 50, (2, 7))
    blocks, projection = {
        "gpt2": ("transformer.h.*.attn", "c_proj"),
        "gpt_neox": ("gpt_neox.layers.*.attention", "dense"),
    }.get(config.model_type, ("model.layers.*.self_attn", "o_proj"))
    groups = getattr(config, "num_key_value_heads", None) or 4
    return model, ids, blocks, projection, groups, getattr(config, "head_dim", None) or 6


def _module(model, name):
    return model.get_submodule(name)


def test_heads_are_found_from_the_configuration(family):
    model, ids, blocks, _, groups, size = family
    names = [name for part in "qkvz" for name in sites(model, f"{blocks}:{part}")]
    assert len(names) == 8 and sites(model, "**:z") == sites(model, f"{blocks}:z")
    with unchanged(model), torch.no_grad(), capture(model, names) as acts:
        model(ids)
    for name in names:
        heads = groups if name[-1] in "kv" else 4
        assert acts[name].shape == (2, 7, heads, size), name


def test_the_heads_are_those_that_the_block_attends_with(family):
    """The attention weights that the model returns mix the captured values into the captured z."""
    model, ids, blocks, _, groups, _ = family
    for block in sites(model, blocks):
        with torch.no_grad(), capture(model, [f"{block}:{p}" for p in "qkvz"]) as acts:
            weights = model(ids, output_attentions=True).attentions[int(block.split(".")[-2])]
        values = acts[f"{block}:v"].repeat_interleave(4 // groups, dim=2)
        mixed = torch.einsum("bhqk,bkhd->bqhd", weights, values)
        torch.testing.assert_close(acts[f"{block}:z"], mixed, rtol=1e-4, atol=1e-5)


def test_queries_and_keys_are_where_they_belong(family):
    """Head h's query is its rows of the projection's weight times the block's input."""
    model, ids, blocks, _, groups, size = family
    block = sites(model, blocks)[1]
    attention = _module(model, block)
    with torch.no_grad(), capture(model, [f"{block}:in", *(f"{block}:{p}" for p in "qkv")]) as acts:
        model(ids)
    hidden = acts[f"{block}:in"]
    for index, part in enumerate("qkv"):
        heads = 4 if part == "q" else groups
        if hasattr(attention, "q_proj"):
            module = getattr(attention, f"{part}_proj")
            weight, bias, rows = module.weight, module.bias, lambda h: range(h * size, (h + 1) * size)
        elif hasattr(attention, "c_attn"):
            weight, bias = attention.c_attn.weight.T, attention.c_attn.bias
            rows = lambda h, i=index: range(i * 24 + h * size, i * 24 + (h + 1) * size)  # noqa: E731
        else:
            weight, bias = attention.query_key_value.weight, attention.query_key_value.bias
            rows = lambda h, i=index: range((3 * h + i) * size, (3 * h + i + 1) * size)  # noqa: E731
        for h in range(heads):
            chosen = list(rows(h))
            by_hand = hidden @ weight[chosen].T + (0 if bias is None else bias[chosen])
            torch.testing.assert_close(
                acts[f"{block}:{part}"][:, :, h], by_hand.detach(), rtol=1e-4, atol=1e-5
            )


def test_one_head_is_patched_and_the_others_stay(family):
    model, ids, blocks, projection, _, size = family
    block = sites(model, blocks)[0]
    out = _module(model, f"{block}.{projection}")
    watched = [f"{block}:z", f"{block}.{projection}:in", f"{block}.{projection}"]
    with torch.no_grad():
        clean = model(ids).logits
        with capture(model, watched) as before:
            model(ids)
        with unchanged(model), patch(model, {f"{block}:z[2]": 0.0}), capture(model, watched) as after:
            ablated = model(ids).logits
        assert torch.equal(model(ids).logits, clean) and not torch.equal(ablated, clean)
    z = before[f"{block}:z"].clone()
    z[:, :, 2] = 0
    assert torch.equal(after[f"{block}:z"], z)
    # The block's output loses exactly what the head's columns of the output projection wrote.
    columns = slice(2 * size, 3 * size)
    weight = out.weight[columns] if not hasattr(out, "out_features") else out.weight[:, columns].T
    lost = before[f"{block}:z"][:, :, 2] @ weight.detach()
    found = before[f"{block}.{projection}"] - after[f"{block}.{projection}"]
    torch.testing.assert_close(found, lost, rtol=1e-3, atol=1e-5)

    def by_function(heads):
        heads[:, :, 2] = 0
        return heads

    with torch.no_grad(), patch(model, {f"{block}:z": by_function}):
        assert torch.equal(model(ids).logits, ablated)


def test_queries_keys_and_values_are_patched(family):
    model, ids, blocks, _, groups, _ = family
    block = sites(model, blocks)[1]
    names = [f"{block}:{part}" for part in "qkv"]
    with torch.no_grad():
        clean = model(ids).logits
        with capture(model, names) as acts:
            model(ids)
        same = {name: acts[name] for name in names}
        with patch(model, same):
            assert torch.equal(model(ids).logits, clean)
        for name in names:
            with patch(model, {name: lambda t: 0 * t}), capture(model, [*names, f"{block}:z"]) as changed:
                assert not torch.equal(model(ids).logits, clean)
            for other in names:
                assert torch.equal(changed[other], 0 * same[other] if other == name else same[other])
            if name.endswith("k"):  # no key stands out, so each position averages the values up to it
                values = same[f"{block}:v"].repeat_interleave(4 // groups, dim=2)
                mean = values.cumsum(1) / torch.arange(1, 8).view(7, 1, 1)
                torch.testing.assert_close(changed[f"{block}:z"], mean, rtol=1e-4, atol=1e-5)


def test_gradients_at_heads_are_those_of_the_patched_values(family):
    model, ids, blocks, _, _, _ = family
    block = sites(model, blocks)[0]
    names = [f"{block}:{part}" for part in "qkvz"] + [f"{block}:z[1]"]
    with capture(model, names, gradients=True) as acts:
        score = model(ids).logits[:, -1, 7].sum()
    gradients = acts.gradients(score)
    torch.testing.assert_close(gradients[f"{block}:z[1]"], gradients[f"{block}:z"][:, :, 1])
    for name in names:
        value = acts[name].detach().requires_grad_()
        with patch(model, {name: value}):
            patched = model(ids).logits[:, -1, 7].sum()
        by_hand = torch.autograd.grad(patched, value)[0]
        assert by_hand.abs().sum() > 0
        torch.testing.assert_close(gradients[name], by_hand, msg=name)


def test_dataclass_outputs_and_generation(family):
    model, ids, blocks, _, _, size = family
    with unchanged(model), torch.no_grad(), capture(model, ["", f"{blocks}:z"]) as acts:
        output = model(ids, labels=ids)
        assert torch.equal(acts[""], output.logits)  # and not the loss, which comes first
        with patch(model, {"": 0.0}):
            patched = model(input_ids=ids, labels=ids)
    assert patched.logits.abs().sum() == 0 and torch.equal(patched.loss, output.loss)
    assert type(patched) is type(output) and patched["logits"] is patched.logits
    with unchanged(model), torch.no_grad(), capture(model, f"{blocks}:z") as acts:
        model.generate(ids, max_new_tokens=2, do_sample=False)
    assert {z.shape for z in acts.values()} == {(2, 1, 4, size)}


def test_record_takes_what_a_tokenizer_gives(family):
    model, ids, blocks, _, _, size = family
    found = record(
        model, {"attention_mask": torch.ones_like(ids), "input_ids": ids}, [":in", f"{blocks}:q[0]"]
    )
    assert torch.equal(found[":in"], ids) and len(found) == 3
    assert found[sites(model, f"{blocks}:q[0]")[1]].shape == (2, 7, size)


def test_heads_that_are_not_there():
    config = FAMILIES["qwen2"]()
    model = transformers.AutoModel.from_config(config)
    with pytest.raises(InputError, match=r"asks for head 1, but 'layers\.0\.self_attn' has 1 \(k\)"):
        sites(model, "layers.0.self_attn:k[1]")
    assert sites(model, "layers.0.self_attn:q[3]") == ["layers.0.self_attn:q[3]"]
    with pytest.raises(InputError, match=r"no attention heads; nearest: 'layers\.\d\.self_attn'"):
        sites(model, "layers.0.mlp:z")
    with pytest.raises(InputError, match="no attention blocks of a known layout"):
        sites(nn.Sequential(nn.Linear(2, 2)), "0:q")


def test_a_projection_of_another_width_is_not_mistaken_for_heads():
    config = FAMILIES["llama"]()
    model = transformers.AutoModel.from_config(config)
    model.layers[0].self_attn.q_proj = nn.Linear(24, 2 * 4 * 8)  # a gated query, as in later families
    assert sites(model, "**:q") == ["layers.1.self_attn:q"]


def test_cross_attention_of_gpt2():
    config = transformers.GPT2Config(
        vocab_size=50, n_embd=24, n_layer=1, n_head=4, n_positions=32, add_cross_attention=True
    )
    model = transformers.GPT2Model(config).eval()
    ids, memory = torch.arange(5)[None], torch.randn(1, 3, 24)
    names = [f"h.0.crossattention:{part}" for part in "qkvz"]
    with torch.no_grad(), capture(model, names) as acts:
        model(ids, encoder_hidden_states=memory)
    q, k, v, z = (acts[name].transpose(1, 2) for name in names)
    weights = (q @ k.transpose(-1, -2) / math.sqrt(6)).softmax(-1)
    torch.testing.assert_close(z, weights @ v, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_heads_of_a_compiled_language_model():
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES["qwen3"]()).eval()
    ids = torch.arange(3, 9)[None]
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(ids)
        with capture(compiled, "**:z") as acts, patch(compiled, {"model.layers.0.self_attn:z[0]": 0.0}):
            compiled(ids)
    assert acts["model.layers.0.self_attn:z"][:, :, 0].abs().sum() == 0
    torch.compiler.reset()
