"""What every measure of similarity keeps: a value for itself, the invariance that it states, and no eye for batches or the order of samples."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lineament.measure.alignment.joint import JointMoments
from lineament.measure.alignment.similarity import MEASURES, KernelSums, similarity

Measured = Callable[[list[tuple[Tensor, Tensor]]], float]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair() -> tuple[Tensor, Tensor]:
    """Four units and five, which share three directions."""
    shared = normal(400, 3)
    x = shared @ normal(3, 4, seed=1) + 0.5 * normal(400, 4, seed=2)
    return x, shared @ normal(3, 5, seed=3) + 0.5 * normal(400, 5, seed=4)


def from_moments(name: str) -> Measured:
    def measured(batches: list[tuple[Tensor, Tensor]]) -> float:
        moments = JointMoments([each.shape[1] for each in batches[0]], blocks=1, nulls=())
        for x, y in batches:
            moments.update([x[:, None], y[:, None]])
        whole = moments.total().covariance
        one, two = moments.slice(0), moments.slice(1)
        return similarity(name, whole[one, one], whole[two, two], whole[one, two])

    return measured


def debiased(batches: list[tuple[Tensor, Tensor]]) -> float:
    sums = KernelSums([each.shape[1] for each in batches[0]])
    for x, y in batches:
        sums.update([x, y])
    return float(sums.cka()[0, 1])


# How each is measured on batches, of itself, the change of either side that leaves it as it is, and its range.
ROTATION = MEASURES["cka"].invariant
FAMILY = {name: (from_moments(name), m.same, m.invariant, m.range) for name, m in MEASURES.items()}
FAMILY["debiased cka"] = (debiased, 1.0, ROTATION, (-1.0, 1.0))
EXACT = {name for name in FAMILY if not name.startswith(("ridge", "procrustes"))}  # a root, or a small ridge

CHANGES = {
    "order and scale of the units": lambda v: (v * torch.arange(1.0, v.shape[1] + 1).double()).flip(1) - 7,
    ROTATION: lambda v: 3 * v @ torch.linalg.qr(normal(v.shape[1], v.shape[1], seed=9)).Q + 1,
    "any invertible linear map": lambda v: v @ normal(v.shape[1], v.shape[1], seed=8) + 2,
}


@pytest.mark.parametrize("name", FAMILY)
def test_a_representation_is_like_itself(name: str) -> None:
    measured, same, _, _ = FAMILY[name]
    x, _ = pair()
    assert measured([(x, x)]) == pytest.approx(same, abs=1e-9 if name in EXACT else 2e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_each_keeps_its_invariance_and_range(name: str) -> None:
    measured, _, invariant, (low, high) = FAMILY[name]
    x, y = pair()
    before = measured([(x, y)])
    sides = invariant[-1] if invariant.endswith((" of a", " of b")) else "ab"
    change = CHANGES[invariant.removesuffix(" of a").removesuffix(" of b")]
    tolerance = 1e-9 if name in EXACT else 2e-5
    if "a" in sides:
        assert measured([(change(x), y)]) == pytest.approx(before, abs=tolerance)
    if "b" in sides:
        assert measured([(x, change(y))]) == pytest.approx(before, abs=tolerance)
    assert low <= before <= high
    assert before < measured([(x, x)]) or MEASURES[name].kind == "distance"


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("size", [1, 7, 399])
def test_batches_and_the_order_of_samples_do_not_matter(name: str, size: int) -> None:
    measured, *_ = FAMILY[name]
    x, y = pair()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(3))
    whole = measured([(x, y)])
    assert measured(list(zip(x.split(size), y.split(size)))) == pytest.approx(whole, abs=1e-12)
    assert measured([(x[order], y[order])]) == pytest.approx(whole, abs=1e-12)
