"""What bad input gets: one clear message that quotes what came, what was expected and the nearest valid choice.

Every public function checks its arguments here, before any work is done. A failed check raises
:class:`InputError`, which the command line turns into one line on standard error and exit status 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor


class InputError(ValueError):
    """The caller passed something that cannot be used; the message says what, why and how to fix it."""


class NoGradientError(InputError):
    """Gradients cannot pass through the model, so that nothing can be said of its derivatives: it is quantised, or detaches what it computes."""


class NotFiniteError(InputError):
    """NaN or infinity where only finite numbers can be used: in the data, the weights, a loss or a gradient."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`InputError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise InputError(message)


def show(value: Any, limit: int = 80) -> str:
    """A short, printable form of any argument: tensors by shape and dtype, the rest by a clipped ``repr``.

    >>> show(torch.zeros(2, 3))
    'a float32 tensor of shape (2, 3)'
    >>> show((torch.zeros(2, 3), None))
    'a tuple of a float32 tensor of shape (2, 3), None'
    >>> show({"weight": torch.zeros(2, 3)})
    "a dict of 'weight': a float32 tensor of shape (2, 3)"
    """
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{'an' if dtype[0] == 'i' else 'a'} {dtype} tensor of shape {tuple(value.shape)}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return (
            f"{'an' if str(value.dtype)[0] == 'i' else 'a'} {value.dtype} array of shape {tuple(value.shape)}"
        )
    if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value):
        inside = [show(item, limit) for item in value[:4]] + ["..."] * (len(value) > 4)
        return f"a {type(value).__name__} of {', '.join(inside)}"
    if type(value) is dict and any(isinstance(item, Tensor) for item in value.values()):
        inside = [f"{key!r}: {show(item, limit)}" for key, item in islice(value.items(), 4)]
        return f"a dict of {', '.join(inside + ['...'] * (len(value) > 4))}"
    text = re.sub(r"\s*\n\s*", " ", repr(value))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def suggest(name: str, choices: Iterable[str], most: int = 3) -> str:
    """``"; nearest: 'a', 'b'"`` for the choices closest to ``name``, or all of them when there are few.

    >>> suggest("layer5", ["layer1", "layer4"])
    "; nearest: 'layer4', 'layer1'"
    >>> suggest("zebra", ["layer1", "layer4"])
    "; there are: 'layer1', 'layer4'"
    """
    choices = [str(c) for c in choices]
    # Digits in common do not make numbers near: 1 is no likelier to be meant by 11 than 9 is.
    numbers = str(name).isdigit() and all(c.isdigit() for c in choices)
    near = [] if numbers else difflib.get_close_matches(str(name), choices, n=most, cutoff=0.6)
    if near:
        return "; nearest: " + ", ".join(repr(c) for c in near)
    if 0 < len(choices) <= 12:
        return "; there are: " + ", ".join(repr(c) for c in choices)
    return (
        f"; there are {len(choices)} choices, from {choices[0]!r} to {choices[-1]!r}"
        if choices
        else "; there are none"
    )


def one_of(what: str, value: Any, choices: Sequence[str] | Iterable[str]) -> str:
    """Return ``value`` if it is one of ``choices``, else say which is nearest.

    >>> one_of("method", "gradcam", ["grad_cam", "norm_grad"])
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: method: got 'gradcam', which is not a choice; nearest: 'grad_cam'
    """
    choices = list(choices)
    # Looking for the nearest takes long: only when it is to be named.
    if value not in choices:
        raise InputError(f"{what}: got {show(value)}, which is not a choice{suggest(value, choices)}")
    return value


def number(
    what: str,
    value: Any,
    *,
    low: float | None = None,
    high: float | None = None,
    open_low: bool = False,
    open_high: bool = False,
    integer: bool = False,
) -> Any:
    """Return ``value`` if it is a finite number inside the interval; ``open_*`` excludes that end.

    >>> number("fraction", 1.5, low=0, high=1)
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: fraction: got 1.5, expected a number in [0, 1]
    """
    if isinstance(value, np.generic):
        value = value.item()
    kind = "an integer" if integer else "a number"
    left = "(-inf" if low is None else f"{'(' if open_low else '['}{low}"
    right = "inf)" if high is None else f"{high}{')' if open_high else ']'}"
    expected = f"{what}: got {show(value)}, expected {kind} in {left}, {right}"
    numeric = isinstance(value, int) or (isinstance(value, float) and not integer)
    require(numeric and not isinstance(value, bool), expected)
    require(value == value and abs(value) != float("inf"), expected)
    require(low is None or (value > low if open_low else value >= low), expected)
    require(high is None or (value < high if open_high else value <= high), expected)
    return value


def seed(what: str, value: Any) -> int:
    """Return ``value`` if it is an integer that seeds any generator here.

    >>> seed("--seed", -1)
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: --seed: got -1, expected an integer in [0, 9223372036854775807]
    """
    return number(what, value, low=0, high=2**63 - 1, integer=True)


def listed(what: str, values: Any, expected: str) -> list[Any]:
    """Return ``values`` as a list, or say that several were expected where one came.

    >>> listed("fractions", 0.5, "shares in [0, 1], such as [0.5]")
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: fractions: got 0.5, expected a list of shares in [0, 1], such as [0.5]
    """
    several = isinstance(values, Iterable) and not isinstance(values, (str, bytes))
    several = several and not (isinstance(values, Tensor) and values.ndim == 0)
    require(several, f"{what}: got {show(values)}, expected a list of {expected}")
    found = list(values)
    require(bool(found), f"{what}: got none, expected a list of {expected}")
    return found


def tensor(
    what: str,
    value: Any,
    *,
    shape: Sequence[int | str | None] | None = None,
    floating: bool | None = None,
    finite: bool = True,
    empty: bool = False,
) -> Tensor:
    """Return ``value`` if it is a tensor of this form.

    ``shape`` holds an int (must match), a name (any size, shown in the message) or ``None`` for each dimension.

    >>> tensor("images", torch.zeros(3), shape=("batch", "channels", "height", "width"))
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: images: got a float32 tensor of shape (3,), expected a tensor of shape (batch, channels, height, width)
    """
    require(
        isinstance(value, Tensor),
        f"{what}: got {show(value)} ({type(value).__name__}), expected a torch.Tensor",
    )
    if shape is not None:
        fits = value.ndim == len(shape) and all(
            not isinstance(want, int) or have == want for have, want in zip(value.shape, shape)
        )
        names = ", ".join("*" if s is None else str(s) for s in shape) + ("," if len(shape) == 1 else "")
        require(fits, f"{what}: got {show(value)}, expected a tensor of shape ({names})")
    require(
        empty or value.numel() > 0,
        f"{what}: got {show(value)}, which is empty; expected at least one element",
    )
    if floating is not None:
        kind = "a floating-point" if floating else "an integer"
        require(value.is_floating_point() == floating, f"{what}: got {show(value)}, expected {kind} tensor")
    if finite and value.is_floating_point():
        bad = int((~torch.isfinite(value)).sum())
        require(
            bad == 0,
            f"{what}: {bad} of {value.numel()} values are NaN or infinite; expected finite values only",
        )
    return value


def labels(what: str, value: Any, *, count: int | None = None, classes: int | None = None) -> Tensor:
    """Return ``value`` as int64 class labels of shape (batch,), each in ``[0, classes)``.

    >>> labels("targets", torch.tensor([0, 7]), classes=5)
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: targets: got label 7 at position 1, expected labels from 0 to 4 (5 classes)
    """
    value = tensor(what, value, shape=("batch" if count is None else count,), floating=False).long()
    top = (classes if classes is not None else int(value.max()) + 1) - 1
    wrong = ((value < 0) | (value > top)).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise InputError(
            f"{what}: got label {int(value[at])} at position {at}, "
            f"expected labels from 0 to {top} ({top + 1} classes)"
        )
    return value
