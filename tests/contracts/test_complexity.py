"""What every measure of features keeps: the model as it was, also after an exception; one seed, one answer; any precision; finite data."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.core.results import plain
from lineament.measure.complexity.checkpoints import temporal_score, training_dynamics
from lineament.measure.complexity.features import feature_function
from lineament.measure.complexity.flow import flow, residual_branches
from lineament.measure.complexity.groups import feature_objective
from lineament.measure.complexity.importance import importance
from lineament.measure.complexity.layers import complexity
from lineament.measure.complexity.redundancy import redundancy
from lineament.measure.complexity.removal import dictionary_quality, support_features
from lineament.measure.complexity.robustness import robustness
from tests.contracts.unchanged import unchanged


class Net(nn.Module):
    """Batch norm, dropout, a sum and a ReLU in place; ``broken`` raises in the last layer."""

    def __init__(self, broken=False):
        super().__init__()
        torch.manual_seed(0)
        self.broken = broken
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block = Residual()
        self.drop, self.out = nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        x = self.block(self.norm(self.stem(x)))
        if self.broken:
            raise RuntimeError("broken")
        return self.out(self.drop(x.mean((2, 3))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)

    def forward(self, x):
        out = self.conv(x)
        out += x
        return self.relu(out)


def network(broken=False, dtype=torch.float32):
    net = Net(broken).to(dtype)
    net.train()
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    net.stem.weight.requires_grad_(False)
    return net


def data(dtype=torch.float32, count=60):
    g = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 5, 5, generator=g).to(dtype), torch.arange(count) % 3


def units(dtype=torch.float32):
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(2)))[0].to(dtype)
    return SimpleNamespace(site="block", atoms=turn, encode=lambda x: x @ turn.T, decode=lambda z: z @ turn)


WAYS = {
    "complexity": lambda net, d, u: complexity(net, d, u, sites=["stem", "block"]),
    "positions": lambda net, d, u: complexity(net, d, u, sites=["stem", "block"], rows="positions"),
    "learned": lambda net, d, u: complexity(net, d, u, sites=["stem", "block"], variance="learned", ridge=(0.1, 1.0)),
    "temporal": lambda net, d, u: temporal_score(net, [net.state_dict()] * 2, d, u),
    "dynamics": lambda net, d, u: training_dynamics(net, [net.state_dict()], d, lambda _: u, sites=["stem", "block"]),
    "importance": lambda net, d, u: importance(net, d, u),
    "importance of all": lambda net, d, u: importance(net, d, u, classes="mean"),
    "support": lambda net, d, u: support_features(net, d, u, torch.arange(4)),
    "quality": lambda net, d, u: dictionary_quality(net, d, u),
    "flow": lambda net, d, u: flow(net, d, u, form="debiased"),
    "branches": lambda net, d, u: residual_branches(net, d[0][:4]),
    "redundancy": lambda net, d, u: redundancy(net, d, u, keep=0.9, masks=4),
    "robustness": lambda net, d, u: robustness(feature_function(net, u), d[0][:5], draws=3),
    "objective": lambda net, d, u: feature_objective(net, u, 1)(d[0][:5]),
}  # fmt: skip
# Those that need no more of the model than what comes before the site.
EARLY = (
    "branches",
    "complexity",
    "positions",
    "learned",
    "temporal",
    "redundancy",
    "robustness",
    "objective",
)


def numbers(value):
    found = plain(value)
    while isinstance(found, dict):
        found = list(found.values())
    return str(found)


@pytest.mark.parametrize("way", WAYS)
def test_the_model_is_left_as_it_was(way):
    net = network()
    with unchanged(net):
        WAYS[way](net, data(), units())


@pytest.mark.parametrize("way", [way for way in WAYS if way not in EARLY or way == "branches"])
def test_the_model_is_left_as_it_was_by_an_exception(way):
    net = network(broken=True)
    with unchanged(net), pytest.raises(RuntimeError, match="broken"):
        WAYS[way](net, data(), units())


@pytest.mark.parametrize("way", WAYS)
def test_one_seed_one_answer(way):
    torch.manual_seed(5)
    first = numbers(WAYS[way](network(), data(), units()))
    torch.manual_seed(6)
    assert numbers(WAYS[way](network(), data(), units())) == first


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS)
def test_other_precisions_give_about_the_same(way, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = WAYS[way](network(dtype=dtype), data(dtype), units(dtype))
        single = WAYS[way](network(), data(), units())
    for name, value in getattr(found, "__dict__", {}).items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and "errors" not in name:
            loose = dtype == torch.bfloat16
            torch.testing.assert_close(
                value.double(),
                getattr(single, name).double(),
                rtol=0.1 if loose else 1e-3,
                atol=0.1 if loose else 1e-3,
            )


@pytest.mark.parametrize("way", [w for w in WAYS if w != "objective"])
def test_images_that_are_not_finite_are_refused(way):
    images, labels = data()
    images[3] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        WAYS[way](network(), (images, labels), units())


@pytest.mark.parametrize("way", [w for w in WAYS if w not in ("branches", "objective", "robustness")])
def test_empty_data_are_refused(way):
    with pytest.raises(InputError, match=r"empty|got no|no batches"):
        WAYS[way](network(), data(count=0), units())


def test_results_do_not_depend_on_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(complexity(network(), data(), units(), sites=["stem", "block"]).information)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)
