"""What a forward writes into buffers, of whatever module, is gone after the call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.core.gradients import per_sample_gradients
from lineament.core.models import buffers_kept, frozen
from lineament.optim.sam import running_statistics_kept


class InPlace(nn.Module):
    """A norm written by hand, which gathers its mean in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean())
        return x - self.mean


class Rebound(InPlace):
    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean()
        return x - self.mean


NORMS = {
    "batch": lambda: nn.BatchNorm1d(1),
    "instance": lambda: nn.InstanceNorm1d(1, track_running_stats=True),
    "in place": InPlace,
    "rebound": Rebound,
}


def product(make):
    options = {"kind": "empirical"} if make is fisher else {}

    def call(net, x):
        operator = make(net, F.mse_loss, [(x, torch.zeros_like(x))], **options)
        operator @ torch.ones(operator.shape[0])

    return call


def sam(net, x):
    net.train()
    with running_statistics_kept(net):
        net(x)


def kept(net, x):
    with buffers_kept(net):
        net.train()(x)


def looked(net, x):
    with frozen(net):
        net(x)


CALLS = {
    "sam": sam,
    "kept": kept,
    "frozen": looked,
    **{make.__name__: product(make) for make in (hessian, gauss_newton, fisher)},
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS.keys())
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_buffers_are_as_they_were(norm, call):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 1, 1), norm())
    before = {name: (b, b.clone()) for name, b in net.named_buffers()}
    call(net, torch.randn(4, 1, 3))
    after = dict(net.named_buffers())
    assert all(after[name] is b and torch.equal(b, copy) for name, (b, copy) in before.items())


def test_per_sample_gradients_leave_instance_norm_as_it_was():
    net = nn.Sequential(nn.Conv1d(1, 1, 1), InPlace())
    per_sample_gradients(net, F.mse_loss, torch.randn(4, 1, 3), torch.zeros(4, 1, 3))
    assert float(net[1].mean) == 0
