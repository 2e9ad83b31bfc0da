"""Extraction and aggregation against really inserted layers and materialised outer products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.explain.saliency.aggregation import (
    AGGREGATES,
    Window,
    aggregate_contributions,
    combined,
    normalised,
)
from lineament.explain.saliency.baselines import integrated_gradients
from lineament.explain.saliency.checks import class_sensitivity
from lineament.explain.saliency.maps import saliency
from lineament.explain.saliency.meta import meta_saliency


def pair(seed=0, channels=4, size=(5, 6)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator, dtype=torch.float64) for _ in range(2)]


def materialised(x, g, window: Window, depthwise: bool, groups: int = 1):
    """Every entry of every contribution: (batch, entries, locations)."""
    columns = F.unfold(F.pad(x, window.padding), window.kernel, window.dilation, 0, window.stride)
    patches = columns.reshape(len(x), x.shape[1], -1, columns.shape[-1])
    flat = g.flatten(2)
    if depthwise:
        return (patches * flat[:, :, None]).flatten(1, 2)
    parts = [
        (p.flatten(1, 2)[:, :, None] * q[:, None]).flatten(1, 2)
        for p, q in zip(patches.chunk(groups, 1), flat.chunk(groups, 1))
    ]
    return torch.cat(parts, 1)


def reduced(entries, aggregate):
    return {
        "sum": lambda e: e.sum(1),
        "norm": lambda e: e.square().sum(1).sqrt(),
        "filter_norm": lambda e: e.clamp_min(0).square().sum(1).sqrt(),
        "max": lambda e: e.amax(1),
        "max_abs": lambda e: e.abs().amax(1),
    }[aggregate](entries)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize("extract", ["conv", "depthwise"])
def test_closed_forms_equal_the_materialised_outer_products(extract, aggregate, size):
    x, g = pair()
    window = Window.square(size)
    found = aggregate_contributions(x, g, extract, aggregate, window=window)
    expected = reduced(materialised(x, g, window, extract == "depthwise"), aggregate)
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_real_strided_dilated_grouped_convolution(aggregate, groups):
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=groups).double()
    x = pair()[0]
    g = torch.randn_like(conv(x))
    window = Window.of(conv)
    found = aggregate_contributions(x, g, "conv", aggregate, window=window, groups=groups)
    expected = reduced(materialised(x, g, window, False, groups), aggregate)
    torch.testing.assert_close(found.flatten(1), expected, atol=1e-12, rtol=1e-12)


def test_contributions_sum_to_the_gradient_of_a_really_inserted_layer():
    x, _ = pair()
    head = nn.Linear(4, 3).double()

    def score(y):
        return head(y.tanh().mean((2, 3)))[:, 1].sum()

    leaf = x.clone().requires_grad_()
    g = torch.autograd.grad(score(leaf), leaf)[0]
    bias = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    scale = torch.ones(4, dtype=torch.float64, requires_grad=True)
    kernel = torch.zeros(4, 4, 3, 3, dtype=torch.float64)
    kernel[range(4), range(4), 1, 1] = 1
    kernel.requires_grad_()
    assert torch.allclose(torch.autograd.grad(score(x + bias[:, None, None]), bias)[0], g.sum((0, 2, 3)))
    assert torch.allclose(
        torch.autograd.grad(score(x * scale[:, None, None]), scale)[0], (g * x).sum((0, 2, 3))
    )
    inserted = torch.autograd.grad(score(F.conv2d(x, kernel, padding=1)), kernel)[0]
    entries = materialised(x, g, Window.square(3), False).sum((0, 2))
    torch.testing.assert_close(entries.reshape(4, 9, 4).permute(2, 0, 1).reshape(4, 4, 3, 3), inserted)


def test_linear_approximation_sums_to_the_score_of_a_bias_free_relu_network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3, bias=False),
    ).double()
    x = torch.rand(2, 1, 6, 7).double()
    for site in (":in", "1"):
        maps = saliency(net, x, 2, site=site, method="linear_approx", resize=False)
        torch.testing.assert_close(maps.sum((1, 2, 3)), net(x)[:, 2].detach())


def small(inplace=False):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(inplace), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(inplace),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def test_before_global_pooling_normgrad_ignores_the_class():
    net, x = small().double(), torch.rand(4, 1, 10, 12).double()
    assert abs(class_sensitivity(net, x, site="4", resize=False).mean - 1) < 1e-6
    assert class_sensitivity(net, x, site="4", method="gradient").undefined == 4
    stepped = class_sensitivity(net, x, site="4", explain=meta_saliency, eps=0.5, resize=False)
    assert stepped.mean < 1


def test_integrated_gradients_are_complete_and_agree_with_any_chunking():
    net, x = small().double(), torch.rand(3, 1, 10, 12).double()
    found = integrated_gradients(net, x, 2, steps=256)
    with torch.no_grad():
        expected = net(x)[:, 2] - net(torch.zeros_like(x))[:, 2]
    torch.testing.assert_close(found.sum((1, 2, 3)), expected, atol=2e-3, rtol=0)
    torch.testing.assert_close(found, integrated_gradients(net, x, 2, steps=256, batch_size=7))


def test_excitation_conserves_mass_through_residual_sums():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = (
                nn.Conv2d(1, 4, 3, padding=1),
                nn.Conv2d(4, 4, 3, padding=1),
                nn.Linear(4, 3),
            )

        def forward(self, x):
            y = F.relu(self.a(x))
            return self.fc((F.relu(self.b(y)) + y).mean((2, 3)))

    torch.manual_seed(0)
    net = Residual().double()
    for module in (net.a, net.b, net.fc):
        nn.init.uniform_(module.weight, 0, 1)
    maps = saliency(net, torch.rand(2, 1, 6, 6).double(), 1, site=":in", method="excitation_backprop")
    torch.testing.assert_close(maps.sum((1, 2, 3)), torch.ones(2).double())


def test_constant_maps_normalise_to_zeros_and_combine_without_nan():
    maps, constant = normalised(torch.cat([torch.full((1, 1, 2, 2), 3.0), torch.rand(1, 1, 2, 2)]))
    assert constant.tolist() == [True, False] and maps[0].abs().max() == 0 and maps[1].max() == 1
    assert torch.isfinite(combined([torch.ones(1, 1, 2, 2), torch.rand(1, 1, 4, 4)], (4, 4))).all()
