"""Sums over one pass of features and representations, and the least-squares maps and shares of variance that follow from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lineament.core.checks import require
from lineament.core.statistics.moments import Covariance, CrossCovariance

_KEPT = 2**24  # numbers of a representation kept for decoding, at each site


@dataclass(frozen=True)
class Sums:
    """What a pass leaves of a site: sums of squares of units, and products of the features' columns with them."""

    count: int
    mean_x: Tensor
    mean_y: Tensor
    squares_y: Tensor
    scatter: Tensor


@dataclass(frozen=True)
class Columns:
    """Products of the features' columns among themselves."""

    scatter: Tensor
    correlation: Tensor


def gathered(
    walk: Any, F: Tensor, rows: Tensor, names: Sequence[str], kept: Sequence[list[Tensor]]
) -> tuple[dict[str, Sums], Columns]:
    """Sums of features and representations over some samples, in one pass."""
    streams = {name: CrossCovariance() for name in names}
    own = Covariance()
    for part, acts in walk(rows):
        own.update(F[part])
        for name, store in zip(names, kept):
            phi = acts[name].cpu()
            streams[name].update(F[part], phi)
            if len(rows) * phi.shape[1] <= _KEPT:
                store.append(phi)
    found = {name: Sums(len(rows), s.mean_x, s.mean_y, s.squares_y, s.scatter) for name, s in streams.items()}
    return found, Columns(own.scatter, own.correlation)


def inverse(own: Columns, place: Tensor) -> Tensor:
    """The inverse of the scatter of these columns, of least norm where they depend on each other; at one scale, so that none looks like rounding.

    Times the products with units, it is the least-squares map from centred columns to centred units.
    """
    S = own.scatter[place][:, place]
    scale = S.diagonal().sqrt().clamp_min(1e-300)
    found = torch.linalg.pinv(S / scale[:, None] / scale, hermitian=True, rtol=1e-10)
    return found / scale[:, None] / scale


def left_over(W: Tensor, place: Tensor, fit: Sums, judge: Sums, own: Columns) -> tuple[Tensor, Tensor]:
    """Of each unit Σ_T (φ - μ - W f)² and Σ_T (φ - μ)², with the means of V."""
    n = judge.count
    shift, moved = judge.mean_y - fit.mean_y, (judge.mean_x - fit.mean_x)[place]
    cross = judge.scatter[place] + n * moved[:, None] * shift
    S = own.scatter[place][:, place] + n * torch.outer(moved, moved)
    total = judge.squares_y + n * shift.square()
    return total - 2 * (W * cross).sum(0) + (W * (S @ W)).sum(0), total


def per_sample(
    walk: Any,
    F: Tensor,
    rows: Tensor,
    names: Sequence[str],
    fit: Mapping[str, Sums],
    weights: Mapping[str, Mapping[str, Tensor]],
    kept: Sequence[list[Tensor]],
) -> tuple[dict[str, Sums], Columns, dict[str, dict[str, float]]]:
    """The same sums, and of each site and set of columns the mean over samples of 1 - ‖φ - μ - W f‖² / ‖φ - μ‖²."""
    sums = {site: dict.fromkeys(weights[site], 0.0) for site in names}
    places = _places(weights, F.shape[1], names)

    def watched(all_rows: Tensor) -> Any:
        for part, acts in walk(all_rows):
            for site in names:
                phi = acts[site].double().cpu() - fit[site].mean_y
                size = phi.square().sum(1)
                require(
                    bool((size > 0).all()),
                    f"reduction: a sample lies on the mean of {site!r}, so that its ratio is 0/0; use 'ratio'",
                )
                f = F[part] - fit[site].mean_x
                for key, W in weights[site].items():
                    left = (phi - f[:, places[key]] @ W).square().sum(1)
                    sums[site][key] += float((1 - left / size).sum())
            yield part, acts

    judge, own = gathered(watched, F, rows, names, kept)
    return judge, own, {site: {key: v / len(rows) for key, v in each.items()} for site, each in sums.items()}


def _places(weights: Any, width: int, names: Sequence[str]) -> dict[str, Tensor]:
    """The columns of each set of weights, from the order in which the sets were made."""
    first = weights[names[0]]
    whole = torch.arange(width)
    found, start = {}, 0
    for key, W in first.items():
        if key == "":
            break
        found[key] = whole[start : start + len(W)]
        start += len(W)
    found[""] = whole
    for key in first:
        if key not in found:
            own = found[key.removeprefix("without ")]
            found[key] = whole[~torch.isin(whole, own)]
    return found


def decoded(
    kept: Sequence[list[Tensor]], F: Tensor, fit: Tensor, judge: Tensor, places: Mapping[str, Tensor]
) -> dict[str, float]:
    """How well least squares on the representation gives each feature: the accuracy of classes, R² of values."""
    if not kept[0] or not kept[1]:
        return {}
    X, Z = (torch.cat(part).double() for part in kept)
    mean = X.mean(0)
    scale = X.std(0).clamp_min(1e-12)
    X, Z = (X - mean) / scale, (Z - mean) / scale
    gram = X.T @ X if X.shape[1] <= len(X) else X @ X.T
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    center = F[fit].mean(0)
    Y = F[fit] - center
    W = torch.linalg.solve(gram, X.T @ Y) if X.shape[1] <= len(X) else X.T @ torch.linalg.solve(gram, Y)
    P = Z @ W + center
    found = {}
    for name, place in places.items():
        truth, guess = F[judge][:, place], P[:, place]
        values = truth[:, 0].unique()
        if len(place) > 1 and bool(((truth == 0) | (truth == 1)).all()) and bool((truth.sum(1) == 1).all()):
            found[name] = float((guess.argmax(1) == truth.argmax(1)).double().mean())
        elif len(place) == 1 and len(values) == 2:
            middle = values.mean()
            found[name] = float(((guess[:, 0] > middle) == (truth[:, 0] > middle)).double().mean())
        else:
            around = truth - center[place]
            found[name] = 1 - float((truth - guess).square().sum() / around.square().sum())
    return found
