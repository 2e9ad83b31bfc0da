"""The table of descriptors and classifiers, and the invariances of the descriptors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from lineament.core.checks import InputError
from lineament.handcrafted.gabor import gabor_kernel
from lineament.handcrafted.hog import hog
from lineament.handcrafted.lbp import lbp, lbp_codes
from lineament.handcrafted.scores import class_scores
from lineament.handcrafted.table import CLASSIFIERS, DESCRIPTORS, classifier, described, evaluated


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    x = torch.from_numpy(x[:400]).reshape(-1, 8, 8).repeat_interleave(2, 1).repeat_interleave(2, 2) / 16
    return x, y[:400]


@pytest.mark.parametrize("name", DESCRIPTORS)
def test_a_descriptor_of_one_image_is_that_of_the_batch(name, digits):
    x, _ = digits
    whole = described(name, x[:5])
    np.testing.assert_allclose(described(name, x[3:4])[0], whole[3], atol=1e-9)
    np.testing.assert_allclose(described(name, x[:5].float()), whole, atol=2e-6)
    assert np.isfinite(described(name, torch.zeros(2, 16, 16))).all()
    prepared = described(name, (20 * x[:3]).to(torch.uint8), prepare=True)
    assert np.isfinite(prepared).all() and len(prepared) == 3


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_each_classifier_reads_gabor_features_and_permuted_labels_say_nothing(kind, digits):
    x, y = digits
    X = described("hog" if kind != "gbdt" else "gabor-whole", x)
    train, test = (X[:300], y[:300]), (X[300:], y[300:])
    found, made = evaluated("hog", kind, *classifier(kind, effort="none"), train, test)
    assert found.scores.accuracy > (0.85 if kind != "gbdt" else 0.5)
    assert found.settings == {} and found.validation is None and found.margin is not None
    assert found.scores.micro[2] == pytest.approx(found.scores.accuracy)
    assert (made.predict(X[300:]) == found.predicted).all()
    if kind == "knn":
        chance, _ = evaluated(
            "hog",
            kind,
            *classifier(kind, effort="none"),
            (X[:300], np.random.default_rng(0).permutation(y[:300])),
            test,
        )
        assert chance.scores.accuracy < 0.25


def test_the_search_looks_at_the_training_part_only(digits):
    x, y = digits
    X = described("hog", x)
    made, grid = classifier("knn", effort="small")
    one, _ = evaluated("hog", "knn", made, grid, (X[:200], y[:200]), (X[200:], y[200:]))
    other, _ = evaluated(
        "hog", "knn", *classifier("knn", effort="small"), (X[:200], y[:200]), (X[200:250], y[200:250])
    )
    assert one.settings == other.settings and one.validation == other.validation
    assert all(len(classifier(k, effort="full")[1]) >= 3 for k in CLASSIFIERS)
    assert "Nystroem" in str(classifier("svm", samples=30_000)[0])


def test_bad_parts_are_refused(digits):
    x, y = digits
    X = described("pixels", x)
    with pytest.raises(InputError, match="one class"):
        evaluated("pixels", "knn", *classifier("knn"), (X[:9], np.zeros(9)), (X[9:], y[9:]))
    with pytest.raises(InputError, match="class 9"):
        some = y < 9
        evaluated("pixels", "knn", *classifier("knn"), (X[some], y[some]), (X, y))
    with pytest.raises(InputError, match="8 pixels"):
        described("hog", torch.zeros(2, 4, 4))
    with pytest.raises(InputError, match="gabor"):
        described("gabro", x)
    with pytest.raises(InputError, match="svm"):
        classifier("smv")


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.1, 10), st.floats(-3, 3))
def test_hog_does_not_see_brightness_and_lbp_no_increasing_map(seed, gain, shift):
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(1, 16, 16, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(hog(x + shift, cell=4), hog(x, cell=4), rtol=0, atol=1e-9)
    torch.testing.assert_close(hog(gain * x, cell=4), hog(x, cell=4), rtol=0, atol=1e-3)
    turned = hog(x.flip(1, 2), cell=4).view(3, 3, 2, 2, 9)
    torch.testing.assert_close(turned, hog(x, cell=4).view(3, 3, 2, 2, 9).flip(0, 1, 2, 3), rtol=0, atol=1e-9)
    grey = torch.randint(0, 200, (1, 12, 12), generator=generator)
    inside = lambda v: lbp_codes(v, 4, 1)[:, 1:-1, 1:-1]  # noqa: E731
    assert torch.equal(inside(grey), inside(grey**2 + 3 * grey))
    ror = lbp_codes(grey, 4, 1, codes="ror")[:, 1:-1, 1:-1]
    assert torch.equal(
        lbp_codes(grey.rot90(1, (1, 2)), 4, 1, codes="ror")[:, 1:-1, 1:-1], ror.rot90(1, (1, 2))
    )
    torch.testing.assert_close(
        lbp(grey, grid=2).view(4, 59).sum(1), torch.ones(4, dtype=torch.float64), check_dtype=False
    )


def test_an_edge_is_one_bin_and_a_turned_filter_its_conjugate():
    edge = torch.zeros(1, 16, 16)
    edge[:, :, 8:] = 1
    found = hog(edge, cell=8, block=1).view(-1, 9)
    assert bool((found[:, 1:] == 0).all()) and bool((found[:, 0] > 0).any())
    one, other = gabor_kernel(0.2, 0.4), gabor_kernel(0.2, 0.4 + np.pi)
    torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other).conj(), rtol=0, atol=1e-12)
    assert class_scores([0, 1, 1, 2], [0, 1, 2, 2]).confusion == ((1, 0, 0), (0, 1, 1), (0, 0, 1))


@pytest.mark.parametrize("more", [{"binning": "linear"}, {"binning": "hard"}, {"like": "opencv"}])
def test_gradients_pass_by_flat_places(more):
    x = torch.zeros(1, 16, 16, dtype=torch.float64)
    x[:, 4:9, 5:8] = torch.rand(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x.requires_grad_()
    found = hog(x, cell=4, **more)
    torch.testing.assert_close(found.detach(), hog(x.detach(), cell=4, **more), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(found.square().sum(), x)
    assert bool(slope.isfinite().all()) and bool((slope[0, 4:9, 5:8] != 0).any()) and not slope[0, 12:].any()


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4, 8, 9, 12])
def test_the_bin_of_every_direction_between_whole_numbers(count, signed):
    side = torch.arange(-12, 13, dtype=torch.float64)
    up, right = (v.flatten() for v in torch.meshgrid(side, side, indexing="ij"))
    moved = (up != 0) | (right != 0)
    up, right = up[moved], right[moved]
    degrees = torch.rad2deg(torch.atan2(up, right))
    eighth = (up == 0) | (right == 0) | (up.abs() == right.abs())
    degrees = torch.where(eighth, (degrees / 45).round() * 45, degrees)
    whole = 360 if signed else 180
    expected = ((degrees % whole) * count / whole + 1e-12).floor().long() % count
    # Each image holds one gradient in its middle; -0.0 beside 0.0 is no step to the left.
    images = torch.zeros(len(up), 3, 3, dtype=torch.float64)
    images[:, 2, 1], images[:, 1, 2] = up, torch.where(right == 0, -0.0, right)
    images[:, 2, 2], images[:, 1, 1] = 0, 0
    votes = hog(images, count, cell=3, block=1, norm="L1", signed=signed)
    assert torch.equal(votes.argmax(1), expected)
    assert bool((votes.gather(1, expected[:, None]) > 0.2).all())


def test_diagonals_of_divided_bytes_are_where_degrees_in_double_precision_put_them():
    # The same difference twice, each rounded by itself: about a tenth of the pairs are not equal.
    draw = torch.Generator().manual_seed(0)
    ends = torch.randint(0, 256, (4, 20_000), generator=draw)
    ends[3] = ends[2] - (ends[0] - ends[1]) * (1 - 2 * torch.randint(0, 2, (20_000,), generator=draw))
    ends = ends[:, (ends[0] != ends[1]) & (ends[3] >= 0) & (ends[3] < 256)]
    images = torch.zeros(ends.shape[1], 3, 3, dtype=torch.float64)
    images[:, 2, 1], images[:, 0, 1], images[:, 1, 2], images[:, 1, 0] = ends.double() / 255
    up, right = images[:, 2, 1] - images[:, 0, 1], images[:, 1, 2] - images[:, 1, 0]
    assert 0.1 < (up.abs() != right.abs()).double().mean() < 0.9
    degrees = [math.degrees(math.atan2(*pair)) % 180 for pair in zip(up.tolist(), right.tolist())]
    for count in (4, 8, 12):
        expected = torch.tensor([int(angle * count // 180) for angle in degrees])
        found = hog(images, count, cell=3, block=1).argmax(1)
        # An arc tangent is not rounded to the nearest number everywhere.
        assert (found != expected).double().mean() < 1e-3


def test_no_images_are_no_rows_and_many_are_as_one_by_one():
    assert hog(torch.rand(0, 32, 32)).shape == (0, 324)
    bright = torch.rand(1, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(hog(1e25 * bright, norm="L1"), hog(1e3 * bright, norm="L1"))
    assert lbp(torch.zeros(0, 32, 32, dtype=torch.uint8)).shape == (0, 944)
    many = torch.rand(130, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = hog(many, cell=4)
    torch.testing.assert_close(torch.cat([hog(one[None], cell=4) for one in many]), whole, rtol=0, atol=1e-12)
    x = many[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: hog(v, cell=8, block=1, binning="linear", norm="L2"), x)


@pytest.mark.parametrize("name", ["pixels", "hog", "lbp", "gabor"])
def test_descriptors_do_not_depend_on_the_unit_of_grey_levels(name):
    grey = torch.randint(0, 256, (6, 16, 16), generator=torch.Generator().manual_seed(0))
    grey[0, 0, :2] = torch.tensor([0, 255])
    expected = described(name, grey)
    for other in (grey.float(), grey.double() / 255, grey.double() / 255 * 4 - 2, grey * 256, grey.byte()):
        np.testing.assert_allclose(described(name, other), expected, rtol=1e-4, atol=2e-5)
    # A few new images may not reach white.
    np.testing.assert_allclose(
        described(name, grey[1:2] // 2, levels=(0, 255)), described(name, (grey[1:2] // 2).double() / 255), rtol=1e-6, atol=1e-9
    )  # fmt: skip
