"""Agreement pairs differ in the subject's number alone, and the answers are the verb forms of either number."""

from __future__ import annotations

import itertools

import pytest
import torch

from lineament.core.checks import InputError
from lineament.data import agreement_tasks
from lineament.data.agreement_tasks import (
    CONSTRUCTIONS,
    FINITE,
    PEOPLE,
    THINGS,
    TRANSITIVE,
    agreement_pairs,
    synthetic_agreement,
)

NUMBER = {
    form: k for forms in (PEOPLE, THINGS, TRANSITIVE, FINITE) for pair in forms for k, form in enumerate(pair)
}
SUBJECT = {"simple": 1, "rc": 1, "within_rc": 4, "nounpp": 1}
OTHER = {"rc": 4, "within_rc": 1, "nounpp": 4}
LENGTH = {"simple": 2, "rc": 6, "within_rc": 5, "nounpp": 5}


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_pairs_differ_in_the_subjects_number_alone(construction):
    pairs = agreement_pairs(40, construction, seed=1)
    assert len(pairs) == 40 and pairs == agreement_pairs(40, construction, seed=1)
    assert pairs != agreement_pairs(40, construction, seed=2)
    for k, row in enumerate(zip(pairs.clean, pairs.corrupt, pairs.correct, pairs.wrong)):
        a, b = row[0].split(), row[1].split()
        at = SUBJECT[construction]
        assert len(a) == len(b) == LENGTH[construction] and a[0] == "The"
        assert [i for i, (x, y) in enumerate(zip(a, b)) if x != y] == [at]
        assert NUMBER[a[at]] == k % 2 != NUMBER[b[at]]
        assert any({a[at], b[at]} == set(pair) for pair in PEOPLE)
        right, wrong = row[2], row[3]
        assert right[0] == wrong[0] == " "
        verbs = TRANSITIVE if construction == "within_rc" else FINITE
        assert (right.strip(), wrong.strip())[:: 1 if k % 2 == 0 else -1] in verbs
        if construction == "rc":
            # Inside the clause the verb agrees with the clause's own subject.
            assert NUMBER[a[5]] == NUMBER[a[4]]


@pytest.mark.parametrize("construction", ["rc", "within_rc", "nounpp"])
def test_the_other_nouns_number_is_what_was_asked_for(construction):
    for attractor, wanted in (("same", {0}), ("opposite", {1}), ("either", {0, 1})):
        pairs = agreement_pairs(60, construction, attractor=attractor)
        words = [text.split() for text in pairs.clean]
        found = {NUMBER[w[OTHER[construction]]] ^ NUMBER[w[SUBJECT[construction]]] for w in words}
        assert found == wanted
        assert all(len({w.rstrip("s") for w in row}) >= len(row) - 1 for row in words)


@pytest.mark.parametrize("construction", CONSTRUCTIONS)
def test_small_vocabularies_hold_the_same_sentences(construction):
    pairs = synthetic_agreement(50, construction, nouns=12, verbs=4, seed=3)
    assert pairs.clean.shape == (50, LENGTH[construction] + 1) and (pairs.clean[:, 0] == 0).all()
    assert len(set(pairs.vocabulary)) == len(pairs.vocabulary) > int(pairs.clean.max())
    differs = pairs.clean != pairs.corrupt
    assert (differs.sum(1) == 1).all() and differs[:, SUBJECT[construction] + 1].all()
    rows = torch.arange(50)
    assert pairs.right is not None and (pairs.right.sum(1) == 4).all()
    assert pairs.right[rows, pairs.correct].all() and not pairs.right[rows, pairs.wrong].any()
    for row, k in itertools.product(range(50), [SUBJECT[construction] + 1]):
        subject = NUMBER[pairs.vocabulary[pairs.clean[row, k]]]
        answers = [pairs.vocabulary[t] for t in pairs.right[row].nonzero()[:, 0]]
        assert {NUMBER[a] for a in answers} == {subject}


def test_lists_hold_single_words_of_two_forms():
    for forms in (PEOPLE, THINGS, TRANSITIVE, FINITE):
        flat = [word for pair in forms for word in pair]
        assert len(set(flat)) == len(flat) and not any(" " in word for word in flat)
    assert set(agreement_tasks.PREPOSITIONS).isdisjoint(NUMBER)


class Letters:
    """A tokenizer of chunks of at most ``size`` letters."""

    def __init__(self, size):
        self.size = size

    def __call__(self, text, **_):
        return {"input_ids": [text[k : k + self.size] for k in range(0, len(text), self.size)]}


def test_a_tokenizer_leaves_words_of_equal_length():
    pairs = agreement_pairs(30, "nounpp", tokenizer=Letters(6))
    words = {w for text in pairs.clean for w in text.split()[1:] if w in NUMBER}
    assert all(len(w.rstrip("s")) + 1 != 6 for w in words) and words
    with pytest.raises(InputError, match=r"forms of one token each, expected at least 2"):
        agreement_pairs(3, "rc", tokenizer=Letters(2))


def test_bad_calls_are_refused_by_name():
    for call, words in (
        (lambda: agreement_pairs(0, "rc"), "count: got 0"),
        (lambda: agreement_pairs(3, "cr"), "construction: got 'cr'"),
        (lambda: agreement_pairs(3, "rc", attractor="any"), "attractor"),
        (lambda: synthetic_agreement(3, "rc", nouns=40), r"nouns: got 40, expected an integer in \[2, 12\]"),
        (lambda: synthetic_agreement(3, "rc", verbs=0), "verbs: got 0"),
    ):
        with pytest.raises(InputError, match=words):
            call()
