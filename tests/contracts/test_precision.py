"""Every method in float64, bfloat16 and float16: no constant of another precision gets into the result.

In float64 a result must not depend on torch's default dtype: a number that became a tensor by itself (``torch.where(z < 0, -eps, eps)``) would be float32 there,
and leave a relative error of 1e-8. In half precision a method agrees with float32 on the same (rounded) weights to the dtype's rounding, or refuses by name.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament import explain
from lineament.core.checks import InputError
from lineament.core.curvature.eigenpairs import top_eigenpairs
from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.core.curvature.traces import trace
from lineament.core.gradients import per_sample_gradients
from lineament.core.readouts import logistic, ridge
from lineament.core.sites.activations import patch
from lineament.core.statistics import Covariance, Moments
from lineament.explain.faithfulness.input_gradients import KINDS, input_gradient
from lineament.explain.relevance.rules import PRESETS, relevance_rules
from lineament.explain.saliency.methods import METHODS as SALIENCY
from lineament.explain.tokens.methods import METHODS as TOKENS
from lineament.learn.useful.early_outputs import outputs_of
from lineament.measure.collapse.metrics import collapse_metrics
from lineament.measure.collapse.profile import collapse
from lineament.measure.landscape.axes import given
from lineament.measure.landscape.criteria import hessian_criteria
from lineament.measure.landscape.grids import line, plane
from lineament.optim import ASAM, SAM
from lineament.train.attacks import pgd
from tests.contracts import test_inference_mode, test_patching, test_saliency, test_tokens
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


def numbers(call):
    """All numbers of a call's result as one tensor."""
    return lambda: torch.cat([torch.from_numpy(n) for n in test_inference_mode.numbers(call())]).nan_to_num()


def on_images(call):
    """``call(network, images, labels)`` of a smooth network: where a ReLU or a maximum decides, half precision may decide otherwise."""

    def prepare(dtype):
        torch.manual_seed(0)
        layers = (
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.SiLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(60, 4),
        )
        net = nn.Sequential(*layers)
        for _ in range(20):
            net(images() + torch.randn(3, 1, 1, 1))
        net, x = rounded(net).to(dtype).eval(), rounded(images()).to(dtype)
        return numbers(lambda: call(net, x, torch.tensor([0, 1, 2])))

    return prepare


def on_batches(call):
    """``call(network, loss, batches)`` of a small smooth network."""

    def prepare(dtype):
        torch.manual_seed(0)
        net = rounded(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))).to(dtype)
        x, y = rounded(torch.randn(20, 4)).to(dtype), torch.arange(20) % 3
        return numbers(lambda: call(net, nn.CrossEntropyLoss(), [(x[:8], y[:8]), (x[8:], y[8:])]))

    return prepare


def on_rows(call):
    """``call(features, labels)``: statistics of features far from zero, which half precision cannot add up."""

    def prepare(dtype):
        torch.manual_seed(0)
        y = torch.arange(600) % 3
        x = rounded(3 + torch.randn(600, 5) + torch.randn(3, 5)[y]).to(dtype)
        return numbers(lambda: call(x, y))

    return prepare


def on_text(call):
    def prepare(dtype):
        net = rounded(model("gpt2")).to(dtype)
        return numbers(lambda: call(net))

    return prepare


def product(make):
    def call(*args):
        operator = make(*args)
        return operator @ torch.linspace(-1, 1, operator.shape[0], dtype=operator.dtype)

    return call


def moments(x, y):
    made = Moments()
    for part in x.split(7):
        made.update(part)
    return made.mean, made.variance


def covariance(x, y):
    made = Covariance()
    for part in x.split(7):
        made.update(part)
    return made.covariance


MAPS = torch.rand(3, 1, 12, 9, generator=torch.Generator().manual_seed(5))
SCORES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def images():
    return torch.rand(3, 2, 12, 9, generator=torch.Generator().manual_seed(0))


LABELLED = ("logit_true", "softmax_true", "loss")


def rounded(value):
    """Values that every dtype can hold, so that only the arithmetic differs."""
    return value.bfloat16().float()


# Random draws follow the default dtype or the network's (soft faithfulness): nothing can be compared there.
CASES = {
    **{f"saliency {m}": saliency_maps(m) for m in SALIENCY if m != "random"},
    **{f"input gradient {k}": input_gradients(k) for k in KINDS if k != "random"},
    **{f"tokens {m}": token_scores(m) for m in TOKENS if m not in test_tokens.DRAWN},
    **{f"patching {m}": patching_scores(m) for m in test_patching.METHODS},
    **{f"rules {r}": coefficients(r) for r in (*PRESETS, "epsilon", "gamma")},
    "collapse": collapse_numbers,
    "line": loss_line,
    "meta-saliency": on_images(lambda net, x, y: explain.meta_saliency(net, x, y, site="2", eps=0.1)),
    "combined saliency": on_images(lambda net, x, y: explain.combined_saliency(net, x, y, site=["0", "2"])),
    "integrated gradients": on_images(lambda net, x, y: explain.integrated_gradients(net, x, y, steps=4)),
    "deletion": on_images(lambda net, x, y: explain.deletion_insertion(net, x, MAPS, y, steps=4)),
    "infidelity": on_images(lambda net, x, y: explain.infidelity(net, x, MAPS, y, samples=8)),
    "attack": on_images(
        lambda net, x, y: pgd(net, x, y, norm="l2", eps=0.1, step=0.05, steps=2, bounds=None).delta
    ),
    "outputs": on_images(lambda net, x, y: outputs_of(net, (x, y), recalibrate=True)[0]),
    "collapse of a network": on_images(lambda net, x, y: [collapse(net, [(x, y)], sites=["4"])["4"].nc2]),
    "recalibrated plane": on_images(
        lambda net, x, y: (
            plane(net, F.cross_entropy, [(x, y)], axes_of(net), steps=3, batchnorm="recalibrate").loss
        )
    ),
    "hard faithfulness": on_text(
        lambda net: list(explain.hard_faithfulness(net, [5, 40, 81, 12], SCORES).values())
    ),
    "continuation": on_text(
        lambda net: explain.explain_continuation(net, [5, 40, 81], [7, 9], method="grad_norm").matrix
    ),
    **{make.__name__: on_batches(product(make)) for make in (hessian, gauss_newton, fisher)},
    "eigenpairs": on_batches(lambda *a: top_eigenpairs(hessian(*a), 2).values),
    "trace": on_batches(lambda *a: trace(hessian(*a), 20).value),
    "criteria": on_batches(lambda *a: hessian_criteria(*a, steps=10, probes=2).re),
    "per-sample gradients": on_batches(
        lambda net, loss, data: list(per_sample_gradients(net, loss, *data[1]).values())
    ),
    "moments": on_rows(moments),
    "covariance": on_rows(covariance),
    "collapse metrics": on_rows(lambda x, y: collapse_metrics(x, y)),
    "ridge": on_rows(lambda x, y: ridge(x[:, :4], x[:, 4:], penalties=[0.1]).predict(x[:5, :4])),
    "logistic": on_rows(lambda x, y: logistic(x, y, penalties=[0.1]).logits(x[:5])),
}


def axes_of(net):
    a, b = (torch.linspace(-1, 1, sum(p.numel() for p in net.parameters())) ** k for k in (1, 2))
    return [given(net, v.bfloat16().to(next(net.parameters()))) for v in (a, b)]


def error(found, reference):
    return float((found.double() - reference.double()).norm() / reference.double().norm())


# Of the dtype, how many. Effects are small differences of two answers, each rounded by itself: 32 in float16.
ROUNDINGS = {torch.bfloat16: 24, torch.float16: 48}


@pytest.mark.filterwarnings("ignore::lineament.measure.landscape.batchnorm_modes.LandscapeWarning")
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

    @pytest.mark.parametrize("dtype", ROUNDINGS, ids=str)
    def test_half_precision_agrees_to_its_rounding_or_is_refused(self, case, dtype):
        call = case(dtype)
        try:
            found = call()
        except InputError:
            with pytest.raises(InputError, match=r"half|float"):
                call()
            return
        assert torch.isfinite(found).all()
        assert error(found, case(torch.float32)()) < ROUNDINGS[dtype] * torch.finfo(dtype).eps


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


@pytest.mark.parametrize("slope", [0.0, 2e-7, 1e-3])
@pytest.mark.parametrize("make", [SAM, ASAM])
def test_a_vanishing_gradient_climbs_as_far_in_float16_as_in_float32(make, slope):
    def climbed(dtype):
        w = nn.Parameter(torch.ones(4, dtype=dtype))
        optimizer = make(torch.optim.SGD([w], lr=0.1), rho=0.5)
        w.grad = torch.full((4,), slope, dtype=torch.float16).to(dtype)
        optimizer.first_step()
        return w.detach().float()

    torch.testing.assert_close(climbed(torch.float16), climbed(torch.float32), rtol=2e-3, atol=0)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_an_attack_on_a_flat_network_stays_where_it_is_in_float16(norm):
    net = nn.Linear(3, 2).half()
    nn.init.zeros_(net.weight)
    found = pgd(
        net, torch.full((2, 3), 0.5).half(), torch.tensor([0, 1]), norm=norm, eps=0.1, step=0.1, steps=2
    )
    assert found.delta.tolist() == [[0.0] * 3] * 2 and bool(found.no_gradient.all())
