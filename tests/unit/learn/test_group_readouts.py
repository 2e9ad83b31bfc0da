"""DFR and DFR-MLP against scikit-learn and hand-made groups; weights of directions against matrices and finite differences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn

from lineament.core.checks import InputError
from lineament.core.sites.activations import record
from lineament.learn import DFRMLP, by_group, dfr, dfr_mlp, direction_weights, layers_worth
from lineament.learn.projection.pooling import pooled
from lineament.learn.projection.robust import balanced


def marked(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weak feature that says the class and a strong one that agrees with it in 95 %; the group is whether it agrees, and the class."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (count,), generator=generator)
    agree = torch.rand(count, generator=generator) < 0.95
    easy = torch.where(agree, y, 1 - y)
    x = torch.stack([2.0 * y - 1, 2.0 * easy - 1], 1)
    x += torch.tensor([0.8, 0.3]) * torch.randn(count, 2, generator=generator)
    return x * torch.tensor([0.5, 8.0]) + torch.tensor([3.0, -2.0]), y, 2 * y + agree


def test_dfr_is_the_mean_of_logistic_regressions_to_balanced_subsets():
    x, y, groups = marked(600, 0)
    x = x.double()
    layer = dfr(x, y, groups, subsets=3, seed=5)
    scaler = StandardScaler().fit(x.numpy())
    weights, biases = [], []
    for seed in (5, 6, 7):
        rows = balanced(groups, seed)
        counts = groups[rows].unique(return_counts=True)[1]
        assert (counts == groups.unique(return_counts=True)[1].min()).all()
        fit = LogisticRegression(C=1.0, tol=1e-10).fit(scaler.transform(x[rows].numpy()), y[rows].numpy())
        weights.append(fit.coef_[0])
        biases.append(fit.intercept_[0])
    found = layer(x)
    theirs = scaler.transform(x.numpy()) @ np.mean(weights, 0) + np.mean(biases)
    assert np.allclose((found[:, 1] - found[:, 0]).numpy(), theirs, atol=1e-4)


def test_both_read_outs_lift_the_worst_group_over_a_plain_one():
    (x, y, groups), (x_test, y_test, groups_test) = marked(1200, 0), marked(2000, 1)
    plain = LogisticRegression().fit(StandardScaler().fit_transform(x.numpy()), y.numpy())
    scaled = StandardScaler().fit(x.numpy()).transform(x_test.numpy())
    before = by_group(torch.from_numpy(plain.predict(scaled)), y_test, groups_test)
    options = DFRMLP(hidden=64, steps=300)
    linear = by_group(dfr(x, y, groups)(x_test).argmax(1), y_test, groups_test)
    perceptron = by_group(dfr_mlp(x, y, groups, options)(x_test).argmax(1), y_test, groups_test)
    assert before.worst < 0.65 and linear.worst > 0.8 and perceptron.worst > 0.8
    assert linear.mean == pytest.approx(sum(linear.accuracies) / 4)
    assert linear.worst == min(linear.accuracies) and sum(linear.counts) == 2000


def test_the_perceptron_sees_what_no_line_does_and_draws_nothing_from_the_global_state():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(400, 2, generator=generator) * 2 - 1
    y = (x.prod(1) > 0).long()
    groups = (torch.arange(400) % 5 == 0).long()
    state = torch.get_rng_state()
    nets = [dfr_mlp(x, y, groups, DFRMLP(hidden=64, rate=1.0, steps=500)) for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))
    assert (nets[0](x).argmax(1) == y).double().mean() > 0.93
    assert (dfr(x, y, groups)(x).argmax(1) == y).double().mean() < 0.7


def test_a_layers_worth_holds_both_by_group_and_its_directions():
    (x, y, groups), (x_test, y_test, groups_test) = marked(600, 0), marked(2000, 1)
    net = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
    nn.init.constant_(net[1].weight, 0.0)
    net[1].weight.data[0, 1] = 2.0  # only the misleading feature is left
    found = layers_worth(
        net, (x, y), (x_test, y_test), groups=(groups, groups_test), directions=torch.eye(2), mlp=DFRMLP(hidden=32, steps=200)
    )  # fmt: skip
    before, after = found["0"], found["1"]
    for name in ("dfr", "dfr_standardised", "dfr_mlp"):
        assert getattr(before, name).worst > 0.75 and getattr(after, name).worst < 0.65, name
    assert before.directions == (1.0, 1.0) and after.directions == (0.0, 2.0)
    assert found.to_dict()["layers"][0]["dfr"]["groups"] == [0, 1, 2, 3]
    short = layers_worth(net, (x, y), (x_test, y_test), groups=(groups, groups_test), mlp=None)
    assert short["0"].dfr_mlp is None and short["0"].directions is None
    with pytest.raises(InputError, match="groups: got 3 for 600 train samples"):
        layers_worth(net, (x, y), (x_test, y_test), groups=(groups[:3], groups_test))
    with pytest.raises(InputError, match=r"groups: got .*expected"):
        layers_worth(net, (x, y), (x_test, y_test), groups=groups)


def test_weights_of_directions_are_norms_of_the_layers_matrices():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)).double()
    v = torch.randn(6, 5, dtype=torch.float64)
    found = direction_weights(net, torch.randn(7, 5, dtype=torch.float64), v, batch_size=3)
    first, second = net[0].weight, net[1].weight
    assert torch.allclose(found["0"], (v @ first.T).norm(dim=1))
    assert torch.allclose(found["1"], (v @ (second @ first).T).norm(dim=1))


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (
            nn.Sequential(
                nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.GELU(), nn.Flatten(), nn.Linear(64, 3), nn.Dropout()
            ),
            (2, 6, 6),
        ),
        (
            nn.Sequential(
                nn.Linear(4, 8), nn.LayerNorm(8), nn.SiLU(inplace=True), Attention(), nn.Linear(8, 2)
            ),
            (5, 4),
        ),
    ],
)
def test_weights_of_directions_are_finite_differences(net, shape):
    torch.manual_seed(0)
    net, x = net.double().train(), torch.randn(6, *shape, dtype=torch.float64)
    v = torch.randn(3, *shape, dtype=torch.float64)
    found = direction_weights(net, x, v)
    assert net.training and list(found) == [str(k) for k in range(len(net))]
    step = 1e-5
    for k, direction in enumerate(v):
        ends = [record(net, x + sign * step * direction, "*") for sign in (1, -1)]
        for site, value in found.items():
            slope = (pooled(ends[0][site]) - pooled(ends[1][site])) / (2 * step)
            assert float(value[k]) == pytest.approx(float(slope.norm(dim=1).mean()), rel=1e-6)


def test_directions_and_groups_that_do_not_fit_are_named():
    net, x = nn.Sequential(nn.Linear(2, 2)), torch.randn(4, 2)
    for call, message in {
        lambda: direction_weights(net, x, torch.eye(3)): "directions: got",
        lambda: direction_weights(net, x.long(), torch.eye(2)): "inputs: got",
        lambda: direction_weights(net, x, torch.eye(2), sites="9"): "9",
        lambda: direction_weights(nn.Sequential(nn.LSTM(2, 2)), x[None], torch.eye(2)[:, None]): "forward AD|directions",
        lambda: dfr(x, torch.zeros(3).long(), torch.zeros(4).long()): "y: got",
        lambda: dfr(x, torch.zeros(4).long(), torch.rand(4)): "groups: got",
        lambda: dfr(x, torch.zeros(4).long(), torch.zeros(4).long()): "class",
        lambda: DFRMLP(rate=0): "rate",
        lambda: dfr_mlp(1e30 * x, torch.tensor([0, 1, 0, 1]), torch.zeros(4).long(), DFRMLP(8, 1e30, 3), standardised=False): "NaN",
    }.items():  # fmt: skip
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("kind", [torch.nn.LSTM, torch.nn.GRU])
def test_recurrent_layers_are_weighed_as_their_jacobian_says(kind):
    torch.manual_seed(0)

    class Last(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = kind(3, 4, batch_first=True)
            self.out = torch.nn.Linear(4, 2)

        def forward(self, x):
            return self.out(self.cells(x)[0][:, -1])

    net, x, v = Last().eval(), torch.randn(5, 6, 3), torch.randn(2, 6, 3)
    jacobians = [torch.autograd.functional.jacobian(net, sample[None])[0, :, 0] for sample in x]
    expected = [sum(float((j * each).sum((1, 2)).norm()) for j in jacobians) / 5 for each in v]
    assert direction_weights(net, x, v, sites="out")["out"].tolist() == pytest.approx(expected, rel=1e-4)
    assert torch.backends.mkldnn.enabled


def test_fewer_samples_than_features_train_the_same_perceptron():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 64, generator=generator, dtype=torch.float64)
    y, groups = torch.arange(40) % 3, torch.arange(40) % 2
    short = dfr_mlp(x, y, groups, DFRMLP(hidden=16, steps=200), standardised=False)
    rows = balanced(groups)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).double()
    for step in range(200):
        rate = 0.1 * (1 + math.cos(math.pi * step / 200)) / 2
        grads = torch.autograd.grad(
            torch.nn.functional.cross_entropy(net(x[rows]), y[rows]), list(net.parameters())
        )
        with torch.no_grad():
            for p, g in zip(net.parameters(), grads):
                p -= rate * g
    torch.testing.assert_close(short(x), net(x), rtol=1e-9, atol=1e-9)
