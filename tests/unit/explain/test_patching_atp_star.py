"""AtP*: the QK fix against real patches where everything behind the attention is linear, GradDrop against gradients taken by hand."""

from __future__ import annotations

import pytest
import torch
from tests.contracts.language_models import FAMILIES, prompts, tiny
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture, patch, record
from lineament.explain.patching.activation import activation_patching
from lineament.explain.patching.atp_star import GradDrop
from lineament.explain.patching.attribution import attribution_patching
from lineament.explain.patching.components import find_components
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.relevance.rules import relevance_rules

METRIC = logit_difference([5, 6, 7], [8, 9, 10])


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def linear_behind_attention(family):
    """One block whose attention alone acts, and nothing nonlinear behind it."""
    model = tiny(family, torch.float64)
    body = getattr(model, "transformer", None) or getattr(model, "gpt_neox", None) or model.model
    blocks = body.h if family == "gpt2" else body.layers
    del blocks[1:]
    blocks[0].mlp = Nothing()
    for holder, name in ((body, "ln_f"), (body, "final_layer_norm"), (body, "norm")):
        if hasattr(holder, name):
            setattr(holder, name, nn.Identity())
    if family in ("gemma2", "gemma3"):
        blocks[0].post_attention_layernorm = nn.Identity()
        blocks[0].post_feedforward_layernorm = nn.Identity()
        model.config.final_logit_softcapping = None
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_qk_fix_is_exact_for_one_layer_whatever_the_softmax(family):
    model, (clean, corrupt) = linear_behind_attention(family), prompts()
    # With one layer only the last query reaches the metric.
    corrupt[:, -1] = clean[:, -1].roll(1)
    # Rotary families compute angles, and transformers' RMS norms, in float32.
    tolerance = {"atol": 1e-9 if family == "gpt2" else 2e-4, "rtol": 1e-4}
    for positions in ("each", "together", [5, 1]):
        options = {"sites": ["q", "k", "v"], "normalise": False, "positions": positions}
        truth = activation_patching(model, clean, corrupt, METRIC, **options)
        plain = attribution_patching(model, clean, corrupt, METRIC, **options)
        fixed = attribution_patching(model, clean, corrupt, METRIC, qk_fix=True, **options)
        for kind in ("q", "k"):
            assert truth.scores[kind].abs().max() > 1e-2
            torch.testing.assert_close(fixed.per_example[kind], truth.per_example[kind], **tolerance)
            assert not torch.allclose(plain.scores[kind], truth.scores[kind], rtol=0.05)
        assert torch.equal(fixed.scores["v"], plain.scores["v"])
        assert fixed.method == "attribution patching, QK fix" and fixed.settings["qk_fix"]


def test_the_qk_fix_takes_the_rules_coefficients_and_undoes_the_blindness_of_the_ah_rule():
    model, (clean, corrupt) = tiny("llama", torch.float64), prompts()
    options = {"sites": ["q", "k", "v"], "normalise": False, "direction": "noising"}
    found = relevance_patching(model, clean, corrupt, METRIC, rules="relp+ah", qk_fix=True, **options)
    blind = relevance_patching(model, clean, corrupt, METRIC, rules="relp+ah", **options)
    assert blind.scores["q"].abs().max() == 0 < found.scores["q"].abs().max()
    # The coefficient of the mixed values is that of relevance patching: a query moved alone, by hand.
    name, head, at = "model.layers.1.self_attn", 2, 4
    source = record(model, corrupt, f"{name}:q")[f"{name}:q"]

    def change(q):
        q[:, at, head] = source[:, at, head]
        return q

    before = record(model, clean, f"{name}:z")[f"{name}:z"]
    with patch(model, {f"{name}:q": change}):
        after = record(model, clean, f"{name}:z")[f"{name}:z"]
    with relevance_rules(model, "relp+ah"), capture(model, f"{name}:z", gradients=True) as acts:
        score = METRIC(model(clean).logits).sum()
    c = acts.gradients(score)[f"{name}:z"]
    want = ((after - before) * c).sum((1, 2, 3))
    torch.testing.assert_close(found.per_example["q"][:, 1, at, head], want.detach())


def by_hand(model, clean, corrupt, kind, dropped):
    """Difference times gradient where some blocks hand their gradient on by the residual stream alone."""
    blocks = model.transformer.h

    def skip(k):
        def hook(block, args, output):
            first = output[0] if isinstance(output, tuple) else output
            new = first.detach() + args[0] - args[0].detach()
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return blocks[k].register_forward_hook(hook)

    found = []
    for place in find_components(model, kind)[0]:
        name = place.read.name
        source = record(model, clean, name)[name]
        handles = [skip(k) for k in dropped]
        try:
            with capture(model, name, gradients=True) as acts:
                score = METRIC(model(corrupt).logits).sum()
            found.append(((source - acts[name]) * acts.gradients(score)[name]).sum(-1).detach())
        finally:
            for handle in handles:
                handle.remove()
    return torch.stack(found, 1)


@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "v"])
def test_grad_drop_is_the_mean_size_over_gradients_with_one_block_skipped(kind):
    model, (clean, corrupt) = tiny("gpt2", torch.float64), prompts()
    plain = attribution_patching(model, clean, corrupt, METRIC, sites=kind, normalise=False)
    torch.testing.assert_close(plain.per_example[kind], by_hand(model, clean, corrupt, kind, []))
    found = attribution_patching(model, clean, corrupt, METRIC, sites=kind, normalise=False, grad_drop=True)
    total = sum(by_hand(model, clean, corrupt, kind, [k]).abs() for k in range(2))
    torch.testing.assert_close(found.per_example[kind], total / (2 if "resid" in kind else 1))
    torch.testing.assert_close(found.scores[kind], found.per_example[kind].mean(0))
    scaled = attribution_patching(model, clean, corrupt, METRIC, sites=kind, grad_drop=True)
    assert scaled.scores[kind].min() >= 0


@pytest.mark.parametrize("rules", ["gradient", "relp"])
@pytest.mark.parametrize("family", ["gpt2", "pythia", "llama", "gemma2"])
def test_with_no_block_dropped_grad_drop_is_the_size_of_the_score(family, rules, monkeypatch):
    model, (clean, corrupt) = tiny(family), prompts()
    options = {"sites": ["resid_pre", "q", "mlp_out"], "rules": rules, "qk_fix": True}
    plain = relevance_patching(model, clean, corrupt, METRIC, **options)
    monkeypatch.setattr(
        GradDrop, "dropped", property(lambda self: None, lambda self, value: None), raising=False
    )
    monkeypatch.setattr(GradDrop, "passes", lambda self, component: len(self.blocks))
    found = relevance_patching(model, clean, corrupt, METRIC, grad_drop=True, **options)
    for kind in plain.scores:
        torch.testing.assert_close(found.per_example[kind], plain.per_example[kind].abs())


def test_a_model_linear_behind_its_sites_needs_neither_fix():
    """Attention that mixes with a constant pattern: queries and keys have no effect, and the fix agrees with all other methods on it."""
    model, (clean, corrupt) = linear_behind_attention("gpt2"), prompts()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :48] = 0.0
        model.transformer.h[0].attn.c_attn.bias[:48] = 0.0
    options = {"sites": ["q", "k", "v", "attn_out"], "normalise": False}
    truth = activation_patching(model, clean, corrupt, METRIC, **options)
    for method in (attribution_patching, relevance_patching):
        found = method(
            model,
            clean,
            corrupt,
            METRIC,
            qk_fix=True,
            **({} if method is attribution_patching else {"rules": ["ln"]}),
            **options,
        )
        for kind in truth.scores:
            torch.testing.assert_close(found.scores[kind], truth.scores[kind], atol=1e-9, rtol=0)


def test_bad_calls_are_refused_by_name():
    model, (clean, corrupt) = tiny("gpt2"), prompts()
    with pytest.raises(InputError, match="qk_fix: none of the sites is a query or a key"):
        attribution_patching(model, clean, corrupt, METRIC, qk_fix=True)
    with pytest.raises(InputError, match="grad_drop: got a model with 1 known blocks"):
        attribution_patching(linear_behind_attention("gpt2"), clean, corrupt, METRIC, grad_drop=True)
    with pytest.raises(InputError, match="sits: is no option of patching; nearest: 'sites'"):
        attribution_patching(model, clean, corrupt, METRIC, sits="q")
