"""Sparse attention on unmodified decoders of transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tests.unit.modules.sparse_attention.models import FAMILIES, OTHERS, made, prompts

from lineament.core.checks import InputError
from lineament.modules.sparse_attention import BlockCache, install, sparse_attention

NAMES = tuple(FAMILIES)
BEFORE_5 = int(transformers.__version__.split(".")[0]) < 5
BUDGET: dict[str, Any] = {"block_size": 4, "blocks": 3}


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_past_is_the_model_itself_and_little_of_it_is_not(name: str):
    model, tokens = made(name), prompts(2, 30)
    known = model(tokens).logits
    with sparse_attention(model, block_size=4, blocks=8) as budget:
        torch.testing.assert_close(model(tokens).logits, known, rtol=1e-3, atol=1e-3)
        budget.blocks = 7
        almost = model(tokens).logits
        torch.testing.assert_close(almost[:, :28], known[:, :28], rtol=1e-3, atol=1e-3)
        budget.blocks = 2
        assert not torch.allclose(model(tokens).logits[:, -1], known[:, -1], atol=1e-2)
        torch.testing.assert_close(model(tokens).logits[:, :8], known[:, :8], rtol=1e-3, atol=1e-3)
        budget.mode = ("full", "full")
        torch.testing.assert_close(model(tokens).logits, known, rtol=1e-3, atol=1e-3)
        budget.mode, budget.blocks = "sparse", [1, 8]
        mixed = model(tokens).logits
        budget.blocks = [8, 1]
        assert not torch.allclose(model(tokens).logits, mixed, atol=1e-2)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_read_their_whole_past_or_little_of_it(name: str):
    if BEFORE_5 and name in ("OPT", "StableLm"):
        pytest.skip("these two make masks or attend in their own way in transformers 4")
    model, tokens = made(name), prompts(2, 30)
    with torch.no_grad():
        known = model(tokens).logits
        with sparse_attention(model, block_size=4, blocks=7) as budget:
            assert budget.kept == ()
            torch.testing.assert_close(model(tokens).logits[:, :28], known[:, :28], rtol=1e-3, atol=1e-3)
            budget.blocks = 2
            assert not torch.allclose(model(tokens).logits[:, -1], known[:, -1], atol=1e-2)


@pytest.mark.parametrize("name", ["Bloom", "Falcon"])
def test_families_outside_of_the_attention_interface_are_refused(name: str):
    TestRefused().refused(made(name), "does not take part in the attention interface")


@pytest.mark.parametrize("mode", ["sparse", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_row_gives_what_it_gives_alone(name: str, mode: str):
    model, tokens = made(name), prompts(1, 21)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], 1)
    batch = torch.cat([padded, prompts(1, 26, seed=2)])
    mask = torch.ones_like(batch)
    mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    right = torch.cat([tokens, torch.zeros(1, 5, dtype=torch.long)], 1)
    with sparse_attention(model, **BUDGET, mode=mode):
        alone = model(tokens).logits
        found = model(batch, attention_mask=mask, position_ids=positions).logits
        after = model(right, attention_mask=mask[:1].flip(1)).logits
    torch.testing.assert_close(found[:1, 5:], alone, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after[:, :21], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["sparse", "full"])
@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_give_what_they_give_alone(name: str, mode: str):
    model, one, two = made(name), prompts(1, 17), prompts(1, 22, seed=2)
    packed, positions = torch.cat([one, two], 1), torch.cat([torch.arange(17), torch.arange(22)])[None]
    with sparse_attention(model, **BUDGET, mode=mode):
        alone = torch.cat([model(one).logits, model(two).logits], 1)
        found = model(packed, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(found, alone, rtol=1e-3, atol=1e-3)
        if name != "gpt2":
            lengths = torch.tensor([0, 17, 39], dtype=torch.int32)
            lengths = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths}
            told = model(packed, position_ids=positions, use_cache=False, **lengths).logits
            torch.testing.assert_close(told, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", ["block", "dynamic", "static"])
@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_is_one_full_forward_token_by_token(name: str, kind: str, mask: bool):
    model, tokens = made(name), prompts(2, 41)
    seen = torch.ones_like(tokens)
    if mask:
        seen[0, :3] = 0
        seen[1, :6] = 0
    positions = (seen.cumsum(1) - 1).clamp(min=0)
    for blocks in (3, 30):
        cache = {
            "block": lambda: BlockCache(model.config),
            "dynamic": lambda: transformers.DynamicCache(config=model.config),
            "static": lambda: transformers.StaticCache(config=model.config, max_cache_len=64),
        }[kind]()
        with sparse_attention(model, block_size=4, blocks=blocks), torch.no_grad():
            known = model(tokens, attention_mask=seen, position_ids=positions).logits
            found, at = [], 0
            # A prompt, a chunk, and then one token a step.
            for step in (14, 9, *([1] * 18)):
                part = slice(at, at + step)
                asked = {"attention_mask": seen[:, : at + step], "position_ids": positions[:, part]}
                found.append(model(tokens[:, part], **asked, past_key_values=cache).logits)
                at += step
        found = torch.cat(found, 1)
        for row in range(2):
            torch.testing.assert_close(
                found[row, seen[row] > 0], known[row, seen[row] > 0], rtol=1e-3, atol=1e-3
            )


@pytest.mark.parametrize("name", NAMES)
def test_generate_with_a_batch_beams_and_an_assistant(name: str):
    model, assistant = made(name), made(name, seed=3)
    tokens = prompts(2, 23)
    tokens[0, :4] = 0
    asked = {
        "attention_mask": (tokens != 0).long(), "max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    with sparse_attention(model, **BUDGET):
        plain = model.generate(tokens, **asked)
        torch.testing.assert_close(
            model.generate(tokens, **asked, past_key_values=BlockCache(model.config)), plain
        )
        alone = model.generate(tokens[:1, 4:], **asked | {"attention_mask": torch.ones(1, 19).long()})
        assert torch.equal(alone[0, 19:], plain[0, 23:])
        beams = model.generate(tokens, **asked, num_beams=3)
        cached = model.generate(tokens, **asked, num_beams=3, past_key_values=BlockCache(model.config))
        assert torch.equal(cached, beams)
        single = {**asked, "attention_mask": asked["attention_mask"][1:]}
        for cache in (None, BlockCache(model.config)):
            helped = model.generate(tokens[1:], **single, assistant_model=assistant, past_key_values=cache)
            assert torch.equal(helped, plain[1:])
    assert not torch.equal(model.generate(tokens, **asked), plain)


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_left_behind(name: str):
    model, tokens = made(name), prompts(1, 30)
    before, known = copy.deepcopy(model.config.to_dict()), model(tokens).logits
    attributes = [set(vars(m)) for m in model.modules()]
    for fails in (False, True):
        try:
            with sparse_attention(model, **BUDGET), sparse_attention(model, block_size=2, blocks=2):
                model(tokens)
                if fails:
                    raise KeyError
        except KeyError:
            assert fails
        assert model.config.to_dict() == before and model.config._attn_implementation == "sdpa"
        assert "lineament_sparse" not in vars(model.config)
        assert [set(vars(m)) for m in model.modules()] == attributes
        assert torch.equal(model(tokens).logits, known)


def test_two_models_share_nothing_but_their_configuration():
    model = made("llama")
    other, tokens = copy.deepcopy(model), prompts(1, 30)
    for module in other.modules():
        if hasattr(module, "config"):
            module.config = model.config
    known = other(tokens).logits
    with sparse_attention(model, **BUDGET):
        torch.testing.assert_close(other(tokens).logits, known, rtol=1e-3, atol=1e-3)
        with sparse_attention(other, block_size=2, blocks=1):
            small = other(tokens).logits
        torch.testing.assert_close(other(tokens).logits, known, rtol=1e-3, atol=1e-3)
        found = model(tokens).logits
    assert not torch.allclose(small, found, atol=1e-2) and not torch.allclose(found, known, atol=1e-2)


def test_installed_options_are_saved_and_loaded(tmp_path):
    model, tokens = made("llama"), prompts(1, 30)
    plain = model(tokens).logits
    install(model, **BUDGET)
    known = model(tokens).logits
    assert not torch.allclose(known, plain, atol=1e-2)
    model.save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="lineament_sparse"
    )
    torch.testing.assert_close(opened(tokens).logits, known)
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened(tokens).logits, plain)


def test_the_released_choice_is_the_exact_one_until_a_second_chunk_of_blocks(tmp_path):
    model, tokens, budget = made("llama"), prompts(1, 40), {"block_size": 4, "blocks": 4}
    with sparse_attention(model, **budget):
        exact = model(tokens).logits
    with sparse_attention(model, **budget, selection="released"):
        known = model(tokens).logits
        asked = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        plain, kept = model.generate(tokens, **asked), BlockCache(model.config)
        assert torch.equal(model.generate(tokens, **asked, past_key_values=kept), plain)
    torch.testing.assert_close(known[:, :16], exact[:, :16])
    assert not torch.allclose(known, exact, atol=1e-2)
    install(model, **budget, selection="released")
    model.save_pretrained(tmp_path)
    opened = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="lineament_sparse"
    )
    torch.testing.assert_close(opened(tokens).logits, known)


def test_layers_with_a_sliding_window_stay_and_are_named():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = made("qwen2", num_hidden_layers=3, use_sliding_window=True, sliding_window=6, layer_types=types)
    tokens = prompts(2, 30)
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    known = model(tokens, attention_mask=mask).logits
    with sparse_attention(model, block_size=4, blocks=8) as budget:
        assert budget.kept == (0, 2)
        found = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(found[mask > 0], known[mask > 0], rtol=1e-3, atol=1e-3)
        budget.blocks = 2
        sparse = model(tokens).logits
        cached, cache = [], BlockCache(model.config)
        with torch.no_grad():
            for token in tokens.split(1, 1):
                cached.append(model(token, past_key_values=cache).logits)
        torch.testing.assert_close(torch.cat(cached, 1), sparse, rtol=1e-3, atol=1e-3)
    TestRefused().refused(made("mistral", sliding_window=8), "all its layers attend within a sliding window")


class TestRefused:
    def refused(self, model, message: str, **options):
        before = copy.deepcopy(vars(model.config)) if hasattr(model, "config") else None
        with pytest.raises(InputError) as told, sparse_attention(model, **options):
            model(prompts(1, 30))
        assert message in str(told.value) and "\n" not in str(told.value)
        assert before is None or vars(model.config) == before

    def test_models(self):
        t5 = transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        )
        self.refused(t5, "encoder-decoder")
        bert = transformers.BertModel(
            transformers.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        )  # fmt: skip
        self.refused(bert, "does not take part" if BEFORE_5 else "not causal")
        self.refused(torch.nn.Linear(2, 2), "Linear does not take part in the attention interface")
        gemma = transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(**{**FAMILIES["qwen3"][2], "attn_logit_softcapping": 50.0})
        )
        self.refused(gemma, "caps its attention logits")
        oss = transformers.GptOssForCausalLM(
            transformers.GptOssConfig(
                **{**FAMILIES["qwen3"][2], "num_local_experts": 2, "num_experts_per_tok": 1}
            )
        )
        self.refused(oss, "learned attention sinks")
        self.refused(made("llama", output_attentions=True, attn_implementation="eager"), "output_attentions")

    @pytest.mark.parametrize(
        ("message", "options"),
        [
            ("block_size: got 0", {"block_size": 0}),
            ("blocks: got 0", {"blocks": 0}),
            ("mode: got 'sparce', which is not a choice; nearest: 'sparse'", {"mode": "sparce"}),
            ("blocks: got [4], 1 values, expected one for each layer", {"blocks": [4]}),
            ("scoring: got 'dots'", {"scoring": "dots"}),
            ("selection: got 'inexact'", {"selection": "inexact"}),
            ("selection: 'released' wants block_size a power", {"selection": "released", "block_size": 4}),
        ],
    )
    def test_options(self, message: str, options: dict):
        self.refused(made("llama"), message, **options)

    def test_calls(self):
        model, tokens = made("llama"), prompts(1, 20)
        holes = torch.ones_like(tokens)
        holes[0, 5] = 0
        with sparse_attention(model, **BUDGET):
            with pytest.raises(InputError, match="the mask has holes"):
                model(tokens, attention_mask=holes)
            with pytest.raises(InputError, match="expected the 2-D mask"):
                model(tokens, attention_mask=torch.ones(1, 1, 20, 20).tril().bool())
            with pytest.raises(InputError, match="output_attentions"):
                model(tokens, output_attentions=True)
        model = made("gpt2", attn_pdrop=0.1).train()
        with sparse_attention(model, **BUDGET), pytest.raises(InputError, match=r"dropout 0\.1 in attention"):
            model(tokens)
