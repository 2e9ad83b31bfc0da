"""How near is a rebuilt picture to the true one? MSE, PSNR and SSIM, as gradient inversion reports them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lineament.core.checks import require, show
from lineament.core.pictures import psnr, ssim
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

    >>> import torch
    >>> x = torch.rand(1, 3, 16, 16)
    >>> round(picture_scores(x, x).ssim, 4)
    1.0
    """
    require(
        first.shape == second.shape and first.ndim == 4,
        f"second: got {show(second)}, expected the shape of {show(first)}",
    )
    return PictureScores(
        float((first - second).square().mean()),
        float(psnr(first, second, peak=peak).mean()),
        float(ssim(first, second, peak=peak, window=window, sigma=sigma, constants=constants).mean()),
    )
