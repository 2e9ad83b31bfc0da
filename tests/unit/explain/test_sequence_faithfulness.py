"""Attributions of whole continuations, judged target by target beside chance."""

from __future__ import annotations

import math

import pytest
import torch
from tests.contracts.token_models import byte_tokenizer, model
from tests.contracts.unchanged import unchanged

from lineament.core.checks import InputError
from lineament.explain.tokens import explain_continuation
from lineament.explain.tokens.baselines import attribute_tokens
from lineament.explain.tokens.controls import random_importance
from lineament.explain.tokens.faithfulness import soft_faithfulness
from lineament.explain.tokens.sequence_faithfulness import sequence_faithfulness

QUICK = {"max_steps": 3, "min_steps": 3, "stop": "dummy", "probes": 2}


def made(net, prompt=(5, 40, 81), **options):
    return explain_continuation(net, None, list(prompt), [7, 8, 9, 10, 11], stride=2, **{**QUICK, **options})


def test_a_continuation_is_the_mean_of_its_targets_alone():
    net = model("gpt2").double()
    found = made(net)
    with unchanged(net):
        judged = sequence_faithfulness(net, None, found, n_samples=5, seed=3, random_draws=2)
    alone = []
    for k, a in enumerate(found.steps):
        every = torch.cat([a.scores[None], random_importance(a.scored, seed=3 + k, draws=2)])
        alone.append(soft_faithfulness(net, None, a.ids, every, n_samples=5, seed=3 + k))
    for name in ("sufficiency", "comprehensiveness"):
        values = torch.stack([getattr(a, name) for a in alone])
        assert float(getattr(judged, name)) == pytest.approx(float(values[:, 0].mean()))
        assert float(getattr(judged, f"random_{name}")) == pytest.approx(float(values[:, 1:].mean()))
    assert len(judged.targets[0]) == 3 and len(judged.plot().lines) == 4
    assert set(judged.to_dict()) >= {"sufficiency", "log_comprehensiveness", "targets"}


def test_the_logarithm_comes_after_the_means_over_prompts():
    net = model("gpt2")
    both = sequence_faithfulness(net, None, [made(net), made(net, (9, 31, 22, 8))], n_samples=3)
    assert both.comprehensiveness.shape == (2,)
    wanted = math.log(float(both.comprehensiveness.mean()) / float(both.random_comprehensiveness.mean()))
    assert both.log_comprehensiveness == pytest.approx(wanted)


@pytest.mark.parametrize("scope", ["source", "all"])
def test_an_encoder_decoder_is_judged_on_its_source_and_on_what_came_before(scope):
    net = model("t5")
    found = explain_continuation(net, None, [5, 40, 81], [7, 8, 9], scope=scope, **QUICK)
    judged = sequence_faithfulness(net, None, found, n_samples=3)
    assert len(judged.targets[0]) == 3 and bool(torch.isfinite(judged.comprehensiveness).all())


def test_scores_of_any_range_want_a_normalisation():
    net = model("gpt2")
    found = explain_continuation(
        net,
        byte_tokenizer(),
        "the cat sat",
        max_new_tokens=2,
        explain=attribute_tokens,
        method="input_x_grad",
    )
    with pytest.raises(InputError, match=r"expected importances in \[0, 1\]"):
        sequence_faithfulness(net, byte_tokenizer(), found)
    assert sequence_faithfulness(
        net, byte_tokenizer(), found, normalize="softmax", n_samples=2
    ).sufficiency.shape == (1,)


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "found: got none"), (3, "found: got 3, expected a list of continuations"), ([3], "what explain_continuation returns")],
)  # fmt: skip
def test_bad_calls_are_named(given, message):
    with pytest.raises(InputError, match=message):
        sequence_faithfulness(model("gpt2"), None, given)
    with pytest.raises(InputError, match="random_draws"):
        sequence_faithfulness(model("gpt2"), None, made(model("gpt2")), random_draws=0)
