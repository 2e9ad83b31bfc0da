"""One augmentation for two batches: differentiable, with parameters that real and synthetic pictures share.

Zhao, Bilen, "Dataset Condensation with Differentiable Siamese Augmentation", ICML 2021; used by arXiv 2202.02916, section 1.5. Each function takes pictures
[n, channels, height, width] and the drawn numbers: one for all of them, or a tensor with one a picture.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

Number = float | Tensor


def color(
    x: Tensor,
    brightness: Number,
    saturation: Number,
    contrast: Number,
    *,
    amounts: tuple[float, float, float] = (1.0, 2.0, 0.5),
) -> Tensor:
    """Brightness, then saturation, then contrast, from draws in [0, 1] and how much each may change.

    >>> x = torch.rand(1, 3, 4, 4)
    >>> bool(torch.allclose(color(x, 0.5, 0.5, 0.5), x))
    True
    """
    brightness, saturation, contrast = (
        _column(v, x)[:, :, None, None] for v in (brightness, saturation, contrast)
    )
    x = x + (brightness - 0.5) * amounts[0]
    grey = x.mean(1, keepdim=True)
    x = (x - grey) * (saturation * amounts[1]) + grey
    mean = x.mean((1, 2, 3), keepdim=True)
    return (x - mean) * (contrast + amounts[2]) + mean


def shift(x: Tensor, rows: Number, columns: Number) -> Tensor:
    """x[i + rows, j + columns], zero outside: the crop of a padded picture.

    >>> shift(torch.arange(4.0).view(1, 1, 2, 2), 1, 0).flatten().tolist()
    [2.0, 3.0, 0.0, 0.0]
    """
    for dim, by in ((2, rows), (3, columns)):
        side = x.shape[dim]
        at = torch.arange(side, device=x.device) + _column(by, x).long()
        inside = ((at >= 0) & (at < side)).to(x.dtype)
        shape = [len(at), 1, 1, 1]
        shape[dim] = side
        at, inside = at.clamp(0, side - 1).view(shape), inside.view(shape)
        x = x.gather(dim, at.expand(x.shape)) * inside
    return x


def cutout(x: Tensor, row: Number, column: Number, size: tuple[int, int]) -> Tensor:
    """Zeros in a rectangle around a centre, cut at the border.

    >>> cutout(torch.ones(1, 1, 3, 3), 0, 0, (2, 2)).sum().item()
    8.0
    """
    inside = []
    for length, centre, side in zip(size, (row, column), x.shape[2:]):
        first = _column(centre, x).long() - length // 2
        # What falls outside is moved to the nearest edge, so that an edge is always cut where the rectangle passes it.
        low, high = first.clamp(0, side - 1), (first + length - 1).clamp(0, side - 1)
        at = torch.arange(side, device=x.device)
        inside.append((at >= low) & (at <= high))
    hole = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return x * ~hole


def flip(x: Tensor, draw: Number, *, probability: float = 0.5) -> Tensor:
    """Left and right exchanged where the draw is below the probability.

    >>> flip(torch.tensor([[[[1.0, 2.0]]]]), 0.1).flatten().tolist()
    [2.0, 1.0]
    """
    return torch.where(_column(draw, x)[:, :, None, None] < probability, x.flip(3), x)


def affine(x: Tensor, matrix: Tensor, *, align_corners: bool = False) -> Tensor:
    """Bilinear resampling by matrices [1 or n, 2, 2] of normalised coordinates, zeros outside."""
    theta = torch.cat([matrix, matrix.new_zeros(len(matrix), 2, 1)], 2)
    grid = F.affine_grid(theta.expand(len(x), 2, 3), list(x.shape), align_corners=align_corners)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=align_corners)


def scale(x: Tensor, width: Number, height: Number, *, align_corners: bool = False) -> Tensor:
    """Resampled at coordinates times (width, height): a factor above 1 makes the picture smaller.

    >>> scale(torch.ones(1, 1, 2, 2), 1.0, 1.0).flatten().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    return affine(
        x,
        torch.diag_embed(torch.cat([_column(v, x) for v in (width, height)], 1)),
        align_corners=align_corners,
    )


def rotate(x: Tensor, angle: Number, *, align_corners: bool = False) -> Tensor:
    """Turned by an angle in radians.

    >>> rotate(torch.ones(1, 1, 2, 2), 0.0).flatten().tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    cos, sin = _column(angle, x).cos(), _column(angle, x).sin()
    return affine(
        x, torch.stack([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)], 1), align_corners=align_corners
    )


def _column(value: Number, like: Tensor) -> Tensor:
    """[1, 1] for one number, [n, 1] for one a picture."""
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1)
