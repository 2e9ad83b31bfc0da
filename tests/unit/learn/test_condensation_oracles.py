"""Dataset condensation: what must hold of distances, augmentations, coresets, kernels and sets, whatever the data."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import nn

from lineament.learn import Condensation, k_centers
from lineament.learn.condensation import augmentation, learning
from lineament.learn.condensation.coresets import kernel_distance
from lineament.learn.condensation.distances import gradient_distance
from lineament.learn.condensation.matching import gradients, real_gradient
from lineament.learn.condensation.siamese import Strategy


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_gradients_of_a_linear_classifier_at_zero_are_those_of_the_class_means():
    """Of class c alone, row k is (1/C - [k = c]) m_c; of all, (mean of m - m_k) / C, which no picture added to all of them changes."""
    net = nn.Linear(5, 3, bias=False).double()
    nn.init.zeros_(net.weight)
    batches = [
        drawn(n, 5, seed=c) for c, n in enumerate((2, 7, 4))
    ]  # classes of unequal sizes weigh the same
    means = torch.stack([b.mean(0) for b in batches])
    for c, batch in enumerate(batches):
        (alone,) = gradients(net, batch, torch.full((len(batch),), c))
        assert torch.allclose(alone, (1 / 3 - torch.eye(3).double()[c])[:, None] * means[c])
    for shared in (0 * means[0], 9 * drawn(5, seed=8)):
        (summed,) = real_gradient(net, [net.weight], [b + shared for b in batches], range(3))
        assert torch.allclose(summed, (means.mean(0) - means) / 3)


def test_the_distance_of_rows():
    a, b = ([drawn(4, 2, 3, 3, seed=s), drawn(4, seed=s), drawn(3, 8, seed=s)] for s in (1, 2))
    rows, near = 4 + 3, 1e-5
    assert 0 <= gradient_distance(a, b) <= 2 * rows
    assert gradient_distance(a, a).item() == pytest.approx(0, abs=near)
    assert gradient_distance(a, [-g for g in a]).item() == pytest.approx(2 * rows, abs=near)
    scales = drawn(4, 1, 1, 1, seed=3).exp()
    assert gradient_distance([a[0] * scales, *a[1:]], b).item() == pytest.approx(gradient_distance(a, b).item(), abs=near)  # fmt: skip
    assert torch.equal(gradient_distance([a[0], 50 * a[1], a[2]], b), gradient_distance(a, b))
    dead = [a[0].clone(), *a[1:]]
    dead[0][1] = 0
    assert gradient_distance(dead, a).item() == pytest.approx(1, abs=near)


def test_what_augmentations_leave_alone():
    x = torch.rand(3, 2, 6, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(augmentation.flip(augmentation.flip(x, 0.1), 0.1), x)
    assert torch.equal(augmentation.shift(x, 0, 0), x)
    for corners in (True, False):
        for same in (
            augmentation.scale(x, 1.0, 1.0, align_corners=corners),
            augmentation.rotate(x, 0.0, align_corners=corners),
        ):
            assert torch.allclose(same, x, atol=1e-5)
    # One set of numbers for the whole batch: equal pictures stay equal.
    for word in ("color", "crop", "cutout", "flip", "scale", "rotate"):
        found = Strategy(word)(x[:1].expand(5, -1, -1, -1), torch.Generator().manual_seed(1))
        assert (found == found[:1]).all()


def test_k_centers_cover_within_twice_the_best_radius():
    for seed in range(5):
        x = drawn(9, 2, seed=seed)
        apart = torch.cdist(x, x)
        for count in (1, 2, 3):
            best = min(apart[list(c)].min(0).values.max() for c in combinations(range(9), count))
            assert best <= apart[k_centers(x, count)].min(0).values.max() <= 2 * best + 1e-12


def test_the_distance_of_kernels():
    j, other = drawn(6, 9, seed=1), drawn(6, 9, seed=2)
    assert kernel_distance(j, j).item() == pytest.approx(0, abs=1e-12)
    assert kernel_distance(j, 7 * j).item() == pytest.approx(0, abs=1e-12)
    assert 0 < kernel_distance(j, other) <= 1
    crossed = torch.eye(2).double()
    assert kernel_distance(crossed[:, :1], crossed[:, 1:]).item() == pytest.approx(1)


def test_a_network_trained_on_few_pictures_at_a_time_learns_what_it_learns_from_all():
    """Its gradient is the mean over the batch; where batch norms mix pictures they stay together."""
    x = drawn(30, 1, 4, 4)
    y = torch.arange(30) % 3

    def trained(cached: int, norm: bool) -> torch.Tensor:
        torch.manual_seed(0)
        mixing = [nn.BatchNorm2d(2)] if norm else []
        net = nn.Sequential(nn.Conv2d(1, 2, 3), *mixing, nn.Tanh(), nn.Flatten(), nn.Linear(8, 3)).double()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        options = Condensation(epochs=3, batch_train=20)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(learning, "_CACHED", cached)
            learning._train(net, optimizer, x, y, options, None, learning.drawn_from(1))
        return torch.cat([p.flatten() for p in net.parameters()])

    for norm in (False, True):
        assert torch.allclose(trained(16 * 7, norm), trained(10**6, norm), rtol=1e-12, atol=1e-14)
