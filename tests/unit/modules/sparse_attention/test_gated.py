"""Gated Llamas, the released format, and NSA's three branches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tests.unit.modules.sparse_attention.models import SHAPE, SPECIAL, made, prompts

from lineament.core.checks import InputError
from lineament.modules.sparse_attention import (
    AlignmentOptions,
    BlockCache,
    GatedLlamaConfig,
    GatedLlamaForCausalLM,
    aligned,
    attend,
    from_released,
    full_attention,
    nsa,
    sparse_attention,
)  # fmt: skip

SMALL = {**SHAPE, **SPECIAL}


def gated(seed: int = 0) -> GatedLlamaForCausalLM:
    torch.manual_seed(seed)
    model = GatedLlamaForCausalLM(GatedLlamaConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model


def released(folder: Path, window: int = 0, **changes) -> dict[str, torch.Tensor]:
    """A folder as the authors write it, and its weights."""
    model = made("llama", seed=4, tie_word_embeddings=True)
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.g_proj.weight"] = torch.randn(4 * 3, 32)
    told = {
        **SMALL, "model_type": "llama-nsa", "architectures": ["LlamaNSAForCausalLM"], "auto_map": {"AutoConfig": "configuration.X"},
        "block_size": 4, "block_counts": 3, "window_size": window, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "torch_dtype": "float32", "head_dim": 8, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(told))
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors")
    return weights


def test_open_gates_are_a_plain_llama_and_closed_ones_attend_to_nothing():
    model, plain, tokens = gated(), made("llama"), prompts(2, 30)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "gate.weight" not in k})
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.gate.weight.zero_()
            layer.self_attn.o_proj.weight.mul_(2)
    torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=1e-3)
    for each in (model, plain):
        each.eval()
    with sparse_attention(model, block_size=4, blocks=2), sparse_attention(plain, block_size=4, blocks=2):
        torch.testing.assert_close(model(tokens).logits, plain(tokens).logits, rtol=1e-3, atol=1e-3)


def test_a_gated_model_is_saved_decoded_and_refuses_to_lose_its_gates(tmp_path):
    model, tokens = gated(), prompts(1, 20)
    known = model(tokens).logits
    model.save_pretrained(tmp_path)
    opened = GatedLlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(tokens).logits, known)
    with sparse_attention(model, block_size=4, blocks=2):
        assert not torch.allclose(model(tokens).logits, known, atol=1e-2)
        plain = model.generate(tokens, max_new_tokens=8, do_sample=False)
        cached = model.generate(
            tokens, max_new_tokens=8, do_sample=False, past_key_values=BlockCache(model.config)
        )
    assert torch.equal(plain, cached)
    model.config._attn_implementation = "sdpa"
    with pytest.raises(InputError, match="would drop the gates"):
        model(tokens)


def test_alignment_is_taken_after_or_before_the_gate():
    model, tokens = gated().train(), prompts(1, 26)
    losses = {}
    for place in ("post_gate", "pre_gate"):
        with aligned(
            model, block_size=4, blocks=2, p_full=1, options=AlignmentOptions(place=place)
        ) as branch:
            (model(tokens, labels=tokens).loss + branch.loss).backward()
        losses[place] = branch.losses[0].detach()
    # Gates are below one.
    assert 0 < losses["post_gate"] < losses["pre_gate"]


def test_a_released_folder_opens_with_the_gate_that_is_used(tmp_path):
    weights = released(tmp_path)
    model, tokens = from_released(tmp_path), prompts(1, 26)
    for number, layer in enumerate(model.model.layers):
        theirs = weights[f"model.layers.{number}.self_attn.g_proj.weight"]
        for head in range(4):
            torch.testing.assert_close(layer.self_attn.gate.weight[head], theirs[3 * head + 1])
    assert not model.training and model.lm_head.weight is model.model.embed_tokens.weight
    sparse = model(tokens).logits
    with sparse_attention(model, block_size=4, blocks=3):
        torch.testing.assert_close(model(tokens).logits, sparse)
    with sparse_attention(model, mode="full"):
        assert not torch.allclose(model(tokens).logits, sparse, atol=1e-2)
    released(tmp_path, inference_mode="full")
    assert not torch.allclose(from_released(tmp_path)(tokens).logits, sparse, atol=1e-2)


def test_a_released_nsa_has_three_branches(tmp_path):
    released(tmp_path, window=5)
    model, tokens = from_released(tmp_path), prompts(1, 26)
    assert model.model.layers[0].self_attn.gate.weight.shape == (12, 32)
    known = model(tokens).logits
    found, cache = [], transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for token in tokens.split(1, 1):
            found.append(model(token, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1), known, rtol=1e-3, atol=1e-3)
    with sparse_attention(model, mode="full"):
        assert not torch.allclose(model(tokens).logits, known, atol=1e-2)
    with aligned(model), pytest.raises(InputError, match="NSA has no full attention"):
        model(tokens)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        from_released(tmp_path)
    made("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(InputError, match="holds a model of type 'llama', expected 'llama-nsa'"):
        from_released(tmp_path / "llama")
    released(tmp_path, num_hidden_layers=3)
    with pytest.raises(InputError, match="do not fit its configuration"):
        from_released(tmp_path)


@pytest.mark.parametrize("kind", ["plain", "padding", "documents"])
def test_the_branches_by_hand(kind: str):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 30, 4, dtype=torch.float64) for heads in (4, 2, 2))
    begin, past = torch.zeros(30, dtype=torch.long), {}
    if kind == "padding":
        begin, past = begin + 5, {"padding": torch.arange(30)[None] >= 5}
    if kind == "documents":
        begin[13:], past = 13, {"documents": torch.tensor([0, 13, 30])}
    for branch in range(3):
        gates = torch.zeros(1, 4, 30, 3, dtype=torch.float64)
        gates[..., branch] = 0.5
        found = nsa(q, k, v, gates, block_size=4, blocks=2, window=6, **past)
        for query in range(int(begin[0]), 30):
            first = int(begin[query])
            for head in range(4):
                keys, values = k[0, head // 2, first : query + 1], v[0, head // 2, first : query + 1]
                if branch == 0:
                    whole = len(keys) // 4 * 4
                    keys, values = (x[:whole].view(-1, 4, 4).mean(1) for x in (keys, values))
                elif branch == 2:
                    keys, values = keys[-6:], values[-6:]
                else:
                    continue
                known = (
                    (keys @ q[0, head, query] / 2).softmax(0) @ values
                    if len(keys)
                    else torch.zeros(4).double()
                )
                torch.testing.assert_close(found[0, head, query], 0.5 * known)
        if branch == 1:
            torch.testing.assert_close(found, 0.5 * attend(q, k, v, block_size=4, blocks=2, **past).output)
    gates = torch.rand(1, 4, 30, 3, dtype=torch.float64)
    found = nsa(q, k, v, gates, block_size=4, blocks=2, full=("compressed", "selected", "window"), **past)
    torch.testing.assert_close(found, gates.sum(-1, keepdim=True) * full_attention(q, k, v, **past))
    with pytest.raises(InputError, match="gates: got"):
        nsa(q, k, v, gates[..., :2])
