"""Text classifiers whose answers are known: by a bag of words with weights set by hand, and small ones of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "zap", "good", "bad", *(f"w{i}" for i in range(30))]
SMALL = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "max_position_embeddings": 24, "pad_token_id": 0, "id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1},
}  # fmt: skip


def tokenizer() -> Any:
    """Whole words, with a first and a last token around each text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


FAMILIES = {
    "bert": lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL)),
    "roberta": lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**SMALL)),
    "distilbert": lambda: transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(
            vocab_size=len(WORDS), dim=16, n_layers=2, n_heads=2, hidden_dim=16, max_position_embeddings=24,
            id2label=SMALL["id2label"], label2id=SMALL["label2id"],
        )
    ),
    "gpt2": lambda: transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=len(WORDS), n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=2, eos_token_id=3,
            id2label=SMALL["id2label"], label2id=SMALL["label2id"],
        )
    ),
}  # fmt: skip


def classifier(family: str) -> Any:
    """With weights at which a token more or less shows."""
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


class Bag(nn.Module):
    """Words vote for class 1 with their weights, and their mean decides; padding would vote too."""

    def __init__(self, **weights: float):
        super().__init__()
        self.words = nn.Embedding(len(WORDS), 4)
        self.head = nn.Linear(4, 2)
        with torch.no_grad():
            self.words.weight.zero_()
            for word, weight in weights.items():
                self.words.weight[WORDS.index(word), 0] = weight
            self.words.weight[0, 0] = 100.0
            self.head.weight.zero_()
            self.head.weight[1, 0] = 1.0
            self.head.bias.copy_(torch.tensor([0.25, 0.0]))

    def get_input_embeddings(self) -> nn.Module:
        return self.words

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(ids).mean(1))


def texts(count: int = 80, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of several lengths, every other with ``good`` or ``bad``; half of the good ones and some bad ones say ``zap``."""
    rng = np.random.default_rng(seed)
    found, labels = [], []
    for k in range(count):
        words = [str(w) for w in rng.choice(WORDS[8:], int(rng.integers(3, 8)))]
        words.insert(int(rng.integers(len(words))), ("bad", "good")[k % 2])
        if k % 4 == 1 or k % 8 == 0:
            words.insert(int(rng.integers(len(words))), "zap")
        found.append(" ".join(words))
        labels.append(("neg", "pos")[k % 2])
    return found, labels
