"""One augmentation for two batches: differentiable, with parameters that real and synthetic pictures share.

Zhao, Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021; used by arXiv 2202.02916, section 1.5. Each function takes pictures
[n, channels, height, width] and the drawn numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def color(
    x: Tensor,
    brightness: float,
    saturation: float,
    contrast: float,
    *,
    amounts: tuple[float, float, float] = (1.0, 2.0, 0.5),
) -> Tensor:
    """Brightness, then saturation, then contrast, from draws in [0, 1] and how much each may change.

    >>> x = torch.rand(1, 3, 4, 4)
    >>> bool(torch.allclose(color(x, 0.5, 0.5, 0.5), x))
    True
    """
    x = x + (brightness - 0.5) * amounts[0]
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (saturation * amounts[1]) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + amounts[2]) + mean


def shift(x: Tensor, rows: int, columns: int) -> Tensor:
    """x[i + rows, j + columns], zero outside: the crop of a padded picture.

    >>> shift(torch.arange(4.0).view(1, 1, 2, 2), 1, 0).flatten().tolist()
    [2.0, 3.0, 0.0, 0.0]
    """
    return F.pad(x, (-min(columns, 0), max(columns, 0), -min(rows, 0), max(rows, 0)))[
        ..., max(rows, 0) : max(rows, 0) + x.shape[2], max(columns, 0) : max(columns, 0) + x.shape[3]
    ]


def cutout(x: Tensor, row: int, column: int, size: tuple[int, int]) -> Tensor:
    """Zeros in a rectangle around a centre, cut at the border.

    >>> cutout(torch.ones(1, 1, 3, 3), 0, 0, (2, 2)).sum().item()
    8.0
    """
    keep = torch.ones(x.shape[2:], dtype=x.dtype, device=x.device)
    rows, columns = (
        (torch.arange(length, device=x.device) + at - length // 2).clamp(0, side - 1)
        for length, at, side in zip(size, (row, column), x.shape[2:])
    )
    keep[rows[:, None], columns] = 0
    return x * keep


def flip(x: Tensor, draw: float, *, probability: float = 0.5) -> Tensor:
    """Left and right exchanged where the draw is below the probability.

    >>> flip(torch.tensor([[[[1.0, 2.0]]]]), 0.1).flatten().tolist()
    [2.0, 1.0]
    """
    return x.flip(3) if draw < probability else x


def affine(x: Tensor, matrix: tuple[tuple[float, float], tuple[float, float]]) -> Tensor:
    """Bilinear resampling by a 2 x 2 matrix of normalised coordinates, zeros outside."""
    theta = torch.tensor([[*row, 0.0] for row in matrix], dtype=x.dtype, device=x.device)
    grid = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def scale(x: Tensor, width: float, height: float) -> Tensor:
    """Resampled at coordinates times (width, height): a factor above 1 makes the picture smaller.

    >>> scale(torch.ones(1, 1, 2, 2), 1.0, 1.0).flatten().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    return affine(x, ((width, 0.0), (0.0, height)))


def rotate(x: Tensor, angle: float) -> Tensor:
    """Turned by an angle in radians.

    >>> rotate(torch.ones(1, 1, 2, 2), 0.0).flatten().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    return affine(x, ((math.cos(angle), -math.sin(angle)), (math.sin(angle), math.cos(angle))))
