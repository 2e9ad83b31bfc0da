"""Language models and tokenizers in miniature, made here: every architecture that the token methods treat differently."""

from __future__ import annotations

import functools
from typing import Any

import torch

TEXT = (
    "the cat sat on the mat . the dog ran to the house . a cat and a dog saw the red house . the keys to the old house are lost . "
    "she is lost and he was red . an old man sat and ran ."
)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CAUSAL = ("gpt2", "llama", "opt", "gemma3")
BOTH_WAYS = ("t5", "bart")
# What makes each method quick.
QUICK: dict[str, dict[str, Any]] = {
    "reagent": {"steps": 4, "probes": 2}, "integrated_gradients": {"steps": 8}, "gradient_shap": {"n_samples": 6}, "lime": {"n_samples": 40},
    "kernel_shap": {"n_samples": 40}, "bayesian": {"evaluations": 12, "batch": 6},
}  # fmt: skip


@functools.cache
def byte_tokenizer() -> Any:
    """Byte-level BPE, as GPT-2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    kind = Tokenizer(models.BPE())
    kind.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    kind.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    kind.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=kind, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


@functools.cache
def wordpiece_tokenizer() -> Any:
    """WordPiece with a mask, as BERT has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    kind = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    kind.normalizer = normalizers.BertNormalizer()
    kind.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    kind.decoder = decoders.WordPiece()
    kind.train_from_iterator(
        [TEXT], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    )
    kind.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=kind,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@functools.cache
def sentencepiece_tokenizer(kind: str = "unigram") -> Any:
    """Pieces that begin with the mark of a space, which every text gets, as Llama (BPE) and T5 (unigram) have them; with a padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>", "<pad>"]
    trainer = None
    if kind == "unigram":
        words = sorted({f"▁{word}" for word in TEXT.split()})
        scores = [*((piece, 0.0) for piece in special), ("▁", -6.0), *((piece, -4.0) for piece in words)]
        scores += [(letter, -8.0) for letter in sorted(set(TEXT) - {" "}) if letter not in words]
        made = Tokenizer(models.Unigram(scores, unk_id=0))
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    if trainer is not None:
        made.train_from_iterator([TEXT] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )


def model(name: str, attention: str = "eager", seed: int = 0) -> Any:
    """A model with random weights, sharpened so that it has opinions."""
    import transformers as t

    size = len(byte_tokenizer())
    common: dict[str, Any] = {
        "vocab_size": size,
        "attn_implementation": attention,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    torch.manual_seed(seed)
    if name == "gpt2":
        made = t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **common))
    elif name == "llama":
        made = t.LlamaForCausalLM(t.LlamaConfig(**SMALL, intermediate_size=48, **common))
    elif name == "opt":
        made = t.OPTForCausalLM(
            t.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=16, pad_token_id=1, **common)
        )
    elif name == "gemma3":
        options = {"intermediate_size": 48, "head_dim": 16, "num_key_value_heads": 1, "sliding_window": 8}
        made = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**SMALL, **options, **common))
    elif name == "bloom":
        made = t.BloomForCausalLM(t.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **common))
    elif name == "t5":
        options = {
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        }
        made = t.T5ForConditionalGeneration(t.T5Config(**options, pad_token_id=0, **common))
    else:
        both = {
            f"{part}_{what}": n
            for part in ("encoder", "decoder")
            for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 48))
        }
        options = {
            "d_model": 32,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 0,
            "pad_token_id": 1,
            **both,
        }
        made = t.BartForConditionalGeneration(t.BartConfig(**options, **common))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return made.eval()


def masked_model(seed: int = 0) -> Any:
    import transformers as t

    torch.manual_seed(seed)
    options = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return t.BertForMaskedLM(t.BertConfig(vocab_size=len(wordpiece_tokenizer()), **options)).eval()


def copies(place: int, vocabulary: int = 12, sure: float = 0.9) -> Any:
    """A function that says the token at one place again: only that token matters, and how much is known."""

    def probabilities(ids: torch.Tensor) -> torch.Tensor:
        rest = (1 - sure) / vocabulary
        return torch.nn.functional.one_hot(ids[:, place], vocabulary).double() * sure + rest

    return probabilities
