"""The networks of relp's golden files, rebuilt from their weights as the files' README writes them."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class Attention(nn.Module):
    """Attention with one matrix a head and part, as the golden README writes it."""

    def __init__(self, w, at):
        super().__init__()
        heads, width, size = w[f"{at}.W_Q"].shape
        for part in "QKV":
            linear = nn.Linear(width, heads * size).double()
            linear.weight = nn.Parameter(w[f"{at}.W_{part}"].permute(0, 2, 1).reshape(heads * size, width))
            linear.bias = nn.Parameter(w[f"{at}.b_{part}"].flatten())
            setattr(self, f"{part.lower()}_proj", linear)
        self.o_proj = nn.Linear(heads * size, width).double()
        self.o_proj.weight = nn.Parameter(w[f"{at}.W_O"].reshape(heads * size, width).T)
        self.o_proj.bias = nn.Parameter(w[f"{at}.b_O"])
        self.heads = heads

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(z.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, w, at, act):
        super().__init__()
        self.gated = f"{at}.W_gate" in w
        for name, key in (("gate_proj", "W_gate"), ("up_proj", "W_in"), ("down_proj", "W_out")):
            if f"{at}.{key}" in w:
                matrix = w[f"{at}.{key}"]
                linear = nn.Linear(*matrix.shape, bias=key == "W_out").double()
                linear.weight = nn.Parameter(matrix.T)
                setattr(self, name, linear)
        self.down_proj.bias = nn.Parameter(w[f"{at}.b_out"])
        self.b_in = nn.Parameter(w[f"{at}.b_in"])
        self.act = act

    def forward(self, x):
        if self.gated:
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x) + self.b_in)
        return self.down_proj(self.act(self.up_proj(x) + self.b_in))


class Block(nn.Module):
    def __init__(self, w, at, norm, act):
        super().__init__()
        self.ln1, self.ln2 = norm(f"{at}.ln1"), norm(f"{at}.ln2")
        self.attn, self.mlp = Attention(w, f"{at}.attn"), MLP(w, f"{at}.mlp", act)

    def forward(self, x):
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Decoder(nn.Module):
    """The golden model, written out: an architecture that the library does not know."""

    def __init__(self, w, config):
        super().__init__()

        def norm(at):
            size = len(w[f"{at}.w"])
            made = (
                nn.LayerNorm(size, config["eps"])
                if config["normalization_type"] == "LN"
                else nn.RMSNorm(size, config["eps"])
            )
            made.weight = nn.Parameter(w[f"{at}.w"])
            if isinstance(made, nn.LayerNorm):
                made.bias = nn.Parameter(w[f"{at}.b"])
            return made

        act = {
            "gelu_new": nn.GELU(approximate="tanh"),
            "silu": nn.SiLU(),
            "gelu": nn.GELU(),
            "relu": nn.ReLU(),
        }[config["act_fn"]]
        self.embed, self.place = nn.Embedding.from_pretrained(w["embed.W_E"]), w["pos_embed.W_pos"]
        self.blocks = nn.ModuleList([Block(w, f"blocks.{k}", norm, act) for k in range(config["n_layers"])])
        self.norm = norm("ln_final")
        self.head = nn.Linear(*w["unembed.W_U"].shape).double()
        self.head.weight, self.head.bias = nn.Parameter(w["unembed.W_U"].T), nn.Parameter(w["unembed.b_U"])

    def forward(self, ids):
        x = self.embed(ids) + self.place[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def huggingface(w, config):
    """The same weights in an unmodified transformers GPT-2, where they fit one."""
    transformers = pytest.importorskip("transformers")
    made = transformers.GPT2Config(
        bos_token_id=0, eos_token_id=0, vocab_size=config["d_vocab"], n_positions=config["n_ctx"], n_embd=config["d_model"], n_layer=config["n_layers"],
        n_head=config["n_heads"], n_inner=config["d_mlp"], activation_function=config["act_fn"],
        layer_norm_epsilon=config["eps"], tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(made).double().eval()
    state = {"wte.weight": w["embed.W_E"], "wpe.weight": w["pos_embed.W_pos"]}
    state |= {"ln_f.weight": w["ln_final.w"], "ln_f.bias": w["ln_final.b"]}
    for k in range(config["n_layers"]):
        b = f"blocks.{k}"
        state |= {
            f"h.{k}.ln_{n}.{long}": w[f"{b}.ln{n}.{short}"]
            for n in (1, 2)
            for long, short in (("weight", "w"), ("bias", "b"))
        }
        state[f"h.{k}.attn.c_attn.weight"] = torch.cat(
            [w[f"{b}.attn.W_{p}"].permute(1, 0, 2).flatten(1) for p in "QKV"], 1
        )
        state[f"h.{k}.attn.c_attn.bias"] = torch.cat([w[f"{b}.attn.b_{p}"].flatten() for p in "QKV"])
        state[f"h.{k}.attn.c_proj.weight"] = w[f"{b}.attn.W_O"].flatten(0, 1)
        state[f"h.{k}.attn.c_proj.bias"] = w[f"{b}.attn.b_O"]
        for name, part in (("c_fc", "in"), ("c_proj", "out")):
            state[f"h.{k}.mlp.{name}.weight"], state[f"h.{k}.mlp.{name}.bias"] = (
                w[f"{b}.mlp.W_{part}"],
                w[f"{b}.mlp.b_{part}"],
            )
    model.transformer.load_state_dict(state)
    model.lm_head = nn.Linear(*w["unembed.W_U"].shape).double()
    model.lm_head.weight, model.lm_head.bias = (
        nn.Parameter(w["unembed.W_U"].T),
        nn.Parameter(w["unembed.b_U"]),
    )
    return model.eval()


class Conserving(nn.Module):
    def __init__(self, d):
        super().__init__()
        for name in ("w1", "w2", "wf"):
            norm = nn.RMSNorm(len(d[name]), 1e-6)
            norm.weight = nn.Parameter(d[name])
            setattr(self, f"norm_{name}", norm)
        for name in ("Wq", "Wk", "Wv", "Wo", "Wg", "Wu", "Wd"):
            linear = nn.Linear(*d[name].shape, bias=False).double()
            linear.weight = nn.Parameter(d[name].T)
            setattr(self, name, linear)
        self.act, self.y, self.z = nn.SiLU(), nn.Identity(), nn.Identity()
        self.u = d["u"]

    def forward(self, x):
        h = self.norm_w1(x)
        a = nn.functional.scaled_dot_product_attention(self.Wq(h), self.Wk(h), self.Wv(h), is_causal=True)
        y = self.y(x + self.Wo(a))
        h = self.norm_w2(y)
        z = self.z(y + self.Wd(self.act(self.Wg(h)) * self.Wu(h)))
        return self.norm_wf(z)[..., -1, :] @ self.u


class Dictionary:
    def __init__(self, d):
        self.d = d

    def encode(self, x):
        return ((x - self.d["sae_b_dec"]) @ self.d["sae_W_enc"] + self.d["sae_b_enc"]).relu()

    def decode(self, f):
        return f @ self.d["sae_W_dec"] + self.d["sae_b_dec"]


class Downstream(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.h, self.act = nn.Identity(), nn.GELU()
        for name in ("first", "last"):
            norm = nn.LayerNorm(len(d["ln_w"]))
            norm.weight, norm.bias = nn.Parameter(d["ln_w"]), nn.Parameter(d["ln_b"])
            setattr(self, name, norm)
        self.d = d

    def forward(self, h):
        h = self.h(h)
        y = h + self.act(self.first(h) @ self.d["W1"] + self.d["b1"]) @ self.d["W2"] + self.d["b2"]
        y = y.cumsum(1) / torch.arange(1, y.shape[1] + 1, dtype=y.dtype)[:, None]
        return self.last(y)[:, -1] @ self.d["u"]
