"""How near is a rebuilt picture that is a little shifted or turned? Registered PSNR, and the structural similarity of complex wavelets (CW-SSIM).

Sampat, Wang, Gupta, Bovik, Markey, "Complex Wavelet Structural Similarity", IEEE TIP 2009. A person is recognised in a picture that is one pixel off, and PSNR and SSIM
fall there as if nothing was seen.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import number, require, show
from lineament.core.pictures import psnr


def registered_psnr(guess: Tensor, truth: Tensor, *, peak: float = 1.0, steps: int = 60) -> Tensor:
    """PSNR of each picture after the guess was shifted, turned and scaled to fit, or before, whichever is higher; decibels [n].

    Whole shifts by up to an eighth of the sides are tried, and the best is refined by ``steps`` of Adam on angle, scale and shift. What comes in from outside
    repeats the border.

    Args:
        guess, truth: [n, channels, height, width] in [0, peak].

    >>> x = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    >>> moved = x.roll(2, 3)
    >>> bool((registered_psnr(moved, x) > psnr(moved, x) + 3).all())
    True
    """
    require(
        guess.shape == truth.shape and guess.ndim == 4,
        f"guess: got {show(guess)}, expected the shape of {show(truth)}, [n, channels, height, width]",
    )
    number("steps", steps, low=0, integer=True)
    n, _, height, width = truth.shape
    up, across = height // 8, width // 8
    shifts = [(dy, dx) for dy in range(-up, up + 1) for dx in range(-across, across + 1)]
    padded = F.pad(guess, (across, across, up, up), mode="replicate")
    errors = torch.stack([
        (padded[..., up + dy : up + dy + height, across + dx : across + dx + width] - truth).square().flatten(1).mean(1) for dy, dx in shifts
    ])  # fmt: skip
    first = truth.new_tensor(shifts)[errors.argmin(0)]
    # Angle, log of the scale, and shift along x and y in units of half a side.
    turn = torch.stack([first[:, 1] * 0, first[:, 1] * 0, 2 * first[:, 1] / width, 2 * first[:, 0] / height], 1).requires_grad_()  # fmt: skip
    optimizer = torch.optim.Adam([turn], lr=0.01)
    best = torch.maximum(psnr(guess, truth, peak=peak), 10 * torch.log10(peak**2 / errors.amin(0)))
    for _ in range(steps):
        with torch.enable_grad():
            angle, scale, x, y = turn.unbind(1)
            cos, sin = scale.exp() * angle.cos(), scale.exp() * angle.sin()
            affine = torch.stack([torch.stack([cos, -sin, x], 1), torch.stack([sin, cos, y], 1)], 1)
            grid = F.affine_grid(affine, [n, guess.shape[1], height, width], align_corners=False)
            moved = F.grid_sample(guess.detach(), grid, padding_mode="border", align_corners=False)
            error = (moved - truth).square().flatten(1).mean(1)
            (turn.grad,) = torch.autograd.grad(error.sum(), turn)
        optimizer.step()
        best = torch.maximum(best, 10 * torch.log10(peak**2 / error.detach()))
    return best


def cw_ssim(
    first: Tensor,
    second: Tensor,
    *,
    peak: float = 1.0,
    levels: int = 2,
    orientations: int = 8,
    window: int = 7,
    constant: float = 1e-4,
) -> Tensor:
    """CW-SSIM of each picture [n], in [0, 1]: (2 |Σ c d*| + K) / (Σ |c|² + Σ |d|² + K), the mean over places and bands.

    c and d are coefficients of complex steerable filters, made in the Fourier domain (so that borders wrap around): each is one octave and one half-plane of
    directions. A small shift turns all phases of a window alike, which the sum does not see.

    Args:
        first, second: [n, channels, height, width] in [0, peak]. levels: octaves, from the second highest down. window: side of the windows of the sums.
        constant: K for one place, in units of peak².

    >>> x = torch.rand(2, 1, 16, 16)
    >>> cw_ssim(x, x).tolist()
    [1.0, 1.0]
    """
    require(
        first.shape == second.shape and first.ndim == 4,
        f"second: got {show(second)}, expected the shape of {show(first)}, [n, channels, height, width]",
    )
    for name, value in (("levels", levels), ("orientations", orientations), ("window", window)):
        number(name, value, low=1, integer=True)
    side = min(first.shape[2:])
    require(
        side >= 4 * 2 ** (levels - 1), f"levels: got {levels}, which is too many for pictures of side {side}"
    )
    window = min(window, side)
    one, two = (torch.fft.fft2(x.float() / peak) for x in (first, second))
    told = []
    for band in _bands(first.shape[2], first.shape[3], levels, orientations):
        c, d = (torch.fft.ifft2(spectrum * band.to(first.device)) for spectrum in (one, two))
        shared = c * d.conj()
        total = lambda x: F.avg_pool2d(x, window, stride=1)  # noqa: E731
        across = torch.complex(total(shared.real), total(shared.imag)).abs()
        energy = total(c.abs().square() + d.abs().square())
        told.append(((2 * across + constant) / (energy + constant)).flatten(1).mean(1))
    return torch.stack(told).mean(0)


def _bands(height: int, width: int, levels: int, orientations: int) -> list[Tensor]:
    """Analytic filters on the Fourier grid: a raised cosine of the frequency's logarithm, times a power of a cosine of its direction."""
    y, x = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)[None]
    octave = torch.log2((x.square() + y.square()).sqrt().clamp(min=1e-6) / 0.25)
    angle = torch.atan2(y, x)
    found = []
    for level in range(levels):
        away = (octave + level).abs()
        radial = torch.where(away < 1, (away * math.pi / 2).cos(), torch.zeros(()))
        for k in range(orientations):
            off = torch.remainder(angle - k * math.pi / orientations + math.pi, 2 * math.pi) - math.pi
            found.append(radial * torch.where(off.abs() < math.pi / 2, off.cos() ** (orientations - 1), torch.zeros(())))  # fmt: skip
    return found
