"""A network with one logit z answers as the network with the logits (0, z) does, wherever classes are decided, counted or explained."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lineament.explain.faithfulness.input_gradients import input_gradient
from lineament.learn.useful.slow_examples import select_slow
from lineament.measure.collapse.profile import collapse
from lineament.measure.landscape.axes import given
from lineament.measure.landscape.grids import line
from lineament.train.attacks import PGD, pgd, robust_accuracy
from lineament.train.loop import fit

X = torch.tensor([[-1.0], [-2.0], [1.0], [2.0], [0.5], [-0.3]])
Y = torch.tensor([0, 0, 1, 1, 0, 1])


class Two(nn.Module):
    def __init__(self, one):
        super().__init__()
        self.one = one

    def forward(self, x):
        z = self.one(x)
        return torch.cat([torch.zeros_like(z), z], 1)


def network(two):
    one = nn.Linear(1, 1)
    one.weight.data.fill_(1.0)
    one.bias.data.zero_()
    return Two(one) if two else one


def loss(z, y):
    """Of either network."""
    if z.shape[1] == 1:
        return F.binary_cross_entropy_with_logits(z[:, 0], y.to(z))
    return F.cross_entropy(z, y)


def metrics(two):
    net = network(two)
    at = given(net, torch.tensor([1.0, 0.0]))
    found = line(net, loss, [(X, Y)], at, steps=3, metrics=["accuracy", "class_loss", "gradient_norm"])
    return torch.cat([found.metrics["accuracy"], found.metrics["class_loss"].flatten(), found.loss])


def trained(two):
    done = fit(
        network(two),
        (X, Y),
        optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1),
        loss=loss,
        epochs=1,
    )
    return torch.tensor([done.history[0].accuracy, done.history[0].loss])


def attacked(two):
    return pgd(network(two), X, Y, norm="linf", eps=0.5, step=0.2, steps=3, bounds=None).delta


def robust(two):
    attack = PGD(eps=0.5, step=0.5, steps=1, bounds=None)
    return torch.tensor(robust_accuracy(network(two), X, Y, attack))


def slow(by):
    return lambda two: select_slow(network(two)(X), Y, by=by).mask.float()


def gradients(kind):
    return lambda two: input_gradient(network(two), X, Y, kind=kind)


CASES = {
    "landscape metrics": metrics,
    "training": trained,
    "attack": attacked,
    "robust accuracy": robust,
    **{f"slow examples, {by}": slow(by) for by in ("clusters", "misclassified", "quantile", "eiil")},
    **{f"gradient, {kind}": gradients(kind) for kind in ("softmax_true", "softmax_predicted", "loss")},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_one_logit_is_two_classes(case):
    one, two = case(False), case(True)
    assert bool(one.any())
    torch.testing.assert_close(one, two)


def test_the_smallest_input():
    assert metrics(False)[:3].tolist() == pytest.approx([1 / 2, 2 / 3, 2 / 3])
    x, y = torch.tensor([[-1.0], [-2.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
    assert collapse(network(False), [(x, y)])[":in"].nc4 == 0.0
