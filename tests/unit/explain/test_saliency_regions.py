"""Maps for a class of a region: the gradient of its mean logit, by hand, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.explain import over_region, saliency

REGION = torch.zeros(6, 6, dtype=torch.bool)
REGION[1:3, 4:] = True


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))


@pytest.mark.parametrize("site", [":in", "1"])
def test_the_gradient_of_the_mean_logit_of_the_region(net, site):
    x = torch.rand(2, 2, 6, 6, requires_grad=True)
    acts = net[:2](x)
    score = net[2](acts)[:, 1][:, REGION].mean(1).sum()
    (g,) = torch.autograd.grad(score, x if site == ":in" else acts)
    at = x if site == ":in" else acts
    with over_region(net, REGION):
        maps = saliency(net, x.detach(), 1, site=site, method="grad_cam" if site == "1" else "gradient")
    by_hand = (
        g.abs().amax(1, keepdim=True)
        if site == ":in"
        else (g.mean((2, 3), keepdim=True) * at).sum(1, keepdim=True).relu()
    )
    assert torch.allclose(maps, by_hand.detach(), atol=1e-6)
    assert net(x).shape == (2, 3, 6, 6) and not net._forward_hooks


def test_regions_that_cannot_be(net):
    for region in (torch.zeros(6, 6), torch.ones(6), -torch.ones(6, 6)):
        with pytest.raises(InputError, match="region: got"), over_region(net, region):
            pass
    with pytest.raises(InputError, match=r"region: its size is \(5, 5\)"), over_region(net, torch.ones(5, 5)):
        net(torch.zeros(1, 2, 6, 6))
    assert not net._forward_hooks
