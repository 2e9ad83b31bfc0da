"""Every method in float64 and bfloat16: no constant of another precision gets into the result.

In float64 a result must not depend on torch's default dtype: a number that became a tensor by itself (``torch.where(z < 0, -eps, eps)``) would be float32 there,
and leave a relative error of 1e-8. In bfloat16 a method agrees with float32 on the same (rounded) weights to bfloat16's rounding, or refuses by name.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import patch
from lineament.explain.faithfulness.input_gradients import KINDS, input_gradient
from lineament.explain.relevance.rules import PRESETS, relevance_rules
from lineament.explain.saliency.methods import METHODS as SALIENCY
from lineament.explain.tokens.methods import METHODS as TOKENS
from lineament.measure.collapse.metrics import collapse_metrics
from lineament.measure.landscape.axes import given
from lineament.measure.landscape.grids import line
from tests.contracts import test_patching, test_saliency, test_tokens
from tests.contracts.language_models import prompts, tiny
from tests.contracts.token_models import model

# Each function prepares a call in one dtype: networks and inputs are made before the default dtype changes.


def saliency_maps(method):
    def prepare(dtype):
        net, x = rounded(test_saliency.network(method=method)).to(dtype), rounded(images()).to(dtype)
        return lambda: test_saliency.explain(net, x, method)

    return prepare


def input_gradients(kind):
    def prepare(dtype):
        labels = torch.tensor([0, 1, 2]) if kind in LABELLED else None
        torch.manual_seed(0)
        # Smooth: where a ReLU or a maximum decides, bfloat16 may decide otherwise.
        net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(60, 4))
        net, x = rounded(net).to(dtype), rounded(images()).to(dtype)
        return lambda: input_gradient(net, x, labels, kind=kind)

    return prepare


def token_scores(method):
    def prepare(dtype):
        net = rounded(model("gpt2")).to(dtype)
        return lambda: test_tokens.explain(net, method, target=3).scores

    return prepare


def patching_scores(name):
    def prepare(dtype):
        options = {"normalise": False} if name in test_patching.NORMALISED else {}
        net, call = rounded(tiny("gpt2")).to(dtype), test_patching.METHODS[name]
        return lambda: test_patching.numbers(
            call(net, *prompts(), test_patching.METRIC, **options)
        ).nan_to_num()

    return prepare


def coefficients(rule):
    def prepare(dtype):
        torch.manual_seed(0)
        layers = (nn.Linear(6, 8), nn.LayerNorm(8), nn.ELU(0.3), nn.Linear(8, 8), nn.Softsign(), nn.RMSNorm(8, 1e-6), nn.Linear(8, 3))  # fmt: skip
        net = rounded(nn.Sequential(*layers).eval()).to(dtype)
        x = rounded(torch.randn(5, 6)).to(dtype).requires_grad_()

        def call():
            with relevance_rules(net, rule, eps=0.1):
                y = net(x)
            return torch.autograd.grad(y.sum(), x)[0]

        return call

    return prepare


def collapse_numbers(dtype):
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    features = rounded(torch.randn(60, 8) + torch.randn(3, 8)[labels]).to(dtype)
    weight = rounded(torch.randn(3, 8)).to(dtype)

    def call():
        found = collapse_metrics(features, labels, weight=weight).to_dict()
        return torch.tensor([v for v in found.values() if isinstance(v, float)], dtype=torch.float64)

    return call


def loss_line(dtype):
    torch.manual_seed(0)
    net = rounded(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).to(dtype)
    data = [(rounded(torch.randn(20, 4)).to(dtype), torch.arange(20) % 3)]
    direction = {name: rounded(torch.randn(p.shape)).to(dtype) for name, p in net.named_parameters()}
    return lambda: line(net, nn.CrossEntropyLoss(), data, given(net, direction), at=[-0.7, 0.1, 0.3]).loss


def images():
    return torch.rand(3, 2, 12, 9, generator=torch.Generator().manual_seed(0))


LABELLED = ("logit_true", "softmax_true", "loss")


def rounded(value):
    """Values that every dtype can hold, so that only the arithmetic differs."""
    return value.bfloat16().float()


# Random draws follow the default dtype: nothing can be compared there.
CASES = {
    **{f"saliency {m}": saliency_maps(m) for m in SALIENCY if m != "random"},
    **{f"input gradient {k}": input_gradients(k) for k in KINDS if k != "random"},
    **{f"tokens {m}": token_scores(m) for m in TOKENS if m not in test_tokens.DRAWN},
    **{f"patching {m}": patching_scores(m) for m in test_patching.METHODS},
    **{f"rules {r}": coefficients(r) for r in (*PRESETS, "epsilon", "gamma")},
    "collapse": collapse_numbers,
    "line": loss_line,
}


def error(found, reference):
    return float((found.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
class TestContract:
    def test_float64_is_float64_throughout(self, case):
        call = case(torch.float64)
        found = call()
        assert found.dtype == torch.float64
        torch.set_default_dtype(torch.float64)
        try:
            reference = call()
        finally:
            torch.set_default_dtype(torch.float32)
        assert reference.norm() > 0 and error(found, reference) < 1e-13
        assert error(case(torch.float32)(), found) < 1e-4

    def test_bfloat16_agrees_to_its_rounding_or_is_refused(self, case):
        call = case(torch.bfloat16)
        try:
            found = call()
        except InputError:
            with pytest.raises(InputError, match=r"half|float"):
                call()
            return
        assert torch.isfinite(found).all()
        assert error(found, case(torch.float32)()) < 24 * torch.finfo(torch.bfloat16).eps


def test_the_epsilon_rule_is_exact_at_its_own_scale():
    net = nn.Sequential(nn.Linear(1, 1, bias=False)).double().eval()
    nn.init.ones_(net[0].weight)
    x = torch.tensor([[1e-6]], dtype=torch.float64, requires_grad=True)
    with relevance_rules(net, "epsilon", eps=1e-6):
        y = net(x)
    assert torch.autograd.grad(y.sum(), x)[0].item() == 0.5


def test_a_number_is_patched_in_with_the_precision_of_the_site():
    net = nn.Sequential(nn.Identity())
    with patch(net, {"0": 0.1}):
        assert net(torch.ones(1).double()).item() == 0.1
