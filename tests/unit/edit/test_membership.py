"""The likelihood-ratio attack on unlearning."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.edit import u_lira


class Says(nn.Module):
    """Log-odds of class 0 by sample, in any network alike but for noise."""

    def __init__(self, odds: torch.Tensor):
        super().__init__()
        self.register_buffer("odds", odds)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.odds[x[:, 0].long()]
        return torch.stack([own, torch.zeros_like(own)], 1)


def networks(count: int, gap: float, noise: float = 1.0) -> tuple[list[nn.Module], list[nn.Module]]:
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(40, generator=generator)
    kinds = [
        [Says(level + shift + noise * torch.randn(40, generator=generator)) for _ in range(count)]
        for shift in (gap, 0.0)
    ]
    return kinds[0], kinds[1]


SAMPLES = (torch.arange(40.0)[:, None], torch.zeros(40).long())


def test_two_kinds_alike_are_told_by_chance():
    found = u_lira(*networks(20, 0.0), SAMPLES)
    assert abs(found.accuracy - 0.5) < 3 * found.error + 0.02 and found.networks == 20 and found.samples == 40


def test_kinds_apart_are_told_as_often_as_the_normal_distribution_says():
    # Means two deviations apart, equal spreads: Φ(1).
    found = u_lira(*networks(60, 2.0), SAMPLES)
    known = float(torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor(1.0)))
    assert found.accuracy == pytest.approx(known, abs=3 * found.error + 0.005)


def test_a_confident_network_has_finite_odds():
    edited, never = networks(3, 200.0)
    assert u_lira(edited, never, SAMPLES).accuracy == 1


def test_too_few_networks_are_refused():
    edited, never = networks(2, 0.0)
    with pytest.raises(InputError, match="got 2 edited and 2"):
        u_lira(edited, never, SAMPLES)
