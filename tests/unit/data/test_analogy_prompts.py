"""Analogies say what completes them and where the distractor is."""

from __future__ import annotations

import re

import pytest
from tests.contracts.token_models import byte_tokenizer, wordpiece_tokenizer

from lineament.core.checks import InputError
from lineament.data.analogy_prompts import DISTRACTORS, PAIRS, TEMPLATES, analogy_prompts, tokens_inside


def test_every_prompt_names_its_pair_and_its_distractor():
    total = sum(map(len, PAIRS.values())) * len(DISTRACTORS)
    made = analogy_prompts(total)
    assert len(set(made.prompts)) == len(made) == total
    for prompt, answer, (start, stop), relation in zip(
        made.prompts, made.answers, made.distractors, made.relations
    ):
        first = next(a for a, b in PAIRS[relation] if f" {b}" == answer and f" {a}" in prompt)
        assert prompt[start + 1 : stop - 1] in DISTRACTORS
        outside = prompt[:start] + prompt[stop:]
        assert first in outside and answer.strip() not in re.findall(r"\w+", prompt)
    assert set(made.relations) == set(TEMPLATES)


def test_the_seed_decides():
    assert analogy_prompts(5, seed=1) == analogy_prompts(5, seed=1) != analogy_prompts(5, seed=2)


def test_lists_are_without_repetition_and_templates_have_both_places():
    for name, pairs in PAIRS.items():
        assert len({a for a, _ in pairs}) == len(pairs) == len({b for _, b in pairs})
        assert TEMPLATES[name].count("{a}") == TEMPLATES[name].count("{d}") == 1 and not TEMPLATES[
            name
        ].endswith(" ")


@pytest.mark.parametrize("words", [byte_tokenizer(), wordpiece_tokenizer()])
def test_tokens_within_a_span(words):
    text = "the cat (a dog) sat"
    inside = tokens_inside(words, text, (text.index("("), text.index(")") + 1))
    ids = words(text)["input_ids"]
    assert len(inside) == len(ids)
    said = words.decode([i for i, yes in zip(ids, inside.tolist()) if yes])
    if words.unk_token is None:
        assert said.strip() == "(a dog)"
    else:
        assert "a dog" in said and "cat" not in said and "sat" not in said
    assert not inside[0]


def test_bad_calls_are_named():
    with pytest.raises(InputError, match=r"count: got 0"):
        analogy_prompts(0)
    with pytest.raises(InputError, match=r"count: got 9999"):
        analogy_prompts(9999)
    with pytest.raises(InputError, match="does not say where its tokens are"):
        tokens_inside(object(), "a", (0, 1))
