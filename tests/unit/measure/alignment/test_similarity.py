"""Measures of similarity: what leaves each as it is, self-similarity, and debiased CKA against Song's estimator with its matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lineament.core.checks import InputError
from lineament.measure.alignment.similarity import (
    BatchKernels,
    KernelSums,
    cka,
    refused,
    ridge,
    similarity,
    soft_matching,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def pair(width: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    shared = normal(400, 3, seed=seed)
    x = shared @ normal(3, 4, seed=seed + 1) + 0.5 * normal(400, 4, seed=seed + 2)
    return x, shared @ normal(3, width, seed=seed + 3) + 0.5 * normal(400, width, seed=seed + 4)


def measured(name: str, x: Tensor, y: Tensor) -> float:
    x, y = x - x.mean(0), y - y.mean(0)
    return similarity(name, x.T @ x / len(x), y.T @ y / len(x), x.T @ y / len(x))


def song(x: Tensor, y: Tensor) -> float:
    n = len(x)
    k, m = ((v @ v.T).fill_diagonal_(0.0) for v in (x, y))
    ones = torch.ones(n, dtype=x.dtype)
    value = (k @ m).trace() + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * ones @ k @ m @ ones
    return float(value / (n * (n - 3)))


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_debiased_cka_is_songs_estimator(shift: float) -> None:
    x, y = pair()
    x, y = x[:90] + shift, y[:90] - shift
    parts = [KernelSums([4, 5]), KernelSums([4, 5])]
    for number, rows in enumerate(torch.arange(90).split(13)):
        parts[number % 2].update([x[rows], y[rows]])
    found = (parts[0] + parts[1]).hsic()
    centred = (x - x.mean(0), y - y.mean(0))
    for i, a in enumerate(centred):
        for j, b in enumerate(centred):
            assert float(found[i, j]) == pytest.approx(song(a, b), rel=1e-10 if shift else 1e-12)
    assert float(KernelSums.from_state_dict(parts[0].state_dict()).hsic()[0, 1]) == float(
        parts[0].hsic()[0, 1]
    )


def test_one_batch_of_kernels_is_the_whole() -> None:
    x, y = pair()
    kernels, sums = BatchKernels(2), KernelSums([4, 5])
    kernels.update([x, y])
    sums.update([x, y])
    torch.testing.assert_close(kernels.cka(), sums.cka())
    with pytest.raises(InputError, match="at least 4"):
        kernels.update([x[:3], y[:3]])


def test_few_samples_of_independent_units() -> None:
    x, y = normal(100, 512), normal(100, 512, seed=1)
    assert cka(x, y, debiased=False) > 0.8 and abs(cka(x, y)) < 0.03
    assert "expected at least 2048" in refused("cka", 100, 1024) and not refused("matching", 100, 1024)


def test_ridge_is_judged_on_other_samples() -> None:
    x, y = normal(300, 128), normal(300, 128, seed=1)
    halves = [
        tuple(m.T @ n / 150 for m, n in ((a, a), (b, b), (a, b)))
        for a, b in ((x[:150], y[:150]), (x[150:], y[150:]))
    ]
    assert ridge(halves[0], halves[0]) > 0.7 and ridge(*halves) < 0


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (4, 8), (6, 3), (4, 6)])
def test_soft_matching_is_the_best_transport(rows: int, columns: int) -> None:
    from scipy.optimize import linear_sum_assignment

    scores = normal(rows, columns)
    each = math.lcm(rows, columns)
    copies = scores.repeat_interleave(each // rows, 0).repeat_interleave(each // columns, 1)
    best = copies[linear_sum_assignment(copies.numpy(), maximize=True)].mean()
    assert soft_matching(scores) == pytest.approx(float(best), abs=1e-9)
