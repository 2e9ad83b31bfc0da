"""What every token attribution keeps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lineament.core.checks import InputError
from lineament.explain.tokens.methods import METHODS, attribute_tokens
from lineament.explain.tokens.prompts import Reading
from lineament.explain.tokens.results import NORMALIZATIONS
from tests.contracts.token_models import BOTH_WAYS, CAUSAL, QUICK, byte_tokenizer, copies, model
from tests.contracts.unchanged import unchanged

PROMPT = torch.tensor([5, 40, 81, 12, 300, 33, 7])
BLACK_BOX = ("reagent", "occlusion", "lime", "kernel_shap", "bayesian", "random")
SOURCE_ONLY = ("rollout", "value_zeroing")
DRAWN = (*BLACK_BOX, "gradient_shap")


def explain(net: Any, method: str, prompt: Any = PROMPT, **options: Any) -> Any:
    return attribute_tokens(net, prompt, **{"method": method, **QUICK.get(method, {}), **options})


@pytest.mark.parametrize("method", METHODS)
class TestContract:
    def test_a_score_for_each_token_on_every_architecture(self, method):
        for name in (*CAUSAL, *BOTH_WAYS):
            if name in BOTH_WAYS and method in SOURCE_ONLY:
                with pytest.raises(InputError, match="choose"):
                    explain(model(name), method)
                continue
            found = explain(model(name), method)
            assert found.scores.shape == found.ids.shape and torch.isfinite(found.scores).all()
            assert not found.scores.requires_grad and (found.scores[~found.scored] == 0).all()
            assert found.target == explain(model(name), "random").target and 0 < found.probability < 1
            assert sorted(found.ranking()) == found.scored.nonzero()[:, 0].tolist()

    def test_the_model_is_left_as_it_was_also_after_an_error(self, method):
        net = model("gpt2")
        net.train()
        net.transformer.ln_f.bias.requires_grad_(False)
        with unchanged(net):
            explain(net, method)
        handle = net.lm_head.register_forward_hook(lambda *call: call[2] * float("nan"))
        with unchanged(net), pytest.raises(InputError, match="NaN"):
            explain(net, method)
        handle.remove()

    def test_the_same_seed_gives_the_same_scores_and_another_others(self, method):
        net = model("gpt2")
        assert torch.equal(explain(net, method).scores, explain(net, method).scores)
        if method in DRAWN:
            assert not torch.equal(explain(net, method, seed=1).scores, explain(net, method, seed=2).scores)

    def test_the_callers_modes_and_threads_change_nothing(self, method):
        net = model("gpt2")
        reference = explain(net, method).scores
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                torch.testing.assert_close(explain(net, method).scores, reference)
        threads = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            torch.testing.assert_close(explain(net, method).scores, reference, rtol=1e-3, atol=1e-5)
        finally:
            torch.set_num_threads(threads)

    def test_float64_and_half_precision(self, method):
        reference = explain(model("gpt2"), method, target=3).scores.double()
        double = explain(model("gpt2").double(), method, target=3).scores.double()
        torch.testing.assert_close(double, reference, rtol=1e-3, atol=1e-4)
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.isfinite(explain(model("gpt2").to(dtype), method, target=3).scores).all()

    def test_several_prompts_are_each_alone(self, method):
        net, other = model("gpt2"), torch.tensor([9, 31, 22, 8])
        seed = {"seed": 3} if method in DRAWN else {}
        both = explain(net, method, [PROMPT, other], target=[3, 4], contrast=[13, 14], **seed)
        assert [(a.target, a.contrast, len(a.scores)) for a in both] == [(3, 13, 7), (4, 14, 4)]
        for k, (prompt, target) in enumerate(((PROMPT, 3), (other, 4))):
            own = {"seed": 3 + k} if method == "reagent" else seed
            alone = explain(net, method, prompt, target=target, contrast=target + 10, **own)
            torch.testing.assert_close(both[k].scores, alone.scores, rtol=1e-3, atol=1e-5)

    def test_special_tokens_are_neither_scored_nor_replaced(self, method):
        net, words = model("gpt2"), byte_tokenizer()
        ids = torch.cat([torch.tensor([words.bos_token_id]), PROMPT])
        seen = []
        handle = net.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        found = explain(net, method, ids, tokenizer=words)
        handle.remove()
        assert not found.scored[0] and found.scores[0] == 0 and found.scored[1:].all()
        assert all((rows[:, 0] == words.bos_token_id).all() for rows in seen if rows.shape[1] == len(ids))

    def test_a_span_and_a_contrast(self, method):
        net = model("gpt2")
        found = explain(net, method, target=3, contrast=4, reading=Reading(span=(2, 5)))
        assert found.scored.nonzero()[:, 0].tolist() == [2, 3, 4] and found.contrast == 4
        with pytest.raises(InputError, match="the target itself"):
            explain(net, method, target=3, contrast=3)

    def test_functions_that_give_probabilities(self, method):
        function = copies(2)
        if method not in BLACK_BOX:
            with pytest.raises(InputError, match="reagent, occlusion"):
                explain(function, method, [1, 2, 3, 4])
            return
        found = explain(function, method, [1, 2, 3, 4])
        assert found.target == 3 and found.scores.shape == (4,)
        log_version = explain(lambda ids: function(ids).log(), method, [1, 2, 3, 4])
        torch.testing.assert_close(log_version.scores, found.scores)


@pytest.mark.parametrize("method", ["reagent", "occlusion", "grad_norm"])
@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt: got an empty text"), ([], "prompt: got no tokens"), ([5], "prompt: 1 of its 1 tokens"),
        ([0, 0, 5], "special tokens are not"), ([5, 999], "prompt: got id 999"), (7, "prompt: .*expected text or a list"),
        (torch.tensor([0.5, 1.0]), "prompt: .*integer"), (torch.zeros(3, 2, dtype=torch.long), "prompt: .*shape"),
        ([5] * 65, "prompt: it has 65 tokens and the model takes at most 64"),
        (["the cat", ""], r"prompt 1 of 2 \(from 0\): prompt: got an empty text"),
        (["the cat", "the cat " * 60], r"prompt 1 of 2 \(from 0\): prompt: it has 121 tokens"),
    ],
)  # fmt: skip
def test_bad_prompts_are_named(method, prompt, message):
    with pytest.raises(InputError, match=message):
        explain(model("gpt2"), method, prompt, tokenizer=byte_tokenizer())


@pytest.mark.parametrize("what", ["target", "contrast"])
@pytest.mark.parametrize(
    ("token", "message"),
    [
        (9999, r"got 9999, expected an integer in \[0, 309\]"), (-1, "-1"), (True, "True"), (1.5, "1.5"), ([1, 2, 3], "got 3 for 1 prompts"),
        ("", "got '', of which the tokenizer makes no token"),
        ("the dog", r"'the dog' is 2 tokens \('the', ' dog'\), expected one"),
    ],
)  # fmt: skip
def test_bad_targets_are_named(what, token, message):
    with pytest.raises(InputError, match=f"{what}: .*{message}"):
        explain(model("gpt2"), "random", "the cat sat", tokenizer=byte_tokenizer(), **{what: token})


def test_normalised_scores():
    raw = explain(model("gpt2"), "input_x_grad").scores
    for how in NORMALIZATIONS:
        scores = explain(model("gpt2"), "input_x_grad", normalize=how).scores
        if how in ("softmax", "abs-sum"):
            assert abs(float(scores.sum()) - 1) < 1e-5 and (scores >= 0).all()
        elif how == "minmax":
            assert float(scores.min()) == 0 and abs(float(scores.max()) - 1) < 1e-6
        else:
            assert torch.equal(scores, raw)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda ids: torch.randn(len(ids), 9) * 5, "neither probabilities"),
        (lambda ids: torch.full((len(ids), 9), float("nan")), "NaN"),
        (lambda ids: torch.ones(3, 2, 2), "next-token probabilities of shape"),
        (lambda ids: [0.5], "next-token probabilities"),
        (3, "model: got 3"),
    ],
)
def test_functions_that_give_no_probabilities_are_named(function, message):
    with pytest.raises(InputError, match=message):
        explain(function, "random", [1, 2, 3, 4])


def test_unknown_methods_and_options_are_named():
    with pytest.raises(InputError, match="nearest: 'rollout'"):
        explain(model("gpt2"), "rolout")
    for method in ("integrated_gradients", "reagent", "attention_all"):
        with pytest.raises(InputError, match="has no option 'stepz'"):
            explain(model("gpt2"), method, stepz=3)
    with pytest.raises(InputError, match="normalize"):
        explain(model("gpt2"), "random", normalize="sum")
    with pytest.raises(InputError, match="no tokenizer"):
        explain(model("gpt2"), "random", "text")


@pytest.mark.parametrize("method", ["attention_last", "attention_all", "rollout"])
def test_an_attention_without_weights_says_which_to_choose(method):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match=r"'sdpa' returns no weights.*attn_implementation='eager'"):
            explain(model("gpt2", attention="sdpa"), method)


@pytest.mark.parametrize(
    "method", ["reagent", "grad_norm", "integrated_gradients", "occlusion", "value_zeroing"]
)
def test_sdpa_gives_what_eager_gives(method):
    eager, sdpa = (explain(model("llama", attention=a), method, target=3).scores for a in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=1e-3, atol=1e-5)
