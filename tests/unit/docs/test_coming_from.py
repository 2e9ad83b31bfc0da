"""Every block of ours in the page for users of other libraries runs as it stands, and gives what the page says."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
PAGE = Path(__file__).parents[3] / "docs" / "coming-from.md"


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({f"w{k}": k for k in range(6)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0")


def test_every_block_of_ours_runs(tmp_path, monkeypatch):
    from transformers import GPT2Config, GPT2LMHeadModel

    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stages = [("layer4", nn.Conv2d(1, 4, 3)), ("relu", nn.ReLU()), ("pool", nn.AdaptiveAvgPool2d(2))]
        model = nn.Sequential(
            OrderedDict([*stages, ("flatten", nn.Flatten()), ("fc", nn.Linear(16, 3))])
        ).eval()
        images, labels = torch.rand(24, 1, 8, 8), torch.arange(24) % 3
        config = GPT2Config(
            vocab_size=6, n_positions=8, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
        language_model = GPT2LMHeadModel(config).eval()
    names = {
        "model": model,
        "images": images,
        "labels": labels,
        "loader": [(images[:12], labels[:12]), (images[12:], labels[12:])],
        "language_model": language_model,
        "tokenizer": tokenizer(),
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == len(re.findall(r"^## ", PAGE.read_text(encoding="utf-8"), re.MULTILINE)) > 0
    for number, block in enumerate(blocks):
        exec(compile(block, f"coming-from.md, block {number}", "exec"), names)
    assert names["maps"].shape == (24, 1, 8, 8)
    assert names["cache"]["transformer.h.1"].shape == (1, 3, 8)
    assert names["cache"]["transformer.h.1.attn:z"].shape == (1, 3, 2, 4)
    assert names["logits"].shape == (1, 3, 6)
    assert names["found"].values.shape == (2,) and names["report"].findings
