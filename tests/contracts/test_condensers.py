"""What every way to condense keeps: the same call, the form of the set, balance, the seed, the input's device and values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lineament.learn import Condensation, condense
from lineament.learn.condensation.condensing import LEARNED, METHODS

X = torch.rand(25, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0] * 14 + [1] * 5 + [2] * 6)  # unbalanced


def tiny() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


def made(method: str, x: torch.Tensor = X, seed: int = 0, per_class: int = 2):
    options = Condensation(outer=2, inner=2, epochs=1, batch_real=4)
    return condense(x, Y, per_class=per_class, method=method, network=tiny, options=options, seed=seed)


@pytest.mark.parametrize("method", METHODS)
def test_the_form_of_the_set(method):
    kept = X.clone()
    found = made(method)
    assert found.pictures.shape == (6, 3, 8, 8) and found.pictures.dtype == torch.float32
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2] and found.per_class == 2
    assert torch.isfinite(found.pictures).all() and torch.equal(X, kept)
    assert torch.allclose(found.mean, X.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(found.normalised(X).std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4)
    assert (len(found.trace) == 4) == (method in LEARNED)
    one = made(method, per_class=1)
    assert len(one.pictures) == 3


@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_and_the_form_of_storage_does_not(method):
    state = torch.get_rng_state()
    first = made(method)
    torch.rand(3)
    again = made(method)
    assert torch.equal(first.pictures, again.pictures)
    if method in (*LEARNED, "random"):
        assert not torch.equal(made(method, seed=1).pictures, first.pictures)
    strided = made(method, X.movedim(1, -1).contiguous().movedim(-1, 1))
    assert torch.allclose(strided.pictures, first.pictures, atol=1e-4)
    torch.set_rng_state(state)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in LEARNED])
def test_what_is_chosen_is_there_once_and_of_its_class(method):
    found = made(method)
    rows = [(picture == X).flatten(1).all(1).nonzero()[:, 0].tolist() for picture in found.pictures]
    assert all(len(r) == 1 for r in rows) and len({r[0] for r in rows}) == 6
    assert [int(Y[r[0]]) for r in rows] == found.labels.tolist()
