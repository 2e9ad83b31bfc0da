"""The useful recipe: every stage on a small scale, a killed run, and claims that judge planted numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from lineament.core.checks import InputError
from lineament.recipes import useful as recipe
from lineament.recipes.useful import Config, run
from lineament.recipes.useful.claims import claims_of
from lineament.recipes.useful.theory import WAYS, Theory, Walk
from lineament.recipes.useful.training import Early, Final, parsed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:more than 70%:UserWarning", "ignore:classes .* have fewer:UserWarning")
def test_a_killed_recipe_goes_on_with_the_same_result(tmp_path, monkeypatch):
    config = dataclasses.replace(
        Config.preset("quick"), epochs=3, separating=2, train=150, theory_steps=10, theory_samples=40,
        theory_slow=(0.6,), methods=("sgd", "sgd+useful", "sgd+steps", "sgd+upweight", "asam+jtt"), label_noise=0.1,
    )  # fmt: skip
    whole = run(config, out=tmp_path / "whole")
    for figure in whole.figures:
        assert (tmp_path / "whole" / figure.file).stat().st_size < 200_000 and figure.alt
    original, calls = recipe.final, []

    def killed(name, *rest):
        calls.append(name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(name, *rest)

    monkeypatch.setattr(recipe, "final", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "cut")
    again = run(config, out=tmp_path / "cut")
    assert calls[3:] == ["sgd+steps", "sgd+upweight", "asam+jtt"]
    assert [c.observed for c in again.claims] == [c.observed for c in whole.claims]


def final(test: float) -> Final:
    return Final(test, 0.0, 1.0, 10, 0.1, 1.0, 2.0, 3.0, 0.1, 1.0, 2.0, [])


def judged(fast=(1.0, 1.0, 1.0), slow=(0.3, 0.4, 0.9), recursion=1e-15, recall=0.95, **errors: float):
    """Whether each claim holds of these alignments, by way, of this selection and of these test errors."""
    walks = {way: [Walk(torch.tensor([[a, b]] * 400), [0.9])] for way, a, b in zip(WAYS, fast, slow)}
    theory = Theory([200, 400], {"0.6": walks}, {"GD": recursion})
    early = [Early(2, [0.5], {}, 1.0, [0.1] * 10, recall, 0.6)]
    config = dataclasses.replace(Config(), theory_slow=(0.6,))
    given = {"sgd": 5.0, "sgd_random": 4.5, "sgd_useful": 4.0, "sam": 4.0, "sam_useful": 3.0, **errors}
    found = {name.replace("_", "+"): [final(value)] for name, value in given.items()}
    return [claim.holds for claim in claims_of(config, theory, early, found)]


def test_claims_judge_planted_numbers():
    assert judged() == [True] * 8
    for number, planted in [
        (0, {"slow": (0.6, 0.7, 0.9)}),
        (1, {"fast": (1.0, 1.2, 1.0)}),
        (2, {"slow": (0.3, 0.4, 0.35)}),
        (3, {"recursion": 1e-8}),
        (4, {"recall": 0.8}),
        (5, {"sgd": 3.9}),
        (6, {"sam_useful": 4.1}),
        (7, {"sgd_random": 3.9}),
    ]:
        assert not judged(**planted)[number], planted


def test_methods_are_taken_apart():
    assert parsed("sam+useful+ta").selects and parsed("sam+useful+ta").trivial
    for name, said in [
        ("sgd+useful+random", "at most one way"),
        ("sgd+steps+useful", "a control without selection"),
        ("sag+useful", "methods: got 'sag'"),
    ]:
        with pytest.raises(InputError, match=said):
            parsed(name)
