"""A task whose true explanation is known, and a small GPT-2 that solves it.

Sixteen tokens: fifteen symbols of twenty, one of them replaced by the marker ``!``, and ``?`` at the end. The next token is the symbol behind the
marker. So the marker and that symbol are what decides, whatever a method says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lineament.core.batching import progress

SYMBOLS = [chr(ord("a") + k) for k in range(20)]
MARKER, QUESTION = len(SYMBOLS), len(SYMBOLS) + 1
TOKENS = 16


def examples(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(count, 16) ids, the next token, and where the marker is."""
    ids = torch.randint(len(SYMBOLS), (count, TOKENS), generator=generator)
    places = torch.randint(TOKENS - 2, (count,), generator=generator)
    rows = torch.arange(count)
    ids[:, -1] = QUESTION
    ids[rows, places] = MARKER
    return ids, ids[rows, places + 1], places


def other_symbol(ids: Tensor, generator: torch.Generator) -> Tensor:
    """The sampler of this task: any symbol, no marker and no question."""
    return torch.randint(len(SYMBOLS), ids.shape, generator=generator)


def network() -> Any:
    """Two layers, four heads, width 64."""
    from transformers import GPT2Config, GPT2LMHeadModel

    settings: dict[str, Any] = {"attn_implementation": "eager"}
    config = GPT2Config(
        vocab_size=len(SYMBOLS) + 2, n_positions=TOKENS, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=None, eos_token_id=None, **settings,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def train(seed: int, most: int) -> dict[str, Tensor]:
    """Weights after AdamW (2e-3, batches of 96) until the loss of 20 batches is below 0.01, or ``most`` steps."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    recent: list[float] = []
    for _ in progress(range(most), "training"):
        ids, target, _ = examples(96, generator)
        loss = F.cross_entropy(model(ids, logits_to_keep=1).logits[:, -1], target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        recent = [*recent[-19:], float(loss.detach())]
        if len(recent) == 20 and sum(recent) / 20 < 0.01:
            break
    return {name: value.clone() for name, value in model.state_dict().items()}


def as_directory(weights: dict[str, Tensor], folder: Path) -> tuple[Any, Any]:
    """The network as an ordinary Hugging Face directory with its tokenizer, loaded from there."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    model = network()
    model.load_state_dict(weights)
    model.save_pretrained(folder)
    words = [*SYMBOLS, "!", "?"]
    kind = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    kind.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=kind).save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", use_safetensors=True)
    if bars:
        logging.enable_progress_bar()
    return loaded.eval(), AutoTokenizer.from_pretrained(folder)
