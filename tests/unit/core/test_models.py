"""A model's logits are found in what it returns, and a model is left as it was."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.core.models import answered, device_of, dtype_of, frozen, logits


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"logits": t}, lambda t: OrderedDict(loss=None, logits=t),
                                  lambda t: SimpleNamespace(logits=t), lambda t: (t,)])  # fmt: skip
def test_logits_are_found(wrap):
    scores = torch.rand(2, 3)
    assert logits(wrap(scores)) is scores


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"scores": torch.rand(2)}, r"dict with keys \['scores'\]"),
        (None, "NoneType"),
        ((torch.rand(2),) * 2, "tuple"),
    ],
)
def test_other_outputs_are_named(output, message):
    with pytest.raises(InputError, match=message):
        logits(output)


def test_frozen_puts_every_mode_and_flag_back_after_an_exception():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    net[1].eval()
    net[0].bias.requires_grad_(False)
    modes = [m.training for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    with pytest.raises(RuntimeError), frozen(net):
        assert not any(m.training for m in net.modules())
        assert not any(p.requires_grad for p in net.parameters())
        raise RuntimeError
    assert [m.training for m in net.modules()] == modes
    assert [p.requires_grad for p in net.parameters()] == flags


def test_device_and_dtype_follow_the_model():
    assert dtype_of(nn.Linear(2, 2).double()) == torch.float64
    assert dtype_of(nn.ReLU()) == torch.get_default_dtype()
    assert device_of(nn.ReLU()) == torch.device("cpu")


def test_inputs_that_do_not_fit_are_named_and_other_faults_keep_theirs():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    assert answered(net, torch.zeros(3, 1, 4, 4)).shape == (3, 2)
    with pytest.raises(
        InputError, match=r"Sequential does not take images of shape \(2, 4, 4\) in float32 \(.*channels"
    ):
        answered(net, torch.zeros(3, 2, 4, 4))
    with pytest.raises(InputError, match=r"of shape \(1, 5, 5\)"):
        answered(net, torch.zeros(3, 1, 5, 5))
    for message in ("CUDA out of memory. Tried to allocate a size of 2", "broken"):

        def failing(x, message=message):
            raise RuntimeError(message)

        with pytest.raises(RuntimeError, match=message):
            answered(failing, torch.zeros(1, 1))
