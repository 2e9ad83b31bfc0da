"""Weights that are computed (weight norm, spectral norm, orthogonal maps, pruning masks) are drawn anew and copied as plain ones are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from lineament.core.checks import InputError
from lineament.core.redrawing import copied
from lineament.explain.saliency.checks import randomisation
from lineament.train.stacked import refreshed


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).mT


MAKERS = {
    "plain": lambda layer: layer,
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "weight_norm": weight_norm,
    "weight_norm over all": lambda layer: weight_norm(layer, dim=None),
    "spectral_norm": spectral_norm,
    "pruned": lambda layer: prune.random_unstructured(layer, "weight", 0.3),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def network(name):
    """Learned: all weights are far from what anybody draws; and one forward with a graph has been made."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(MAKERS[name](nn.Linear(3, 3)), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        for parameter in net[0].parameters():
            parameter.mul_(50)
    net(torch.ones(1, 3))
    return net.eval()


@pytest.mark.parametrize("name", MAKERS)
def test_nothing_that_was_learned_stays(name):
    net = network(name)
    before = {n: p.clone() for n, p in net.state_dict().items()}
    fresh, again, other = refreshed(net, 1), refreshed(net, 1), refreshed(net, 2)
    x = torch.eye(3)
    assert torch.equal(fresh(x), again(x)) and not torch.equal(fresh(x), other(x))
    for parameter in fresh[0].parameters():
        # Of three inputs nothing beyond 1/sqrt(3) is drawn; rows and whole matrices are at most so many times longer.
        assert float(parameter.abs().max()) <= 2
    assert 0.01 < float(fresh[0].weight.abs().max()) <= 1.5
    assert all(torch.equal(net.state_dict()[n], value) for n, value in before.items())


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_forward_computes_is_the_weight_that_was_drawn(name):
    fresh = refreshed(network(name), 1)
    x = torch.eye(3)
    by_hand = x @ fresh[0].weight.detach().T + fresh[0].bias.detach()
    torch.testing.assert_close(fresh[0](x).detach(), by_hand)
    if name == "pruned":
        assert int((fresh[0].weight == 0).sum()) == 3
    if "spectral" in name:
        assert float(torch.linalg.matrix_norm(fresh[0].weight, 2)) == pytest.approx(1, abs=1e-3)
    if "orthogonal" in name:
        torch.testing.assert_close(fresh[0].weight @ fresh[0].weight.mT, x)


@pytest.mark.parametrize("name", MAKERS)
def test_a_copy_answers_alike_after_a_forward_with_a_graph(name):
    net = network(name)
    assert torch.equal(copied(net)(torch.eye(3)), net(torch.eye(3)))


@pytest.mark.parametrize("name", MAKERS)
def test_randomised_maps_draw_them_too(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            MAKERS[name](nn.Conv2d(1, 3, 3)),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(3, 2),
        ).eval()
    found = randomisation(net, torch.rand(2, 1, 6, 6), site="1")
    assert found.layers == ["4", "0"] and not found.skipped


def test_a_parametrization_without_a_way_back_is_said():
    net = nn.Sequential(nn.Linear(3, 3))
    parametrize.register_parametrization(net[0], "weight", Symmetric())
    with pytest.raises(InputError, match=r"weight of ParametrizedLinear cannot be drawn anew.*right_inverse"):
        refreshed(net)
