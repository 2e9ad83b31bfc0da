"""Every Python block of four papers' pages runs as it stands, on small models under the names that the page uses."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import joblib
import matplotlib as mpl
import pytest
import torch
from torch import nn

PAPERS = Path(__file__).parents[3] / "docs" / "papers"
TEXTS = (
    "The capital of France is Paris London . The keys to the cabinet are is translate: ... Das When Mary and John went to the store, John gave a drink to "
    "Mary gave Rome was not built in one day"
)


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (PAPERS / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)


def run(page: str, names: dict[str, Any]) -> dict[str, Any]:
    mpl.use("Agg")
    for k, block in enumerate(blocks(page)):
        exec(compile(block, f"{page}.md, block {k}", "exec"), names)
    return names


def words() -> Any:
    """A tokenizer of whole words with their spaces, as GPT-2's vocabulary has them."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    split = pre_tokenizers.Split(Regex(r" ?[^\s]+"), "isolated")
    known = sorted({w for text in (TEXTS, *TEXTS.split()) for w, _ in split.pre_tokenize_str(text)})
    kind = Tokenizer(
        models.WordLevel({w: k for k, w in enumerate(["<unk>", "<end>", *known])}, unk_token="<unk>")
    )
    kind.pre_tokenizer = split
    return PreTrainedTokenizerFast(
        tokenizer_object=kind, unk_token="<unk>", eos_token="<end>", bos_token="<end>"
    )


def gpt2(size: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings: dict[str, Any] = {"attn_implementation": "eager", "bos_token_id": 1, "eos_token_id": 1}
    net = GPT2LMHeadModel(
        GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=2, n_positions=64, **settings)
    ).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else None
    return net


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no probe passed")
def test_reagent():
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = words()
    model = gpt2(len(tokenizer))
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=32,
            d_kv=16,
            d_ff=48,
            num_layers=2,
            num_heads=2,
            decoder_start_token_id=0,
        )
    ).eval()
    names = run(
        "reagent",
        {
            "model": model, "tokenizer": tokenizer, "t5": t5, "prompt": "The keys to the cabinet", "other": "Rome was not built in one day",
            "ids": tokenizer("The capital of France is")["input_ids"],
            "my_api": lambda ids: model(ids).logits[:, -1].softmax(-1).detach(),
            "scores": torch.rand(5).softmax(0),
        },
    )  # fmt: skip
    assert len(names["many"]) == 2 and names["a"].scores.shape == names["a"].ids.shape


@pytest.mark.slow
def test_relp():
    tokenizer = words()
    model = gpt2(len(tokenizer))
    ids = torch.randint(2, len(tokenizer), (4, 3, 7), generator=torch.Generator().manual_seed(0))

    class MyAct(nn.SiLU):
        pass

    names = {
        "model": model, "tokenizer": tokenizer, "MyAct": MyAct, "clean_ids": ids[0], "patch_ids": ids[1], "test_ids": ids[2], "test_patch_ids": ids[3],
        "input_ids": ids[0], "answer": 5,
    }  # fmt: skip
    pages = blocks("relp")
    assert "sites = {" in pages[1]
    for k, block in enumerate(pages):
        if "component_nodes(model" in block:
            # Metrics belong to the prompts of their block.
            from lineament.explain.patching.metrics import logit_difference

            names["metric"] = names["test_metric"] = logit_difference([5, 6, 7], [8, 9, 10])
        if k == 1:
            names["model"], names["x_clean"], names["x_corrupt"] = (
                encoder(MyAct),
                torch.randn(2, 4, 8),
                torch.randn(2, 4, 8),
            )
            names["metric"], kept = (lambda y: y[:, -1, 0]), names["metric"]
        exec(compile(block, f"relp.md, block {k}", "exec"), names)
        if k == 1:
            names["model"], names["metric"] = model, kept
    assert names["coverage"].active()["ln"] == 5


def encoder(act: type[nn.Module]) -> nn.Module:
    """A small model of the layout that the page spells out."""

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
            self.attention, self.gate, self.act, self.out = (
                nn.Linear(8, 8),
                nn.Softplus(),
                act(),
                nn.Linear(8, 8),
            )

        def forward(self, x):
            x = x + self.attention(self.norm1(x))
            return x + self.out(self.act(self.gate(self.norm2(x))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Layer(), Layer()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    return Encoder().eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_diffroar():
    captum = pytest.importorskip("captum.attr")
    from lineament.explain.saliency.maps import saliency
    from lineament.train.stacked import Training

    x = 0.3 * torch.rand(260, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(260) % 2
    x[:, 0, 2:6, 2:6] += 0.7 * y[:, None, None]

    def make_network() -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))

    data = (x[:200], y[:200], x[200:], y[200:])
    names = {
        "make_network": make_network, "x": data[0], "y": data[1], "x_test": data[2], "y_test": data[3], "data": data, "saliency": saliency,
        "captum": types.SimpleNamespace(attr=captum), "my_train": Training(make_network, epochs=4, lr=1e-2, select="last"),
        "images": x[:6], "digits": x[:20, 0], "labels": torch.arange(20) % 10,
        "explain": lambda z: z.abs(), "maps": x[:6].abs(),
    }  # fmt: skip
    # Worker processes would take longer to start than they work.
    with joblib.parallel_config("threading"):
        for k, block in enumerate(blocks("diffroar")):
            if k == 1:
                names["model"] = names["robust"]
            if k == 2:
                names["model"] = nn.Sequential(nn.Flatten(), nn.Linear(128, 10))
                names["network"] = nn.Linear(10, 2)
            exec(compile(block, f"diffroar.md, block {k}", "exec"), names)
    assert names["found"].fractions == (1.0, 0.5, 0.2, 0.1)
    assert round(names["MaxMargin"](5, blocks=10).margin, 4) == 0.2041


def test_gsae(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the page saves a dictionary
    names = run("gsae", {})
    assert names["found"].mode == "gradient" and names["found"].kl < names["found"].kl_random
    assert (tmp_path / "my-dictionary" / "config.json").is_file()


def test_ssa():
    names = run("ssa", {})
    assert names["loss"].isfinite() and names["model"].lm_head.weight.grad is not None
    report, best = names["report"], names["best"]
    assert bool((report.error <= report.bound + 1e-5).all()) and best.kept.mean() > report.kept.mean()
