"""Needles: keys and their values are where they are said to be, and a fact occurs once."""

from __future__ import annotations

import pytest
import torch

from lineament.core.checks import InputError
from lineament.data.needles import key_values, needles


@pytest.mark.parametrize("tokens", [24, 100])
def test_values_asked_for_stand_behind_their_keys(tokens: int) -> None:
    found = key_values(20, tokens, pairs=8, questions=4, vocabulary=20, seed=3)
    rows, at = (found.targets != -100).nonzero(as_tuple=True)
    assert len(rows) == 80
    before = at - found.distance[rows, at]
    assert torch.equal(found.ids[rows, before], found.ids[rows, at])
    assert torch.equal(found.ids[rows, before + 1], found.targets[rows, at])
    assert torch.equal(found.ids[rows, at + 1], found.targets[rows, at])
    # Each key is said once before it is asked for, so that the answer is unique.
    said = (found.ids[:, : tokens - 8, None] == torch.arange(1, 10)).sum(1)
    assert (said.sum(1) == 8).all() and said.max() == 1
    assert torch.equal(key_values(20, tokens, vocabulary=20, seed=3).ids, found.ids)


def test_fact_stands_once_at_its_depth() -> None:
    found = needles(5, 300, seed=1)
    for each in found:
        assert each.text.count(each.answer) == 1
        assert each.text.index(each.answer) / len(each.text) == pytest.approx(each.depth, abs=0.1)
    assert [each.depth for each in found] == [0.1, 0.3, 0.5, 0.7, 0.9]
    assert needles(1, 50, depth=0.0)[0].text.startswith("The secret number")


@pytest.mark.parametrize(
    ("options", "told"),
    [({"tokens": 23}, "at least 24"), ({"questions": 9}, "no more than pairs=8"), ({"pairs": 32}, "more than the 31 of")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(options: dict[str, int], told: str) -> None:
    with pytest.raises(InputError, match=told):
        key_values(1, **({"tokens": 100} | options))
