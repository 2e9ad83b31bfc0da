"""The one face of all models: rows of several lengths, encoder-decoders, half precision, embeddings on their way."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.contracts.token_models import BOTH_WAYS, CAUSAL, byte_tokenizer, copies, model, wordpiece_tokenizer
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.tokens.gradients import through_embeddings
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.prompts import Reading, read, token_id

ROWS = [
    torch.tensor([[5, 40, 81, 12], [6, 7, 8, 9]]),
    torch.tensor([[9, 31, 22, 8, 77, 15, 4]]),
    torch.tensor([[3, 2]] * 3),
]


@pytest.mark.parametrize("name", [*CAUSAL, "bloom", *BOTH_WAYS])
def test_rows_of_several_lengths_are_each_alone(name):
    net = model(name)
    face = NextToken(net)
    sources = [2, 3, 1] if name in BOTH_WAYS else None
    alone = []
    with torch.no_grad():
        for rows, source in zip(ROWS, sources or [0] * 3):
            for row in rows:
                inputs = {"input_ids": row[None]}
                if source:
                    inputs = {"input_ids": row[None, :source], "decoder_input_ids": row[None, source:]}
                alone.append(net(**inputs).logits[0, -1])
    with face.ready(), unchanged(net):
        for batch_size in ("auto", 1, 4):
            found = face.logits(ROWS, sources, batch_size=batch_size)
            torch.testing.assert_close(found, torch.stack(alone), rtol=1e-4, atol=1e-4)
        reduced = face.logits(
            ROWS,
            sources,
            then=lambda scores, index: torch.stack([scores.argmax(1), index.to(scores.device)], 1),
        )
    assert reduced[:, 0].tolist() == torch.stack(alone).argmax(1).tolist() and reduced[:, 1].tolist() == list(
        range(6)
    )


def test_one_forward_for_all_lengths_where_the_model_takes_positions():
    for name, forwards in (("gpt2", 1), ("bloom", 3)):
        face = NextToken(model(name))
        with face.ready():
            face.logits(ROWS)
        assert face.forwards == forwards


def test_only_the_last_position_is_scored():
    net, shapes = model("gpt2"), []
    handle = net.lm_head.register_forward_hook(lambda m, a, o: shapes.append(tuple(o.shape)))
    with NextToken(net).ready() as face:
        face.logits(ROWS[:1])
    handle.remove()
    assert shapes == [(2, 1, len(byte_tokenizer()))]


def test_half_precision_is_scored_in_float32():
    with NextToken(model("gpt2").bfloat16()).ready() as face:
        assert face.logits(ROWS[:1]).dtype == torch.float32
    with NextToken(model("gpt2").double()).ready() as face:
        assert face.logits(ROWS[:1]).dtype == torch.float64


@pytest.mark.parametrize("name", [*CAUSAL, *BOTH_WAYS])
def test_embeddings_can_be_changed_on_their_way(name):
    net = model(name)
    face, source = NextToken(net), 4 if name in BOTH_WAYS else 0
    ids = ROWS[1]
    other = torch.tensor([[9, 31, 22, 8, 77, 16, 4]])
    with face.ready():
        plain, swapped = face.logits([ids], [source]), face.logits([other], [source])
        assert not torch.allclose(plain, swapped)
        kept: list[torch.Tensor] = []
        through_embeddings(face, other, source, lambda e, columns: (kept.append(e), e)[1])
        torch.testing.assert_close(through_embeddings(face, ids, source)[0], plain)
        # The other row's embeddings in place of this row's give the other row's logits.
        pieces = iter(kept)
        found, _, _ = through_embeddings(face, ids, source, lambda e, columns: next(pieces))
        torch.testing.assert_close(found, swapped)


class Plain(nn.Module):
    """A module of nobody's library: ids in, logits out."""

    def __init__(self):
        super().__init__()
        self.words, self.out = nn.Embedding(12, 4), nn.Linear(4, 12)

    def forward(self, tokens):
        return self.out(self.words(tokens).cumsum(1))


def test_any_module_of_ids_is_a_model():
    net = Plain()
    with NextToken(net).ready() as face:
        torch.testing.assert_close(
            face.logits([torch.tensor([[1, 2, 3]])]), net(torch.tensor([[1, 2, 3]]))[:, -1].detach()
        )
    with pytest.raises(InputError, match="does not show"):
        NextToken(net).needs_weights("the word embeddings")

    class Base(nn.Module):
        def forward(self, input_ids):
            return torch.zeros(3)

    with (
        pytest.raises(InputError, match=r"expected \(batch, tokens, vocabulary"),
        NextToken(Base()).ready() as face,
    ):
        face.logits([torch.tensor([[1, 2]])])


def test_a_base_model_without_a_head_is_named():
    import transformers

    base = transformers.GPT2Model(
        transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(InputError, match="last_hidden_state"), NextToken(base).ready() as face:
        face.logits([torch.tensor([[1, 2]])])


def test_prompts_of_encoder_decoders():
    face = NextToken(model("t5"))
    source = read(face, [5, 6, 7], Reading([9, 10]))
    assert source.ids.tolist() == [5, 6, 7, 0, 9, 10] and source.source == 3
    assert source.scored.tolist() == [True] * 3 + [False] * 3
    both = read(face, [5, 6, 7], Reading([9, 10], scope="all"))
    assert both.scored.tolist() == [True] * 3 + [False] + [True] * 2
    with pytest.raises(InputError, match="scope"):
        read(face, [5, 6, 7], Reading(scope="target"))
    face.config.decoder_start_token_id = face.config.bos_token_id = None
    with pytest.raises(InputError, match="decoder_start_token_id"):
        read(face, [5, 6, 7])


def test_text_is_read_as_the_tokenizer_reads_it():
    words = byte_tokenizer()
    face = NextToken(model("gpt2"), words)
    prompt = read(face, "the cat<|endoftext|> sat", Reading(protect=words(" sat")["input_ids"]))
    assert prompt.tokens == ("the", " cat", "<|endoftext|>", " sat")
    assert prompt.scored.tolist() == [True, True, False, False]
    assert face.special == {0} and NextToken(copies(0)).special == frozenset()


def test_a_word_that_the_tokenizer_does_not_have_is_no_target():
    words = wordpiece_tokenizer()
    face = NextToken(lambda ids: torch.full((len(ids), 40), 1 / 40), words)
    assert token_id(face, "target", "cat", 10**6) == words.convert_tokens_to_ids("cat")
    assert token_id(face, "target", words.unk_token, 10**6) == words.unk_token_id
    with pytest.raises(
        InputError, match=r"target: '猫' is not in the tokenizer's vocabulary, which reads it as '.UNK.'"
    ):
        token_id(face, "target", "猫", 10**6)


def test_padding_among_the_ids_is_refused_and_a_tokenizer_without_it_is_no_obstacle():
    words = wordpiece_tokenizer()
    face = NextToken(model("gpt2"), words)
    with pytest.raises(InputError, match=r"prompt: it holds 2 padding tokens \('\[PAD\]', id 0\)"):
        read(face, [*words("the cat sat")["input_ids"], 0, 0])
    # Where padding and end are one token, as many users set it, it may be text.
    same = copy.deepcopy(byte_tokenizer())
    assert same.pad_token is None and len(read(NextToken(model("gpt2"), same), "the cat sat").ids) == 3
    same.pad_token = same.eos_token
    assert read(NextToken(model("gpt2"), same), [0, 40, 41, 42]).scored.tolist() == [False, True, True, True]
