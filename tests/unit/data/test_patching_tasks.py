"""The tasks' pairs are alike but for what carries the answer, and the recipe runs on a small scale."""

from __future__ import annotations

import pytest
import torch

from lineament.core.checks import InputError
from lineament.data.patching_tasks import (
    NAMES,
    PLACES,
    TEMPLATES,
    THINGS,
    greater_than_pairs,
    ioi_pairs,
    save_language_model,
    synthetic_greater_than,
    synthetic_induction,
    synthetic_ioi,
)


@pytest.mark.parametrize("order", ["ABBA", "BABA", "both"])
def test_ioi_pairs_differ_in_who_acts(order):
    pairs = ioi_pairs(40, order=order, seed=1)
    assert len(pairs) == 40 and pairs == ioi_pairs(40, order=order, seed=1) != ioi_pairs(
        40, order=order, seed=2
    )
    for k, (clean, corrupt, right, wrong) in enumerate(
        zip(pairs.clean, pairs.corrupt, pairs.correct, pairs.wrong)
    ):
        right, wrong = right.strip(), wrong.strip()
        a, b = clean.split(), corrupt.split()
        assert len(a) == len(b) and sum(x != y for x, y in zip(a, b)) == 1
        assert (
            clean.count(wrong) == 2
            and clean.count(right) == 1
            and corrupt.count(right) == 2
            and right != wrong
        )
        subject_first = clean.index(wrong) < clean.index(right)
        assert subject_first == (order == "BABA" or (order == "both" and k % 2 == 1))
    others = ioi_pairs(20, corrupt="others")
    for clean, corrupt in zip(others.clean, others.corrupt):
        assert len({w for w in corrupt.replace(",", "").split() if w in NAMES}) == 3
        assert not {w for w in corrupt.split() if w in NAMES} & {w for w in clean.split() if w in NAMES}


def test_lists_are_of_single_words_without_repetition():
    for words in (NAMES, PLACES, THINGS):
        assert len(set(words)) == len(words) and not any(" " in w for w in words)
    assert all(t.format(A="a", B="b", S="s", place="p", thing="t").count(" ") for t in TEMPLATES)


def test_greater_than_years_leave_room_on_both_sides():
    pairs = greater_than_pairs(200)
    for clean, right, wrong in zip(pairs.clean, pairs.correct, pairs.wrong):
        year = int(clean.split("year ")[1][2:4])
        assert 2 <= year <= 97 and int(right) == year + 1 and int(wrong) == year - 1


def test_synthetic_tasks_hold_the_answer_in_the_tokens():
    ioi = synthetic_ioi(300, seed=2)
    rows = torch.arange(300)
    assert ioi.clean.shape == (300, 12) and (ioi.clean[:, 2] != ioi.clean[:, 4]).all()
    named = (ioi.clean >= 2) & (ioi.clean < 32)
    assert named.nonzero()[:, 1].reshape(300, 3).tolist() == [[2, 4, 8]] * 300
    assert (ioi.clean[:, 8] == ioi.wrong).all() and (ioi.corrupt[:, 8] == ioi.correct).all()
    assert ((ioi.clean != ioi.corrupt).sum(1) == 1).all() and (ioi.correct != ioi.wrong).all()
    assert 0.3 < float((ioi.clean[:, 8] == ioi.clean[:, 2]).double().mean()) < 0.7
    years = synthetic_greater_than(300, seed=2)
    assert (
        years.right[rows, years.correct].all()
        and not years.right[rows, years.wrong].any()
        and (years.corrupt[:, 2] == 2).all()
    )
    induction = synthetic_induction(300, seed=2)
    for clean, corrupt, right, wrong in zip(
        induction.clean, induction.corrupt, induction.correct, induction.wrong
    ):
        at = int((clean[:-1] == clean[-1]).nonzero()[0])
        assert clean[at + 1] == right and corrupt[at + 1] == wrong != right and (clean != corrupt).sum() == 1


def test_bad_sizes_are_refused():
    for call in (
        lambda: ioi_pairs(0),
        lambda: synthetic_ioi(1, names=1),
        lambda: synthetic_ioi(1, length=9),
        lambda: ioi_pairs(1, order="AB"),
    ):
        with pytest.raises(InputError):
            call()


@pytest.mark.slow
def test_models_are_saved_as_hugging_face_directories(tmp_path):
    transformers = pytest.importorskip("transformers")
    from lineament.recipes.kit.networks import gpt2

    pairs = synthetic_ioi(3)
    model = gpt2(len(pairs.vocabulary), 12, layers=1, width=16, heads=2, seed=0)
    folder = save_language_model(model, pairs.vocabulary, tmp_path / "model")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = " ".join(pairs.vocabulary[t] for t in pairs.clean[0])
    assert tokenizer(text)["input_ids"] == pairs.clean[0].tolist()
    torch.testing.assert_close(again(pairs.clean).logits, model(pairs.clean).logits)
