"""How near is one picture to another, and how is its colour written? PSNR, SSIM in two forms, and CIE Lab of sRGB.

SSIM with a Gaussian window and a border of zeros is the form of gradient inversion's reports; with a uniform window on valid places it is
scikit-image's default. Lab has scikit-image's constants (D65, 2 degrees), and runs where the pictures are.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, one_of, require, show

# sRGB's primaries in XYZ, as scikit-image has them.
_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)


def psnr(first: Tensor, second: Tensor, *, peak: float = 1.0) -> Tensor:
    """Peak signal-to-noise ratio of each picture, 10 log10(peak² / mean squared error) in decibels; infinite for equal ones.

    >>> psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)).tolist()
    [20.0]
    """
    first, second = _pair(first, second)
    error = (first - second).square().flatten(1).mean(1)
    return 10 * torch.log10(peak**2 / error)


def ssim(
    first: Tensor,
    second: Tensor,
    *,
    peak: float = 1.0,
    window: int | None = None,
    form: Literal["gaussian", "uniform"] = "gaussian",
    sigma: float = 1.5,
    constants: tuple[float, float] | None = None,
) -> Tensor:
    """Structural similarity of each picture, the mean over channels and places.

    Args:
        first, second: [n, channels, height, width] in [0, peak].
        window: side of the window, 11 for ``form="gaussian"`` (zeros beyond the border) and 7 for ``"uniform"`` (places whose
            window is whole, and variances with n - 1, as scikit-image takes them).
        sigma: of the Gaussian. constants: C1 and C2, (0.01 peak)² and (0.03 peak)².

    >>> x = torch.rand(2, 3, 16, 16)
    >>> ssim(x, x, form="uniform").tolist()
    [1.0, 1.0]
    """
    first, second = _pair(first, second)
    one_of("form", form, ("gaussian", "uniform"))
    window = (11 if form == "gaussian" else 7) if window is None else window
    number("window", window, low=1, integer=True)
    require(window % 2 == 1, f"window: got {window}, expected an odd number of pixels")
    channels = first.shape[1]
    if form == "gaussian":
        at = torch.arange(window, dtype=first.dtype, device=first.device) - window // 2
        bell = torch.exp(-at.square() / (2 * sigma**2))
        bell = bell / bell.sum()
        padding, unbiased = window // 2, 1.0
    else:
        smaller = min(first.shape[2:])
        require(
            smaller >= window,
            f"window: got {window}, the picture's smaller side is {smaller}; use at most that",
        )
        bell = first.new_full((window,), 1 / window)
        padding, unbiased = 0, window**2 / (window**2 - 1)

    def smooth(x: Tensor) -> Tensor:
        across = bell.expand(channels, 1, 1, window)
        x = F.conv2d(x, across, padding=(0, padding), groups=channels)
        return F.conv2d(x, across.transpose(2, 3), padding=(padding, 0), groups=channels)

    a, b = smooth(first), smooth(second)
    aa = unbiased * (smooth(first * first) - a * a)
    bb = unbiased * (smooth(second * second) - b * b)
    ab = unbiased * (smooth(first * second) - a * b)
    c1, c2 = constants or ((0.01 * peak) ** 2, (0.03 * peak) ** 2)
    map_ = (2 * a * b + c1) * (2 * ab + c2) / ((a * a + b * b + c1) * (aa + bb + c2))
    return map_.flatten(1).mean(1)


def rgb_to_lab(rgb: Float[Tensor, "*batch 3 height width"]) -> Float[Tensor, "*batch 3 height width"]:
    """CIE Lab of sRGB in [0, 1]: L in [0, 100], a and b around [-110, 110].

    >>> [round(v) for v in rgb_to_lab(torch.tensor([1.0, 0.0, 0.0])[:, None, None]).flatten().tolist()]
    [53, 80, 67]
    """
    rgb = _colour("rgb", rgb)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).clamp_min(0) ** 2.4, rgb / 12.92)
    xyz = _mixed(linear, rgb.new_tensor(_XYZ)) / rgb.new_tensor(_WHITE)[:, None, None]
    f = torch.where(xyz > 0.008856, xyz.clamp_min(0.008856) ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(-3)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -3)


def lab_to_rgb(
    lab: Float[Tensor, "*batch 3 height width"], *, clip: bool = True
) -> Float[Tensor, "*batch 3 height width"]:
    """sRGB of CIE Lab; with ``clip``, colours that sRGB has none of go to the nearest end of [0, 1].

    >>> x = torch.rand(3, 4, 4)
    >>> bool((lab_to_rgb(rgb_to_lab(x)) - x).abs().max() < 1e-3)
    True
    """
    L, a, b = _colour("lab", lab).unbind(-3)
    y = (L + 16) / 116
    # A negative z is no colour; scikit-image takes it for 0.
    f = torch.stack([y + a / 500, y, (y - b / 200).clamp_min(0)], -3)
    xyz = torch.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * f.new_tensor(_WHITE)[:, None, None]
    back = torch.linalg.inv(torch.tensor(_XYZ, dtype=torch.float64)).to(f)
    linear = _mixed(xyz, back)
    rgb = torch.where(
        linear > 0.0031308, 1.055 * linear.clamp_min(0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear
    )
    return rgb.clamp(0, 1) if clip else rgb


def _mixed(x: Tensor, matrix: Tensor) -> Tensor:
    return (matrix @ x.flatten(-2)).unflatten(-1, x.shape[-2:])


def _colour(what: str, x: Tensor) -> Tensor:
    require(
        x.ndim >= 3 and x.shape[-3] == 3 and x.is_floating_point(),
        f"{what}: got {show(x)}, expected floating-point pictures of shape (..., 3, height, width)",
    )
    return x


def _pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    require(
        first.shape == second.shape and first.ndim == 4,
        f"second: got {show(second)}, expected the shape of {show(first)}, (pictures, channels, height, width)",
    )
    if not first.is_floating_point():  # differences of bytes would wrap around
        return first.double(), second.double()
    return first, second.to(first.dtype)
