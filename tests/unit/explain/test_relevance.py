"""LRP rules as a block: closed forms, conservation, what matches what, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tests.contracts.language_models import prompts, tiny
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import capture
from lineament.explain.patching.metrics import logit_difference
from lineament.explain.patching.relevance import relevance_patching
from lineament.explain.relevance.rules import relevance_rules


def coefficients(net, x, rules, **options):
    x = x.clone().requires_grad_()
    with relevance_rules(net, rules, **options):
        y = net(x)
    return torch.autograd.grad(y.sum(), x)[0], y.detach()


ACTIVATIONS = [nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Mish(), nn.Hardswish(), nn.Tanh(), nn.ELU(), nn.Softsign(), nn.ReLU(), nn.LeakyReLU(0.2)]  # fmt: skip


@pytest.mark.parametrize("act", ACTIVATIONS, ids=lambda a: repr(a))
def test_the_identity_rule_is_value_over_input_and_its_limit_at_zero(act):
    x = torch.tensor([-40.0, -2.0, -1e-3, 1e-5, 0.5, 3.0, 40.0]).double()
    found, y = coefficients(act.eval(), x, "identity")
    torch.testing.assert_close(found, y / x, atol=1e-12, rtol=1e-9)
    if not isinstance(act, (nn.ReLU, nn.LeakyReLU)):
        at_zero = torch.zeros(1).double().requires_grad_()
        slope = torch.autograd.grad(act(at_zero).sum(), at_zero)[0]
        torch.testing.assert_close(coefficients(act, torch.zeros(1).double(), "identity")[0], slope)


def test_every_activation_of_transformers_has_its_rule():
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-4, 4, 40).double()
    refused = []
    for name in activations.ACT2CLS:
        act = activations.ACT2FN[name].eval().double()
        if not torch.isfinite(act(torch.zeros(1).double())).all() or name == "xielu":
            continue
        try:
            found, y = coefficients(act, x, "identity")
        except InputError as error:
            refused.append((name, str(error)))
            continue
        torch.testing.assert_close(found, y / x, atol=1e-12, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert all("has no limit at 0" in words for _, words in refused)
    names = [name for name, _ in refused]
    assert "sigmoid" in names and "gelu_new" not in names and "silu" not in names


@pytest.mark.parametrize("act", [nn.Softplus(), nn.Sigmoid()])
def test_activations_with_a_value_at_zero_have_no_identity_rule(act):
    net = nn.Sequential(nn.Linear(2, 2), act, nn.GELU()).eval()
    with pytest.raises(InputError, match=r"phi\(0\)"), relevance_rules(net):
        pass
    with relevance_rules(net, ["relp", {type(act): "gradient"}]) as coverage:
        assert list(coverage.modules["identity"]) == ["2"]


def test_the_norm_rules_against_the_expression_with_a_constant_statistic():
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6).double()
    v = torch.randn(4, 5, 6).double()

    class Gemma(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.randn(6).double()), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    class T5LayerNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.randn(6).double()), 1e-6

        def forward(self, x):
            return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))

    class LayerNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias, self.eps = (
                nn.Parameter(torch.randn(6).double()),
                nn.Parameter(torch.randn(6).double()),
                1e-6,
            )

        def forward(self, x):
            return F.layer_norm(x, (6,), self.weight, self.bias, self.eps)

    class GemmaRMSNorm(Gemma):
        pass

    def constant(x, centred, w, eps):
        with torch.no_grad():
            statistic = (
                x.var(-1, correction=0, keepdim=True) if centred else x.square().mean(-1, keepdim=True)
            ) + eps
        return ((x - x.mean(-1, keepdim=True)) if centred else x) * statistic.rsqrt() * w

    plain, rms = nn.LayerNorm(6, 1e-6).double(), nn.RMSNorm(6, 1e-6).double()
    nn.init.normal_(plain.weight), nn.init.normal_(rms.weight)
    bare = nn.LayerNorm(6, 1e-6, elementwise_affine=False)
    gemma, t5, own = GemmaRMSNorm(), T5LayerNorm(), LayerNorm()
    for norm, centred, weight in (
        (plain, True, plain.weight),
        (bare, True, torch.ones(6).double()),
        (rms, False, rms.weight),
        (gemma, False, 1 + gemma.weight),
        (t5, False, t5.weight),
        (own, True, own.weight),
    ):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        with relevance_rules(norm.eval(), "ln"):
            y = norm(a)
        assert torch.equal(y, norm(x))
        found = torch.autograd.grad(y, a, v)[0]
        torch.testing.assert_close(
            found, torch.autograd.grad(constant(b, centred, weight.detach(), 1e-6), b, v)[0]
        )
        if centred:
            torch.testing.assert_close(found.sum(-1), torch.zeros(4, 5).double(), atol=1e-12, rtol=0)
            plain_gradient = torch.autograd.grad(norm(b), b, v)[0]
            centred_x = x - x.mean(-1, keepdim=True)
            # Up to eps, the gradient also has no part along the normalised input; the rule has.
            assert (
                (plain_gradient * centred_x).sum(-1).abs().max()
                < 1e-4
                < 0.05
                < (found * centred_x).sum(-1).abs().max()
            )

    class FancyRMSNorm(Gemma):
        def forward(self, x):
            return x / x.abs().amax(-1, keepdim=True) * self.weight

    with (
        pytest.raises(InputError, match="neither a layer norm nor an RMS norm"),
        relevance_rules(FancyRMSNorm().eval(), "ln"),
    ):
        pass


def test_gradcheck_with_the_statistic_frozen():
    """The backward is the derivative of the forward whose statistic does not move: finite differences agree."""
    torch.manual_seed(0)
    norm = nn.LayerNorm(5).double().eval()
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 5).double()
    with torch.no_grad():
        scale = (x.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()

    def frozen(z):
        return (z - z.mean(-1, keepdim=True)) * scale * norm.weight.detach() + norm.bias.detach()

    assert torch.autograd.gradcheck(frozen, x.clone().requires_grad_())
    z = x.clone().requires_grad_()
    with relevance_rules(norm, "ln"):
        y = norm(z)
    rows = [torch.autograd.grad(y.flatten()[k], z, retain_graph=True)[0].flatten() for k in range(15)]
    numeric = torch.stack(
        [
            (frozen((x.flatten() + 1e-6 * e).view(3, 5)) - frozen(x)).flatten() / 1e-6
            for e in torch.eye(15).double()
        ],
        1,
    )
    torch.testing.assert_close(torch.stack(rows), numeric, atol=1e-8, rtol=0)


class Gated(nn.Module):
    """A bias-free block of everything, with norms, gate and attention of a known layout."""

    def __init__(self, biases=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.gate_norm = nn.RMSNorm(6, 1e-6), nn.LayerNorm(6, 1e-6, bias=biases)
        for name, size in (("q_proj", (6, 6)), ("k_proj", (6, 6)), ("v_proj", (6, 6)), ("o_proj", (6, 6)), ("gate_proj", (6, 9)), ("up_proj", (6, 9)), ("down_proj", (9, 6))):  # fmt: skip
            setattr(self, name, nn.Linear(*size, bias=biases))
        self.act = nn.SiLU()
        self.double().eval()
        if biases:
            nn.init.normal_(self.gate_norm.bias)

    def forward(self, x):
        h = self.norm(x)
        x = x + self.o_proj(
            F.scaled_dot_product_attention(self.q_proj(h), self.k_proj(h), self.v_proj(h), is_causal=True)
        )
        h = self.gate_norm(x)
        return x + self.down_proj(self.act(self.gate_proj(h)) * self.up_proj(h))


CONSTANT = {"q_proj": "detach", "k_proj": "detach"}


def test_relevance_is_conserved_without_biases():
    net, x = Gated(), torch.randn(2, 4, 6).double()
    found, y = coefficients(net, x, ["relp", CONSTANT])
    torch.testing.assert_close((found * x).sum(), y.sum())
    # Without the rule for attention it is not.
    assert abs(float((coefficients(net, x, "relp")[0] * x).sum() - y.sum())) > 1e-3


def test_biases_take_their_share():
    net, x = Gated(biases=True), torch.randn(2, 4, 6).double().requires_grad_()
    biased = [n for n, m in net.named_modules() if getattr(m, "bias", None) is not None and n not in CONSTANT]
    with relevance_rules(net, ["relp", CONSTANT]), capture(net, biased, gradients=True) as acts:
        y = net(x).sum()
    total = (torch.autograd.grad(y, x, retain_graph=True)[0] * x).sum()
    for name, c in acts.gradients(y).items():
        total = total + (c * net.get_submodule(name).bias).sum()
    torch.testing.assert_close(total, y)


def test_the_half_rule_gives_half_the_gradient_to_each_factor():
    net, x = Gated(), torch.randn(2, 4, 6).double()
    sites = ["act", "up_proj"]
    with capture(net, sites, gradients=True) as acts:
        plain = acts.gradients(net(x).sum())
    with relevance_rules(net, "half"), capture(net, sites, gradients=True) as acts:
        half = acts.gradients(net(x).sum())
    for site in sites:
        torch.testing.assert_close(half[site], plain[site] / 2)


@pytest.mark.parametrize("rule", ["epsilon", "gamma"])
def test_linear_rules_conserve_and_have_their_limits(rule):
    torch.manual_seed(0)
    conv = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(16, 3, bias=False),
    )
    dense = nn.Sequential(nn.Linear(7, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    for net, x in ((conv, torch.randn(3, 2, 4, 4)), (dense, torch.randn(3, 7))):
        net, x = net.double().eval(), x.double()
        none = {"eps": 1e-12} if rule == "epsilon" else {"gamma": 0.0}
        found, y = coefficients(net, x, rule, **none)
        torch.testing.assert_close(found, coefficients(net, x, {})[0], atol=1e-8, rtol=1e-6)
        some = {"eps": 0.3} if rule == "epsilon" else {"gamma": 0.5}
        found, again = coefficients(net, x, rule, **some)
        assert torch.equal(y, again) and not torch.allclose(found, coefficients(net, x, rule, **none)[0])
        if rule == "gamma":
            torch.testing.assert_close((found * x).sum(), y.sum())
    w = dense[0].weight.detach()
    x = torch.randn(1, 7).double()
    single = nn.Sequential(dense[0]).eval()
    z = x @ w.T
    if rule == "epsilon":
        want = (z / (z + 0.3 * z.sign())) @ w
        torch.testing.assert_close(coefficients(single, x, rule, eps=0.3)[0], want)
    else:
        parts = w * x
        weighted = parts * torch.where(parts * z.T > 0, 1.5, 1.0)
        want = (weighted * (z.T / weighted.sum(1, keepdim=True))).sum(0) / x[0]
        torch.testing.assert_close(coefficients(single, x, rule, gamma=0.5)[0][0], want)


def test_gamma_knows_the_linear_maps_of_gpt2():
    model, (clean, _) = tiny("gpt2", torch.float64), prompts()
    with relevance_rules(model, ["gamma", "ln", "identity"]) as coverage:
        assert len(coverage.modules["gamma"]) == 9  # four in each block, and the head
        logits = model(clean).logits
    assert torch.equal(logits, model(clean).logits)


def test_attention_rules_on_queries_keys_and_values():
    model, (clean, _) = tiny("llama"), prompts()
    sites = [f"model.layers.*.self_attn:{p}" for p in "qkv"]

    def seen(rules):
        with relevance_rules(model, rules), capture(model, sites, gradients=True) as acts:
            score = model(clean).logits[:, -1, 5].sum()
        return acts.gradients(score)

    plain, ah, uniform = seen("gradient"), seen("ah"), seen("uniform")
    last = "model.layers.1.self_attn:"
    assert ah[f"{last}q"].abs().max() == 0 == ah[f"{last}k"].abs().max()
    torch.testing.assert_close(ah[f"{last}v"], plain[f"{last}v"])
    for part, share in (("q", 0.25), ("k", 0.25), ("v", 0.5)):
        torch.testing.assert_close(uniform[last + part], share * plain[last + part])


def test_soft_caps_are_the_plain_gradient_unless_asked_for():
    model, (clean, _) = tiny("gemma2"), prompts()
    with relevance_rules(model, "softcap") as coverage, capture(model, "lm_head", gradients=True) as acts:
        out = model(clean).logits
    z = acts["lm_head"].detach()
    assert torch.equal(out, model(clean).logits) and coverage.active() == {"softcap": 1}
    torch.testing.assert_close(
        acts.gradients(out.sum())["lm_head"], 3 * torch.tanh(z / 3) / z, atol=1e-6, rtol=1e-5
    )
    with capture(model, "lm_head", gradients=True) as acts:
        plain = acts.gradients(model(clean).logits.sum())["lm_head"]
    torch.testing.assert_close(plain, 1 - torch.tanh(z / 3) ** 2, atol=1e-5, rtol=1e-4)
    with (
        pytest.raises(InputError, match="'softcap' matched no module"),
        relevance_rules(tiny("llama"), "softcap"),
    ):
        pass


def test_blocks_nest_and_no_grad_forwards_pass():
    net = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GELU()).eval()
    x = torch.randn(2, 4)
    both = coefficients(net, x, "relp")[0]
    y = x.clone().requires_grad_()
    with relevance_rules(net, "ln"), relevance_rules(net, "identity"):
        torch.testing.assert_close(torch.autograd.grad(net(y).sum(), y)[0], both)
        with torch.no_grad():
            assert torch.equal(net(x), net(x))


def test_scores_in_sequential_networks_are_gradient_times_difference():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    x = torch.randn(2, 3, 4)
    result = relevance_patching(
        net, x[0], torch.zeros(3, 4), logit_difference([0, 1, 2], [1, 2, 0]), sites={"x": "0:in"}
    )
    z = torch.zeros(3, 4, requires_grad=True)
    g = torch.autograd.grad(logit_difference([0, 1, 2], [1, 2, 0])(net(z)).sum(), z)[0]
    torch.testing.assert_close(
        result.per_example["x"][:, 0, 0] * (result.source - result.base), (g * x[0]).sum(1)
    )
