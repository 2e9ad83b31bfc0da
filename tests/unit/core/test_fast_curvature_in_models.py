"""Whatever a model does with a tensor in between, a product of its Hessian is that of plain autograd, and the model stays what it was."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tests.contracts.unchanged import unchanged
from torch import nn
from torch.utils.checkpoint import checkpoint

from lineament.core.curvature.fast import graph
from lineament.core.curvature.krylov import lanczos
from lineament.core.curvature.matrices import gauss_newton, hessian
from lineament.core.gradients import per_sample_gradients
from lineament.optim.gns.network import Network


class Net(nn.Module):
    """A convolution's weights ``w``, a batch norm ``b`` with a past, layers ``n`` for vectors, and any forward."""

    def __init__(self, forward):
        super().__init__()
        self.inside = forward
        self.w, self.b = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.BatchNorm2d(4)
        self.b.running_mean.copy_(torch.randn(4))
        self.b.running_var.copy_(torch.rand(4) + 0.5)
        self.n = nn.Sequential(nn.Linear(4, 7), nn.GELU(), nn.Linear(7, 4))

    def forward(self, x):
        return self.inside(self, x)


def mean(h):
    return h.mean((2, 3))


def unrecorded_convolution(net, x):
    with torch.no_grad():
        h = F.conv2d(x, net.w)
    return mean(net.b(h).tanh())


def detached(net, x):
    return mean(net.b(F.conv2d(x, net.w).detach_()).tanh())


def hook_before_norm(net, x):
    h = F.conv2d(x, net.w)
    h.register_hook(lambda g: 2 * g)
    return mean(net.b(h).tanh())


def hook_after_norm(net, x):
    h = F.conv2d(x, net.w)
    z = net.b(h).tanh()
    h.register_hook(lambda g: 2 * g)
    return mean(z)


def gradient_inside(net, x):
    h = F.conv2d(x, net.w)
    z = net.b(h).tanh()
    (g,) = torch.autograd.grad(
        z.square().sum(), h, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return mean(z) + mean(g)


def data_before_norm(net, x):
    h = F.conv2d(x, net.w)
    h.data.mul_(0.5)
    return mean(net.b(h).tanh())


def input_changed(net, x):
    a = F.conv2d(x, net.w.detach())
    h = F.conv2d(a, torch.ones(4, 4, 1, 1))
    a.mul_(2.0)
    return mean((net.b(h) + a).tanh())


def pooled_in_place(net, x):
    h = F.max_pool2d(F.relu(F.conv2d(x, net.w)), 2)
    h[:, 0] = 0
    return mean(h.tanh())


def view_in_place(net, x):
    h = F.conv2d(x, net.w)
    h.view(len(h), -1).mul_(torch.linspace(0, 1, 144))
    return mean(h.tanh())


def flat_in_place(net, x):
    h = F.conv2d(x, net.w)
    h.flatten(1)[:, 3:] = 0
    return mean(h.tanh())


def changed_under_a_view(net, x):
    h = F.conv2d(x, net.w)
    flat = h.flatten(1)
    h.mul_(2)
    return flat.tanh().unflatten(1, (4, 36)).mean(2) + mean(h)


def strided(net, x):
    h = F.conv2d(x, net.w)
    return h.as_strided((6, 4, 36), (144, 36, 1)).tanh().mean(2)


def viewed_as(net, x):
    return F.conv2d(x, net.w).view_as(torch.empty(24, 36)).view(6, 4, 36).tanh().mean(2)


def complex_view(net, x):
    return mean(torch.view_as_complex(F.conv2d(x, net.w).reshape(6, 4, 6, 3, 2)).abs())


def mapped(net, x):
    return torch.func.vmap(lambda i: F.conv2d(i[None], net.w).tanh().mean((0, 2, 3)))(x)


def shifts_mapped(net, x):
    shifts = net.w[:3, 0, 0, :1] * torch.ones(3, 4)
    norm = torch.func.vmap(lambda b: F.batch_norm(F.conv2d(x, net.w), torch.zeros(4), torch.ones(4), None, b))
    return mean(norm(shifts).mean(0).tanh())


def tangents(net, x):
    v = mean(x.repeat(1, 2, 1, 1)[:, :4])
    return net.n(v) + torch.func.jvp(net.n, (v,), (torch.ones_like(v),))[1]


def checkpointed(net, x):
    return checkpoint(net.n, mean(F.conv2d(x, net.w)), use_reentrant=False)


def inference_inside(net, x):
    with torch.inference_mode():
        h = F.relu(F.conv2d(x, net.w.detach()))
    return net.n(mean(h.clone()))


def complex_convolution(net, x):
    return mean(F.conv2d(torch.complex(x, x), torch.complex(net.w, net.w.flip(0))).abs())


def numpy_stride(net, x):
    return mean(F.max_pool2d(F.conv2d(x, net.w, None, np.int64(2)).tanh(), np.int64(2)))


def sparse_linear(net, x):
    return F.linear(torch.eye(6).to_sparse(), mean(F.conv2d(x, net.w)).T.contiguous()).square()


def group_norm(net, x):
    return mean(F.group_norm(F.conv2d(x, net.w) + 30, 2, net.b.weight, net.b.bias).tanh())


def instance_norm(net, x):
    return mean(F.instance_norm(F.conv2d(x[:1], net.w)).tanh()).repeat(6, 1)


def batch_statistics(net, x):
    h = F.relu(
        F.batch_norm(F.conv2d(x, net.w) + 30, None, None, net.b.weight, net.b.bias, True), inplace=True
    )
    return mean(h.pow(2))


MODELS = [
    unrecorded_convolution, detached, hook_before_norm, hook_after_norm, gradient_inside,
    data_before_norm, input_changed, pooled_in_place, view_in_place, flat_in_place, changed_under_a_view, strided,
    viewed_as, complex_view, mapped, shifts_mapped, tangents, checkpointed, inference_inside, complex_convolution, numpy_stride,
    sparse_linear, group_norm, instance_norm, batch_statistics,
]  # fmt: skip


def plain(net, loss, x, y, vector):
    leaves = list(net.parameters())
    grads = torch.autograd.grad(loss(net(x), y), leaves, create_graph=True, materialize_grads=True)
    flat = torch.cat([g.flatten() for g in grads])
    found = torch.autograd.grad(flat, leaves, vector, materialize_grads=True)
    return torch.cat([g.flatten() for g in found])


def data():
    return torch.randn(6, 3, 8, 8), torch.randint(0, 4, (6,))


@pytest.mark.parametrize("forward", MODELS, ids=lambda f: f.__name__)
def test_products_are_those_of_plain_autograd(forward):
    torch.manual_seed(0)
    net = Net(forward).eval()
    x, y = data()
    vector = torch.randn(sum(p.numel() for p in net.parameters()))
    with unchanged(net):
        ours = hessian(net, F.cross_entropy, [(x, y)]) @ vector
    expected = plain(net, F.cross_entropy, x, y, vector)
    assert expected.norm() > 0
    # Norms of what is far from zero lose digits in either form, and more with the channels last in memory.
    assert (ours - expected).norm() <= 2e-5 * expected.norm()


def test_the_fast_form_is_left_only_where_it_fails():
    torch.manual_seed(0)
    batches = [data()]
    for forward, expected in (
        (pooled_in_place, False),
        (group_norm, False),
        (mapped, False),
        (gradient_inside, True),
    ):
        operator = hessian(Net(forward).eval(), F.cross_entropy, batches)
        assert torch.isfinite(operator @ torch.randn(operator.shape[0])).all()
        assert operator._risk.plain is expected, forward.__name__


def test_an_error_of_the_models_own_comes_as_it_is():
    def fails(net, x):
        raise ZeroDivisionError("by nothing")

    operator = hessian(Net(fails), F.cross_entropy, [data()])
    with pytest.raises(ZeroDivisionError, match="by nothing"):
        operator @ torch.ones(operator.shape[0])
    with pytest.raises(graph.UnsupportedOperation), graph.FastGraph():
        h = F.conv2d(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3))
        strides = h.as_strided((2, 4), (4, 1))
        assert strides.is_contiguous()


@pytest.mark.parametrize("params", [["1.bias", "5.*"], ["1.*", "5.*"]])
def test_a_norm_after_a_frozen_convolution(params):
    """PyTorch's kernel for channels that lie last reads what is not its own here."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(True), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)
    )  # fmt: skip
    twin = copy.deepcopy(net).double()
    x, y = torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))
    for matrix in (hessian, gauss_newton):
        single = matrix(net, F.cross_entropy, [(x, y)], params=params)
        double = matrix(twin, F.cross_entropy, [(x.double(), y)], params=params)
        vector = torch.randn(single.shape[0])
        torch.testing.assert_close((single @ vector).double(), double @ vector.double(), rtol=1e-3, atol=1e-5)


def test_a_module_of_two_names_stays_what_it_was():
    torch.manual_seed(0)
    layer, norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
    net = nn.Sequential(layer, norm, nn.ReLU(), layer, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    held = [*net.parameters(), *net.buffers()]
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(0, 3, (4,)))]
    vector = torch.randn(sum(p.numel() for p in net.parameters()))
    with unchanged(net):
        assert torch.isfinite(hessian(net, F.cross_entropy, batches, batchnorm="train") @ vector).all()
        per_sample_gradients(net.eval(), F.cross_entropy, *batches[0])
        net.train()
    assert all(a is b for a, b in zip(held, [*net.parameters(), *net.buffers()]))
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())


def test_changes_through_data_are_seen():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
    x, y = torch.randn(6, 4), torch.randint(0, 4, (6,))
    operator = hessian(net, F.cross_entropy, [(x, y)])
    vector = torch.randn(operator.shape[0])
    before = operator @ vector
    for p in net.parameters():
        p.data.neg_()
    after = operator @ vector
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, plain(net, F.cross_entropy, x, y, vector))


def test_newton_steps_fall_back_too():
    torch.manual_seed(0)
    problem = Network(Net(strided).eval(), F.cross_entropy, [data()])
    value, slope = problem.value_and_grad(problem.x0)
    assert np.isfinite(value) and slope.norm() > 0
    assert problem.risk.plain


def test_one_step_of_lanczos_has_a_basis_of_one():
    assert lanczos(torch.diag(torch.tensor([1.0, 2.0, 3.0])), 1).basis.shape == (3, 1)
