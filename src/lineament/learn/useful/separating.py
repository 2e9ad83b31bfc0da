"""After how many epochs are fast and slow examples best told apart? Where the training error's fall first slows down clearly.

Nguyen, Haddad, Gan, Mirzasoleiman, NeurIPS 2024, arXiv 2404.17768: choosing the epoch so gave the lowest test error in the paper's ablation. That
"slows down" means the largest second difference is our reading.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks


def separating_epoch(
    errors: Sequence[float] | Float[Tensor, "epochs"],
    *,
    epochs: int | None = None,
    window: tuple[float, float] = (0.02, 0.15),
    smooth: int = 1,
) -> int:
    """When the training error's fall first slows down clearly: the index t that maximises (e[t-1] - e[t]) - (e[t] - e[t+1]).

    Args:
        errors: the training error after each epoch; ``errors[0]`` is that after the first, so that index t is t + 1 epochs of training.
        epochs: E, the length of the whole training: then only indices whose t + 1 lies in ``window`` times E are considered.
        smooth: width (odd) of a moving average over the curve before.

    Returns:
        An index from 1 to ``len(errors) - 2``; at ties the first.

    Raises:
        InputError: fewer than three errors, NaN, an even width, or no index inside the window.

    Source: the paper's heuristic; this rule for it is ours.

    >>> separating_epoch([0.9, 0.5, 0.4, 0.35, 0.3])
    1
    """
    curve = np.asarray([float(e) for e in errors])
    checks.require(len(curve) >= 3, f"errors: got {len(curve)}, expected at least 3 epochs")
    checks.require(bool(np.isfinite(curve).all()), "errors: got NaN or infinite values, expected finite ones")
    checks.number("smooth", smooth, low=1, integer=True)
    checks.require(smooth % 2 == 1, f"smooth: got {smooth}, expected an odd number")
    first, last = 1, len(curve) - 2
    if epochs is not None:
        low, high = window_of(epochs, window)
        first, last = max(first, low - 1), min(last, high - 1)
        checks.require(
            first <= last,
            f"errors: got {len(curve)} epochs, expected at least {low + 1}, past the window's begin",
        )
    half = smooth // 2
    mean = np.array([curve[max(0, t - half) : t + half + 1].mean() for t in range(len(curve))])
    bend = mean[:-2] - 2 * mean[1:-1] + mean[2:]
    return first + int(np.argmax(bend[first - 1 : last]))


def window_of(epochs: int, window: tuple[float, float] = (0.02, 0.15)) -> tuple[int, int]:
    """The epochs (counted from 1) among which the separating one is sought; at least the second.

    >>> window_of(200), window_of(30), window_of(5)
    ((4, 30), (2, 4), (2, 2))
    """
    checks.number("epochs", epochs, low=1, integer=True)
    low, high = window
    checks.number("window", low, low=0, high=high)
    checks.number("window", high, low=0, high=1)
    first = max(2, math.ceil(round(low * epochs, 9)))
    return first, max(first, math.floor(round(high * epochs, 9)))
