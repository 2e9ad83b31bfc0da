"""What TrAct keeps for every kind of first layer: shapes and dtypes, one sample, odd memory, bad input, the model as it was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.learn.tract.layer import tract
from tests.contracts.unchanged import unchanged

pytestmark = pytest.mark.filterwarnings("ignore:.*mean square of its inputs")

FORMS = {"exact": {}, "samples": {"samples": 7}, "every": {"every": 2}, "momentum": {"momentum": 0.9}}


def tokens(count: int) -> torch.Tensor:
    return torch.arange(3 * count).view(count, 3) % 11


MEMBERS = {
    "linear": (lambda: nn.Linear(6, 5), lambda count: torch.randn(count, 6)),
    "linear on tokens": (lambda: nn.Linear(6, 5), lambda count: torch.randn(count, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(2, 4, 3), lambda count: torch.randn(count, 2, 9)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 3, padding=1), lambda count: torch.randn(count, 2, 6, 6)),
    "grouped": (lambda: nn.Conv2d(4, 4, 2, stride=2, groups=2), lambda count: torch.randn(count, 4, 6, 6)),
    "conv3d": (lambda: nn.Conv3d(1, 3, 2), lambda count: torch.randn(count, 1, 4, 4, 4)),
    "embedding": (lambda: nn.Embedding(11, 4), tokens),
}


@pytest.fixture(params=MEMBERS)
def member(request):
    make, inputs = MEMBERS[request.param]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield nn.Sequential(make(), nn.Tanh()), inputs


def gradient(net: nn.Module, x: torch.Tensor, **options) -> torch.Tensor:
    net.zero_grad()
    with tract(net, **options):
        net(x).square().mean().backward()
    found = net[0].weight.grad
    net.zero_grad()
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shape_and_dtype(member, form, count, dtype):
    net, inputs = member
    x = inputs(count)
    found = gradient(net.to(dtype), x.to(dtype) if x.is_floating_point() else x, **FORMS[form])
    assert found.shape == net[0].weight.shape and found.dtype == dtype and torch.isfinite(found).all()


@pytest.mark.parametrize("form", FORMS)
def test_single_is_double_and_memory_does_not_matter(member, form):
    net, inputs = member
    x = inputs(8)
    single = gradient(net, x, **FORMS[form])
    odd = x.repeat_interleave(2, -1)[..., ::2].flip(0).flip(0)
    odd = odd.transpose(0, -1).contiguous().transpose(0, -1)
    assert not odd.is_contiguous() or odd.ndim < 2
    torch.testing.assert_close(gradient(net, odd, **FORMS[form]), single, rtol=1e-4, atol=1e-6)
    double = gradient(net.double(), x.double() if x.is_floating_point() else x, **FORMS[form])
    torch.testing.assert_close(double.float(), single, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_no_rows_no_gradient(member, form):
    net, inputs = member
    net.zero_grad()
    with tract(net, **FORMS[form]):
        net(inputs(2)[:0]).sum().backward()
    assert net[0].weight.grad is None or not net[0].weight.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_bad_values_and_the_model_afterwards(member, form):
    net, inputs = member
    x = inputs(4)
    if not x.is_floating_point():
        with unchanged(net), pytest.raises(IndexError), tract(net, **FORMS[form]):
            net(x + 100)
        return
    x[:] = float("inf")
    weight, state = net[0].weight.detach().clone(), list(net.state_dict())
    with pytest.raises(InputError, match="NaN or infinite"), tract(net, **FORMS[form]):
        net[0](x).sum().backward()
    assert torch.equal(weight, net[0].weight) and list(net.state_dict()) == state
    assert type(net[0]).__name__ in ("Linear", "Conv1d", "Conv2d", "Conv3d")


def test_threads_and_repetition(member):
    net, inputs = member
    x, before = inputs(8), torch.get_num_threads()
    once = gradient(net, x)
    assert torch.equal(once, gradient(net, x))
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        torch.testing.assert_close(gradient(net, x), once, rtol=1e-4, atol=1e-6)
    finally:
        torch.set_num_threads(before)
