"""What every way of moving weights keeps: the model as it was, also after an exception, in every precision and mode."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core.curvature.matrices import hessian
from lineament.measure.landscape.axes import hessian_axes, random_axes
from lineament.measure.landscape.criteria import hessian_criteria
from lineament.measure.landscape.grids import adam_equation, interpolation, line, panels, perturbations, plane
from lineament.measure.landscape.network_axes import spanned_by
from tests.contracts.unchanged import unchanged

pytestmark = pytest.mark.filterwarnings(
    "ignore::lineament.measure.landscape.batchnorm_modes.LandscapeWarning"
)


class Tied(nn.Module):
    """Batch norm, dropout, a frozen parameter, a weight used twice, one that is not used, and a transposed one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.drop = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.second = nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.idle = nn.Parameter(torch.ones(3))
        self.last = nn.Linear(6, 3)
        self.last.weight = nn.Parameter(torch.randn(6, 3).T)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.tanh(self.second(self.drop(self.norm(self.first(x))))))


def network(training, dtype=torch.float32):
    net = Tied().to(dtype)
    net.train()
    for _ in range(5):
        net(torch.randn(8, 6).to(dtype))
    net.train(training)
    for p in net.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    return net


def data(dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 6, generator=g).to(dtype), torch.randint(0, 3, (n,), generator=g)) for n in (8, 5)
    ]


def stepped(net):
    adam = torch.optim.Adam([p for p in net.parameters() if p.requires_grad])
    for x, y in data(net.first.weight.dtype):
        F.cross_entropy(net(x), y).backward()
        adam.step()
    return adam


WAYS = {
    "line": lambda net, loss, d: line(net, loss, d, random_axes(net, 1)[0], steps=3),
    "plane": lambda net, loss, d: plane(net, loss, d, random_axes(net), steps=3),
    "batch statistics": lambda net, loss, d: plane(
        net, loss, d, random_axes(net), steps=3, batchnorm="batch"
    ),
    "recalibrated": lambda net, loss, d: plane(
        net, loss, d, random_axes(net), steps=3, batchnorm="recalibrate"
    ),
    "metrics": lambda net, loss, d: line(
        net, loss, d, random_axes(net, 1)[0], steps=3, metrics=["accuracy", "class_loss", "gradient_norm"]
    ),
    "interpolation": lambda net, loss, d: interpolation(net, loss, d, Tied(), steps=3),
    "three networks": lambda net, loss, d: plane(
        net, loss, d, spanned_by(net, Tied(), network(False)), steps=3
    ),
    "hessian": lambda net, loss, d: plane(net, loss, d, hessian_axes(hessian(net, loss, d)), steps=3),
    "panels": lambda net, loss, d: panels(net, loss, d, steps=3),
    "perturbations": lambda net, loss, d: perturbations(net, loss, d, count=2),
    "criteria": lambda net, loss, d: hessian_criteria(net, loss, d, steps=5, probes=2),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_left_as_it_was(way, training):
    net = network(training)
    with unchanged(net, generator=way not in ("interpolation", "three networks")):
        WAYS[way](net, F.cross_entropy, data())


@pytest.mark.parametrize("way", WAYS)
def test_also_after_an_exception(way):
    net, calls = network(True), []

    def loss(z, y):
        calls.append(1)
        if len(calls) > 4:
            raise ZeroDivisionError
        return F.cross_entropy(z, y)

    with (
        unchanged(net, generator=way not in ("interpolation", "three networks")),
        pytest.raises(ZeroDivisionError),
    ):
        for _ in range(9):
            WAYS[way](net, loss, data())


@pytest.mark.parametrize("training", [False, True])
def test_the_adam_equation_leaves_model_and_optimizer(training):
    net = network(training)
    adam = stepped(net)
    before = {k: v.clone() for k, v in adam.state[net.first.weight].items()}
    with unchanged(net):
        adam_equation(net, F.cross_entropy, data(), adam, steps=4)
    assert all(torch.equal(v, adam.state[net.first.weight][k]) for k, v in before.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_precision_and_training_goes_on_afterwards(dtype):
    net = network(False, dtype)
    found = plane(net, F.cross_entropy, data(dtype), random_axes(net), steps=3)
    assert found.loss.dtype == torch.float64 and bool(torch.isfinite(found.loss).all())
    with torch.no_grad():
        # The same weights, in float32 at least.
        wide = torch.promote_types(dtype, torch.float32)
        exact = copy.deepcopy(net).to(wide)
        parts = [(float(F.cross_entropy(exact(x.to(wide)), y)), len(y)) for x, y in data(dtype)]
    assert found.centre == pytest.approx(sum(v * n for v, n in parts) / sum(n for _, n in parts), rel=1e-6)
    adam = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    before = net.first.weight.detach().clone()
    F.cross_entropy(net(data(dtype)[0][0]), data(dtype)[0][1]).backward()
    adam.step()
    assert not torch.equal(net.first.weight, before)


def test_same_seed_same_answer_and_inside_inference_mode():
    net = network(False)
    one = plane(net, F.cross_entropy, data(), random_axes(net, seed=3), steps=3).loss
    with torch.inference_mode():
        two = plane(net, F.cross_entropy, data(), random_axes(net, seed=3), steps=3).loss
    assert torch.equal(one, two)
