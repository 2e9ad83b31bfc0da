"""What a forward writes into buffers, of whatever module, is gone after the call."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.core.curvature.matrices import fisher, gauss_newton, hessian
from lineament.core.gradients import per_sample_gradients
from lineament.core.models import buffers_kept, frozen
from lineament.learn.useful.early_outputs import outputs_of
from lineament.measure.landscape.axes import random_axes
from lineament.measure.landscape.grids import line
from lineament.optim.sam import running_statistics_kept
from lineament.train.loop import Run, _has_unused


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


def trained(net, x):
    with frozen(net.eval(), training=True):
        net(x)


def outputs(net, x):
    outputs_of(net, [(x, torch.zeros(4))], recalibrate=True)


def loss_line(mode):
    def call(net, x):
        data, options = [(x, torch.zeros_like(x))], {"batchnorm": mode}
        if mode == "recalibrate" and not isinstance(net[1], nn.BatchNorm1d):
            net.append(nn.BatchNorm1d(1))
        line(net, F.mse_loss, data, random_axes(net, 1)[0], steps=3, **options)

    return call


def unused(net, x):
    _has_unused(
        Run(
            net,
            [(x, torch.zeros_like(x))],
            optimizer=lambda n: torch.optim.SGD(n.parameters(), lr=0.1),
            loss=F.mse_loss,
        )
    )


CALLS = {
    "trained": trained,
    "outputs": outputs,
    "line": loss_line("eval"),
    "line of batch statistics": loss_line("batch"),
    "recalibrated line": loss_line("recalibrate"),
    "unused": unused,
    "sam": sam,
    "kept": kept,
    "frozen": looked,
    **{make.__name__: product(make) for make in (hessian, gauss_newton, fisher)},
}


@pytest.mark.filterwarnings("ignore::lineament.measure.landscape.batchnorm_modes.LandscapeWarning")
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


@pytest.mark.parametrize("batchnorm", ["eval", "recalibrate"])
@pytest.mark.parametrize("norm", [InPlace, Rebound])
def test_no_point_of_a_landscape_sees_what_another_left(norm, batchnorm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(1, 1, 1), norm(), nn.BatchNorm1d(1))
    net(torch.randn(4, 1, 3))
    x = torch.randn(4, 1, 3) + 1
    axis, options = random_axes(net, 1)[0], {"batchnorm": batchnorm, "metrics": ["gradient_norm"]}
    many = line(net, F.mse_loss, [(x, x)], axis, at=[0.7, -0.3, 0.0], **options)
    alone = [line(net, F.mse_loss, [(x, x)], axis, at=[a], **options) for a in (0.7, -0.3, 0.0)]
    assert many.loss.tolist() == [one.loss.item() for one in alone]
    assert many.metrics["gradient_norm"].tolist() == [one.metrics["gradient_norm"].item() for one in alone]
