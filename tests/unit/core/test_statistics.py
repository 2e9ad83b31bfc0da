"""One-pass statistics against numpy on the whole data, merging, and what cancellation would spoil."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from lineament.core.checks import InputError
from lineament.core.statistics.accumulation import Products
from lineament.core.statistics.class_scatter import ClassScatter
from lineament.core.statistics.moments import Covariance, CrossCovariance, Moments
from lineament.core.statistics.shares import difference, paired_difference


def _data(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=dtype) * 2 + 5


def _pieces(rows: int, cuts: list[int]) -> list[slice]:
    edges = sorted({0, rows, *(cut % rows for cut in cuts)})
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


cuts = st.lists(st.integers(0, 10_000), max_size=6)


@given(cuts, st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_moments_do_not_depend_on_the_batches_nor_on_who_took_them(cuts, share):
    x = _data(40, 3)
    pieces = _pieces(40, cuts)
    parts = [Moments(), Moments()]
    for index, piece in enumerate(pieces):
        parts[index < share].update(x[piece])
    found = parts[0] + parts[1]
    a = x.numpy()
    assert found.count == 40
    np.testing.assert_allclose(found.mean, a.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.variance, a.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(found.std, a.std(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(found.skewness, stats.skew(a), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.kurtosis, stats.kurtosis(a), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(found.minimum, a.min(0))
    np.testing.assert_array_equal(found.maximum, a.max(0))


@given(cuts, st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_covariances_do_not_depend_on_the_batches_nor_on_who_took_them(cuts, share):
    x, y = _data(40, 4), _data(40, 3, seed=1)
    y[:, 0] += x[:, 0]
    one, cross = [Covariance(), Covariance()], [CrossCovariance(), CrossCovariance()]
    for index, piece in enumerate(_pieces(40, cuts)):
        one[index < share].update(x[piece])
        cross[index < share].update(x[piece], y[piece])
    joined, both = one[0] + one[1], cross[0] + cross[1]
    np.testing.assert_allclose(joined.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(joined.covariance, np.cov(x.T), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(joined.correlation, np.corrcoef(x.T), rtol=1e-10, atol=1e-13)
    whole = np.corrcoef(x.T, y.T)[:4, 4:]
    np.testing.assert_allclose(both.correlation, whole, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(both.covariance, np.cov(x.T, y.T)[:4, 4:], rtol=1e-10, atol=1e-13)


@given(cuts, st.integers(0, 5), st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None)
def test_class_scatter_does_not_depend_on_the_batches_nor_on_who_took_them(cuts, share, random):
    x, y = _data(40, 4), torch.arange(40) % 5
    order = list(range(40))
    random.shuffle(order)
    parts = [ClassScatter(5, scatter=True), ClassScatter(5, scatter=True)]
    for index, piece in enumerate(_pieces(40, cuts)):
        parts[index < share].update(x[order[piece]], y[order[piece]])
    found = sum(parts)
    means = torch.stack([x[y == k].mean(0) for k in range(5)])
    z = x - means[y]
    np.testing.assert_array_equal(found.counts, [8] * 5)
    np.testing.assert_allclose(found.means, means, rtol=1e-12)
    np.testing.assert_allclose(found.within, z.T @ z, rtol=1e-10, atol=1e-12)
    squares = [float(z[y == k].square().sum()) for k in range(5)]
    np.testing.assert_allclose(found.squares, squares, rtol=1e-11)


def test_float32_far_from_zero_keeps_seven_digits():
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(30_000, 6, generator=generator) * torch.logspace(-1, 1, 6) + 1000.0).float()
    exact = np.cov(x.double().T)
    stream, moments = Covariance(), Moments()
    for batch in x.split(100):
        stream.update(batch)
        moments.update(batch)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert np.abs((stream.covariance.numpy() - exact) / scale).max() < 1e-6
    np.testing.assert_allclose(moments.variance, np.diag(exact), rtol=1e-10)
    # The textbook E[xxᵀ] - m mᵀ in float32 has lost every digit here; this test would see it.
    naive = (x.T @ x / len(x) - x.mean(0)[:, None] * x.mean(0)[None]).double().numpy()
    assert np.abs((naive - exact) / scale).max() > 1e-3


@pytest.mark.slow
def test_ten_million_samples_in_float32():
    # 10^7 samples that alternate by ±0.5 around 100: mean 100 and variance 0.25, exactly known.
    batch = (torch.arange(100_000) % 2 - 0.5 + 100.0).float()[:, None].expand(-1, 2).contiguous()
    stream = Covariance(correction=0)
    moments = Moments(correction=0)
    for _ in range(100):
        stream.update(batch)
        moments.update(batch)
    assert stream.count == 10**7
    np.testing.assert_allclose(stream.covariance, 0.25, rtol=1e-7)
    np.testing.assert_allclose(stream.mean, 100, rtol=1e-12)
    np.testing.assert_allclose(moments.variance, 0.25, rtol=1e-12)


def test_wide_features_go_by_strips_of_the_upper_triangle():
    x = _data(30, 1100, dtype=torch.float32)
    stream = Covariance()
    stream.update(x[:11])
    stream.update(x[11:])
    np.testing.assert_allclose(stream.covariance, np.cov(x.double().T), rtol=1e-4, atol=1e-5)
    assert torch.equal(stream.covariance, stream.covariance.T)


def test_products_of_two_matrices_and_across_dtypes():
    a, b = _data(20, 3), _data(20, 4, seed=1)
    products = Products(3, 4, torch.device("cpu"), symmetric=False)
    products.add(a[:10], b[:10])
    products.add(a[10:].float(), b[10:].float())
    np.testing.assert_allclose(products.value(), a.T @ b, rtol=1e-5)


@pytest.mark.parametrize("kind", [Moments, Covariance, CrossCovariance, ClassScatter])
def test_a_stream_is_stored_and_read_back_bit_for_bit(kind):
    x, y = _data(12, 3), torch.arange(12) % 3
    second = {Moments: (), Covariance: (), CrossCovariance: (x[:, :2],), ClassScatter: (y,)}[kind]
    stream = kind(scatter=True) if kind is ClassScatter else kind()
    stream.update(x, *second)
    again = kind.from_state_dict(stream.state_dict())
    stream.update(x + 1, *second)
    again.update(x + 1, *second)
    for name, value in stream.state_dict().items():
        other = again.state_dict()[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    empty = kind.from_state_dict(kind().state_dict())
    assert (empty + again).count == again.count == (again + empty).count


def test_half_precision_is_summed_in_float32():
    x = _data(500, 3).half()
    stream = Covariance()
    stream.update(x)
    np.testing.assert_allclose(stream.covariance, np.cov(x.double().T), rtol=1e-5, atol=1e-5)


def test_memory_of_a_stream_does_not_grow():
    stream = ClassScatter(3, scatter=True)
    sizes = set()
    for _ in range(3):
        stream.update(_data(50, 4), torch.arange(50) % 3)
        sizes.add(sum(v.numel() for v in stream.state_dict().values() if isinstance(v, torch.Tensor)))
    assert len(sizes) == 1


def test_classes_grow_when_their_number_is_not_given():
    stream = ClassScatter()
    stream.update(torch.ones(2, 3), torch.tensor([0, 0]))
    stream.update(torch.ones(1, 3), torch.tensor([4]))
    assert stream.counts.tolist() == [2, 0, 0, 0, 1]
    more = ClassScatter()
    more.update(torch.zeros(1, 3), torch.tensor([5]))
    assert (stream + more).counts.tolist() == [2, 0, 0, 0, 1, 1]
    with pytest.raises(InputError, match=r"class 1, 2, 3"):
        stream.complete()


def test_constant_features_correlate_with_nothing():
    x = torch.cat([_data(9, 1), torch.ones(9, 1)], 1)
    stream = Covariance()
    stream.update(x)
    assert stream.correlation[0, 1] == 0 and stream.correlation[1, 1] == 0
    moments = Moments()
    moments.update(x)
    assert moments.kurtosis[1] == 0 and moments.skewness[1] == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_are_refused_before_anything_is_counted(bad):
    x = _data(6, 2)
    x[3, 1] = bad
    for stream, rest in ((Moments(), ()), (Covariance(), ()), (ClassScatter(), (torch.zeros(6).long(),))):
        with pytest.raises(InputError, match="1 of 12 values are NaN or infinite"):
            stream.update(x, *rest)
        assert stream.count == 0
    cross = CrossCovariance()
    with pytest.raises(InputError, match="NaN"):
        cross.update(_data(6, 2), x)
    assert cross.count == 0


def test_wrong_shapes_are_named():
    stream = Covariance()
    stream.update(_data(5, 3))
    with pytest.raises(InputError, match=r"shape \(batch, 3\)"):
        stream.update(_data(5, 4))
    with pytest.raises(InputError, match="expected 5 rows"):
        CrossCovariance().update(_data(5, 2), _data(4, 2))
    with pytest.raises(InputError, match="expected another Covariance"):
        stream + Moments()
    with pytest.raises(InputError, match="do not match"):
        other = Covariance()
        other.update(_data(5, 4))
        stream + other
    with pytest.raises(InputError, match="expected at least 2"):
        one = Covariance()
        one.update(_data(1, 2))
        _ = one.covariance
    with pytest.raises(InputError, match="label 7 at position 2"):
        ClassScatter(3).update(_data(3, 2), torch.tensor([0, 1, 7]))
    with pytest.raises(InputError, match="lacks"):
        Moments.from_state_dict({"count": 3})


def test_the_paired_interval_covers_the_difference_that_is_there():
    generator, inside = torch.Generator().manual_seed(0), 0
    for _ in range(2000):
        was = torch.rand(80, generator=generator) < 0.9
        now = torch.where(torch.rand(80, generator=generator) < 0.85, was, torch.rand(80, generator=generator) < 0.6)  # fmt: skip
        mean, low, high = paired_difference(now, was)
        assert low <= mean <= high
        inside += low <= 0.15 * (0.6 - 0.9) <= high
    assert 0.93 < inside / 2000 < 0.98
    # Pairs that agree are narrower than samples that have nothing to do with each other.
    was = torch.arange(100) < 60
    now = torch.arange(100) < 57
    one, other = (f(now, was) for f in (paired_difference, difference))
    assert one[0] == other[0] and one[2] - one[1] < 0.6 * (other[2] - other[1])
    _, low, high = paired_difference(was[:60], was[:60])
    assert low < 0 < high and paired_difference(was[:0], was[:0]) == (0.0, -1.0, 1.0)
