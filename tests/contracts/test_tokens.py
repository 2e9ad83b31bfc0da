"""What every token attribution keeps."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lineament.core.checks import InputError
from lineament.explain.tokens.baselines import METHODS, attribute_tokens
from lineament.explain.tokens.results import NORMALIZATIONS
from tests.contracts.token_models import BOTH_WAYS, CAUSAL, byte_tokenizer, copies, model
from tests.contracts.unchanged import unchanged

PROMPT = torch.tensor([5, 40, 81, 12, 300, 33, 7])
QUICK: dict[str, dict[str, Any]] = {
    "reagent": {"max_steps": 4, "min_steps": 4, "stop": "dummy", "probes": 2},
    "integrated_gradients": {"steps": 8},
    "gradient_shap": {"n_samples": 6},
    "lime": {"n_samples": 40},
    "kernel_shap": {"n_samples": 40},
    "bayesian": {"evaluations": 12, "batch": 6},
}
BLACK_BOX = ("reagent", "occlusion", "lime", "kernel_shap", "bayesian", "random")
SOURCE_ONLY = ("rollout", "value_zeroing")
DRAWN = ("reagent", "gradient_shap", "occlusion", "lime", "kernel_shap", "bayesian", "random")


def explain(net, method, prompt=PROMPT, **options):
    return attribute_tokens(net, None, prompt, **{"method": method, **QUICK.get(method, {}), **options})


@pytest.mark.parametrize("method", METHODS)
class TestContract:
    def test_a_score_for_each_token_on_every_architecture(self, method):
        for name in (*CAUSAL, *BOTH_WAYS):
            if (name in BOTH_WAYS and method in SOURCE_ONLY) or (name == "opt" and method == "value_zeroing"):
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
        half = explain(model("gpt2").bfloat16(), method, target=3).scores
        assert torch.isfinite(half).all()

    def test_several_prompts_are_each_alone(self, method):
        net, other = model("gpt2"), torch.tensor([9, 31, 22, 8])
        both = explain(
            net, method, [PROMPT, other], target=[3, 4], **({"seed": 3} if method in DRAWN else {})
        )
        assert [a.target for a in both] == [3, 4] and [len(a.scores) for a in both] == [7, 4]
        for k, (prompt, target) in enumerate(((PROMPT, 3), (other, 4))):
            seed = {"seed": 3 + (k if method == "reagent" else 0)} if method in DRAWN else {}
            alone = explain(net, method, prompt, target=target, **seed)
            torch.testing.assert_close(both[k].scores, alone.scores, rtol=1e-3, atol=1e-5)

    def test_special_tokens_are_neither_scored_nor_replaced(self, method):
        net, words = model("gpt2"), byte_tokenizer()
        ids = torch.cat([torch.tensor([words.bos_token_id]), PROMPT])
        seen = []
        handle = net.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        found = attribute_tokens(net, words, ids, method=method, **QUICK.get(method, {}))
        handle.remove()
        assert not found.scored[0] and found.scores[0] == 0 and found.scored[1:].all()
        assert all((rows[:, 0] == words.bos_token_id).all() for rows in seen if rows.shape[1] == len(ids))

    def test_a_span_and_a_contrast(self, method):
        net = model("gpt2")
        found = explain(net, method, target=3, contrast=4, span=(2, 5))
        assert found.scored.nonzero()[:, 0].tolist() == [2, 3, 4] and found.contrast == 4
        with pytest.raises(InputError, match="the target itself"):
            explain(net, method, target=3, contrast=3)

    def test_normalised_scores(self, method):
        net = model("gpt2")
        raw = explain(net, method).scores
        for how in NORMALIZATIONS:
            scores = explain(net, method, normalize=how).scores
            if how in ("softmax", "abs-sum"):
                assert abs(float(scores.sum()) - 1) < 1e-5 and (scores >= 0).all()
            elif how == "minmax":
                assert float(scores.min()) == 0 and abs(float(scores.max()) - 1) < 1e-6
            else:
                assert torch.equal(scores, raw)

    def test_bad_prompts_and_targets_are_named(self, method):
        net, words = model("gpt2"), byte_tokenizer()
        options = QUICK.get(method, {})
        for prompt, message in (
            ("", "empty text"),
            ([], "got no tokens"),
            ([5], "1 of its 1 tokens"),
            ([5, 999], "id 999"),
            (torch.tensor([0.5, 1.0]), "integer"),
            (torch.zeros(3, 2, dtype=torch.long), "shape"),
            ([5] * 65, "at most 64"),
            (7, "expected text or a list"),
        ):
            with pytest.raises(InputError, match=f"prompt: .*{message}"):
                attribute_tokens(net, words, prompt, method=method, **options)
        with pytest.raises(InputError, match="no tokenizer"):
            explain(net, method, "text")
        for target, message in (
            (999, "999"),
            (-1, "-1"),
            (True, "True"),
            ("the cat", "2 tokens"),
            (1.5, "1.5"),
        ):
            with pytest.raises(InputError, match=f"target: .*{message}"):
                attribute_tokens(net, words, "the cat sat", target, method=method, **options)
        with pytest.raises(InputError, match="special tokens are not"):
            attribute_tokens(net, words, [0, 0, 5], method=method, **options)

    def test_functions_that_give_probabilities(self, method):
        function = copies(2)
        if method not in BLACK_BOX:
            with pytest.raises(InputError, match="reagent, occlusion"):
                explain(function, method, [1, 2, 3, 4])
            return
        found = explain(function, method, [1, 2, 3, 4])
        assert found.target == 3 and (method == "random" or found.scores.shape == (4,))
        log_version = explain(lambda ids: function(ids).log(), method, [1, 2, 3, 4])
        torch.testing.assert_close(log_version.scores, found.scores)
        for bad, message in (
            (lambda ids: torch.randn(len(ids), 9) * 5, "neither probabilities"),
            (lambda ids: torch.full((len(ids), 9), float("nan")), "NaN"),
            (lambda ids: torch.ones(3, 2, 2), "next-token probabilities of shape"),
            (lambda ids: [0.5], "next-token probabilities"),
        ):
            with pytest.raises(InputError, match=message):
                explain(bad, method, [1, 2, 3, 4])


def test_unknown_methods_and_options_are_named():
    with pytest.raises(InputError, match="nearest: 'rollout'"):
        explain(model("gpt2"), "rolout")
    with pytest.raises(InputError, match="has no option 'stepz'"):
        explain(model("gpt2"), "integrated_gradients", stepz=3)
    with pytest.raises(InputError, match="normalize"):
        explain(model("gpt2"), "random", normalize="sum")
    with pytest.raises(InputError, match="model: got"):
        explain(3, "random")


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
