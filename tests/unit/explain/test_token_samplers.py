"""What tokens are replaced by: never a special token, in the right proportions, and words of another vocabulary mapped back."""

from __future__ import annotations

import copy
import json
import warnings

import pytest
import torch
from tests.contracts.token_models import (
    TEXT,
    byte_tokenizer,
    copies,
    masked_model,
    model,
    wordpiece_tokenizer,
)
from tests.contracts.unchanged import unchanged

from lineament.core.checks import InputError
from lineament.explain.tokens.infill import Alignment, MlmSampler, OtherModelSampler
from lineament.explain.tokens.next_token import NextToken
from lineament.explain.tokens.options import ReagentOptions
from lineament.explain.tokens.recursion import reagent
from lineament.explain.tokens.samplers import (
    InferentialSampler,
    PosSampler,
    UnigramSampler,
    uniform,
)

PROMPT = "the old cat sat on the red mat"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def ids_of(text=PROMPT, rows=1):
    return torch.tensor(byte_tokenizer()(text)["input_ids"]).expand(rows, -1)


def test_uniform_draws_every_ordinary_token_alike_and_no_special_one():
    words = byte_tokenizer()
    drawn = uniform(NextToken(model("gpt2"), words), 330)(torch.zeros(200, 500), None, generator())
    counts = torch.bincount(drawn.flatten(), minlength=330)
    assert counts[0] == 0 and (counts[len(words) :] == 0).all(), (
        "neither the end token nor what the tokenizer does not have"
    )
    chosen = counts[1 : len(words)].double()
    expected = chosen.sum() / len(chosen)
    assert ((chosen - expected).abs() < 5 * expected.sqrt()).all()


def test_unigram_draws_as_often_as_the_corpus_has_them():
    sampler = UnigramSampler(byte_tokenizer(), [TEXT])
    drawn = sampler(torch.zeros(100, 1000), None, generator())
    shares = torch.bincount(drawn.flatten(), minlength=len(sampler.weights)) / drawn.numel()
    torch.testing.assert_close(
        shares.double(), (sampler.weights / sampler.weights.sum()).double(), rtol=0, atol=5e-3
    )
    with pytest.raises(InputError, match="expected a corpus"):
        UnigramSampler(byte_tokenizer(), [])


def test_pos_draws_within_the_class_and_keeps_its_table(tmp_path):
    words, calls = byte_tokenizer(), []

    def tag(entries):
        calls.append(len(entries))
        return ["short" if len(w) < 2 else "long" for w in entries]

    sampler = PosSampler(words, tag, cache=tmp_path)
    ids = ids_of(rows=300)
    drawn = sampler(ids, None, generator())
    assert all(
        sampler.tags[a] == sampler.tags[b] for a, b in zip(ids.flatten().tolist(), drawn.flatten().tolist())
    )
    assert words.eos_token_id not in drawn and len(drawn.unique()) > 20
    again = PosSampler(words, tag, cache=tmp_path)
    assert calls == [len(words)] and again.tags == sampler.tags
    (table,) = tmp_path.iterdir()
    table.write_text("{")
    with pytest.raises(InputError, match="no table of tags"):
        PosSampler(words, tag, cache=tmp_path)
    table.write_text(json.dumps(["x"]))
    with pytest.raises(InputError, match="1 tags for"):
        PosSampler(words, tag, cache=tmp_path)
    with pytest.raises(InputError, match="with this model's tokenizer"):
        sampler(torch.tensor([[5000]]), None, generator())


def test_pos_says_what_is_missing():
    try:
        import nltk

        nltk.pos_tag(["word"])
    except (ImportError, LookupError):
        with pytest.raises(
            InputError,
            match=r"nltk.download\('averaged_perceptron_tagger_eng'\).*PosSampler\(tokenizer, tag=",
        ):
            reagent(model("gpt2"), PROMPT, tokenizer=byte_tokenizer(), sampler="pos")
    else:
        assert len(PosSampler(byte_tokenizer()).tags) == len(byte_tokenizer())


def test_inferential_gives_the_models_own_guesses():
    net, ids = model("gpt2"), ids_of()
    found = InferentialSampler(net, byte_tokenizer())(ids.expand(3, -1), None, generator())
    with torch.no_grad():
        scores = net(ids).logits[0]
    scores[:, byte_tokenizer().eos_token_id] = -torch.inf
    expected = torch.cat([ids[0, :1], scores[:-1].argmax(1)])
    assert (found == expected).all()
    guesses = InferentialSampler(copies(0))(torch.tensor([[4, 1, 2]]), None, generator())
    assert guesses.tolist() == [[4, 4, 4]]
    with pytest.raises(InputError, match="causal models"):
        reagent(model("t5"), [5, 6, 7], sampler="inferential")


def test_spans_are_the_tokens_in_the_text():
    align = Alignment(wordpiece_tokenizer(), byte_tokenizer())
    text, spans = align.spans(ids_of("the cat naïve sat")[0])
    pieces = [text[a:b] for a, b in spans]
    assert text == "the cat naïve sat" and "".join(pieces) == "thecatnaïvesat"
    assert pieces[:2] == ["the", "cat"] and "" in pieces, "the first byte of ï has no character of its own"


def test_the_table_maps_words_with_and_without_a_space():
    words, other = byte_tokenizer(), wordpiece_tokenizer()
    align = Alignment(other, words)
    cat = other.convert_tokens_to_ids("cat")
    assert words.decode([int(align.table[1, cat])]) == " cat"
    assert int(align.table[0, other.mask_token_id]) == int(align.table[1, other.pad_token_id]) == -1
    known = (align.table[1] >= 0).nonzero()[:, 0].tolist()
    assert len(known) > 20
    for i in known:
        assert words.decode([int(align.table[1, i])]) == " " + other.decode([i]).removeprefix("##").strip()


class Favourite(torch.nn.Module):
    """A masked model with fixed opinions, which also keeps what it was asked."""

    def __init__(self, liked):
        super().__init__()
        self.liked, self.seen = liked, []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        self.seen.append(input_ids)
        scores = torch.full((*input_ids.shape, len(wordpiece_tokenizer())), -20.0)
        for word, score in self.liked.items():
            scores[..., wordpiece_tokenizer().convert_tokens_to_ids(word)] = score
        return scores


def test_mlm_masks_exactly_what_is_replaced_and_draws_from_its_fills():
    words, other = byte_tokenizer(), wordpiece_tokenizer()
    judge = Favourite({"dog": 5.0, "house": 5.0 - 1.0986, "cat": 9.0})
    sampler = MlmSampler(judge, other, words)
    ids = ids_of("the old cat sat", rows=2000)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, 2] = True
    assert words.decode([ids[0, 2]]) == " cat"
    drawn = [words.decode([i]) for i in sampler(ids, mask, generator())[:, 2].tolist()]
    # Odds 3 : 1 between the two liked words; the original is never proposed, however liked.
    assert set(drawn) == {" dog", " house"} and 0.72 < drawn.count(" dog") / 2000 < 0.78
    asked = other.convert_ids_to_tokens(judge.seen[0][0].tolist())
    assert [t for t in asked if t != "[PAD]"] == ["[CLS]", "the", "old", "[MASK]", "sat", "[SEP]"]
    greedy = MlmSampler(judge, other, words, greedy=True)(ids[:3], mask[:3], generator())
    assert [words.decode([i]) for i in greedy[:, 2].tolist()] == [" dog"] * 3


def test_mlm_joint_and_single_masks():
    words, other = byte_tokenizer(), wordpiece_tokenizer()
    judge = Favourite({"dog": 5.0, "house": 4.0})
    ids = ids_of("the old cat sat")
    mask = torch.tensor([[True, False, True, True]])
    MlmSampler(judge, other, words)(ids, mask, generator())
    assert int((judge.seen[-1] == other.mask_token_id).sum()) == 3
    single = MlmSampler(judge, other, words, joint=False)
    for seed in range(3):
        found = single(ids, None, generator(seed))
        # Without a space before it neither word is one token, so that the first position falls back.
        assert {words.decode([i]) for i in found[0, 1:].tolist()} <= {" dog", " house"}
    assert len(judge.seen) == 2 and (judge.seen[-1] == other.mask_token_id).sum(1).tolist() == [1] * 4, (
        "one forward a prompt"
    )


def test_mlm_falls_back_where_no_fill_is_one_token():
    words, other = byte_tokenizer(), wordpiece_tokenizer()

    class Nothing(torch.nn.Module):
        def forward(self, input_ids, attention_mask=None, token_type_ids=None):
            scores = torch.zeros(*input_ids.shape, len(other))
            scores[..., : len(other) - 60] = -30.0
            scores[..., other.all_special_ids] = 30.0
            return scores

    sampler = MlmSampler(Nothing(), other, words, fallback=lambda ids, mask, g: torch.full_like(ids, 77))
    sampler.align.table.fill_(-1)
    assert (sampler(ids_of(), torch.ones_like(ids_of()).bool(), generator()) == 77).all()


@pytest.mark.parametrize("joint", [True, False])
def test_mlm_with_a_real_model_runs_through_reagent_and_leaves_it_as_it_was(joint):
    judge, net, words = masked_model().train(), model("gpt2"), byte_tokenizer()
    sampler = MlmSampler(judge, wordpiece_tokenizer(), words, joint=joint)
    with unchanged(judge), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [
            reagent(net, PROMPT, tokenizer=words, sampler=sampler, probes=2, options=ReagentOptions(max_steps=6, top_k=60, lookahead=n))
            for n in (1, 3)
        ]  # fmt: skip
    torch.testing.assert_close(found[0].scores, found[1].scores, rtol=1e-4, atol=1e-6)
    # A tokenizer without padding gives the same fills.
    bare = copy.deepcopy(wordpiece_tokenizer())
    bare.pad_token = None
    alone = MlmSampler(judge, bare, words, joint=joint)
    one, other = (reagent(net, PROMPT, tokenizer=words, sampler=s, steps=2) for s in (sampler, alone))
    torch.testing.assert_close(one.scores, other.scores)


def test_another_models_guesses_come_as_tokens_of_this_one():
    net, words = model("llama"), byte_tokenizer()
    ids = ids_of()
    found = OtherModelSampler(net, words, words)(ids, None, generator())
    with torch.no_grad():
        scores = net(ids).logits[0]
    special = words.eos_token_id
    assert found[0, 0] == ids[0, 0], "nothing stands before the first token"
    for t in range(1, ids.shape[1]):
        best = scores[t - 1].topk(50).indices.tolist()
        texts = [" " + words.decode([i]).strip() for i in best if i != special and words.decode([i]).strip()]
        single = [enc[0] for enc in (words(text)["input_ids"] for text in texts) if len(enc) == 1]
        assert int(found[0, t]) == (single[0] if single else int(ids[0, t]))


def test_vocabularies_that_do_not_align_and_models_without_a_mask_are_refused():
    class Foreign:
        all_special_ids = ()

        def __len__(self):
            return 100

        def decode(self, ids, **options):
            return "漢字" * 3 + str(ids[0])

    with pytest.raises(InputError, match="do not align"):
        Alignment(Foreign(), byte_tokenizer())
    with pytest.raises(InputError, match="no mask token"):
        MlmSampler(masked_model(), byte_tokenizer(), byte_tokenizer())


def test_a_users_function_may_ask_for_the_mask_and_the_generator():
    seen = []

    def plain(ids):
        ids += 1  # A copy: what it does in place stays with it.
        return ids % 12

    def full(ids, mask, generator):
        seen.append(mask.shape)
        return torch.randint(12, ids.shape, generator=generator)

    for function in (plain, full):
        first, second = (
            reagent(copies(1), [1, 2, 3, 4], sampler=function, steps=4, options=ReagentOptions(lookahead=n)) for n in (1, 4)
        )  # fmt: skip
        torch.testing.assert_close(first.scores, second.scores)
        assert first.ids.tolist() == [1, 2, 3, 4]
    assert set(seen) == {(5, 4)}


def test_models_of_another_kind_are_named():
    net, words, other = model("gpt2"), byte_tokenizer(), wordpiece_tokenizer()
    for call, message in (
        (lambda: reagent(masked_model(), "cat", tokenizer=other), "BertForMaskedLM is a masked language model, which has no next token"),
        (lambda: OtherModelSampler(masked_model(), other, words), "BertForMaskedLM is a masked language model"),
        (lambda: MlmSampler(net, other, words), "GPT2LMHeadModel predicts next tokens and fills no masks"),
        (lambda: MlmSampler(model("t5"), other, words), "T5ForConditionalGeneration predicts next tokens and fills no masks"),
        (lambda: OtherModelSampler(model("t5"), words, words), "T5ForConditionalGeneration is an encoder-decoder, which does not continue"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()
