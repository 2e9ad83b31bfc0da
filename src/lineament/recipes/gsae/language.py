"""A small GPT-2 on text, saved and opened as a user's model, and two dictionaries of a layer's residual stream; or a model of the user's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.data.patching_tasks import save_language_model
from lineament.dictionaries.autoencoders import TopK
from lineament.dictionaries.effects import steering_effects
from lineament.dictionaries.evaluation import evaluate
from lineament.dictionaries.selection import Selection
from lineament.dictionaries.trainer import TrainingOptions
from lineament.dictionaries.training import train_dictionary
from lineament.load.hub import quiet_transformers
from lineament.load.language_models import load_language_model
from lineament.recipes.kit.networks import gpt2
from lineament.recipes.kit.text import read_text
from lineament.train.loop import fit


@dataclass(frozen=True)
class Spoken:
    """One dictionary of the language model in one mode."""

    name: str
    mode: str
    ce: float
    ce_substituted: float
    ce_error: float
    kl: float
    kl_error: float
    recovered: float
    fvu: float
    dead: float
    steering: float


def spoken(config: Any, out: Path) -> list[Spoken]:
    """TopK and g-SAE at the same k, in each mode."""
    text = read_text(config.text)
    if config.language_model == "tiny":
        letters = sorted(set(text))
        ids = torch.tensor([letters.index(c) for c in text[: config.letters]])
        folder = out / "model"
        with quiet_transformers("language_model", "lm"):
            save_language_model(_trained(ids, len(letters), config), letters, folder)
        model, _ = load_language_model(str(folder))
    else:
        model, tokenizer = load_language_model(config.language_model)
        ids = tokenizer(text[: config.letters], return_tensors="pt").input_ids[0]
    rows = ids[: len(ids) // config.length * config.length].reshape(-1, config.length)
    cut = max(1, len(rows) // 20)
    train, test = rows[cut:], rows[:cut]
    width = model.get_input_embeddings().embedding_dim
    makers = {"TopK": 0.0, "g-SAE": 1.0}
    made = [
        TopK(width, config.lm_width, k=config.lm_k, selection=Selection(beta=beta))
        for beta in makers.values()
    ]
    found = train_dictionary(
        model, train, site=config.site, dictionary=made, tokens=config.lm_tokens, batch_size=config.lm_batch, gradient="sampled",
        options=TrainingOptions(dead_tokens=config.lm_tokens // 20),
    )  # fmt: skip
    contexts = test[: min(32, config.contexts)]
    steering = {
        name: float(
            steering_effects(model, each.dictionary, contexts, latents=min(128, config.lm_width)).kl.mean()
        )
        for name, each in zip(makers, found)
    }
    results = []
    for mode in ("activation", "gradient"):
        members = {
            name: each.dictionary
            for name, each in zip(makers, found)
            if mode == "activation" or name == "g-SAE"
        }
        for name, each in zip(
            members,
            evaluate(model, list(members.values()), test, mode=mode, tokens=config.lm_test_tokens),
        ):
            results.append(
                Spoken(
                    name, mode, each.ce, each.ce_substituted, each.errors["ce_substituted"], each.kl, each.errors["kl"],
                    each.recovered_mean, each.fvu, each.dead, steering[name],
                )
            )  # fmt: skip
    return results


def _trained(ids: Tensor, vocabulary: int, config: Any) -> Any:
    model = gpt2(vocabulary, config.length, width=64, layers=4, heads=4, seed=0, attention="sdpa")
    rows = ids[: len(ids) // config.length * config.length].reshape(-1, config.length)
    rows = rows[len(rows) // 20 :]

    def loss(scores: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores[:, :-1].flatten(0, 1), targets[:, 1:].flatten())

    fit(
        model, ({"input_ids": rows}, rows), optimizer=lambda net: torch.optim.AdamW(net.parameters(), lr=3e-3), batch_size=32,
        epochs=config.lm_epochs, loss=loss, seed=0,
    )  # fmt: skip
    return model.eval()
