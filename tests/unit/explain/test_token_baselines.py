"""The rivals against closed forms: exact Shapley values, completeness, Captum, and what attention must sum to."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from tests.contracts.token_models import BOTH_WAYS, CAUSAL, copies, model

from lineament.core.checks import InputError
from lineament.explain.tokens.attention import from_attention
from lineament.explain.tokens.gradients import through_embeddings
from lineament.explain.tokens.methods import attribute_tokens
from lineament.explain.tokens.next_token import NextToken

IDS = [5, 40, 81, 12, 300]
ABSENT = 9


def attribute(net: Any, prompt: Any, target: Any = None, **options: Any) -> Any:
    """The attribution of one prompt, or of a list of prompts."""
    return attribute_tokens(net, prompt, target=target, **options)


def scores(net: Any, target: Any = None, **options: Any) -> torch.Tensor:
    return attribute(net, IDS, target, **options).scores


def log_p(net, ids, target):
    with torch.no_grad():
        return float(net(torch.tensor([ids])).logits[0, -1].double().log_softmax(0)[target])


def test_kernel_shap_with_all_subsets_is_the_shapley_value():
    net, target, n = model("gpt2"), 7, len(IDS)
    value = {
        s: log_p(net, [t if i in s else ABSENT for i, t in enumerate(IDS)], target)
        for size in range(n + 1)
        for s in itertools.combinations(range(n), size)
    }
    exact = []
    for i in range(n):
        rest = [j for j in range(n) if j != i]
        total = 0.0
        for size in range(n):
            weight = math.factorial(size) * math.factorial(n - 1 - size) / math.factorial(n)
            for s in itertools.combinations(rest, size):
                total += weight * (value[tuple(sorted((*s, i)))] - value[s])
        exact.append(total)
    found = attribute(net, IDS, target, method="kernel_shap", absent=ABSENT)
    torch.testing.assert_close(found.scores, torch.tensor(exact, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    sampled = attribute(net, IDS * 3, target, method="kernel_shap", absent=ABSENT, n_samples=2000)
    full, nothing = log_p(net, IDS * 3, target), log_p(net, [ABSENT] * 15, target)
    assert abs(float(sampled.scores.sum()) - (full - nothing)) < 1e-4, "the values sum to what is explained"


def test_occlusion_is_leaving_one_out():
    net, target = model("gpt2"), 7
    found = attribute(net, IDS, target, method="occlusion", absent=ABSENT)
    for i in range(len(IDS)):
        without = [ABSENT if j == i else t for j, t in enumerate(IDS)]
        assert abs(float(found.scores[i]) - (log_p(net, IDS, target) - log_p(net, without, target))) < 1e-4
    averaged = attribute(copies(1), [1, 2, 3], method="occlusion", n_samples=3000, seed=1)
    # One draw in twelve gives the token back.
    assert abs(float(averaged.scores[1]) - 11 / 12 * math.log((0.9 + 0.1 / 12) / (0.1 / 12))) < 0.1
    assert averaged.scores[0] == 0


def test_lime_finds_the_weights_of_a_linear_model():
    weights = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)

    def linear(ids):  # log p(0) - log p(1) is linear in which tokens are present.
        z = (ids != ABSENT).double() @ weights
        return torch.stack([z, torch.zeros_like(z)], 1).log_softmax(1)

    found = attribute(linear, [2, 3, 4, 5], 0, contrast=1, method="lime", absent=0, n_samples=400, ridge=1e-9)
    assert found.scores.abs().max() < 1e-6, "nothing is ever absent when the stand-in is another token"

    def twelve(ids):
        return torch.cat([linear(ids), torch.full((len(ids), 10), -1e4, dtype=torch.float64)], 1)

    found = attribute(
        twelve, [2, 3, 4, 5], 0, contrast=1, method="lime", absent=ABSENT, n_samples=400, ridge=1e-9
    )
    torch.testing.assert_close(found.scores, weights, rtol=1e-5, atol=1e-5)


# Where nothing is added to the embeddings before the first norm, zero is no continuous end of the path.
@pytest.mark.parametrize("name", ["gpt2", "opt", "bart"])
def test_integrated_gradients_sum_to_what_zeroing_changes(name):
    net = model(name).double()

    exact = attribute(net, IDS, 7, method="integrated_gradients", rule="gauss", steps=200)
    face = NextToken(net)
    source = len(IDS) if name in ("t5", "bart") else 0
    ids = torch.tensor([[*IDS, *([0] if source else [])]])
    with torch.no_grad():
        zeroed = lambda e, columns: e if source and columns.start == source else e * 0  # noqa: E731
        ends = [
            through_embeddings(face, ids, source, change)[0].log_softmax(1)[0, 7] for change in (None, zeroed)
        ]
    assert abs(float(exact.scores.sum()) - float(ends[0] - ends[1])) < 1e-3


@pytest.mark.slow
def test_integrated_gradients_and_gradient_shap_agree_with_captum():
    captum = pytest.importorskip("captum.attr")
    net, target = model("gpt2").double(), 7
    embeddings = net.transformer.wte(torch.tensor([IDS])).detach()

    def score(e):
        return net(inputs_embeds=e).logits[:, -1].log_softmax(1)[:, target]

    theirs = (
        captum.IntegratedGradients(score).attribute(embeddings, n_steps=60, method="gausslegendre").sum(-1)[0]
    )
    ours = scores(net, target, method="integrated_gradients", rule="gauss", steps=60)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-8)
    # From the zero baseline expected gradients are integrated gradients, up to their draws.
    drawn = scores(net, target, method="gradient_shap", baseline="zero", n_samples=6000)
    assert (
        drawn - scores(net, target, method="integrated_gradients", rule="gauss", steps=300)
    ).abs().max() < 0.05
    noisy = scores(net, target, method="gradient_shap", noise=0.1, n_samples=5)
    assert torch.isfinite(noisy).all()


def test_gradients_are_those_of_the_word_embeddings():
    net, target = model("gpt2").double(), 7
    e = net.transformer.wte(torch.tensor([IDS])).detach().requires_grad_()
    f = net(inputs_embeds=e).logits[:, -1].log_softmax(1)[0, target]
    (g,) = torch.autograd.grad(f, e)
    torch.testing.assert_close(scores(net, target, method="grad_norm"), g[0].norm(dim=-1))
    torch.testing.assert_close(scores(net, target, method="input_x_grad"), (g * e.detach())[0].sum(-1))
    f = net(inputs_embeds=e).logits[0, -1]
    (g,) = torch.autograd.grad(f[target] - f[3], e)
    rather = attribute(net, IDS, target, contrast=3, method="input_x_grad").scores
    torch.testing.assert_close(rather, (g * e.detach())[0].sum(-1))


def test_attention_is_the_models_own():
    net = model("llama")
    with torch.no_grad():
        weights = torch.stack(net(torch.tensor([IDS]), output_attentions=True).attentions)[:, 0].double()
    for how in ("last", "all", "rollout"):
        method = how if how == "rollout" else f"attention_{how}"
        found = attribute(net, IDS, method=method).scores
        torch.testing.assert_close(found, from_attention(weights, how))
        assert abs(float(found.sum()) - 1) < 1e-5
    mean = weights.mean(1)
    identity = torch.eye(len(IDS), dtype=torch.float64)
    product = (mean[1] + identity) / 2 @ (mean[0] + identity) / 2
    torch.testing.assert_close(from_attention(weights, "rollout"), product[-1])
    crossed = attribute(model("t5"), IDS, method="attention_last").scores
    assert abs(float(crossed.sum()) - 1) < 1e-5 and crossed[-1] == 0


def test_asking_for_attention_again_still_works_afterwards():
    net = model("gpt2")
    attribute(net, IDS, method="attention_all")
    with torch.no_grad():
        assert len(net(torch.tensor([IDS]), output_attentions=True).attentions) == 2


def test_value_zeroing_by_hand():
    net = model("gpt2")
    found = attribute(net, IDS, method="value_zeroing").scores
    rows, n = torch.tensor([IDS]), len(IDS)
    outputs = {}

    def run(layer=None, place=None):
        def without(module, args, output):
            output = output.clone()
            output[:, place, 64:] = 0
            return output

        handles = [
            net.transformer.h[k].register_forward_hook(
                lambda m, a, o, k=k: outputs.__setitem__(k, o if torch.is_tensor(o) else o[0])
            )
            for k in (0, 1)
        ]
        if layer is not None:
            handles.append(net.transformer.h[layer].attn.c_attn.register_forward_hook(without))
        with torch.no_grad():
            net(rows)
        for handle in handles:
            handle.remove()
        return {k: v[0].double() for k, v in outputs.items()}

    plain, mixes = run(), []
    for layer in (0, 1):
        moved = torch.stack(
            [1 - torch.cosine_similarity(run(layer, j)[layer], plain[layer], dim=-1) for j in range(n)], 1
        )
        mixes.append(moved / moved.sum(1, keepdim=True))
    torch.testing.assert_close(found, (mixes[1] @ mixes[0])[-1], rtol=1e-3, atol=1e-5)
    assert abs(float(found.sum()) - 1) < 1e-6


def test_the_search_finds_the_tokens_that_suffice_together():
    """The target is probable only where both the 7 at position 1 and the 4 at position 5 are there."""
    prompt = [3, 7, 5, 1, 2, 4, 6, 8, 9, 1, 2, 3]

    def both(ids):
        there = (ids[:, 1] == 7) & (ids[:, 5] == 4)
        p = torch.full((len(ids), 10), 0.1)
        p[there] = 0.02
        p[there, 7] = 0.82
        return p

    for seed in range(3):
        found = attribute(both, prompt, 7, method="bayesian", seed=seed, keep=4)
        assert set(found.ranking()[:2]) == {1, 5}
        # What does not matter is alike, far below them.
        rest = [float(found.scores[t]) for t in found.ranking()[2:]]
        assert max(abs(r - rest[0]) for r in rest) < 0.5 * float(found.scores[[1, 5]].min() - rest[0])
    rows = []

    def counted(ids):
        rows.append(len(ids))
        return both(ids)

    attribute(counted, prompt, 7, method="bayesian", evaluations=20, batch=8, draws=3)
    assert sum(rows) == 1 + 2 * 20 * 3


def test_bad_options_are_named():
    net = model("gpt2")
    for method, options, message in (
        ("integrated_gradients", {"steps": 0}, "steps"),
        ("integrated_gradients", {"rule": "gaus"}, "nearest: 'gauss'"),
        ("gradient_shap", {"baseline": "mean"}, "baseline"),
        ("occlusion", {"absent": 999}, "absent"),
        ("kernel_shap", {"n_samples": 1}, "n_samples"),
        ("lime", {"width": 0.0}, "width"),
        ("bayesian", {"evaluations": 3}, "evaluations"),
        ("bayesian", {"keep": 99}, "keep"),
    ):
        with pytest.raises(InputError, match=message):
            attribute(net, IDS, method=method, **options)


@pytest.mark.parametrize("method", ["grad_norm", "input_x_grad"])
def test_gradients_of_prompts_of_one_length_share_their_forwards(method):
    prompts = [torch.tensor(IDS), torch.tensor(IDS[::-1]), torch.tensor(IDS * 2), torch.tensor(IDS) + 1]
    found = attribute(model("gpt2").double(), prompts, [5, 6, 7, 8], method=method)
    # One for what the model says next, and one for each of two lengths.
    assert found[0].forwards == 3


@pytest.mark.parametrize("method", ["attention_last", "attention_all", "rollout"])
@pytest.mark.parametrize("name", [*CAUSAL, *BOTH_WAYS, "bloom"])
def test_attention_of_prompts_of_several_lengths_comes_from_shared_forwards(method, name):
    if name in BOTH_WAYS and method == "rollout":
        pytest.skip("rollout is for one sequence")
    prompts = [torch.tensor(IDS), torch.tensor(IDS * 2), torch.tensor(IDS[:3]), torch.tensor(IDS[::-1])]
    # Padded where that can be: not without a mask and positions, nor where eager attention in float64 cannot hide what comes first.
    padded = {torch.float64: (*BOTH_WAYS, "gpt2"), torch.float32: (*BOTH_WAYS, *CAUSAL)}
    for dtype, shares in padded.items():
        net = model(name).to(dtype)
        several = attribute(net, prompts, [5, 6, 7, 8], method=method)
        for found, prompt, target in zip(several, prompts, (5, 6, 7, 8)):
            alone = attribute(net, prompt, target, method=method).scores
            torch.testing.assert_close(found.scores, alone, rtol=1e-4, atol=1e-6)
        assert several[0].forwards == (2 if name in shares else 6)


def test_the_official_input_times_gradient_adds_the_position_embedding():
    net = model("gpt2").double()
    e = net.transformer.wte(torch.tensor(IDS)[None]).detach().requires_grad_()
    (g,) = torch.autograd.grad(net(inputs_embeds=e).logits[0, -1].log_softmax(0)[5], e)
    both = e.detach() + net.transformer.wpe.weight[: len(IDS)]
    found = attribute(net, IDS, 5, method="input_x_grad", positions=True)
    torch.testing.assert_close(found.scores, (g * both)[0].sum(-1))
    several = attribute(net, [IDS, IDS[::-1], IDS[:3]], 5, method="input_x_grad", positions=True)
    torch.testing.assert_close(several[0].scores, found.scores)
    with pytest.raises(InputError, match="are 16 wide and are projected to 32"):
        attribute(model("opt"), IDS, method="input_x_grad", positions=True)
    with pytest.raises(InputError, match="positions: LlamaForCausalLM has no position embedding"):
        attribute(model("llama"), IDS, method="input_x_grad", positions=True)
    with pytest.raises(InputError, match="has no option 'positions'"):
        attribute(net, IDS, method="grad_norm", positions=True)


def test_an_overflow_in_half_precision_is_no_score():
    # T5 divides zero embeddings by their norm: the gradient there exceeds what 16 bits hold.
    message = r"'integrated_gradients': \d+ of 4 scores are NaN .*model\.float\(\)"
    with pytest.raises(InputError, match=message):
        attribute(model("t5").half(), [5, 40, 81, 12], method="integrated_gradients", steps=4)
