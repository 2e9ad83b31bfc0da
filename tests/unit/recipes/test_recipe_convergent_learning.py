"""The convergent-learning recipe: a tiny run, that a killed one goes on, and predicates that can fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lineament.core.checks import InputError
from lineament.recipes import convergent_learning
from lineament.recipes.convergent_learning import Config, run
from lineament.recipes.convergent_learning.claims import Layer, all_claims


def layer(**values: float) -> Layer:
    usual = {
        "site": "conv1", "units": 16, "semi": 0.7, "match": 0.6, "error": 0.01, "overlap": 0.5, "shuffled": 0.3, "rotated": 0.5, "untrained": 0.7,
        "best": 0.95, "worst": 0.1, "single": 0.3, "few": 0.2, "few_units": 6.0, "dense": 0.1, "information": 0.8, "subspace": 0.7, "spectrum": 0.95,
        "curve_semi": [0.9], "curve_match": [0.8], "curve_shuffled": [0.3], "curve_untrained": [0.5],
    }  # fmt: skip
    return Layer(**{**usual, **values})  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (0, {"shuffled": 0.46}), (1, {"rotated": 0.56}), (2, {"rotated": 0.56}), (3, {"best": 0.84}), (3, {"worst": 0.31}),
        (4, {"few": 0.26}), (4, {"few_units": 9.0}), (5, {"information": 0.69}), (6, {"subspace": 0.59}), (7, {"spectrum": 0.89}),
        (8, {"untrained": 0.6}),
    ],
)  # fmt: skip
def test_each_predicate_can_fail(number: int, value: dict) -> None:
    assert all(claim.holds and not claim.reason for claim in all_claims([layer()], 1.0))
    claims = all_claims([layer(**value)], 1.0)
    assert not claims[number].holds
    assert not all_claims([layer()], 0.9)[9].holds


def test_presets() -> None:
    for name in ("quick", "small", "paper"):
        json.dumps(dataclasses.asdict(Config.preset(name)))
    with pytest.raises(InputError, match="at least two networks"):
        run(dataclasses.replace(Config(), seeds=(0,)), out=Path("nowhere"))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_result(tmp_path, monkeypatch) -> None:
    tiny = dataclasses.replace(Config(), width=3, epochs=1)
    trainings = []
    train = convergent_learning.trained
    monkeypatch.setattr(convergent_learning, "trained", lambda *a: trainings.append(1) or train(*a))
    with monkeypatch.context() as patch:
        patch.setattr(convergent_learning, "aligned", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(tiny, out=tmp_path / "a")
    again = run(tiny, out=tmp_path / "a")
    assert len(trainings) == 2
    whole = run(tiny, out=tmp_path / "b")
    assert [claim.observed for claim in again.claims] == [claim.observed for claim in whole.claims]
    assert again.claims[-1].holds and len(again.figures) == 2
