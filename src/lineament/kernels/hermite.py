"""An activation in Hermite polynomials, by quadrature: E[φ(Z) h_k(Z)] for standard normal Z."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from lineament.core.checks import InputError, number, require, show
from lineament.core.results import Readable


@dataclass(frozen=True)
class Hermite(Readable):
    """``coefficients`` a_k = E[φ h_k], h_k normalised; ``second_moment`` E φ²; ``slope_moment`` E φ'², infinite where φ jumps.

    ``negative_slope``: of a leaky relu, up to a factor and the sign of its argument, which the activation is; ``None`` of any other.
    """

    coefficients: np.ndarray
    second_moment: float
    slope_moment: float
    negative_slope: float | None = None


def hermite_coefficients(activation: Callable[[torch.Tensor], Any], terms: int = 80) -> Hermite:
    """Hermite coefficients of an activation, by Gauss-Legendre quadrature on panels that meet at 0, where kinks lie.

    Args:
        activation: a function of a float64 tensor, elementwise, or an ``nn.Module``.
        terms: k = 0, ..., terms - 1.

    Raises:
        InputError: not finite, not elementwise, a second moment that is zero or infinite.

    >>> [round(float(a), 6) for a in hermite_coefficients(torch.sin, 4).coefficients[1::2]]
    [0.606531, -0.247615]
    """
    number("terms", terms, low=1, high=400, integer=True)
    points, weights = _panels()
    z = torch.from_numpy(points.copy()).requires_grad_()
    try:
        given = activation
        if isinstance(activation, torch.nn.Module):
            given = copy.deepcopy(activation).double().eval()
        with torch.enable_grad():
            values = given(z)
            slopes = torch.autograd.grad(values.sum(), z)[0] if values.requires_grad else torch.zeros_like(z)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"activation: {show(activation)} cannot be applied to a tensor of numbers ({error})"
        ) from error
    require(
        values.shape == z.shape, f"activation: gave {show(values)} for {show(z)}, expected the same shape"
    )
    phi, slope = values.detach().numpy(), slopes.numpy()
    require(bool(np.isfinite(phi).all()), f"activation: {show(activation)} is not finite everywhere")
    second = float(weights @ phi**2)
    require(0 < second < math.inf, f"activation: E φ² = {second:g}, which cannot be scaled to 1")
    outer = float((weights * phi**2)[np.abs(points) > 29].sum())
    # At 0, where panels meet, a pole hides from them.
    centre = given(torch.tensor([-1e-12, 1e-12], dtype=torch.float64)).detach().abs().amax().item()
    require(
        centre**2 * 1e-12 < 1e-6 * second,
        f"activation: {show(activation)} has a pole at 0, so that E φ² is infinite",
    )
    require(
        outer < 1e-9 * second,
        f"activation: {show(activation)} grows so fast that E φ² is infinite, expected less than exp(z²/4)",
    )
    basis = np.stack(hermite_basis(points, terms))
    smooth = _jump(given, points, phi, slope) < 1e-4 * math.sqrt(second)
    moment = float(weights @ slope**2) if smooth else math.inf
    return Hermite(basis @ (weights * phi), second, moment, _negative_slope(points, phi))


def _negative_slope(points: np.ndarray, phi: np.ndarray) -> float | None:
    """α of max(z, 0) + α min(z, 0) if an activation is a multiple of it, or of its mirror image, and no line."""
    slopes = phi / points
    left, right = slopes[points < 0], slopes[points > 0]
    less, more = sorted((float(left[0]), float(right[0])), key=abs)
    straight = all(np.abs(side - side[0]).max() <= 1e-12 * abs(more) for side in (left, right))
    return less / more if straight and less != more else None


def _jump(activation: Any, points: np.ndarray, phi: np.ndarray, slope: np.ndarray) -> float:
    """How far an activation jumps between neighbouring points, where its slope does not explain the difference; 0 for a kink."""
    near = np.flatnonzero(np.abs(points[1:]) < 8)
    run = np.diff(points)[near]
    unexplained = np.abs(np.diff(phi)[near] - run * (slope[near] + slope[near + 1]) / 2)
    worst = near[np.argsort(-unexplained)[:16]]
    at = lambda x: activation(torch.from_numpy(x)).detach().numpy()  # noqa: E731
    low, high, left, right = points[worst], points[worst + 1], phi[worst], phi[worst + 1]
    for _ in range(40):
        middle = (low + high) / 2
        value = at(middle)
        first = np.abs(value - left) > np.abs(right - value)
        low, left = np.where(first, low, middle), np.where(first, left, value)
        high, right = np.where(first, middle, high), np.where(first, value, right)
    return float(np.abs(right - left).max())


def hermite_basis(x: Any, terms: int) -> list[Any]:
    """h_0 ... of ``x``, a number, array or tensor: probabilists' Hermite polynomials over √k!.

    >>> [round(row, 6) for row in hermite_basis(2.0, 3)]
    [1.0, 2.0, 2.12132]
    """
    rows = [x * 0 + 1, x]
    for k in range(1, terms - 1):
        rows.append((x * rows[k] - math.sqrt(k) * rows[k - 1]) / math.sqrt(k + 1))
    return rows[:terms]


@lru_cache(maxsize=1)
def _panels(reach: float = 30.0, width: float = 0.5, nodes: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Points and normal-density weights on [-reach, reach]."""
    inner, mass = np.polynomial.legendre.leggauss(nodes)
    edges = np.arange(-reach, reach, width)
    points = (edges[:, None] + (inner + 1) * width / 2).ravel()
    weights = np.tile(mass * width / 2, len(edges)) * np.exp(-(points**2) / 2) / math.sqrt(2 * math.pi)
    return points, weights
