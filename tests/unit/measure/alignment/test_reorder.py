"""Reordered networks compute what they did, permuted copies are found again, and the line between them is flat."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.contracts.surgery_networks import made
from torch import nn

from lineament.core.checks import InputError
from lineament.core.surgery import channel_groups, permute
from lineament.measure.alignment.profile import alignment
from lineament.measure.alignment.reorder import barrier, permuted


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.inner, self.norm = nn.Conv2d(6, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.outer = nn.Conv2d(5, 6, 3, padding=1)
        self.head = nn.Linear(6 * 16, 3)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.outer(self.norm(self.inner(x)).relu())
        return self.head(x.flatten(1))


@pytest.fixture(scope="module")
def setting():
    torch.manual_seed(0)
    net, x = Residual(), torch.randn(64, 1, 4, 4)
    for _ in range(3):
        net(x)
    net.eval()
    groups = channel_groups(net, x[:2])
    orders = {
        g: torch.randperm(g.size, generator=torch.Generator().manual_seed(3)) for g in groups.groups.values()
    }
    assert len(orders) == 2
    return net, permute(net, orders).eval(), x, torch.arange(64) % 3


@pytest.mark.parametrize("by", ["activations", "weights"])
def test_a_permuted_copy_is_put_back(by: str, setting) -> None:
    net, other, x, y = setting
    assert not torch.equal(other.stem.weight, net.stem.weight)
    found = alignment(net, other, (x, y), sites=["stem", "inner"], nulls=())
    again = permuted(other, found, x[:2], model_a=net, by=by)
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor, msg=name)
    before, after = (
        barrier(net, other, (x, y), points=5),
        barrier(net, again, (x, y), points=5, renormalise=False),
    )
    assert float((after.losses - after.losses[0]).abs().max()) < 1e-5
    assert float((before.losses - before.losses[0]).abs().max()) > 1e-3


def test_groups_without_a_site_are_ordered_by_weights(setting) -> None:
    net, other, x, y = setting
    found = alignment(net, other, (x, y), sites=["stem"], nulls=())
    again = permuted(other, found, x[:2], model_a=net)
    torch.testing.assert_close(again.inner.weight, net.inner.weight)


def test_heads_are_put_back_by_what_they_hold() -> None:
    net, example = made("vit")
    net = net.double()
    images = torch.randn(
        60, *example.shape[1:], dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    heads = [group for group in channel_groups(net, example).values() if group.heads]
    assert len(heads) == 2
    other = permute(net, {group: [2, 0, 1] for group in heads})
    found = alignment(net, other, images, sites=[group.name for group in heads], nulls=(), blocks=2)
    again = permuted(other, found, images[:2])
    for (name, p), q, turned in zip(net.named_parameters(), again.parameters(), other.parameters()):
        assert torch.equal(p, q), name
        assert "query.weight" not in name or not torch.equal(p, turned)


def test_another_network_keeps_what_it_computes(setting) -> None:
    net, _, x, y = setting
    torch.manual_seed(9)
    other = Residual().eval()
    found = alignment(net, other, (x, y), sites=["stem", "inner"], nulls=())
    again = permuted(other, found, x[:2])
    torch.testing.assert_close(again(x), other(x), rtol=1e-4, atol=1e-5)
    assert alignment(net, again, (x, y), sites="stem")["stem"].match.columns.tolist() == list(range(6))


def test_batch_norms_are_estimated_anew_and_both_ends_stay(setting) -> None:
    net, other, x, y = setting
    before = [copy.deepcopy(n.state_dict()) for n in (net, other)]
    plain, fresh = (barrier(net, other, (x, y), points=3, renormalise=r) for r in (False, True))
    assert torch.equal(plain.losses[[0, 2]], fresh.losses[[0, 2]]) and plain.losses[1] != fresh.losses[1]
    for n, state in zip((net, other), before):
        assert all(torch.equal(v, state[k]) for k, v in n.state_dict().items()) and not n.training
    assert fresh.accuracies is not None and fresh.samples == 64


def test_what_cannot_be_averaged_is_named(setting) -> None:
    net, other, x, y = setting
    with pytest.raises(InputError, match="expected the same architecture"):
        barrier(net, nn.Linear(2, 2), (x, y))
    with pytest.raises(InputError, match="by='activations' needs"):
        permuted(other, None, x[:2])
    wrong = alignment(net, other, (x, y), sites=["head"], nulls=())
    with pytest.raises(InputError, match="align at 'stem'"):
        permuted(other, wrong, x[:2])
