"""The heads of every family: the probabilities mix the values into z, and a zeroed head takes from the output what its columns wrote."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.language_models import SMALL, build, transformers
from torch import nn

from lineament.core.checks import InputError
from lineament.core.models import unwrapped
from lineament.core.sites.activations import capture, patch
from lineament.core.sites.heads import head_view
from lineament.core.sites.naming import sites

T = transformers
ENCODER = {k: v for k, v in SMALL.items() if not k.startswith(("bos", "eos"))}
SEQ2SEQ = {
    "vocab_size": 50, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "opt": lambda: T.OPTConfig(**{k: v for k, v in SMALL.items() if k != "intermediate_size"}, ffn_dim=32, word_embed_proj_dim=24),
    "phi": lambda: T.PhiConfig(**{**SMALL, "hidden_size": 32}),
    "gpt-neo": lambda: T.GPTNeoConfig(vocab_size=50, hidden_size=24, num_layers=2, num_heads=4, max_position_embeddings=32, attention_types=[[["global", "local"], 1]]),
    "gpt-j": lambda: T.GPTJConfig(vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=32, rotary_dim=4),
    "bloom": lambda: T.BloomConfig(vocab_size=50, hidden_size=24, n_layer=2, n_head=4),
    "falcon": lambda: T.FalconConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, multi_query=True, new_decoder_architecture=False, alibi=False),
    "falcon-rw": lambda: T.FalconConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, multi_query=False, new_decoder_architecture=False, alibi=True),
    "falcon-new": lambda: T.FalconConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, alibi=False),
    "bert": lambda: T.BertConfig(**ENCODER),
    "roberta": lambda: T.RobertaConfig(**{**ENCODER, "pad_token_id": 1}),
    "distilbert": lambda: T.DistilBertConfig(vocab_size=50, dim=24, n_layers=2, n_heads=4, hidden_dim=32, max_position_embeddings=32),
    "bart": lambda: T.BartConfig(**SEQ2SEQ),
    "t5": lambda: T.T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=2, num_heads=4, decoder_start_token_id=0),
}  # fmt: skip


def made(family: str):
    torch.manual_seed(0)
    config = FAMILIES[family]()
    model = T.AutoModel.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    ids = torch.randint(3, 50, (2, 6), generator=torch.Generator().manual_seed(1))
    return model, {
        "input_ids": ids,
        **({"decoder_input_ids": ids[:, :4]} if config.is_encoder_decoder else {}),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_the_probabilities_mix_the_values_into_the_heads(family):
    model, inputs = made(family)
    blocks = [name.removesuffix(":z") for name in sites(model, "**:z")]
    assert len(blocks) == (6 if model.config.is_encoder_decoder else 2), blocks
    with (
        torch.no_grad(),
        capture(model, [f"{b}:{part}" for b in blocks for part in ("v", "z", "pattern")]) as acts,
    ):
        model(**inputs)
    for block in blocks:
        pattern, values, z = (acts[f"{block}:{part}"] for part in ("pattern", "v", "z"))
        values = values.repeat_interleave(pattern.shape[1] // values.shape[2], 2)
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", pattern, values), z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_zeroed_head_takes_away_what_it_wrote(family):
    model, inputs = made(family)
    block = sites(model, "**:z")[0].removesuffix(":z")
    config = next(m.config for m in model.modules() if hasattr(m, "config"))
    attention = unwrapped(model).get_submodule(block)
    view = head_view(attention, "z", config)
    names = {id(module): name for name, module in model.named_modules()}
    watched = [f"{block}:z", names[id(view.module)]]
    with torch.no_grad(), capture(model, watched) as before:
        model(**inputs)
    with torch.no_grad(), patch(model, {f"{block}:z[1]": 0.0}), capture(model, watched) as after:
        model(**inputs)
    lost = before[watched[1]] - after[watched[1]]
    own = before[f"{block}:z"][:, :, 1]
    columns = slice(view.size, 2 * view.size)
    if view.side == "out":
        expected = torch.zeros_like(lost)
        expected[..., columns] = own
    else:
        expected = own @ view.module.weight[:, columns].T
    torch.testing.assert_close(lost, expected.detach(), rtol=1e-3, atol=1e-5)


def test_fused_attention_is_told_to_be_eager():
    model = build(
        T.GPT2Config(
            vocab_size=50, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
        )
    )
    model.set_attn_implementation("sdpa")
    site = "transformer.h.0.attn:pattern"
    with pytest.raises(InputError, match="set_attn_implementation"), capture(model, site):
        model(torch.tensor([[3, 4, 5]]))
    model.set_attn_implementation("eager")
    with torch.no_grad(), capture(model, "transformer.h.*.attn:pattern") as acts:
        model(torch.tensor([[3, 4, 5]]))
    assert len(acts) == 2 and acts[site].shape == (1, 4, 3, 3)
    with pytest.raises(InputError, match="can be recorded"), patch(model, {site: 0.0}):
        pass
    with pytest.raises(InputError, match="no attention heads"):
        sites(model, "transformer.h.0.mlp:pattern")
