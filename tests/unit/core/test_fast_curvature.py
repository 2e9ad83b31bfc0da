"""The rewritten operations give the numbers of PyTorch's own, once, twice and in blocks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from lineament.core.curvature.fast import products as matrix_products
from lineament.core.curvature.fast.graph import FastGraph


@pytest.fixture
def wide_registers(monkeypatch):
    """The matrix products of processors with AVX-512, on any."""
    monkeypatch.setattr(matrix_products, "faster_here", torch.backends.mkldnn.is_available)


def products(function, leaves, rewritten, block):
    with FastGraph() if rewritten else nullcontext():
        value = function(*leaves)
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(4, *g.shape, generator=generator, dtype=torch.float64) for g in grads]
    if block:
        second = vmap(lambda v: torch.autograd.grad(grads, leaves, v, retain_graph=True))(vectors)
    else:
        each = [
            torch.autograd.grad(grads, leaves, [v[i] for v in vectors], retain_graph=True) for i in range(4)
        ]
        second = [torch.stack(parts) for parts in zip(*each)]
    return [value, *grads, *second]


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": 2, "padding": (1, 0)}, {"dilation": 2}, {"padding": "same"}],
)
def test_convolutions(options, groups, block):
    torch.manual_seed(0)
    shapes = [(3, 4, 8, 7), (8, 4 // groups, 3, 3), (8,), (2, 8, 1, 1)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def function(x, w, b, last):
        return F.conv2d(F.conv2d(x, w, b, groups=groups, **options).tanh(), last).pow(3).mean()

    torch.testing.assert_close(
        products(function, leaves, True, block), products(function, leaves, False, False)
    )


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("sides", [1, 3])
def test_convolutions_of_signals_and_volumes(sides, block):
    torch.manual_seed(0)
    convolve = {1: F.conv1d, 3: F.conv3d}[sides]
    shapes = [(2, 3, *[5] * sides), (4, 3, *[3] * sides)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def function(x, w):
        return convolve(x, w, padding=1).tanh().mean()

    torch.testing.assert_close(
        products(function, leaves, True, block), products(function, leaves, False, False)
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(training, affine):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(6, 3, 4, 4), (3,), (3,)]]
    mean, var = torch.randn(3).double(), torch.rand(3).double() + 0.5

    def function(x, w, b):
        y = F.batch_norm(x, mean.clone(), var.clone(), w if affine else None, b if affine else None, training)
        return (y.tanh() * (1 + w).reshape(3, 1, 1)).mean() + b.pow(3).sum()

    torch.testing.assert_close(
        products(function, leaves, True, True), products(function, leaves, False, False)
    )


def test_what_a_graph_keeps_is_counted():
    x = torch.randn(10, 100, requires_grad=True)
    with FastGraph() as seen:
        y = torch.tanh(x)
        torch.tanh(x.detach())
    assert seen.bytes == y.numel() * 4


def in_single_precision(function, shapes, block):
    """The rewritten float32 numbers, and PyTorch's own in float64."""
    torch.manual_seed(0)
    exact = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    ours = [leaf.detach().float().requires_grad_() for leaf in exact]
    for a, b in zip(products(function, ours, True, block), products(function, exact, False, False)):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 2e-6 * b.norm()


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(
    "form",
    ["linear", "linear without bias", "addmm", "changed in place", "bias with a stride", "one bias for all"],
)
def test_linear_layers_in_single_precision(form, block, wide_registers):
    def function(x, w, b, v):
        if form == "addmm":
            hidden = torch.addmm(b, x.flatten(0, 1), w.T)
        else:
            bias = {
                "linear without bias": None,
                "bias with a stride": b.repeat(2)[::2],
                "one bias for all": b[:1].expand(96),
            }
            hidden = F.linear(x, w, bias.get(form, b))
        if form == "changed in place":
            hidden += x[..., :1]
            hidden *= 2
        return F.linear((hidden / 8).tanh(), v).square().mean() + b.pow(3).mean()

    in_single_precision(function, [(3, 40, 64), (96, 64), (96,), (80, 96)], block)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1}])
def test_convolutions_in_single_precision(options, block):
    def function(x, w, b, last):
        y = F.conv2d((F.conv2d(x, w, b, **options) / 12).tanh(), last)
        # A view of what PyTorch's convolution leaves contiguous.
        return y.view(len(y), -1).pow(3).mean()

    in_single_precision(function, [(3, 16, 9, 9), (32, 16, 3, 3), (32,), (4, 32, 2, 2)], block)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("case", ["plain", "bias", "not affine", "used twice", "changed", "grouped"])
def test_batch_norm_after_a_convolution(case, block):
    torch.manual_seed(0)
    groups = 2 if case == "grouped" else 1
    shapes = [(3, 4, 5, 5), (6, 4 // groups, 3, 3), (6,), (6,), (6,)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    mean, var = torch.randn(6).double(), torch.rand(6).double() + 0.5

    def function(x, w, b, scale, shift):
        y = F.conv2d(x, w, b if case == "bias" else None, groups=groups)
        if case == "changed":
            y.add_(1)
        affine = (None, None) if case == "not affine" else (scale, shift)
        z = F.batch_norm(y, mean, var, *affine)
        if case == "used twice":
            z = z + y
        return (z.tanh() * (1 + scale * b).reshape(6, 1, 1)).mean() + (shift * b).pow(3).sum()

    torch.testing.assert_close(
        products(function, leaves, True, block), products(function, leaves, False, False)
    )


def test_a_bias_of_another_size_is_refused_as_by_pytorch(wide_registers):
    x, w = torch.randn(70, 80, requires_grad=True), torch.randn(90, 80)
    with FastGraph():
        wide = F.linear(x, w, torch.randn(1))
        with pytest.raises(RuntimeError, match="size"):
            F.linear(x, w, torch.randn(80))
    assert wide.shape == (70, 90)


@pytest.mark.parametrize("kind", ["convolution", "batch norm"])
def test_results_may_be_changed_in_place(kind):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 2, 8, 8), (2, 2, 3, 3)]]

    def function(x, w):
        y = F.conv2d(x, w)
        if kind == "batch norm":
            y = F.batch_norm(y, torch.randn(2).double(), torch.rand(2).double() + 1, w[0, 0, 0, :2])
        y += 0.5
        y *= 2
        return y.pow(3).mean()

    torch.manual_seed(1)
    ours = products(function, leaves, True, False)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, products(function, leaves, False, False))


def test_one_picture_channel_keeps_the_layout_of_the_others():
    x, w = torch.randn(2, 1, 8, 8), torch.randn(4, 1, 3, 3, requires_grad=True)
    with FastGraph():
        y = F.conv2d(x, w)
    if torch.backends.mkldnn.is_available():
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.conv2d(x, w))


@pytest.mark.parametrize("rows", [5, 70])
def test_linear_layers_differentiate_a_third_time(rows, wide_registers):
    torch.manual_seed(0)
    tensors = torch.randn(rows, 80), torch.randn(90, 80) / 9, torch.randn(90)
    found = []
    for context in (FastGraph(), nullcontext()):
        leaves = [t.clone().requires_grad_() for t in tensors]
        with context:
            value = F.linear(*leaves).tanh().pow(3).sum()
        for _ in range(2):
            value = sum(g.pow(2).mean() for g in torch.autograd.grad(value, leaves, create_graph=True))
        found.append(torch.autograd.grad(value, leaves))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_relu(inplace, block):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(5, 4), (4, 6)]]

    def function(x, w):
        return torch.relu(F.relu(x * 1, inplace) @ w).pow(3).mean()

    torch.testing.assert_close(
        products(function, leaves, True, block), products(function, leaves, False, False)
    )
