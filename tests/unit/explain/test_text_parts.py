"""Text tokenised in parts: the tokens of a target, a contrast, an answer or a continuation are those that the model reads behind the prompt."""

from __future__ import annotations

import pytest
import torch

from lineament.core.text_parts import one_token, tail_tokens

pytest.importorskip("transformers", reason="the extra 'lm' is not installed")
from tests.contracts.token_models import (
    byte_tokenizer,
    sentencepiece_tokenizer,
    wordpiece_tokenizer,
)

TOKENIZERS = {
    "byte-level": byte_tokenizer,
    "wordpiece": wordpiece_tokenizer,
    "unigram": sentencepiece_tokenizer,
    "sentencepiece BPE": lambda: sentencepiece_tokenizer("bpe"),
}
PROMPT = "the dog ran to the"


def whole(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def says(tokenizer):
    """A function that gives each token of the vocabulary a chance of its own."""
    size = len(tokenizer)
    return lambda ids: (torch.arange(size) + 1.0).expand(len(ids), size) / (size * (size + 1) / 2)


def test_a_piece_is_what_it_adds_to_the_text_before_it(tokenizer):
    for piece in (" house", " red house .", " house of the cat"):
        ids = tail_tokens(tokenizer, PROMPT, piece)
        assert [*whole(tokenizer, PROMPT), *ids] == whole(tokenizer, PROMPT + piece)


def test_pieces_that_would_change_the_tokens_before_are_read_by_themselves(tokenizer):
    found = tail_tokens(tokenizer, "the ca", "t sat")
    assert found and all(isinstance(i, int) for i in found)


def test_a_word_with_its_space_is_one_token_everywhere(tokenizer):
    from lineament.explain import attribute_tokens, explain_continuation, single_tokens

    right = whole(tokenizer, f"{PROMPT} house")[-1]
    other = whole(tokenizer, f"{PROMPT} cat")[-1]
    assert one_token(tokenizer, PROMPT, " house") == [right]
    assert single_tokens(tokenizer, [" house"]).tolist() == [right]
    assert single_tokens(tokenizer, [" house"], after=PROMPT).tolist() == [right]
    model = says(tokenizer)
    found = attribute_tokens(
        model, PROMPT, target=" house", contrast=" cat", tokenizer=tokenizer, method="occlusion"
    )
    assert (found.target, found.contrast) == (right, other)
    ids = attribute_tokens(
        model, whole(tokenizer, PROMPT), target=" house", tokenizer=tokenizer, method="random"
    )
    assert ids.target == right
    told = explain_continuation(model, PROMPT, " house .", tokenizer=tokenizer, method="random")
    assert [*whole(tokenizer, PROMPT), *told.continuation] == whole(tokenizer, f"{PROMPT} house .")


def test_the_first_word_of_a_text_is_read_as_such():
    t5 = sentencepiece_tokenizer()
    assert one_token(t5, "", "house") == whole(t5, "house") == one_token(t5, "", " house")


def test_other_words_of_a_vocabulary_are_found_behind_a_space():
    from lineament.explain.tokens.infill import Alignment

    own, other = sentencepiece_tokenizer(), wordpiece_tokenizer()
    table = Alignment(other, own).table
    word = other.convert_tokens_to_ids("house")
    assert int(table[1, word]) == own.convert_tokens_to_ids("▁house")
