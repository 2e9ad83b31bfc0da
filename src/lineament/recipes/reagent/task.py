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

from lineament.recipes.kit.networks import gpt2
from lineament.train.loop import fit

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


def network(seed: int = 0) -> Any:
    """Two layers, four heads, width 64."""
    return gpt2(len(SYMBOLS) + 2, TOKENS, seed=seed, tied=True)


class Fresh:
    """New examples for every batch; the training ends after the epoch whose mean loss is below 0.01."""

    def __init__(self, seed: int):
        self.generator = torch.Generator().manual_seed(seed)

    def on_batch(self, run: Any, batch: Any) -> None:
        batch.inputs["input_ids"], batch.targets, _ = examples(len(batch), self.generator)

    def on_epoch_end(self, run: Any) -> None:
        run.stop = run.measured["loss"] < 0.01


def trained(seed: int, steps: int) -> dict[str, Tensor]:
    """Weights after AdamW (2e-3, batches of 96) until the loss of 20 batches is below 0.01, or ``steps`` steps."""
    model = network(seed)
    ids, targets, _ = examples(20 * 96, torch.Generator().manual_seed(seed))
    fit(
        model, ({"input_ids": ids}, targets), optimizer=lambda m: torch.optim.AdamW(m.parameters(), lr=2e-3), batch_size=96,
        epochs=-(-steps // 20), loss=lambda scores, target: F.cross_entropy(scores[:, -1], target), callbacks=[Fresh(seed)], seed=seed,
    )  # fmt: skip
    return dict(model.state_dict())


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
