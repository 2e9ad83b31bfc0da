"""The rewritten operations give the numbers of PyTorch's own, once, twice and in blocks."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from lineament.core.curvature.fast.graph import Twice


def products(function, leaves, rewritten, block):
    with Twice() if rewritten else nullcontext():
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
    with Twice() as seen:
        y = torch.tanh(x)
        torch.tanh(x.detach())
    assert seen.bytes == y.numel() * 4


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(
    "activation",
    [
        F.relu,
        torch.relu,
        F.gelu,
        lambda x: F.gelu(x, approximate="tanh"),
        F.silu,
        lambda x: F.relu(x * 1, True),
    ],
    ids=["relu", "torch.relu", "gelu", "gelu tanh", "silu", "relu in place"],
)
def test_activations(activation, block):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(5, 4), (4, 6)]]

    def function(x, w):
        return activation(activation(x) @ w).pow(2).mean()

    torch.testing.assert_close(
        products(function, leaves, True, block), products(function, leaves, False, False)
    )


@pytest.mark.parametrize("activation", [F.gelu, F.silu, F.relu])
def test_activations_differentiate_a_third_time(activation):
    x = torch.linspace(-2, 2, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for context in (Twice(), nullcontext()):
        with context:
            value = activation(x).pow(3).sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), x, create_graph=True)
        found.append(value.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": True},
        {"ignore_index": 2},
        {"reduction": "sum"},
        {"label_smoothing": 0.2},
        {"probabilities": True},
        {"unbatched": True},
        {"pixels": True},
        {"log_softmax": True},
    ],
    ids=str,
)
def test_cross_entropy(options, block):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(6, 4), (4, 5)]]
    target = torch.tensor([0, 2, 1, 4, 2, 3])
    options = dict(options)
    if options.pop("weight", False):
        options["weight"] = torch.rand(5).double()
    form = next(
        (f for f in ("probabilities", "unbatched", "pixels", "log_softmax") if options.pop(f, False)), ""
    )

    def function(x, w):
        scores = (x @ w).tanh()
        if form == "log_softmax":
            return (F.log_softmax(scores, dim=-1) * w[:1]).pow(2).mean()
        if form == "unbatched":
            return F.cross_entropy(scores[1], target[1])
        if form == "pixels":
            return F.cross_entropy(scores.T[None], target[None])
        if form == "probabilities":
            return F.cross_entropy(scores, torch.ones(6, 5).double() / 5)
        return F.cross_entropy(scores, target, **options)

    torch.testing.assert_close(
        products(function, leaves, True, block), products(function, leaves, False, False)
    )
    third = []
    for context in (Twice(), nullcontext()):
        with context:
            value = function(*leaves)
        for _ in range(2):
            value = sum(g.pow(2).mean() for g in torch.autograd.grad(value, leaves, create_graph=True))
        third.append(torch.autograd.grad(value, leaves))
    torch.testing.assert_close(*third)


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
def test_linear_layers_in_single_precision(form, block):
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


POOLS = [
    {"kernel_size": 2},
    {"kernel_size": 3, "stride": 2, "padding": 1},
    {"kernel_size": (3, 2), "stride": 1},
    {"kernel_size": 2, "ceil_mode": True, "dilation": 2},
]


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("options", POOLS)
def test_max_pooling(options, channels, block):
    torch.manual_seed(0)
    shapes = [(2, channels, 9, 8), (channels, channels, 3, 3)]
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def function(x, w):
        return F.max_pool2d(F.conv2d(x, w).tanh(), **options).pow(3).mean()

    torch.testing.assert_close(
        products(function, leaves, True, block), products(function, leaves, False, False)
    )


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize("options", POOLS[:2])
def test_max_pooling_in_the_layout_of_single_precision(options, block):
    def function(x, w, v):
        y = F.max_pool2d(F.conv2d(x, w).tanh(), **options)
        return F.conv2d(y, v).pow(3).mean()

    in_single_precision(function, [(2, 1, 12, 11), (4, 1, 3, 3), (3, 4, 1, 1)], block)


def test_max_pooling_that_gives_its_places_or_pools_signals_stays_pytorchs_own():
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    with Twice():
        pooled, places = F.max_pool2d(x, 2, return_indices=True)
        unbatched = F.max_pool2d(x[0], 2)
    torch.testing.assert_close([pooled, places], [*F.max_pool2d(x, 2, return_indices=True)])
    torch.testing.assert_close(unbatched, F.max_pool2d(x[0], 2))


@pytest.mark.parametrize("kind", ["linear", "small linear", "pool"])
def test_what_is_rewritten_differentiates_a_third_time(kind):
    torch.manual_seed(0)
    pool = kind == "pool"
    # Large enough for the fast kernel, or small.
    rows = 70 if kind == "linear" else 5
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64) if pool else torch.randn(rows, 80)
    w = torch.randn(2, 2, 3, 3, dtype=torch.float64) if pool else torch.randn(90, 80) / 9
    bias = torch.randn(len(w), dtype=w.dtype)
    found = []
    for context in (Twice(), nullcontext()):
        leaves = [t.clone().requires_grad_() for t in (x, w, bias)]
        with context:
            inside = F.max_pool2d(F.conv2d(*leaves), 2) if pool else F.linear(*leaves)
            value = inside.tanh().pow(3).sum()
        for _ in range(2):
            value = sum(g.pow(2).mean() for g in torch.autograd.grad(value, leaves, create_graph=True))
        found.append(torch.autograd.grad(value, leaves))
    torch.testing.assert_close(*found, rtol=1e-6 if pool else 1e-3, atol=1e-5)


def test_a_bias_of_another_size_is_refused_as_by_pytorch():
    x, w = torch.randn(70, 80, requires_grad=True), torch.randn(90, 80)
    with Twice():
        wide = F.linear(x, w, torch.randn(1))
        with pytest.raises(RuntimeError, match="size"):
            F.linear(x, w, torch.randn(80))
    assert wide.shape == (70, 90)


@pytest.mark.parametrize("block", [False, True])
@pytest.mark.parametrize(
    "case", ["pooled", "used twice", "changed before", "places", "in place", "overlapping"]
)
def test_max_pooling_after_relu(case, block):
    torch.manual_seed(0)
    # Mostly negative: some windows hold nothing that ReLU lets through.
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 2, 8, 8), (2,)]]

    def function(x, w):
        z = x * w.reshape(2, 1, 1) - 0.7
        y = F.relu(z, case == "in place")
        if case == "changed before":
            z.add_(3)
        options = {"stride": 1, "padding": 1} if case == "overlapping" else {}
        pooled = F.max_pool2d(y, 2, **options, return_indices=case == "places")
        pooled, places = pooled if case == "places" else (pooled, torch.zeros(()))
        more = y.pow(2).mean() if case == "used twice" else 0.0
        return pooled.pow(3).mean() + more + (pooled * places).mean()

    torch.testing.assert_close(
        products(function, leaves, True, block), products(function, leaves, False, False)
    )


@pytest.mark.parametrize("kind", ["convolution", "batch norm", "pool"])
def test_results_may_be_changed_in_place(kind):
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(3, 2, 8, 8), (2, 2, 3, 3)]]

    def function(x, w):
        y = F.conv2d(x, w)
        if kind == "batch norm":
            y = F.batch_norm(y, torch.randn(2).double(), torch.rand(2).double() + 1, w[0, 0, 0, :2])
        if kind == "pool":
            y = F.max_pool2d(y, 2)
        y += 0.5
        y *= 2
        return y.pow(3).mean()

    torch.manual_seed(1)
    ours = products(function, leaves, True, False)
    torch.manual_seed(1)
    torch.testing.assert_close(ours, products(function, leaves, False, False))


def test_one_picture_channel_keeps_the_layout_of_the_others():
    x, w = torch.randn(2, 1, 8, 8), torch.randn(4, 1, 3, 3, requires_grad=True)
    with Twice():
        y = F.conv2d(x, w)
    if torch.backends.mkldnn.is_available():
        assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, F.conv2d(x, w))
