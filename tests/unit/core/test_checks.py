"""Errors are part of the interface: each quotes what came, what was expected, and the nearest valid choice."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lineament.core.checks import InputError, labels, listed, number, one_of, show, suggest, tensor


def test_one_of_returns_the_choice_and_names_the_nearest():
    assert one_of("method", "grad_cam", ["grad_cam", "cam"]) == "grad_cam"
    with pytest.raises(InputError, match=r"got 'gradcam'.*nearest: 'grad_cam'"):
        one_of("method", "gradcam", ["grad_cam", "norm_grad"])


def test_suggest_lists_few_choices_and_counts_many():
    assert suggest("zzz", ["a", "b"]) == "; there are: 'a', 'b'"
    assert "40 choices" in suggest("zzz", [f"layer{i}" for i in range(40)])
    assert suggest("x", []) == "; there are none"


def test_digits_in_common_make_no_number_near():
    assert suggest("11", map(str, range(10))).startswith("; there are: '0', '1'")


@given(st.floats(allow_nan=True, allow_infinity=True))
def test_number_accepts_exactly_the_interval(value):
    if 0 < value <= 1:
        assert number("fraction", value, low=0, high=1, open_low=True) == value
    else:
        with pytest.raises(InputError, match=r"fraction: got .*, expected a number in \(0, 1\]"):
            number("fraction", value, low=0, high=1, open_low=True)


@pytest.mark.parametrize("value", [True, 1.0, "3", None, torch.tensor(3)])
def test_number_refuses_what_is_no_integer(value):
    with pytest.raises(InputError, match="expected an integer"):
        number("steps", value, low=1, integer=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1.0], "expected a torch.Tensor"),
        (torch.zeros(3), r"shape \(3,\).*\(batch, 2\)"),
        (torch.zeros(4, 3), r"shape \(4, 3\).*\(batch, 2\)"),
        (torch.zeros(0, 2), "empty"),
        (torch.zeros(4, 2, dtype=torch.int64), "floating-point"),
        (torch.tensor([[1.0, float("nan")]]), "1 of 2 values are NaN"),
        (torch.tensor([[1.0, float("inf")]]), "1 of 2 values are NaN or infinite"),
    ],
)
def test_tensor_says_what_is_wrong(value, message):
    with pytest.raises(InputError, match=f"^x: .*{message}"):
        tensor("x", value, shape=("batch", 2), floating=True)


def test_tensor_returns_what_fits_unchanged():
    x = torch.rand(4, 2)
    assert tensor("x", x, shape=("batch", 2), floating=True) is x


def test_labels_name_the_first_wrong_label_and_its_place():
    assert labels("y", torch.tensor([0, 4], dtype=torch.uint8), classes=5).dtype == torch.int64
    with pytest.raises(InputError, match="label 5 at position 1, expected labels from 0 to 4"):
        labels("y", torch.tensor([0, 5]), classes=5)
    with pytest.raises(InputError, match="label -1 at position 0"):
        labels("y", torch.tensor([-1, 5]))
    with pytest.raises(InputError, match=r"expected a tensor of shape \(3,\)"):
        labels("y", torch.tensor([0, 1]), count=3)
    with pytest.raises(InputError, match="integer"):
        labels("y", torch.tensor([0.0, 1.0]))


def test_show_is_short_for_anything():
    assert show("x" * 500).endswith("...") and len(show("x" * 500)) == 80
    assert show(torch.zeros(2, dtype=torch.int64)) == "an int64 tensor of shape (2,)"


def test_listed_takes_several_and_names_one():
    for values in ([0.5, 1], (0.5, 1), range(2), torch.tensor([0.5, 1.0])):
        assert len(listed("x", values, "numbers")) == 2
    for value in (0.5, "ab", None, torch.tensor(0.5)):
        with pytest.raises(InputError, match=r"x: got .*, expected a list of numbers"):
            listed("x", value, "numbers")
    with pytest.raises(InputError, match="x: got none"):
        listed("x", [], "numbers")
