"""PGD: optima of linear models, what it never leaves, every objective, and what it says of saturated losses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tests.contracts.unchanged import unchanged
from torch import nn

from lineament.core.checks import InputError
from lineament.train.attacks import NORMS, OBJECTIVES, PGD, pgd, robust_accuracy


def linear(w, dtype=torch.float64):
    """Two classes with logits (0, w·x): the loss of class 1 grows along -w."""
    w = torch.as_tensor(w, dtype=dtype)
    net = nn.Linear(len(w), 2, bias=False, dtype=dtype)
    net.weight.data.copy_(torch.stack([torch.zeros_like(w), w]))
    return net


def network(classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, classes)).double()


X = torch.rand(9, 3, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.arange(9) % 4


@pytest.mark.parametrize("steps", [1, 3, 20])
def test_linear_models_have_the_known_optimum(steps):
    w = torch.tensor([3.0, -4.0, 1.0], dtype=torch.float64)
    x, y = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1, 0])
    sign = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    found = pgd(linear(w), x, y, norm="l2", eps=0.5, step=0.6, steps=steps, bounds=None)
    torch.testing.assert_close(found.delta, sign * 0.5 * w / w.norm())
    found = pgd(linear(w), x, y, norm="linf", eps=0.5, step=0.6, steps=steps, bounds=None)
    torch.testing.assert_close(found.delta, sign * 0.5 * w.sign())


@pytest.mark.parametrize("norm", NORMS)
def test_the_loss_of_a_linear_model_grows_with_eps(norm):
    x, y = (
        torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([0, 1] * 2 + [1]),
    )
    losses = [
        pgd(linear([1.0, 2.0, -1.0]), x, y, norm=norm, eps=eps, step=eps, steps=3, bounds=None).objective
        for eps in (0.0, 0.1, 0.3, 1.0)
    ]
    for smaller, larger in itertools.pairwise(losses):
        assert bool((larger > smaller).all())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("objective", [o for o in OBJECTIVES if o != "hybrid"])
@pytest.mark.parametrize("random_start", [0.0, 0.3])
def test_never_farther_than_eps_nor_outside_the_range(norm, objective, random_start):
    net = network()
    with unchanged(net):
        found = pgd(
            net, X, Y, norm=norm, eps=0.2, step=0.15, steps=4, objective=objective, random_start=random_start, seed=3
        )  # fmt: skip
    size = found.delta.abs().flatten(1).amax(1) if norm == "linf" else found.delta.flatten(1).norm(dim=1)
    assert float(size.max()) <= 0.2 * (1 + 1e-6) and float(size.min()) > 0
    moved = X + found.delta
    assert float(moved.min()) >= -1e-12 and float(moved.max()) <= 1 + 1e-12
    again = pgd(
        net, X, Y, norm=norm, eps=0.2, step=0.15, steps=4, objective=objective, random_start=random_start, seed=3
    )  # fmt: skip
    assert torch.equal(again.delta, found.delta)


def test_no_reach_is_no_perturbation():
    for norm in NORMS:
        found = pgd(network(), X, Y, norm=norm, eps=0.0, step=0.1, steps=3, random_start=0.2)
        assert bool((found.delta == 0).all())
    assert bool((pgd(network(), X, Y, norm="l2", eps=1.0, step=0.1, steps=0).delta == 0).all())


def test_targets_are_approached_and_true_classes_left():
    net = network()
    loss = nn.functional.cross_entropy
    settings = {"norm": "linf", "eps": 0.3, "step": 0.1, "steps": 8}

    def after(objective, label):
        found = pgd(net, X, Y, objective=objective, **settings)
        return loss(net(X + found.delta), label).item(), loss(net(X), label).item()

    moved, before = after("untargeted", Y)
    assert moved > before
    moved, before = after("targeted", Y)
    assert moved < before
    moved, before = after("plus_one", (Y + 1) % 4)
    assert moved < before


def test_hybrid_is_for_two_classes_and_moves_both_terms():
    net, y = network(2), Y % 2
    found = pgd(net, X, y, norm="l2", eps=0.5, step=0.2, steps=5, objective="hybrid")
    loss = nn.functional.cross_entropy
    start, end = net(X), net(X + found.delta)
    assert loss(end, y) > loss(start, y) and loss(end, 1 - y) < loss(start, 1 - y)
    with pytest.raises(InputError, match="two classes"):
        pgd(network(), X, y, norm="l2", eps=0.5, step=0.2, steps=5, objective="hybrid")


def test_restarts_keep_the_worst_of_each_input():
    net = network()
    settings = {"norm": "linf", "eps": 0.3, "step": 0.05, "steps": 3, "random_start": 0.3, "seed": 5}
    one, many = pgd(net, X, Y, **settings), pgd(net, X, Y, restarts=6, **settings)
    assert bool((many.objective >= one.objective).all()) and bool((many.objective > one.objective).any())
    held = nn.functional.cross_entropy(net(X + many.delta), Y, reduction="none")
    torch.testing.assert_close(held, many.objective)
    with pytest.raises(InputError, match="restarts: got 2 with random_start=0"):
        pgd(net, X, Y, norm="l2", eps=0.1, step=0.1, steps=1, restarts=2)


def test_minimal_stops_where_the_answer_changes():
    net = linear([1.0, 0.0])
    x, y = torch.tensor([[0.25, 0.0], [1.05, 0.0]], dtype=torch.float64), torch.tensor([1, 1])
    found = pgd(net, x, y, norm="l2", eps=0.0, step=0.1, steps=40, minimal=True, bounds=None)
    # One step past the boundary at 0, whatever eps says.
    torch.testing.assert_close(found.delta[:, 0], torch.tensor([-0.3, -1.1], dtype=torch.float64))
    assert found.fooled.tolist() == [True, True]


def test_a_saturated_loss_is_told_and_the_margin_is_not_saturated():
    net = linear([1000.0, 0.0], torch.float32)
    x, y = torch.tensor([[0.6, 0.5], [0.0, 0.5]]), torch.tensor([1, 1])
    settings = {"norm": "linf", "eps": 0.7, "step": 0.35, "steps": 2, "bounds": (-1.0, 1.0)}
    found = pgd(net, x, y, **settings)
    assert found.no_gradient.tolist() == [True, False] and found.fooled.tolist() == [False, True]
    found = pgd(net, x, y, loss="margin", **settings)
    assert found.no_gradient.tolist() == [False, False] and found.fooled.tolist() == [True, True]
    assert found.to_dict()["fooled"] == 1.0


def test_robust_accuracy_is_that_of_the_attacked_inputs():
    net = network()
    attack = PGD(norm="linf", eps=0.2, step=0.1, steps=4)
    delta = attack(net, X, Y).delta
    assert robust_accuracy(net, X, Y, attack) == float((net(X + delta).argmax(1) == Y).double().mean())
    assert robust_accuracy(net, X, Y, attack, batch_size=2) == robust_accuracy(net, X, Y, attack)
    assert attack(net, X, Y).plot() is not None


def test_batch_norm_and_modes_are_left_alone():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12), nn.Linear(12, 4), nn.Dropout(0.5)).double().train()
    with unchanged(net):
        pgd(net, X, Y, norm="l2", eps=0.3, step=0.1, steps=2)

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    both = nn.Sequential(net, Broken())
    with unchanged(both), pytest.raises(RuntimeError, match="broken"):
        pgd(both, X, Y, norm="l2", eps=0.3, step=0.1, steps=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "l1"}, "norm: got 'l1'"),
        ({"objective": "untargetted"}, "nearest: 'untargeted'"),
        ({"eps": -1.0}, "eps: got -1.0"),
        ({"steps": 1.5}, "steps: got 1.5, expected an integer"),
        ({"bounds": (0.0, 0.5)}, "bounds: the inputs lie in"),
        ({"bounds": (1.0, 0.0)}, "bounds: got"),
        ({"loss": "hinge"}, "loss: got 'hinge'"),
        ({"step": math.nan}, "step: got nan"),
    ],
)
def test_bad_settings_are_named(change, message):
    settings = {"norm": "l2", "eps": 0.1, "step": 0.1, "steps": 1, **change}
    with pytest.raises(InputError, match=message):
        pgd(network(), X, Y, **settings)


def test_bad_labels_and_inputs_are_named():
    settings = {"norm": "l2", "eps": 0.1, "step": 0.1, "steps": 1}
    with pytest.raises(InputError, match="targets: got label 7 at position 0, expected labels from 0 to 3"):
        pgd(network(), X, torch.full((9,), 7), **settings)
    with pytest.raises(InputError, match=r"targets: .*shape \(9,\)"):
        pgd(network(), X, Y[:3], **settings)
    with pytest.raises(InputError, match="NaN"):
        pgd(network(), X * math.nan, Y, **settings)
