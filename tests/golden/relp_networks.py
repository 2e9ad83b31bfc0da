"""The networks of relp's golden files, rebuilt from their weights as the files' README writes them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from tests.golden.common import ACTIVATIONS, Scope
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """x W + b."""
    layer = nn.Linear(*weight.shape, bias=bias is not None).double()
    layer.load_state_dict({"weight": weight.T} | ({} if bias is None else {"bias": bias}))
    return layer


def norm(weight: Tensor, bias: Tensor | None, eps: float, kind: str) -> nn.Module:
    layer = {"LN": nn.LayerNorm, "RMS": nn.RMSNorm}[kind](len(weight), eps).double()
    layer.load_state_dict({"weight": weight} | ({} if kind == "RMS" or bias is None else {"bias": bias}))
    return layer


class Attention(nn.Module):
    """From one matrix a head and part."""

    def __init__(self, w: Weights, at: str, causal: bool):
        super().__init__()
        for part in "QKV":
            made = linear(w[f"{at}.W_{part}"].permute(1, 0, 2).flatten(1), w[f"{at}.b_{part}"].flatten())
            setattr(self, f"{part.lower()}_proj", made)
        self.o_proj = linear(w[f"{at}.W_O"].flatten(0, 1), w[f"{at}.b_O"])
        self.heads, self.causal = len(w[f"{at}.W_Q"]), causal

    def forward(self, x):
        parts = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        z = nn.functional.scaled_dot_product_attention(*parts, is_causal=self.causal)
        return self.o_proj(z.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, w: Weights, at: str, act: nn.Module, gated: bool):
        super().__init__()
        self.up_proj, self.b_in = linear(w[f"{at}.W_in"]), nn.Parameter(w[f"{at}.b_in"])
        self.down_proj = linear(w[f"{at}.W_out"], w[f"{at}.b_out"])
        self.gate_proj = linear(w[f"{at}.W_gate"]) if gated else None
        self.act = act

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x) + self.b_in))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x) + self.b_in)


class Block(nn.Module):
    def __init__(self, w: Weights, at: str, file: Scope):
        super().__init__()
        self.ln1, self.ln2 = (
            norm(w[f"{at}.{n}.w"], w.get(f"{at}.{n}.b"), file["eps"], file["normalization_type"])
            for n in ("ln1", "ln2")
        )
        self.attn = Attention(
            w, f"{at}.attn", {"causal": True, "bidirectional": False}[file["attention_dir"]]
        )
        self.mlp = MLP(w, f"{at}.mlp", ACTIVATIONS[file["act_fn"]](), file["gated_mlp"])

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


LAYOUT = {
    "blocks": "blocks.?",
    "resid_pre": "blocks.?:in",
    "attn_out": "blocks.*.attn",
    "mlp_out": "blocks.*.mlp",
}


class Decoder(nn.Module):
    """The golden model, written out: an architecture that the library does not know."""

    def __init__(self, w: Weights, file: Scope):
        super().__init__()
        self.embed, self.place = nn.Embedding.from_pretrained(w["embed.W_E"]), w["pos_embed.W_pos"]
        self.blocks = nn.ModuleList([Block(w, f"blocks.{k}", file) for k in range(file["n_layers"])])
        self.norm = norm(w["ln_final.w"], w.get("ln_final.b"), file["eps"], file["normalization_type"])
        self.head = linear(w["unembed.W_U"], w["unembed.b_U"])

    def forward(self, ids):
        x = self.embed(ids) + self.place[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def huggingface(w: Weights, file: Scope) -> nn.Module:
    """The same weights in an unmodified transformers GPT-2."""
    transformers = pytest.importorskip("transformers")
    made = transformers.GPT2Config(
        bos_token_id=0, eos_token_id=0, vocab_size=file["d_vocab"], n_positions=file["n_ctx"], n_embd=file["d_model"],
        n_layer=file["n_layers"], n_head=file["n_heads"], n_inner=file["d_mlp"], layer_norm_epsilon=file["eps"],
        activation_function={"gelu_tanh": "gelu_new"}.get(file["act_fn"], file["act_fn"]), tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(made).double().eval()
    state = {"wte.weight": w["embed.W_E"], "wpe.weight": w["pos_embed.W_pos"]}
    names = {"ln_f": "ln_final"}
    for k in range(file["n_layers"]):
        b = f"blocks.{k}"
        names |= {f"h.{k}.ln_1": f"{b}.ln1", f"h.{k}.ln_2": f"{b}.ln2"}
        parts = [
            (w[f"{b}.attn.W_{p}"].permute(1, 0, 2).flatten(1), w[f"{b}.attn.b_{p}"].flatten()) for p in "QKV"
        ]
        for name, weight, bias in (
            ("attn.c_attn", torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts])),
            ("attn.c_proj", w[f"{b}.attn.W_O"].flatten(0, 1), w[f"{b}.attn.b_O"]),
            ("mlp.c_fc", w[f"{b}.mlp.W_in"], w[f"{b}.mlp.b_in"]),
            ("mlp.c_proj", w[f"{b}.mlp.W_out"], w[f"{b}.mlp.b_out"]),
        ):
            state |= {f"h.{k}.{name}.weight": weight, f"h.{k}.{name}.bias": bias}
    for name, ours in names.items():
        state |= {f"{name}.weight": w[f"{ours}.w"], f"{name}.bias": w[f"{ours}.b"]}
    model.transformer.load_state_dict(state)
    model.lm_head = linear(w["unembed.W_U"], w["unembed.b_U"])
    return model.eval()


class Conserving(nn.Module):
    """One block without biases, with a read-out of one position."""

    def __init__(self, file: Scope):
        super().__init__()
        for name in ("w1", "w2", "wf"):
            setattr(self, f"norm_{name}", norm(file.input(name), None, file["norm_eps"], "RMS"))
        for name in ("Wq", "Wk", "Wv", "Wo", "Wg", "Wu", "Wd"):
            setattr(self, name, linear(file.input(name)))
        self.act, self.y, self.z = ACTIVATIONS[file["act_fn"]](), nn.Identity(), nn.Identity()
        self.u, self.heads, self.position = file.input("u"), file["n_heads"], file["position"]
        self.attention = {"is_causal": file["causal"], "scale": file["attn_scale"]}

    def forward(self, x):
        h = self.norm_w1(x)
        parts = (p(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.Wq, self.Wk, self.Wv))
        a = nn.functional.scaled_dot_product_attention(*parts, **self.attention)
        y = self.y(x + self.Wo(a.transpose(1, 2).flatten(2)))
        h = self.norm_w2(y)
        z = self.z(y + self.Wd(self.act(self.Wg(h)) * self.Wu(h)))
        return self.norm_wf(z)[..., self.position, :] @ self.u


class Dictionary:
    """The sparse autoencoder of the file."""

    def __init__(self, file: Scope):
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            file.input(f"sae_{key}") for key in ("W_enc", "b_enc", "W_dec", "b_dec")
        )

    def encode(self, x):
        return ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def decode(self, f):
        return f @ self.W_dec + self.b_dec


class Downstream(nn.Module):
    """What follows the features: a gated step, a running mean over the positions, a read-out of one of them."""

    def __init__(self, file: Scope):
        super().__init__()
        self.h, self.act = nn.Identity(), ACTIVATIONS[file["act_fn"]]()
        self.first, self.last = (
            norm(file.input("ln_w"), file.input("ln_b"), file["norm_eps"], "LN") for _ in range(2)
        )
        self.W1, self.b1, self.W2, self.b2, self.u = (
            file.input(key) for key in ("W1", "b1", "W2", "b2", "u")
        )
        self.position = file["position"]

    def forward(self, h):
        h = self.h(h)
        y = h + self.act(self.first(h) @ self.W1 + self.b1) @ self.W2 + self.b2
        y = y.cumsum(1) / torch.arange(1, y.shape[1] + 1, dtype=y.dtype)[:, None]
        return self.last(y)[:, self.position] @ self.u
