"""ReAGent's recursion: what must hold whatever is drawn, and that batching changes nothing."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import pytest
import torch
from tests.contracts.token_models import byte_tokenizer, copies, model

from lineament.core.checks import InputError
from lineament.explain.tokens import recursion
from lineament.explain.tokens.continuations import explain_continuation
from lineament.explain.tokens.options import ReagentOptions, Script
from lineament.explain.tokens.prompts import Prompt, Reading
from lineament.explain.tokens.recursion import rationale

IDS = [6, 11, 7, 8, 9, 10]
NEVER = 5  # A token that is said only where it is drawn, and below it is not.
RARE = set(ReagentOptions.__dataclass_fields__)


def reagent(net: Any, prompt: Any, target: Any = None, **given: Any) -> Any:
    """The call with its rare options written beside the others."""
    rare = {name: given.pop(name) for name in list(given) if name in RARE}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no probe passed")
        return recursion.reagent(net, prompt, target=target, options=ReagentOptions(**rare), **given)


def others(ids, generator):
    return torch.randint(6, 12, ids.shape, generator=generator)


def scripted(function, mask, initial=None, replacement=9, **options):
    """One probe, everything written down, no test."""
    mask = torch.tensor(mask)
    steps, scored = mask.shape
    proposals = torch.full((steps, 1, scored), replacement)
    start = torch.zeros(1, scored) if initial is None else initial
    script = Script(start, torch.where(mask, 0.0, 1.0)[:, None], proposals, proposals)
    return reagent(
        function, IDS[:scored], steps=steps, probes=1, keep=2, script=script, trace=True, **options
    )


@pytest.mark.parametrize("mask", [[False] * 4, [True] * 4, [True, False, True, False]])
def test_what_does_not_move_the_probability_or_moves_all_alike_changes_no_share(mask):
    start = torch.tensor([[0.1, 0.9, 0.4, 0.2]])
    found = scripted(copies(1), [mask], start)
    torch.testing.assert_close(found.scores, start.double().softmax(1)[0])


@pytest.mark.parametrize("update", ["logit", "imp"])
def test_one_step_by_hand(update):
    found = scripted(copies(1), [[False, True, True, False]], update=update)
    gain = 0.9 if update == "imp" else math.log(1.9 / 0.1)
    expected = torch.tensor([-gain, gain, gain, -gain], dtype=torch.float64).softmax(0)
    torch.testing.assert_close(found.scores, expected)


def test_certainty_stays_finite():
    certain = lambda ids: torch.nn.functional.one_hot(ids[:, 1], 12).double()  # noqa: E731
    found = scripted(certain, [[False, True, False, False]] * 3)
    assert torch.isfinite(found.scores).all() and found.scores.argmax() == 1


@pytest.mark.parametrize("place", [0, 3, 5])
def test_the_one_token_that_matters_wins(place):
    found = reagent(copies(place), IDS, steps=80)
    assert found.scores[place] > 0.99 and place in found.rationale
    # The increment of the score that matters is positive on average: log-odds of 0.9 either way.
    odds = reagent(copies(place), IDS, steps=1, probes=400, trace=True).history[0].log()
    rest = [i for i in range(6) if i != place]
    assert float((odds[:, place] - odds[:, rest].mean(1)).mean()) > 0.3


def test_two_tokens_that_matter_alike_score_alike():
    def both(ids):
        return (copies(1)(ids) + copies(4)(ids)) / 2

    found = [reagent(both, [1, 7, 3, 4, 7, 6], 7, steps=12, seed=s, probes=8) for s in range(0, 400, 10)]
    scores = torch.stack([a.scores for a in found])
    mean, error = scores.mean(0), float((scores[:, 1] - scores[:, 4]).std()) / len(found) ** 0.5
    assert abs(float(mean[1] - mean[4])) < 3 * error
    assert float(mean[[1, 4]].min()) > 2 * float(mean[[0, 2, 3, 5]].max())


def test_probes_are_alike_and_can_be_permuted():
    steps, order = 6, torch.tensor([2, 0, 3, 1])
    g = torch.Generator().manual_seed(0)
    start, u = torch.rand(4, 6, generator=g), torch.rand(steps, 4, 6, generator=g)
    ids = [torch.randint(12, (steps, 4, 6), generator=g) for _ in range(2)]

    def run(rows):
        script = Script(start[rows], u[:, rows], *(i[:, rows] for i in ids))
        return reagent(copies(2), IDS, probes=len(rows), max_steps=steps, keep=2, top_k=1, script=script)

    plain, permuted = run(torch.arange(4)), run(order)
    torch.testing.assert_close(permuted.probes, plain.probes[order])
    assert torch.equal(permuted.stopped, plain.stopped[order])
    torch.testing.assert_close(permuted.scores, plain.scores)
    torch.testing.assert_close(run(torch.zeros(4).long()).scores, run(torch.zeros(1).long()).scores)


def test_a_stopped_probe_is_frozen():
    found = reagent(copies(1), IDS, top_k=1, probes=6, max_steps=60, trace=True)
    first = found.hits.long().argmax(0)
    assert found.stopped.any() and len(set(first[found.stopped].tolist())) > 1
    for b in found.stopped.nonzero()[:, 0].tolist():
        assert (found.history[first[b] :, b] == found.history[first[b], b]).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_lookahead_batches_and_prompts_together_change_nothing(name):
    net, prompts = model(name), [[5, 40, 81, 12], [7, 9, 33, 21, 64, 80, 12], [90, 91, 92, 93, 94, 95, 96]]
    options = {"max_steps": 25, "top_k": 30, "probes": 3, "keep": 2}
    reference = [reagent(net, p, lookahead=1, seed=k, **options) for k, p in enumerate(prompts)]
    for changed in ({}, {"lookahead": 7}, {"batch_size": 2}, {"batch_size": 5, "lookahead": 3}):
        for found, alone in zip(reagent(net, prompts, **options, **changed), reference):
            torch.testing.assert_close(found.scores, alone.scores, rtol=1e-3, atol=1e-6)
            assert (found.n_steps, found.rationale) == (alone.n_steps, alone.rationale)
    assert len({a.n_steps for a in reference}) > 1, "the prompts end at different steps"


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt"])
def test_a_cached_prefix_changes_nothing_and_is_used(name):
    net, ids = model(name), torch.randint(2, 300, (30,), generator=torch.Generator().manual_seed(0))
    pair = [ids, torch.cat([ids[:20], torch.tensor([5, 6, 7, 8, 9])])]
    seen = []
    handle = net.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    for prompts, used in (([ids], True), (pair, name != "gemma3")):
        seen.clear()
        cached, plain = (
            reagent(net, prompts, steps=3, reading=Reading(span=(20, 25)), use_cache=use) for use in (True, False)
        )  # fmt: skip
        for a, b in zip(cached, plain):
            torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-6)
        # Rows without their first 20 tokens; a sliding window would count the padding between prompts of several lengths.
        assert (min(seen) == 10) == used
    handle.remove()


def test_no_more_is_asked_than_was_allowed():
    for budget in (30, 61, 200):
        found = reagent(copies(1), IDS, NEVER, sampler=others, max_forwards=budget)
        assert found.sequences <= budget and found.n_steps == (budget - 1) // 10 and not found.converged
    exact = reagent(copies(1), IDS, steps=3)
    assert exact.sequences == 1 + 3 * 5 and exact.forwards == 2


def test_no_probe_stopping_falls_back_with_a_warning():
    rare = ReagentOptions(max_steps=3)
    with pytest.warns(UserWarning, match="mean over all probes"):
        found = recursion.reagent(copies(1), IDS, target=NEVER, sampler=others, options=rare)
    torch.testing.assert_close(found.scores, found.probes.mean(0))
    assert not found.converged and not found.stopped.any()
    with pytest.warns(UserWarning, match=r"prompts 0, 1\)"):
        recursion.reagent(copies(1), [IDS, IDS], target=NEVER, sampler=others, options=rare)


def test_of_equally_probable_tokens_the_first_by_id_comes_first():
    def flat(ids):
        return torch.full((len(ids), 12), 1 / 12, dtype=torch.float64)

    assert reagent(flat, IDS, 2, max_steps=2, top_k=3).n_steps == 1
    assert not reagent(flat, IDS, 3, max_steps=2, top_k=3).converged


def test_stopping_rules():
    early = reagent(copies(1), IDS, probes=40, max_steps=400)
    assert early.converged and early.stopped.all()
    half = reagent(copies(1), IDS, probes=40, max_steps=400, majority=0.5)
    assert 0.5 <= float(half.stopped.double().mean()) < 1 and half.n_steps < early.n_steps
    late = reagent(copies(1), IDS, probes=40, max_steps=400, min_steps=30)
    assert late.n_steps >= 30 and late.scores[1] > early.scores[1]
    # Replacing the best tokens instead: what is left cannot bring the target back once the best one is right.
    inverted = reagent(
        copies(1), IDS, probes=4, min_steps=60, max_steps=62, top_k=1, invert_keep=True, sampler=lambda ids: ids * 0 + 5
    )  # fmt: skip
    assert not inverted.converged and inverted.scores[1] > 0.9
    own = reagent(copies(1), IDS, stop=lambda z, target: z.argmax(1) == target, probes=8, max_steps=200)
    assert own.converged


def test_a_rationale_needs_votes_and_equal_tokens_can_share_them():
    prompt = Prompt(torch.tensor([5, 6, 5, 8]), torch.ones(4, dtype=torch.bool), 0, ("a", "b", "a", "c"))
    shares = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.3, 0.5, 0.1], [0.1, 0.2, 0.1, 0.6]])
    assert rationale(shares, 1, 1, prompt) == (0, 2, 3)
    assert rationale(shares, 1, 2, prompt) == () and rationale(shares, 1, 2, prompt, "token") == (0, 2)
    assert rationale(shares, 2, 3, prompt) == (1,) and rationale(shares, 2, 4, prompt, "token") == ()
    by_token = reagent(copies(1), [1, 7, 3, 7, 5], probes=6, overlap=6, keep=2, vote="token", steps=3)
    assert (1 in by_token.rationale) == (3 in by_token.rationale)


def test_a_contrast_asks_what_speaks_for_the_one_against_the_other():
    def split(ids):  # position 1 decides between the pair, position 4 whether it is a pair at all
        pair = torch.nn.functional.one_hot((ids[:, 1] == 2).long(), 2).double() * 0.8 + 0.1
        share = torch.where(ids[:, 4] == 5, 0.9, 0.1)[:, None].double()
        return torch.cat([pair * share, (1 - share) / 10 * torch.ones(1, 10)], 1)

    plain, rather = (
        reagent(split, [1, 2, 3, 4, 5, 6], 1, contrast=other, steps=60, sampler=lambda ids: ids * 0 + 9) for other in (None, 0)
    )  # fmt: skip
    assert rather.scores[1] > 0.99 and plain.scores[4] > 0.3
    assert abs(rather.probability - 0.9) < 1e-9


def test_a_continuation_is_explained_token_by_token():
    net, prompt = model("gpt2"), [5, 40, 81, 12]
    whole = explain_continuation(net, prompt, max_new_tokens=4, stride=2, steps=3)
    assert whole.positions == (0, 2) and len(whole.continuation) == 4
    alone = reagent(net, [*prompt, *whole.continuation[:2]], whole.continuation[2], seed=1, steps=3)
    torch.testing.assert_close(whole.matrix[1, :6], alone.scores, rtol=1e-3, atol=1e-6)
    assert (whole.matrix[0, 4:] == 0).all() and whole.matrix.shape == (2, 6)
    given = explain_continuation(net, prompt, list(whole.continuation), stride=2, steps=3)
    assert torch.equal(given.matrix, whole.matrix)
    expected = net.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False, pad_token_id=0)[0, 4:]
    assert whole.continuation[: len(expected)] == tuple(expected.tolist()[:4])
    both = explain_continuation(model("t5"), prompt, [7, 8, 9], reading=Reading(scope="all"), steps=3)
    # Source, start token, then what was generated before the last one.
    assert both.matrix.shape == (3, 4 + 1 + 2) and both.matrix[2, 5] > 0 and both.matrix[1, 6] == 0
    # The last token needs no position.
    assert explain_continuation(net, [5] * 60, [6, 7, 8, 9, 10], method="random").matrix.shape == (5, 64)


@pytest.mark.parametrize(
    ("continuation", "message"),
    [
        ("", "no tokens to explain \\(got ''\\)"),
        ("the cat " * 40, "continuation: with its 81 tokens and the 6 before it the model would read 86, and it takes at most 64"),
        ([5, 9999], "continuation: got id 9999, expected ids from 0 to 309"),
    ],
)  # fmt: skip
def test_continuations_that_cannot_be_explained(continuation, message):
    with pytest.raises(InputError, match=message):
        explain_continuation(
            model("gpt2"), "the cat sat on the mat", continuation, tokenizer=byte_tokenizer(), steps=2
        )


def test_results_can_be_plotted_and_written():
    words = byte_tokenizer()
    found = reagent(model("gpt2"), "the cat sat on the", tokenizer=words, steps=3)
    assert json.loads(json.dumps(found.to_dict()))["tokens"] == ["the", " cat", " sat", " on", " the"]
    assert len(found.plot().patches) == 5
    whole = explain_continuation(model("gpt2"), "the cat sat", " on the", tokenizer=words, steps=3)
    assert whole.continuation_text == (" on", " the") and whole.plot().images
    json.dumps(whole.to_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.0}, "ratio"), ({"ratio": 1.0}, "ratio"), ({"ratio": float("nan")}, "ratio"), ({"keep": 6}, "keep 6 of 6"),
        ({"keep": 0.9999}, "keep 6 of 6"), ({"keep": 0}, "keep"), ({"top_k": 0}, "top_k"), ({"top_k": 12}, "vocabulary"),
        ({"probes": 0}, "probes"), ({"steps": 0}, "steps"), ({"min_steps": 9, "max_steps": 3}, "min_steps"), ({"majority": 0.0}, "majority"),
        ({"stop": "topk"}, "nearest: 'top_k'"), ({"update": "logits"}, "nearest: 'logit'"), ({"sampler": "unifrom"}, "nearest: 'uniform'"),
        ({"sampler": "mlm"}, "MlmSampler"), ({"sampler": "unigram"}, "UnigramSampler"), ({"sampler": lambda ids: ids.float()}, "integer ids"),
        ({"sampler": 3}, "expected a name, a sampler or a function"), ({"reading": Reading(span=(4, 2))}, "span"),
        ({"reading": Reading(span=(2, 3))}, "1 of its 6"), ({"reading": Reading([1])}, "encoder-decoder"), ({"max_forwards": 0}, "max_forwards"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        reagent(copies(1), IDS, **{"max_steps": 4, **options})
