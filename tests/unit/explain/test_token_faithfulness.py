"""Soft and hard faithfulness: exact values at the edges, the exact expectation, and controls that keep the ranking."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts.token_models import byte_tokenizer, copies, model
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.explain.tokens.continuations import explain_continuation, sequence_faithfulness
from lineament.explain.tokens.controls import match_entropy, match_retention, random_importance
from lineament.explain.tokens.faithfulness import (
    distance_between,
    exact_soft_faithfulness,
    hard_faithfulness,
    soft_faithfulness,
)
from lineament.explain.tokens.prompts import Reading
from lineament.explain.tokens.results import entropy

IDS = torch.tensor([5, 40, 81, 12, 300])
scores_of = st.lists(st.floats(-5, 5), min_size=3, max_size=8, unique=True).map(
    lambda v: torch.tensor(v, dtype=torch.float64)
)
distributions = st.lists(st.floats(1e-6, 1), min_size=4, max_size=4).map(
    lambda v: torch.tensor(v, dtype=torch.float64) / sum(v)
)


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(6, 2), nn.Linear(2, 6)

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids):
        weights = torch.tensor([0.5, -1.0, 2.0])
        return self.out((weights[:, None] * self.words(input_ids)).sum(1).tanh() * 3)


@given(distributions, distributions)
@settings(max_examples=60, deadline=None)
def test_the_hellinger_distance_is_what_it_should_be(p, q):
    h, tv = float(distance_between(p, q)), float((p - q).abs().sum() / 2)
    assert 0 <= h <= 1 and abs(h - float(distance_between(q, p))) < 1e-12
    assert h * h <= tv + 1e-9 and tv <= math.sqrt(2) * h + 1e-9
    assert abs(float(distance_between(p, q, "squared_official")) - math.sqrt(2) * h * h) < 1e-9
    assert float(distance_between(p, q, "kl")) >= 2 * tv * tv - 1e-9, "Pinsker"
    assert abs(float(distance_between(p, q, "probability", 2)) - max(0.0, float(p[2] - q[2]))) < 1e-12


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "gemma3", "t5", "bart"])
@pytest.mark.parametrize("distance", ["hellinger", "squared_official", "kl", "probability"])
def test_nothing_and_everything_are_exact(name, distance):
    net, size = model(name).double(), 6 if name in ("t5", "bart") else 5
    # A target that zeroing makes less probable, which "probability" needs to normalise by.
    target = next((y for y in range(40) if _loses(net, size, y)), None) if distance == "probability" else None
    zeros, ones = (
        soft_faithfulness(net, IDS, fill, target=target, distance=distance, n_samples=3)
        for fill in (torch.zeros(size), torch.ones(size))
    )
    for found, value in ((zeros, 0.0), (ones, 1.0)):
        for each in (found.sufficiency, found.comprehensiveness):
            assert abs(float(each) - value) < 1e-7
        assert float(found.sufficiency_error) < 1e-7


def _loses(net, size, target):
    """Whether zeroing makes the target less probable."""
    try:
        soft_faithfulness(net, IDS, torch.zeros(size), target=target, distance="probability", n_samples=1)
    except InputError:
        return False
    return True


def test_draws_estimate_the_exact_expectation():
    net, ids, a = Tiny(), torch.tensor([1, 4, 2]), torch.tensor([0.3, 0.8, 0.1])
    exact = exact_soft_faithfulness(net, ids, a)
    found = soft_faithfulness(net, ids, a, n_samples=4000)
    for name in ("sufficiency", "comprehensiveness"):
        error = float(getattr(found, f"{name}_error"))
        assert 0 < error < 0.02 and abs(float(getattr(found, name)) - exact[name]) < 4 * error
    assert abs(found.zero_sufficiency - exact["zero_sufficiency"]) < 1e-6
    # The standard error is the spread of independent estimates.
    several = torch.stack(
        [soft_faithfulness(net, ids, a, n_samples=16, seed=s).comprehensiveness for s in range(150)]
    )
    claimed = (
        float(soft_faithfulness(net, ids, a, n_samples=4000).comprehensiveness_error) * (4000 / 16) ** 0.5
    )
    assert 0.75 < float(several.std()) / claimed < 1.25
    assert math.isnan(float(soft_faithfulness(net, ids, a, n_samples=1).sufficiency_error))


def test_hard_keeps_and_removes_whole_tokens():
    net, ids = Tiny(), torch.tensor([1, 4, 2])
    found = hard_faithfulness(net, ids, torch.tensor([0.1, -3.0, 9.0]), ratios=[0.2, 0.34, 0.7])
    zero_one = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
    # A mask of zeros and ones is the soft metric without chance.
    soft = soft_faithfulness(net, ids, zero_one, n_samples=1)
    torch.testing.assert_close(found["sufficiency"], soft.sufficiency)
    torch.testing.assert_close(found["comprehensiveness"], soft.comprehensiveness)
    torch.testing.assert_close(found["aopc_comprehensiveness"], soft.comprehensiveness.mean())
    assert torch.equal(
        hard_faithfulness(net, ids, torch.tensor([0.1, -3.0, 9.0]), ratios=[1 / 3])["sufficiency"],
        found["sufficiency"][1:2],
    )


def test_several_methods_at_once_are_each_alone_and_the_batch_size_does_not_matter():
    net, g = model("gpt2"), torch.Generator().manual_seed(0)
    several = torch.rand(3, 5, generator=g)
    together = soft_faithfulness(net, IDS, several, n_samples=7)
    for k in range(3):
        alone = soft_faithfulness(net, IDS, several[k], n_samples=7, batch_size=2)
        torch.testing.assert_close(
            together.comprehensiveness[k], alone.comprehensiveness, rtol=1e-4, atol=1e-6
        )
        torch.testing.assert_close(together.sufficiency[k], alone.sufficiency, rtol=1e-4, atol=1e-6)
    hard = hard_faithfulness(net, IDS, several, ratios=[0.4])
    torch.testing.assert_close(
        hard["sufficiency"][1], hard_faithfulness(net, IDS, several[1], ratios=[0.4])["sufficiency"]
    )


def test_special_tokens_are_never_masked():
    words, net = byte_tokenizer(), model("gpt2").double()
    ids = torch.cat([torch.tensor([words.bos_token_id]), IDS])
    with_end = soft_faithfulness(net, ids, torch.tensor([0.0, 1, 1, 1, 1, 1]), tokenizer=words, n_samples=2)
    assert abs(float(with_end.sufficiency) - 1) < 1e-7, "its importance of 0 does not remove the begin token"
    assert (
        float(soft_faithfulness(net, ids, torch.zeros(6), tokenizer=words, n_samples=2).comprehensiveness)
        < 1e-7
    )


def test_the_model_is_left_as_it_was_and_half_precision_works():
    net = model("gpt2").train()
    with unchanged(net):
        soft_faithfulness(net, IDS, torch.rand(5, generator=torch.Generator().manual_seed(0)), n_samples=2)
    half = soft_faithfulness(model("gpt2").bfloat16(), IDS, torch.ones(5), n_samples=2)
    assert abs(float(half.sufficiency) - 1) < 1e-2


@given(scores_of, st.floats(0.05, 0.95))
@settings(max_examples=60, deadline=None)
def test_controls_reach_their_level_and_keep_the_ranking(scores, share):
    level = share * math.log(len(scores))
    gaps = scores.sort().values.diff()
    a = match_entropy(scores, level)
    assert abs(float(a.sum()) - 1) < 1e-9
    if float(gaps.min()) > 1e-3:
        assert abs(float(entropy(a)) - level) < 1e-6
    b = match_retention(scores, 1 / len(scores) + share * (1 - 2 / len(scores)))
    assert float(b.min()) >= 0 and float(b.max()) <= 1
    if float(gaps.min()) > 1e-2:
        assert abs(float(b.mean()) - (1 / len(scores) + share * (1 - 2 / len(scores)))) < 1e-3
    for found in (a, b):
        ordered = found[scores.argsort()]
        assert (ordered.diff() >= -1e-12).all()


def test_clipping_and_ratios():
    net, ids, a = Tiny(), torch.tensor([1, 4, 2]), torch.tensor([0.3, 0.8, 0.1])
    plain, clipped = (soft_faithfulness(net, ids, a, n_samples=400, clip=c) for c in (False, True))
    assert (
        float(clipped.comprehensiveness) <= float(plain.comprehensiveness)
        and float(clipped.comprehensiveness) <= 1
    )
    chance = random_importance(torch.tensor([True, False, True, True]), draws=5)
    assert chance.shape == (5, 4) and (chance[:, 1] == 0).all() and not torch.equal(chance[0], chance[1])
    assert len(soft_faithfulness(net, ids, a).plot().patches) == 2


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (torch.tensor([0.5, -0.1, 0.2, 0.1, 0.0]), {}, "reach from -0.1 to 0.5.*normalized"),
        (torch.tensor([0.5, 1.1, 0.2, 0.1, 0.0]), {}, "in \\[0, 1\\]"),
        (torch.rand(4), {}, "a prompt of 5 tokens"),
        (torch.tensor([float("nan")] * 5), {}, "NaN"),
        (torch.ones(5), {"distance": "helinger"}, "nearest: 'hellinger'"),
        (torch.ones(5), {"n_samples": 0}, "n_samples"),
        (torch.ones(5), {"uniforms": (torch.rand(2, 5, 3), torch.rand(2, 5, 3))}, "uniforms"),
    ],
)
def test_bad_input_is_named(scores, options, message):
    with pytest.raises(InputError, match=message):
        soft_faithfulness(model("gpt2"), IDS, scores, **options)


def test_what_cannot_be_measured_says_why():
    gains = next(y for y in range(300) if not _loses(model("gpt2"), 5, y))
    with pytest.raises(InputError, match="nothing to normalise by"):
        soft_faithfulness(model("gpt2"), IDS, torch.zeros(5), target=gains, distance="probability")
    with pytest.raises(InputError, match="needs the word embeddings"):
        soft_faithfulness(copies(1), [1, 2, 3], torch.ones(3))
    with pytest.raises(InputError, match="at most 16"):
        exact_soft_faithfulness(model("gpt2"), IDS, torch.ones(5))
    for ratios in (0.5, [], [0.0], [1.0], [1.5]):
        with pytest.raises(InputError, match="ratios: got"):
            hard_faithfulness(model("gpt2"), IDS, torch.ones(5), ratios=ratios)


def test_hard_scores_can_be_clipped_too():
    net, ids = model("gpt2").double(), [5, 40, 81, 12]
    scores = torch.rand(40, 4, generator=torch.Generator().manual_seed(0))
    plain, clipped = (hard_faithfulness(net, ids, scores, ratios=[0.5, 0.8], clip=c) for c in (False, True))
    assert float(plain["comprehensiveness"].max()) > 1 >= float(clipped["comprehensiveness"].max())
    torch.testing.assert_close(clipped["comprehensiveness"], plain["comprehensiveness"].clamp(0, 1))
    torch.testing.assert_close(clipped["raw_comprehensiveness"], plain["raw_comprehensiveness"])


# Whole continuations.

QUICK = {"steps": 3, "probes": 2}


def continued(net, prompt=(5, 40, 81), **options):
    return explain_continuation(net, list(prompt), [7, 8, 9, 10, 11], stride=2, **{**QUICK, **options})


def test_a_continuation_is_the_mean_of_its_targets_alone():
    net = model("gpt2").double()
    found = continued(net)
    with unchanged(net):
        judged = sequence_faithfulness(net, found, n_samples=5, seed=3, random_draws=2)
    alone = []
    for k, a in enumerate(found.steps):
        every = torch.cat([a.scores[None], random_importance(a.scored, seed=3 + k, draws=2)])
        alone.append(soft_faithfulness(net, a.ids, every, n_samples=5, seed=3 + k))
    for name in ("sufficiency", "comprehensiveness"):
        values = torch.stack([getattr(a, name) for a in alone])
        assert float(getattr(judged, name)) == pytest.approx(float(values[:, 0].mean()))
        assert float(getattr(judged, f"random_{name}")) == pytest.approx(float(values[:, 1:].mean()))
    assert len(judged.targets[0]) == 3 and len(judged.plot().lines) == 4
    assert set(judged.to_dict()) >= {"sufficiency", "log_comprehensiveness", "targets"}


def test_the_logarithm_comes_after_the_means_over_prompts():
    net = model("gpt2")
    both = sequence_faithfulness(net, [continued(net), continued(net, (9, 31, 22, 8))], n_samples=3)
    assert both.comprehensiveness.shape == (2,)
    wanted = math.log(float(both.comprehensiveness.mean()) / float(both.random_comprehensiveness.mean()))
    assert both.log_comprehensiveness == pytest.approx(wanted)


@pytest.mark.parametrize("scope", ["source", "all"])
def test_an_encoder_decoder_is_judged_on_its_source_and_on_what_came_before(scope):
    net = model("t5")
    found = explain_continuation(net, [5, 40, 81], [7, 8, 9], reading=Reading(scope=scope), **QUICK)
    judged = sequence_faithfulness(net, found, n_samples=3)
    assert len(judged.targets[0]) == 3 and bool(torch.isfinite(judged.comprehensiveness).all())


def test_scores_of_any_range_want_a_normalisation():
    net = model("gpt2")
    words = byte_tokenizer()
    found = explain_continuation(net, "the cat sat", tokenizer=words, max_new_tokens=2, method="input_x_grad")
    with pytest.raises(InputError, match=r"expected importances in \[0, 1\]"):
        sequence_faithfulness(net, found, tokenizer=words)
    judged = sequence_faithfulness(net, found, tokenizer=words, normalize="softmax", n_samples=2)
    assert judged.sufficiency.shape == (1,)


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "found: got none"), (3, "found: got 3, expected a list of continuations"), ([3], "what explain_continuation returns")],
)  # fmt: skip
def test_bad_calls_are_named(given, message):
    with pytest.raises(InputError, match=message):
        sequence_faithfulness(model("gpt2"), given)
    with pytest.raises(InputError, match="random_draws"):
        sequence_faithfulness(model("gpt2"), continued(model("gpt2")), random_draws=0)
