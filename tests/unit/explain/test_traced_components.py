"""Components of models outside the known families: found by what passes in a block, and patched as in those."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.language_models import build, prompts, tiny, transformers

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture, patch
from lineament.explain import activation_patching, find_components, logit_difference

S = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
N = {"vocab_size": 50, "n_embd": 24, "n_layer": 2, "n_head": 4}
NEO = {
    "attention_types": [[["global", "local"], 1]],
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 32,
}
ALL = ("attn_out", "mlp_out", "neurons", "q", "k", "v", "z")
# What each family has beside the residual stream.
OTHERS = {
    "opt": (lambda t: t.OPTConfig(**S, ffn_dim=32, word_embed_proj_dim=24, max_position_embeddings=32), ("attn_out", "q", "k", "v", "z")),
    "phi": (lambda t: t.PhiConfig(**S, intermediate_size=32, partial_rotary_factor=1.0, max_position_embeddings=32), ALL),
    "gpt_neo": (lambda t: t.GPTNeoConfig(vocab_size=50, bos_token_id=0, eos_token_id=1, hidden_size=24, max_position_embeddings=32, **NEO), ALL),
    "gptj": (lambda t: t.GPTJConfig(**N, rotary_dim=4, n_positions=32), ALL),
    "bloom": (lambda t: t.BloomConfig(vocab_size=50, hidden_size=24, n_layer=2, n_head=4), ("attn_out", "mlp_out", "neurons", "z")),
    "falcon": (lambda t: t.FalconConfig(**S), ("attn_out", "mlp_out", "neurons", "z")),
    "bart": (lambda t: t.BartConfig(vocab_size=50, d_model=24, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=32, is_decoder=True, is_encoder_decoder=False), None),
    "mamba": (lambda t: t.MambaConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, state_size=4), ("attn_out",)),
}  # fmt: skip
METRIC = logit_difference([5, 6, 7], [8, 9, 10])


@pytest.mark.parametrize("family", [name for name, (_, kinds) in OTHERS.items() if kinds])
def test_parts_found_by_tracing_add_up_to_the_block_in_every_layer(family):
    """The sites are read by plain hooks: what attention and MLP put out is what each block adds."""
    model, kinds = build(OTHERS[family][0](transformers)), OTHERS[family][1]
    components, blocks = find_components(model, ["resid_pre", *kinds])
    assert {c.kind for c in components} == {"resid_pre", *kinds} and len(blocks) == 2
    seen = {}

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    parts = {c.kind + str(c.layer): c.read for c in components if c.kind in ("attn_out", "mlp_out")}
    parts |= {f"block{k}": block for k, block in enumerate(blocks)}
    handles = [
        site.module.register_forward_hook(
            lambda m, a, o, n=name: seen.update({n: (a and a[0], first(o).clone())})
        )
        for name, site in parts.items()
    ]
    with torch.no_grad():
        model(input_ids=prompts()[0])
    for handle in handles:
        handle.remove()
    for k in range(2):
        taken, given = seen[f"block{k}"]
        total = sum(value for name, (_, value) in seen.items() if name in (f"attn_out{k}", f"mlp_out{k}"))
        if family != "opt":  # whose MLP flattens positions, so that it is no site
            torch.testing.assert_close(taken + total, given, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("family", ["opt", "phi", "gpt_neo", "gptj", "bloom", "mamba"])
def test_patching_all_heads_is_patching_attention_and_all_of_the_stream_is_everything(family):
    model, kinds = build(OTHERS[family][0](transformers), torch.float64), OTHERS[family][1]
    clean, corrupt = prompts()
    found = activation_patching(
        model, clean, corrupt, METRIC, sites=["resid_pre", *kinds], positions="together"
    )
    assert found.scores["resid_pre"][0, 0] == pytest.approx(1)
    assert all(torch.isfinite(scores).all() for scores in found.scores.values())
    assert not kinds or set(found.scores) == {"resid_pre", *kinds}


def test_what_cannot_be_found_is_said():
    model = build(OTHERS["bart"][0](transformers))
    with pytest.raises(
        InputError, match=r"parts of 'bart' are not known and could not be found .*name the sites"
    ):
        find_components(model, "attn_out")
    model = build(OTHERS["opt"][0](transformers))
    with pytest.raises(
        InputError, match="'mlp_out' is no site of this architecture; it has resid_pre, resid_post, attn_out"
    ):
        find_components(model, "mlp_out")
    assert find_components(tiny("gpt2"), "resid_mid")[0]


@pytest.mark.parametrize(
    ("kind", "blocks", "attention"),
    [
        ("T5", "model.encoder.block.*", "layer.0.SelfAttention"),
        ("Bart", "model.model.encoder.layers.*", "self_attn"),
    ],
)
def test_an_encoder_decoder_is_patched_through_a_module_around_it(kind, blocks, attention):
    """The encoder's sites by name, the first token that the decoder says as the answer; one place by hand."""
    sizes = {
        "T5": {"d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0, "dropout_rate": 0.0},
        "Bart": {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "init_std": 0.5},
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, d_model=24, **sizes[kind])
    inner = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()

    class Says(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = inner

        def forward(self, ids):
            start = ids.new_full((len(ids), 1), config.decoder_start_token_id)
            return self.model(input_ids=ids, decoder_input_ids=start).logits[:, -1]

    clean = torch.randint(3, 50, (2, 6))
    corrupt = clean.clone()
    corrupt[:, 2] = 3 + (corrupt[:, 2] - 3 + 7) % 47
    model, sites = Says(), {"blocks": blocks, "attn_out": f"{blocks}.{attention}"}
    found = activation_patching(
        model, clean, corrupt, lambda z: z[:, 5] - z[:, 9], sites=sites, normalise=False
    )
    site = sites["attn_out"].replace("*", "1")
    with capture(model, site) as acts, torch.no_grad():
        model(clean)
        there = acts[site].clone()
        base = model(corrupt)
        mixed = acts[site].clone()
    mixed[:, 2] = there[:, 2]
    with patch(model, {site: mixed}), torch.no_grad():
        moved = model(corrupt) - base
    by_hand = moved[:, 5] - moved[:, 9]
    torch.testing.assert_close(found.per_example["attn_out"][:, 1, 2].float(), by_hand, rtol=1e-3, atol=1e-4)
