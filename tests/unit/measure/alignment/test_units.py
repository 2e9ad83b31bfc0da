"""Oracles of matching, information, sparse maps and clusters: closed forms, invariances, limiting cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lineament.core.checks import InputError, NotFiniteError
from lineament.measure.alignment.clusters import unit_clusters
from lineament.measure.alignment.information import histogram_information, mutual_information
from lineament.measure.alignment.joint import JointMoments, rotated_correlations
from lineament.measure.alignment.matching import (
    core_units,
    cycle_order,
    matching,
    overlap,
    self_matching,
    semi_matching,
)
from lineament.measure.alignment.sparse import half_mse, lasso_path


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def moments(*units: Tensor, blocks: int = 2, **options: object) -> JointMoments:
    made = JointMoments([u.shape[1] for u in units], blocks=blocks, **options)  # pyright: ignore[reportArgumentType]
    made.update([u[:, None] for u in units])
    return made


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(0)) / x.std(0, correction=0)


def test_a_permuted_and_rescaled_copy_is_found() -> None:
    x, order = normal(200, 12), torch.randperm(12, generator=torch.Generator().manual_seed(1))
    y = (x * (1 + normal(12, seed=2).abs()) + normal(12, seed=3))[:, order]
    between = moments(x, y).correlations(0, 1)
    pairs = matching(between)
    torch.testing.assert_close(order[pairs.columns], torch.arange(12))
    torch.testing.assert_close(pairs.values, torch.ones(12, dtype=torch.float64))
    assert overlap(between) == 1
    x, y = standardised(x), standardised(y)
    gram, cross = x.T @ x / 200, x.T @ y / 200
    weights = lasso_path(gram, cross, [0.0, 0.05])
    assert half_mse(weights[0], gram, cross, y.square().mean(0)).abs().max() < 1e-12
    assert ((weights[0].abs() > 1e-9).sum(1) == 1).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 7), st.integers(1, 7), st.integers(0, 10**6))
def test_matching(rows: int, columns: int, seed: int) -> None:
    scores = normal(rows, columns, seed=seed)
    pairs, back = matching(scores), matching(scores.T)
    assert len(pairs.values) == min(rows, columns)
    assert len(set(pairs.columns.tolist())) == len(set(pairs.rows.tolist())) == len(pairs.rows)
    assert float(pairs.values.sum()) == pytest.approx(float(back.values.sum()))
    # No exchange of two partners is better, and each unit's own best is at least as good as what it got.
    a, b = pairs.rows, pairs.columns
    exchanged = scores[a][:, b] + scores[a][:, b].T
    assert (pairs.values[:, None] + pairs.values[None] >= exchanged - 1e-12).all()
    assert (semi_matching(scores).values[a] >= pairs.values).all()
    assert 0 <= overlap(scores) <= 1
    if rows >= 2:
        square = normal(rows, rows, seed=seed)
        own = self_matching(square)
        assert (own.rows != own.columns).all() and sorted(own.columns.tolist()) == list(range(rows))


@given(st.permutations(range(9)))
@settings(max_examples=30, deadline=None)
def test_cycles(permutation: list[int]) -> None:
    order, lengths = cycle_order(torch.tensor(permutation))
    assert sorted(order.tolist()) == list(range(9)) and int(lengths.sum()) == 9
    for cycle in order.split(lengths.tolist()):
        visited = cycle.tolist()
        assert [permutation[i] for i in visited] == visited[1:] + visited[:1] and visited[0] == min(visited)


def test_ties_take_the_first() -> None:
    assert semi_matching(torch.zeros(2, 3)).columns.tolist() == [0, 0]


def test_a_unit_without_partner_is_in_no_core() -> None:
    scores = torch.tensor([[0.9], [0.8]])
    assert core_units({(0, 1): scores}, 0.5)[0].tolist() == [0]


def test_independent_units_correlate_by_chance_only() -> None:
    n, d = 4000, 64
    between = moments(normal(n, d), normal(n, d, seed=1)).correlations(0, 1)
    expected = math.sqrt(2 * math.log(d) / n)
    assert float(semi_matching(between).mean) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize("split", [1, 7, 64])
def test_batches_and_order_do_not_matter(split: int) -> None:
    x, y = normal(100, 3, 5) + 100, normal(100, 3, 4, seed=1)
    whole, parts = JointMoments([5, 4], blocks=4), JointMoments([5, 4], blocks=4)
    whole.update([x, y])
    for rows in torch.arange(100).split(split):
        parts.update([x[rows], y[rows]])
    torch.testing.assert_close(parts.correlations(), whole.correlations(), rtol=0, atol=1e-12)
    # The same images fall into the same blocks, so the errors are the same, too.
    for one, other in zip(parts.blocks, whole.blocks):
        torch.testing.assert_close(one.scatter, other.scatter, rtol=1e-10, atol=1e-10)
    other_order = torch.randperm(100, generator=torch.Generator().manual_seed(5))
    turned = JointMoments([5, 4], blocks=1)
    turned.update([x[other_order], y[other_order]])
    torch.testing.assert_close(turned.correlations(), whole.correlations(), rtol=0, atol=1e-12)


def test_moments_are_stored_and_go_on() -> None:
    x, y = normal(30, 2, 3), normal(30, 2, 3, seed=1)
    whole = JointMoments([3, 3], blocks=3, keep=20)
    whole.update([x[:16], y[:16]])
    part = JointMoments.from_state_dict(whole.state_dict())
    for each in (whole, part):
        each.update([x[16:], y[16:]])
    assert torch.equal(part.correlations(), whole.correlations())
    assert torch.equal(part.rows, whole.rows) and len(part.rows) == 20
    assert torch.equal(part.shuffled_correlations(0, 1), whole.shuffled_correlations(0, 1))


def test_blocks_are_whole_images_and_of_one_size() -> None:
    made = JointMoments([1], blocks=3, nulls=())
    for size in (4, 1, 7):
        made.update([torch.arange(float(size)).reshape(size, 1, 1).expand(size, 5, 1)])
    assert [block.count for block in made.blocks] == [20, 20, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dead_unit_has_no_correlation(dtype: torch.dtype) -> None:
    x = normal(50, 3).to(dtype)
    x[:, 1] = 0.1  # no binary fraction: its mean is rounded
    made = moments(x, x)
    assert made.dead(0).tolist() == [1]
    correlations = made.correlations(0, 1)
    assert not correlations[1].any() and not correlations[:, 1].any() and correlations.isfinite().all()


def test_the_shuffled_null_sees_other_images_at_the_same_position() -> None:
    position = torch.arange(5.0).expand(40, 5)[..., None]  # what a unit holds that looks at the place only
    image = normal(40, 1, 1).expand(40, 5, 1).float()
    made = JointMoments([1, 1], blocks=1)
    made.update([position, position])
    assert made.shuffled_correlations(0, 1).item() == pytest.approx(1)
    other = JointMoments([1, 1], blocks=1)
    other.update([image, image])
    assert abs(other.shuffled_correlations(0, 1).item()) < 0.6 and other.correlations(
        0, 1
    ).item() == pytest.approx(1)


def test_the_rotated_null_keeps_the_subspace() -> None:
    x = standardised(normal(500, 16))
    made = moments(x, x).correlations()
    turned = rotated_correlations(made[:16, 16:], made[16:, 16:])
    # Every turned unit is still a combination of a's: R² of 1, though no unit is the same.
    fitted = (turned * torch.linalg.solve(made[:16, :16], turned)).sum(0)
    torch.testing.assert_close(fitted, torch.ones(16, dtype=torch.float64))
    assert matching(turned).mean < 0.8 and matching(made[:16, 16:]).mean == pytest.approx(1)


def test_errors_name_network_and_unit() -> None:
    bad = torch.zeros(4, 2, 3)
    bad[1, 0, 2] = float("nan")
    with pytest.raises(NotFiniteError, match=r"network 1: unit 2 is NaN or infinite \(1 of 3"):
        JointMoments([3, 3]).update([torch.zeros(4, 2, 3), bad])
    with pytest.raises(InputError, match="expected 4 images and 2 positions"):
        JointMoments([3, 3]).update([torch.zeros(4, 2, 3), torch.zeros(4, 1, 3)])


# Mutual information


def test_information_of_known_tables() -> None:
    margins = torch.tensor([0.2, 0.3, 0.5]).double()
    product = 1000 * margins[:, None] * margins
    assert abs(float(histogram_information(product, bias="none"))) < 1e-15
    diagonal = torch.diag(1000 * margins)
    assert float(histogram_information(diagonal, bias="none")) == pytest.approx(
        float(-(margins * margins.log()).sum())
    )


def test_corrections_are_in_double_precision() -> None:
    # (3 cells - 3 rows - 3 columns + 1) / 2N is no float32 number.
    x = torch.tensor([0.0, 1.0, 2.0]).repeat(19)[:, None].double()
    plain, corrected = (mutual_information(x, x, bins=3, bias=bias) for bias in ("none", "miller_madow"))
    assert float(plain - corrected) == pytest.approx((3 - 3 - 3 + 1) / (2 * 57), abs=1e-13)


def test_information_of_gaussians() -> None:
    x, noise = normal(40_000, 1), normal(40_000, 1, seed=1)
    y = 0.9 * x + math.sqrt(1 - 0.81) * noise
    exact = -0.5 * math.log(1 - 0.81)
    assert float(mutual_information(x, y, bins=40)) == pytest.approx(exact, abs=0.03)
    assert float(mutual_information(x, y, bins=10)) == pytest.approx(0.73, abs=0.02)
    # The paper's bins call the negative half zero.
    assert float(mutual_information(x, y, bins="official")) == pytest.approx(0.53, abs=0.02)


@pytest.mark.parametrize("change", [torch.exp, lambda v: v**3, lambda v: 1e-9 * v - 7])
def test_information_ignores_increasing_changes(change) -> None:
    x, y = normal(500, 2).relu(), normal(500, 2, seed=1) + normal(500, 2)
    found = mutual_information(x, y)
    torch.testing.assert_close(mutual_information(change(x), change(y)), found)


def test_a_rarely_active_unit_has_information_too() -> None:
    x = torch.zeros(5000, 1)
    x[:3] = 1.0
    assert float(mutual_information(x, x, bias="none")) > 0.004
    with pytest.raises(InputError, match="too rarely for these percentiles"):
        mutual_information(x, x, bins="official")


# Sparse maps


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(1, 4), st.floats(0.0, 0.9), st.integers(0, 10**6))
def test_lasso_meets_its_conditions(sources: int, targets: int, shared: float, seed: int) -> None:
    common = normal(60, 1, seed=seed)
    x = standardised(normal(60, sources, seed=seed + 1) * (1 - shared) + common * shared)
    y = standardised(x @ normal(sources, targets, seed=seed + 2) + normal(60, targets, seed=seed + 3))
    gram, cross = x.T @ x / 60, x.T @ y / 60
    largest = float(cross.abs().max())
    penalties = [0.0, 0.01 * largest, 0.1 * largest, 0.5 * largest, largest]
    weights = lasso_path(gram, cross, penalties)
    assert not weights[-1].any()
    for lam, w in zip(penalties, weights):
        slope = cross.T - w @ gram
        assert (slope.abs() <= lam + 1e-9).all()
        used = w != 0
        torch.testing.assert_close(slope[used], lam * w[used].sign(), rtol=0, atol=1e-9)
    errors = half_mse(weights, gram, cross, y.square().mean(0))
    assert (errors.diff(dim=0) >= -1e-12).all()
    loose = lasso_path(gram, cross, penalties, polish=False)

    def objective(w: Tensor) -> Tensor:
        penalty = torch.tensor(penalties)[:, None] * w.abs().sum(-1)
        return half_mse(w, gram, cross, y.square().mean(0)) + penalty

    assert (objective(loose) - objective(weights)).max() <= 1e-6


def test_lasso_of_orthonormal_units_shrinks() -> None:
    q, _ = torch.linalg.qr(normal(40, 6))
    x, y = q * 40**0.5, normal(40, 3, seed=1)
    cross = x.T @ y / 40
    found = lasso_path(torch.eye(6).double(), cross, [0.1])[0].T
    torch.testing.assert_close(found, cross.sign() * (cross.abs() - 0.1).clamp_min(0))


# Clusters


def blocks(groups: int, size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two networks whose units span the same small spaces, each in a basis of its own."""
    base = normal(600, groups, size, seed=seed) * 0.35 + normal(600, groups, 1, seed=seed + 1)
    turns = torch.linalg.qr(normal(groups, size, size, seed=seed + 2)).Q
    return base.flatten(1), torch.einsum("ngs,gst->ngt", base, turns.abs()).flatten(1)


@pytest.mark.parametrize("method", ["spectral", "hierarchical"])
def test_planted_subspaces_are_found(method: str) -> None:
    x, y = blocks(4, 3)
    found = unit_clusters(moments(x, y).correlations(), [12, 12], 4, method=method)
    assert found.shared == 4
    assert sorted(cluster.members for cluster in found.clusters) == [
        (group, group) for group in ((0, 1, 2), (3, 4, 5), (6, 7, 8), (9, 10, 11))
    ]
    assert all(min(cluster.cosines) > 0.99 and cluster.purity == 0.5 for cluster in found.clusters)
