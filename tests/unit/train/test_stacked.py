"""Training: alone or together it is the same network; validation is no test; seeds; robust training is robust."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.train.attacks import PGD, robust_accuracy
from lineament.train.stacked import Training, refreshed

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(300, 6, generator=GENERATOR)
Y = (X[:, :2].sum(1) > 0).long()


def mlp():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))


def normed():
    # No bias before the batch norm: it would have no gradient but rounding, which Adam makes as large as any other.
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize("factory", [mlp, normed])
@pytest.mark.parametrize("select", ["last", "validation"])
@pytest.mark.parametrize("optimizer", [None, lambda net: torch.optim.SGD(net.parameters(), 0.02, fused=True)])
def test_a_stack_trains_each_network_as_it_would_be_alone(factory, select, optimizer):
    train = Training(
        factory, epochs=3, batch_size=50, lr=0.02, optimizer=optimizer, schedule=lambda done: 1 - done, select=select,
        at_once=2,
    )  # fmt: skip
    views, seeds = [X, X * 0.5, X.roll(1, 1)], [0, 1, 0]
    stacked = train.stacked(views, Y, seeds)
    for model, view, seed in zip(stacked, views, seeds):
        alone = train(view, Y, seed)
        assert not model.training and not alone.training
        for (name, a), b in zip(model.state_dict().items(), alone.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_same_seed_same_network_and_the_global_generator_stays():
    state = torch.get_rng_state()
    train = Training(mlp, epochs=2)
    a, b, c = train(X, Y, 3), train(X, Y, 3), train(X, Y, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a[0].weight, b[0].weight) and not torch.equal(a[0].weight, c[0].weight)
    assert all(p.grad is None and p.requires_grad for p in a.parameters())


def test_validation_holds_rows_out_and_keeps_the_best_epoch():
    train = Training(mlp, epochs=4)
    rows, held = train._rows(300, 5)
    assert len(held) == 30 and sorted([*rows.tolist(), *held.tolist()]) == list(range(300))
    # A rate that destroys what was learned: the best epoch is better than the last.
    wild = {"epochs": 8, "lr": 3.0, "batch_size": 20}
    best, last = Training(mlp, **wild), Training(mlp, select="last", **wild)
    rows, held = best._rows(300, 0)
    kept = float((best(X, Y, 0)(X[held]).argmax(1) == Y[held]).double().mean())
    assert kept >= 0.8, "the epoch with the best validation accuracy"
    assert last(X, Y, 0) is not None


@pytest.mark.slow
def test_training_against_an_attack_is_more_robust():
    # Coordinate 0 is strong and alone robust; the others are weak but together as good.
    y = torch.randint(2, (600,), generator=GENERATOR)
    sign = (2.0 * y - 1)[:, None]
    strong = torch.where(torch.rand(600, 1, generator=GENERATOR) < 0.95, sign, -sign)
    x = torch.cat([strong, 0.2 * sign + 0.2 * torch.randn(600, 40, generator=GENERATOR)], 1)
    attack = PGD(norm="linf", eps=0.3, step=0.1, steps=5, bounds=None)
    train = Training(lambda: nn.Linear(41, 2), epochs=20, lr=0.02, select="last")
    plain, robust = train(x, y), train.against(attack)(x, y)
    assert robust_accuracy(robust, x, y, attack) > robust_accuracy(plain, x, y, attack) + 0.2
    assert [len(train.against(attack).stacked([x], y, [0])), train.attack] == [1, None]


def test_small_networks_are_stacked_on_a_cpu_and_large_ones_are_not():
    assert Training(mlp)._stack(torch.device("cpu")) == 64
    assert Training(lambda: nn.Linear(1000, 100))._stack(torch.device("cpu")) == 1
    assert Training(lambda: nn.Linear(1000, 100))._stack(torch.device("cuda")) == 64
    assert Training(mlp, attack=PGD())._stack(torch.device("cuda")) == 1


def test_a_network_is_drawn_anew():
    net = mlp()
    old = {k: v.clone() for k, v in net.state_dict().items()}
    fresh = refreshed(net, 1)
    assert all(torch.equal(v, old[k]) for k, v in net.state_dict().items())
    assert not torch.equal(fresh[0].weight, net[0].weight)
    assert torch.equal(fresh[0].weight, refreshed(net, 1)[0].weight)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

    with pytest.raises(
        InputError, match=r"parameter 1\.scale cannot be drawn anew.*Bare has no reset_parameters"
    ):
        refreshed(nn.Sequential(mlp(), Bare()))


def test_bad_settings_are_named():
    for options, message in [
        ({"epochs": 0}, "epochs: got 0"),
        ({"select": "test"}, "select: got 'test'"),
        ({"lr": 0.0}, "lr: got 0.0"),
    ]:
        with pytest.raises(InputError, match=message):
            Training(mlp, **options)
    with pytest.raises(InputError, match="factory: got 3"):
        Training(3)
    with pytest.raises(InputError, match="factory: it made 3"):
        Training(lambda: 3)(X, Y)
    with pytest.raises(InputError, match="seeds: got 1 for 2 trainings"):
        Training(mlp).stacked([X, X], Y, [0])
