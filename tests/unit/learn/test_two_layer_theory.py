"""The theory of USEFUL: gradients, the noise-free recursion, copies and weights, SAM's limit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lineament.core.checks import InputError
from lineament.data.fast_slow_patches import fast_slow_patches
from lineament.learn.useful.two_layer_theory import (
    alignment_recursion,
    cubic_network,
    fast_free_weights,
    logistic_gradient,
    train_cubic,
    upsampled_share,
)


def filters(seed: int = 0, dims: int = 7) -> torch.Tensor:
    return 0.3 * torch.randn(4, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_closed_gradient_is_that_of_finite_differences():
    data, W = fast_slow_patches(20, dims=7, seed=2), filters()
    weights = fast_free_weights(data.extras["has_fast"], 3)
    _, slope = logistic_gradient(W, *data.pair, weights)
    for j, k in ((0, 0), (1, 1), (3, 6)):
        step = torch.zeros_like(W)
        step[j, k] = 1e-6
        up, down = (logistic_gradient(W + s * step, *data.pair, weights)[0] for s in (1, -1))
        assert float((up - down) / 2e-6) == pytest.approx(float(slope[j, k]), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_without_noise_training_is_the_recursion(factor):
    data, W = fast_slow_patches(60, dims=7, slow=0.5, alpha=0.8, noise=0.0, seed=4), filters(1)
    path = train_cubic(
        W, *data.pair, steps=120, lr=0.2, weights=fast_free_weights(data.extras["has_fast"], factor)
    )
    share = upsampled_share(float(data.extras["has_fast"].double().mean()), factor)
    a, b = alignment_recursion(W[:, 0], W[:, 1], steps=120, lr=0.2, fast=1.0, slow=0.5, alpha=share)
    found = torch.stack([a.max(1).values, b.max(1).values], 1)
    assert torch.allclose(path.alignments, found, atol=1e-12)
    # What is orthogonal to both features stays where it was.
    assert torch.equal(path.W[:, 2:], W[:, 2:])


def test_copies_and_weights_train_alike():
    data, W = fast_slow_patches(30, dims=7, alpha=0.7, seed=5), filters(2)
    rows = torch.cat([torch.arange(30), (~data.extras["has_fast"]).nonzero()[:, 0]])
    copies = train_cubic(W, data.inputs[rows], data.targets[rows], steps=50, lr=0.2)
    weighted = train_cubic(
        W, *data.pair, steps=50, lr=0.2, weights=fast_free_weights(data.extras["has_fast"], 2)
    )
    assert torch.allclose(copies.W, weighted.W, atol=1e-12)
    assert torch.allclose(copies.loss, weighted.loss, atol=1e-12)


def test_sam_of_radius_zero_is_gradient_descent_and_a_small_one_is_near():
    data, W = fast_slow_patches(30, dims=7, seed=6), filters(3)
    plain = train_cubic(W, *data.pair, steps=20, lr=0.1)
    assert torch.equal(train_cubic(W, *data.pair, steps=20, lr=0.1, rho=0.0).W, plain.W)
    gaps = [
        float((train_cubic(W, *data.pair, steps=20, lr=0.1, rho=r).W - plain.W).norm()) for r in (1e-3, 1e-4)
    ]
    assert gaps[0] / gaps[1] == pytest.approx(10, rel=0.05)


def test_the_sam_step_is_that_of_the_optimizer():
    from torch import nn

    from lineament.optim import SAM

    data, W = fast_slow_patches(30, dims=7, seed=7), filters(4)
    w = nn.Parameter(W.clone())
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.softplus(-data.targets * cubic_network(w, data.inputs)).mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    path = train_cubic(W, *data.pair, steps=5, lr=0.1, rho=0.2)
    assert torch.allclose(w.detach(), path.W, atol=1e-11)
    path.plot()
    assert path.gap.shape == (5,) and set(path.to_dict()) == {"loss", "alignments", "W", "first_gradient"}


def test_the_data_are_what_the_theory_says():
    data = fast_slow_patches(4000, dims=10, patches=4, fast=2.0, slow=0.7, alpha=0.6, noise=3.0, seed=1)
    assert torch.equal(data.inputs[:, 0, 1], 0.7 * data.targets) and data.inputs[:, 0, 0].abs().max() == 0
    fast = data.inputs[data.extras["has_fast"], 1]
    assert torch.equal(fast[:, 0], 2 * data.targets[data.extras["has_fast"]]) and fast[:, 1:].abs().max() == 0
    assert float(data.extras["has_fast"].double().mean()) == pytest.approx(0.6, abs=0.03)
    noise = torch.cat([data.inputs[:, 2:].flatten(), data.inputs[~data.extras["has_fast"], 1].flatten()])
    assert float(noise.square().mean()) == pytest.approx(9 / 40, rel=0.03)


def test_what_cannot_be_used_is_named():
    data, W = fast_slow_patches(10, dims=7), filters()
    for options, message in (
        ({"lr": -1.0}, "lr: got -1"),
        ({"rho": -0.1}, "rho: got -0.1"),
        ({"steps": 0}, "steps"),
        ({"weights": -torch.ones(10)}, "weights: expected none negative"),
    ):
        with pytest.raises(InputError, match=message):
            train_cubic(W, *data.pair, **{"steps": 2, "lr": 0.1, **options})
    with pytest.raises(InputError, match="labels than -1 and 1"):
        train_cubic(W, data.inputs, data.targets.clamp(min=0), steps=1, lr=0.1)
    with pytest.raises(InputError, match="expected a tensor of shape"):
        train_cubic(W[:, :5], *data.pair, steps=1, lr=0.1)
    with pytest.raises(InputError, match="alpha"):
        fast_slow_patches(5, alpha=1.5)
    with pytest.raises(InputError, match="dims"):
        fast_slow_patches(5, dims=1)
