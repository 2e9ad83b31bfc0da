"""Views of one shared table are called as the embeddings whose place they take."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.modules import UnifiedEmbedding, multiplex
from lineament.modules.unified_embedding.views import EmbeddingView


def exact(view: EmbeddingView) -> torch.Tensor:
    """The table of an ordinary embedding with the view's values."""
    return view._rows(torch.arange(view.num_embeddings)).detach()


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_view_of_a_bag_is_the_bag_with_its_values(mode):
    net = nn.ModuleDict(
        {"bag": nn.EmbeddingBag(50, 6, mode=mode, padding_idx=3), "one": nn.Embedding(20, 4, padding_idx=0)}
    )
    plain = copy.deepcopy(net)
    multiplex(net, rows=40)
    with torch.no_grad():
        for name in plain:
            plain[name].weight.copy_(exact(net[name]))
        plain["one"].weight[0] = 0
    ids, offsets = torch.tensor([4, 3, 7, 7, 3, 9]), torch.tensor([0, 3, 3, 4])
    torch.testing.assert_close(net["bag"](ids, offsets), plain["bag"](ids, offsets))
    several = torch.tensor([[1, 2, 3], [3, 3, 3]])
    torch.testing.assert_close(net["bag"](several), plain["bag"](several))
    if mode == "sum":
        weights = torch.rand(6)
        torch.testing.assert_close(net["bag"](ids, offsets, weights), plain["bag"](ids, offsets, weights))
    torch.testing.assert_close(net["one"](several), plain["one"](several))


def test_a_model_trains_on_its_views_and_loads_its_state_again():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.user, self.item = nn.Embedding(30, 8), nn.Embedding(40, 4)
            self.out = nn.Linear(12, 1)

        def forward(self, ids):
            return self.out(torch.cat([self.user(ids[:, 0]), self.item(ids[:, 1])], 1))

    net = Net()
    found = multiplex(net, fraction=0.5)
    assert found.replaced == ("user", "item") and found.before == 400 and found.saved == pytest.approx(0.5)
    assert len(list(net.parameters())) == 3
    net(torch.tensor([[1, 2], [29, 39]])).sum().backward()
    assert net.user.table.weight.grad.any()
    other = Net()
    multiplex(other, fraction=0.5)
    other.load_state_dict(net.state_dict())
    ids = torch.tensor([[5, 6]])
    torch.testing.assert_close(other(ids), net(ids))
    unlike = Net()
    multiplex(unlike, fraction=0.5, seed=1)
    with pytest.raises(InputError, match="seed"):
        unlike.load_state_dict(net.state_dict())


def test_what_cannot_be_shared_is_named_and_the_model_is_as_it_was():
    net = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    with pytest.raises(InputError, match=r"0.weight is tied to 1.weight"):
        multiplex(net)
    assert isinstance(net[0], nn.Embedding)
    with pytest.raises(InputError, match="max_norm"):
        multiplex(nn.Sequential(nn.Embedding(10, 4, max_norm=1.0)))
    with pytest.raises(InputError, match=r"no nn\.Embedding"):
        multiplex(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(InputError, match="only: got 'x', expected one of '0'"):
        multiplex(nn.Sequential(nn.Embedding(10, 4)), only=["x"])
    with pytest.raises(InputError, match="it is itself Embedding, which cannot be replaced in place"):
        multiplex(nn.Embedding(10, 4))


@pytest.mark.parametrize("rows", [97, (1 << 24) + 1])
def test_all_features_at_once_equal_each_alone(rows):
    table = UnifiedEmbedding(rows, 1, 2)
    for name, lookups in (("a", 2), ("b", 3), ("c", 1)):
        table.add(name, lookups)
    ids = {name: torch.randint(-(2**62), 2**62, (7,)) for name in "abc"}
    alone = table(ids, as_dict=True)
    torch.testing.assert_close(table(ids), torch.cat([alone[name] for name in "abc"], 1))
    with pytest.raises(InputError, match="got no feature"):
        table({})
