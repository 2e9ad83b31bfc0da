"""What an estimator is given: scikit-learn's own validation, with refusals in one line."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from sklearn.utils.validation import _check_sample_weight, validate_data

from lineament.core.checks import InputError, require


def validated(estimator: Any, *given: Any, **options: Any) -> Any:
    """X, or X and y, as scikit-learn's ``validate_data`` returns them.

    Raises:
        InputError: what scikit-learn refuses with a ``ValueError``: NaN, wrong dimensions, another number of features or samples.

    >>> from sklearn.linear_model import Ridge
    >>> validated(Ridge(), [[1.0, float("nan")]])
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: Input X contains NaN.
    """
    try:
        return validate_data(estimator, *given, **options)
    except ValueError as error:
        lines = str(error).splitlines()
        # What follows advises other estimators.
        told = lines[0] if "contains" in lines[0] else " ".join(lines)
        # The numbers themselves may be thousands.
        raise InputError(re.sub(r":\s*array=.*\.\s*(?=Reshape your data)", ". ", told)) from error


def weights_of(sample_weight: Any, X: Any) -> np.ndarray:
    """Weights [n] of the samples, 1 where none are given; none may be negative, and not all zero."""
    try:
        weights = np.asarray(_check_sample_weight(sample_weight, X), dtype=float)
    except ValueError as error:
        raise InputError(f"sample_weight: {' '.join(str(error).splitlines())}") from error
    require(
        bool((weights >= 0).all()),
        f"sample_weight: got {weights.min():g} among them, expected weights that are not negative",
    )
    require(bool((weights > 0).any()), "sample_weight: all are zero, expected a positive one")
    return weights
