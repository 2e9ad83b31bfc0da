"""The rewritten operations give the numbers of PyTorch's own, once, twice and in blocks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from lineament.core.twice import Twice


def products(function, leaves, rewritten, block):
    with Twice() if rewritten else nullcontext():
        value = function(*leaves)
    grads = torch.autograd.grad(value, leaves, create_graph=True)
    generator = torch.Generator().manual_seed(1)
    vectors = [torch.randn(4, *g.shape, generator=generator, dtype=torch.float64) for g in grads]
    if block:
        second = torch.autograd.grad(grads, leaves, vectors, is_grads_batched=True)
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
    with Twice() as seen:
        y = torch.tanh(x)
        torch.tanh(x.detach())
    assert seen.bytes == y.numel() * 4
