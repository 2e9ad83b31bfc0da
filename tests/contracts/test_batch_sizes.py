"""How the samples are cut into batches or chunks never changes a result, also where the loss ignores targets or weighs classes.

The mean over a batch is then not one over its samples: batches count by what the loss divides by.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core.checks import InputError
from lineament.core.curvature.eigenpairs import top_eigenpairs
from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.core.curvature.traces import trace
from lineament.core.gradients import per_sample_gradients
from lineament.measure.landscape.axes import given
from lineament.measure.landscape.criteria import hessian_criteria
from lineament.measure.landscape.grids import interpolation, line, perturbations, plane

WEIGHTS = torch.tensor([0.2, 1.0, 3.0]).double()
LOSSES = {
    "plain": F.cross_entropy,
    "ignored": nn.CrossEntropyLoss(ignore_index=0),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHTS),
    "both": functools.partial(F.cross_entropy, weight=WEIGHTS, ignore_index=2),
    "of the user's own": lambda z, y: F.cross_entropy(z, y, weight=WEIGHTS, ignore_index=2),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def axis(net, power):
    return given(net, torch.linspace(-1, 1, sum(p.numel() for p in net.parameters())).double() ** power)


def product(make, **options):
    def call(net, loss, batches):
        operator = make(net, loss, batches, **options)
        return operator @ torch.linspace(-1, 1, operator.shape[0]).double()

    return call


def with_metrics(net, loss, batches):
    found = line(
        net, loss, batches, axis(net, 1), steps=3, metrics=["accuracy", "class_loss", "gradient_norm"]
    )
    return torch.cat([found.loss, *(m.flatten().nan_to_num() for m in found.metrics.values())])


CALLS = {
    "line": with_metrics,
    "plane": lambda net, loss, batches: plane(net, loss, batches, [axis(net, 1), axis(net, 2)], steps=3).loss,
    "interpolation": lambda net, loss, batches: interpolation(net, loss, batches, network(), steps=3).loss,
    "perturbations": lambda net, loss, batches: perturbations(net, loss, batches, count=2).rises,
    "hessian": product(hessian),
    "gauss-newton": product(gauss_newton),
    "exact fisher": product(fisher, kind="exact", likelihood="categorical"),
    "empirical fisher": product(fisher, kind="empirical"),
    "eigenpairs": lambda net, loss, batches: top_eigenpairs(hessian(net, loss, batches), 2).values,
    "trace": lambda net, loss, batches: torch.tensor(trace(hessian(net, loss, batches), 30).value),
    "criteria": lambda net, loss, batches: hessian_criteria(net, loss, batches, steps=6, probes=2).re,
}  # fmt: skip


def samples():
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(1)).double()
    return x, torch.tensor([2, 0, 1, 1, 0, 2, 0, 0, 1, 2, 2, 1])


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_batches_of_any_size_give_the_same(call, loss):
    x, y = samples()
    whole = call(network(), loss, [(x, y)])
    assert torch.isfinite(whole).all()
    for sizes in ((5, 7), (1, 1, 10), (4, 4, 4), (1,) * 12):
        batches = list(zip(x.split(sizes), y.split(sizes)))
        torch.testing.assert_close(call(network(), loss, batches), whole)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
def test_per_sample_gradients_are_each_samples_own_in_chunks_of_any_size(loss):
    (x, y), net = samples(), network()
    for chunk in (None, 1, 5):
        found = per_sample_gradients(net, loss, x, y, chunk=chunk)
        for row in range(len(x)):
            own = torch.autograd.grad(loss(net(x[row : row + 1]), y[row : row + 1]), list(net.parameters()))
            for gradient, expected in zip(found.values(), own):
                torch.testing.assert_close(gradient[row], expected, equal_nan=True)


def test_a_loss_that_ignores_every_target_is_refused():
    x, y = samples()
    net = network()
    with pytest.raises(InputError, match="ignores every target"):
        line(net, nn.CrossEntropyLoss(), [(x, torch.full_like(y, -100))], axis(net, 1), steps=3)
