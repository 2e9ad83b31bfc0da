"""The assertion that other tests rely on must fail for everything that can be left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn


def _grad(net):
    net[0].weight.grad = torch.zeros_like(net[0].weight)


def _forward(net):
    net[1].forward = lambda x: x


def _buffer(net):
    with torch.no_grad():
        net[1].running_mean.mul_(-1.0)  # 0.0 becomes -0.0


def _weight(net):
    net[0].weight = nn.Parameter(net[0].weight.detach().clone())


LEFT = {
    "forward hook": lambda net: net[0].register_forward_hook(lambda *_: None),
    "pre-hook": lambda net: net.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda net: net[0].register_full_backward_hook(lambda *_: None),
    "tensor hook": lambda net: net[0].weight.register_hook(lambda g: None),
    "mode": lambda net: net[1].eval(),
    "flag": lambda net: net[0].bias.requires_grad_(False),
    "grad": _grad,
    "forward": _forward,
    "buffer": _buffer,
    "same weight in another tensor": _weight,
    "module": lambda net: net.append(nn.ReLU()),
    "random generator": lambda net: torch.rand(1),
}


@pytest.mark.parametrize("left", LEFT.values(), ids=LEFT.keys())
def test_everything_left_behind_is_noticed(left):
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(AssertionError, match="left behind"), unchanged(net):
        left(net)


def test_global_hooks_are_noticed_and_a_clean_block_passes():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with unchanged(net):
        copy.deepcopy(net)(torch.ones(3, 2))
        with pytest.raises(ZeroDivisionError), torch.no_grad():
            net.eval()
            net.train()
            _ = 1 / 0
    handle = None
    try:
        with pytest.raises(AssertionError, match="global hooks"), unchanged(net):
            handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    finally:
        assert handle is not None
        handle.remove()
