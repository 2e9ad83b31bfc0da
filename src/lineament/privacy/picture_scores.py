"""How near is a rebuilt picture to the true one? MSE, PSNR and SSIM, as gradient inversion reports them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import require, show
from lineament.core.results import Readable


@dataclass(frozen=True)
class PictureScores(Readable):
    """Means over pictures; ``psnr`` in decibels, infinite for equal pictures."""

    mse: float
    psnr: float
    ssim: float


def picture_scores(
    first: Tensor,
    second: Tensor,
    *,
    peak: float = 1.0,
    window: int = 11,
    sigma: float = 1.5,
    constants: tuple[float, float] = (1e-4, 9e-4),
) -> PictureScores:
    """Scores of pictures [n, channels, height, width] in [0, peak].

    Args:
        window, sigma: of SSIM's Gaussian; the border is zeros. constants: C1 and C2.

    >>> x = torch.rand(1, 3, 16, 16)
    >>> round(picture_scores(x, x).ssim, 4)
    1.0
    """
    require(
        first.shape == second.shape and first.ndim == 4,
        f"second: got {show(second)}, expected the shape of {show(first)}",
    )
    error = (first - second).square().flatten(1).mean(1)
    psnr = 10 * torch.log10(peak**2 / error)
    at = torch.arange(window, dtype=first.dtype, device=first.device) - window // 2
    bell = torch.exp(-at.square() / (2 * sigma**2))
    bell = (bell / bell.sum())[:, None] * (bell / bell.sum())
    channels = first.shape[1]

    def smooth(x: Tensor) -> Tensor:
        return F.conv2d(x, bell.expand(channels, 1, window, window), padding=window // 2, groups=channels)

    a, b = smooth(first), smooth(second)
    aa, bb, ab = (
        smooth(first * first) - a * a,
        smooth(second * second) - b * b,
        smooth(first * second) - a * b,
    )
    c1, c2 = constants
    map_ = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
    return PictureScores(float(error.mean()), float(psnr.mean()), float(map_.flatten(1).mean(1).mean()))
