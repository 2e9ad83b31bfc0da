"""BlockMNIST, the simplified data, leakage metrics, and the max-margin network."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from lineament.core.checks import InputError
from lineament.data.blockmnist import NULLS, block_mnist, null_pattern
from lineament.data.digits import digit_images
from lineament.data.signal_blocks import signal_blocks
from lineament.explain.faithfulness.feature_leakage import (
    MaxMargin,
    leakage,
    null_fraction,
    null_mass,
    predicted_gradients,
)
from lineament.explain.faithfulness.input_gradients import input_gradient
from lineament.explain.faithfulness.retraining import accuracy
from lineament.train.stacked import Training

DIGITS, LABELS = digit_images(split="train", count=600).pair


def block(data, k, height=8):
    return data.inputs[:, :, k * height : (k + 1) * height]


@pytest.mark.parametrize("null", NULLS)
@pytest.mark.parametrize("blocks", [2, 3])
def test_the_signal_is_the_digit_and_the_rest_is_null(null, blocks):
    data = block_mnist(DIGITS, LABELS, blocks=blocks, null=null, seed=1)
    assert data.inputs.shape == (600, 1, 8 * blocks, 8) and torch.equal(data.targets, LABELS)
    rows = torch.arange(600)
    every = torch.stack([block(data, k) for k in range(blocks)], 1)
    assert torch.equal(every[rows, data.extras["signal"]], DIGITS)
    rest = every[torch.arange(blocks) != data.extras["signal"][:, None]]
    if null == "pattern":
        assert bool((rest == null_pattern(8)).all())
    elif null == "blank":
        assert bool((rest == 0).all())
    elif null == "noise":
        assert 0.45 < float(rest.mean()) < 0.55 and float(rest.std()) > 0.25
    else:
        flat = DIGITS.flatten(1)
        assert float(torch.cdist(rest.flatten(1)[:50], flat).amin(1).max()) < 1e-3
    mask = data.extras["null_mask"]
    assert mask.shape == (600, 1, 8 * blocks, 8)
    assert float(mask.double().mean()) == pytest.approx((blocks - 1) / blocks)
    torch.testing.assert_close((data.inputs * ~mask).sum((1, 2, 3)), DIGITS.sum((1, 2, 3)))


def test_placements_and_that_they_do_not_depend_on_the_label():
    assert set(block_mnist(DIGITS, LABELS, placement="top").extras["signal"].tolist()) == {0}
    assert set(block_mnist(DIGITS, LABELS, placement="bottom", blocks=3).extras["signal"].tolist()) == {2}
    many, labels = DIGITS.repeat(10, 1, 1, 1), LABELS.repeat(10)
    for placement, share in (("random", 0.5), (0.8, 0.8)):
        signal = block_mnist(many, labels, placement=placement).extras["signal"]
        assert float((signal == 0).double().mean()) == pytest.approx(share, abs=0.03)
        for c in range(10):
            assert float((signal[labels == c] == 0).double().mean()) == pytest.approx(share, abs=0.1)


def test_two_classes_and_any_image_array():
    data = block_mnist(DIGITS, LABELS, classes=(7, 3), null="digit")
    assert set(data.targets.tolist()) == {0, 1} and len(data) == int(((LABELS == 3) | (LABELS == 7)).sum())
    colour = block_mnist(torch.rand(4, 3, 6, 9), torch.arange(4), blocks=4)
    assert colour.inputs.shape == (4, 3, 24, 9)


def test_the_pattern_is_a_square_with_its_diagonals():
    for side in (4, 8, 9, 28):
        p = null_pattern(side)
        low, high = side // 4, side - 1 - side // 4
        expected = torch.zeros(side, side)
        for i in range(low, high + 1):
            expected[low, i] = expected[high, i] = expected[i, low] = expected[i, high] = 1
            expected[i, i] = expected[i, low + high - i] = 1
        assert torch.equal(p, expected)
    assert null_pattern(8, 12).shape == (8, 12)


@pytest.mark.slow
def test_a_model_of_the_top_half_is_right_when_the_signal_is_there_and_has_no_gradient_below():
    class Top(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

        def forward(self, x):
            return self.net(x[:, :, :8])

    train, held = digit_images(split="train"), digit_images(split="test")
    top = block_mnist(*train.pair, placement="top")
    net = Training(Top, epochs=25, lr=3e-3, batch_size=50, select="last")(*top.pair, 0)
    test = block_mnist(*held.pair, seed=1)
    assert accuracy(net, *test.pair) == pytest.approx((1 + 1 / 10) / 2, abs=0.06)
    above = block_mnist(*held.pair, placement="top")
    gradient, null = input_gradient(net, above.inputs), above.extras["null_mask"]
    assert bool((null_mass(gradient, null) == 0).all())
    assert bool((null_fraction(gradient, null, 0.1) == 0).all())


def test_null_shares_of_known_scores():
    null = torch.tensor([[[[False, False], [True, True]]]])
    scores = torch.tensor([[[[4.0, -1.0], [-3.0, 2.0]]]])
    assert null_mass(scores, null).item() == 0.5
    assert [null_fraction(scores, null, top).item() for top in (0.25, 0.5, 0.75, 1.0)] == pytest.approx(
        [0, 0.5, 2 / 3, 0.5]
    )
    assert null_mass(torch.zeros(1, 1, 2, 2), null).item() == 0
    noise = torch.randn(400, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    half = (torch.arange(10) < 5)[None, None, :, None]
    assert float(null_fraction(noise, half).mean()) == pytest.approx(0.5, abs=0.03)
    with pytest.raises(InputError, match=r"null: got .*bool"):
        null_mass(scores, null.float())
    with pytest.raises(InputError, match="broadcasts"):
        null_mass(scores, null[0])


def test_simplified_data_carry_one_signal_and_noise_of_the_ball():
    data = signal_blocks(3000, blocks=6, width=3, eta=0.1, signals=4, direction=torch.tensor([0.6, 0.0, 0.8]))
    own = data.extras["own"]
    noise = data.inputs.reshape(3000, 6, 3).clone()
    noise[own] -= (2 * data.targets[:, None] - 1) * torch.tensor([0.6, 0.0, 0.8])
    assert float(noise.norm(dim=2).max()) <= 0.1 + 1e-6
    # Uniform in a ball of three dimensions: half of the volume lies within 2^(-1/3) of the radius.
    assert float((noise.norm(dim=2) < 0.1 * 0.5 ** (1 / 3)).double().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(data.targets.double().mean()) == pytest.approx(0.5, abs=0.04)
    assert (
        torch.equal(own.sum(1), torch.ones(3000, dtype=torch.long))
        and own.any(0).tolist() == [True] * 4 + [False] * 2
    )


@pytest.mark.parametrize("signals", [1, 2, 3, 5])
def test_the_closed_form_is_the_maximiser_of_a_linear_program(signals):
    """Over many neurons on the sphere, no distribution beats the margin of the two atoms."""
    from scipy.optimize import linprog

    net = MaxMargin(signals)
    x = torch.cat([torch.eye(signals), -torch.eye(signals)]).double()
    y = torch.cat([torch.ones(signals), -torch.ones(signals)]).double()
    assert torch.allclose(y * net(x), torch.full((2 * signals,), net.margin, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3000, signals + 2, generator=generator, dtype=torch.float64)
    theta /= theta.norm(dim=1, keepdim=True)
    atoms = net.neurons()
    ours = torch.cat([atoms["w"][:, None], atoms["r"], atoms["b"][:, None]], 1)
    assert torch.allclose(ours.norm(dim=1), torch.ones(2, dtype=torch.float64))
    theta = torch.cat([theta, ours])
    w, r, b = theta[:, 0], theta[:, 1:-1], theta[:, -1]
    outputs = y[:, None] * torch.relu(x @ r.T + b) * w
    # Maximise t subject to (outputs nu) >= t, nu a distribution.
    count = len(theta)
    solved = linprog(
        np.r_[np.zeros(count), -1.0],
        A_ub=np.c_[-outputs.numpy(), np.ones(len(x))],
        b_ub=np.zeros(len(x)),
        A_eq=np.r_[np.ones(count), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * count + [(None, None)],
    )
    assert -solved.fun == pytest.approx(net.margin, abs=1e-9)
    # Without the two atoms a finite sample of neurons stays below.
    fewer = linprog(
        np.r_[np.zeros(count - 2), -1.0],
        A_ub=np.c_[-outputs[:, :-2].numpy(), np.ones(len(x))],
        b_ub=np.zeros(len(x)),
        A_eq=np.r_[np.ones(count - 2), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * (count - 2) + [(None, None)],
    )
    assert -fewer.fun <= net.margin + 1e-9


def test_the_max_margin_gradient_is_the_same_on_every_signal_block_and_zero_elsewhere():
    direction = torch.tensor([0.6, 0.8])
    net = MaxMargin(3, blocks=5, direction=direction).double()
    # Strictly inside the kinks of the two neurons.
    x = 0.7 * signal_blocks(40, blocks=5, width=2, signals=3, direction=direction).inputs.double()
    x.requires_grad_()
    gradient = torch.autograd.grad(net(x).sum(), x)[0]
    size = gradient.reshape(40, 5, 2).norm(dim=2)
    assert torch.allclose(size[:, :3], torch.full((40, 3), net.margin, dtype=torch.float64))
    assert bool((size[:, 3:] == 0).all())
    shares = size / size.sum(1, keepdim=True)
    assert torch.allclose(shares, predicted_gradients(3, 5).expand(40, 5))
    own = torch.zeros(40, 5, dtype=torch.bool)
    own[:, 0] = True
    assert leakage(gradient, own, 3).ratio == pytest.approx(1.0)


@pytest.mark.slow
def test_a_trained_wide_network_spreads_its_gradient_over_all_signal_blocks():
    data = signal_blocks(1000, blocks=10)
    train = Training(
        lambda: nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 2)),
        epochs=60, batch_size=250, optimizer=lambda net: torch.optim.SGD(net.parameters(), lr=0.1), select="last",
    )  # fmt: skip
    net = train(*data.pair, 0)
    found = leakage(input_gradient(net, data.inputs), data.extras["own"], 5)
    assert accuracy(net, *data.pair) == 1.0
    assert 0.8 < found.ratio < 1.3 and found.noise < 0.2 and found.own < 0.3


def test_leakage_of_known_gradients():
    own = torch.tensor([[True, False, False], [False, True, False]])
    found = leakage(torch.tensor([[3.0, 1.0, 0.0], [2.0, -1.0, 1.0]]), own, 2)
    assert found.to_dict() == {
        "own": 0.5, "other": 0.375, "noise": 0.125, "top_is_own": 0.5, "bottom_is_own": 0.5, "ratio": 0.75, "silent": 0.0,
    }  # fmt: skip
    assert leakage(torch.zeros(2, 3), own, 2).silent == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"placement": "middle"}, "placement: got 'middle'"),
        ({"placement": 1.5}, "placement: got 1.5"),
        ({"blocks": 1}, "blocks: got 1"),
        ({"null": "patern"}, "nearest: 'pattern'"),
        ({"classes": (0, 99)}, r"absent: \[99\]"),
        ({"labels": LABELS[:3]}, "labels"),
        ({"digits": DIGITS * 255}, "divide bytes by 255"),
        ({"digits": DIGITS.flatten(1)}, "digits: got"),
        ({"digits": DIGITS * math.nan}, "NaN"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(InputError, match=message):
        block_mnist(**{"digits": DIGITS, "labels": LABELS, **change})
