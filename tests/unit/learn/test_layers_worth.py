"""What layers are worth: a head that weighs is unseen by standardised read-outs, and a head that projects is seen by both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.core.statistics.effective_rank import effective_rank
from lineament.learn import Reweighting, WithHead, layers_worth
from lineament.learn.projection.pooling import pooled


def test_a_weighing_head_is_seen_by_plain_read_outs_only():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=generator)
    y = (x[:, 7] > 0).long()
    with pytest.warns(UserWarning, match="7 of 8 coordinates"):
        net = WithHead(nn.Identity(), Reweighting(8, 8.0)).train()
    found = layers_worth(net, (x[:200], y[:200]), (x[200:], y[200:]), sites=["encoder", "head"])
    before, after = found["encoder"], found["head"]
    assert before.logistic_standardised == pytest.approx(after.logistic_standardised, abs=0.011)
    assert before.logistic > 0.9 > after.logistic + 0.2 and found.best is before and net.training
    assert before.rank > 7 and after.rank < 2
    assert before.dfr is None


def test_the_worst_group_is_read_out_from_as_many_of_each():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (400,), generator=generator)
    agree = torch.rand(400, generator=generator) < 0.95
    easy = torch.where(agree, y, 1 - y)
    x = torch.stack([2.0 * y - 1, 8.0 * easy - 4], 1) + 0.3 * torch.randn(400, 2, generator=generator)
    net = nn.Sequential(nn.Identity(), nn.Linear(2, 1))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[0.0, 1.0]]))
    groups = (agree.long()[:200], agree.long()[200:])
    found = layers_worth(net, (x[:200], y[:200]), (x[200:], y[200:]), groups=groups, mlp=None)
    assert found["0"].dfr.worst > 0.9 and found["1"].dfr.worst < 0.7


def test_maps_are_pooled_and_rank_is_closed_form():
    assert pooled(torch.arange(8.0).view(1, 2, 2, 2)).tolist() == [[1.5, 5.5]]
    x = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    shares = torch.tensor([0.8, 0.2])
    assert effective_rank(x) == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())))
    assert effective_rank(torch.ones(4, 2)) == 0


def test_labels_that_do_not_fit_and_unknown_sites_are_named():
    net, x = nn.Sequential(nn.Linear(2, 2)), torch.randn(4, 2)
    with pytest.raises(InputError, match="test: got label -1, expected classes from 0 on"):
        layers_worth(net, (x, torch.arange(4) % 2), (x, torch.arange(4) % 2 - 1))
    with pytest.raises(InputError, match="train: got 4 inputs and 3 targets"):
        layers_worth(net, (x, torch.zeros(3).long()), (x, torch.zeros(4).long()))
    found = layers_worth(net, (x, torch.tensor([0, 1, 0, 1])), (x, torch.tensor([0, 1, 0, 1])))
    with pytest.raises(InputError, match="expected one of '0'"):
        found["1"]
