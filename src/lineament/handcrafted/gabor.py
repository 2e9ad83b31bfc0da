"""How strong are the stripes of each width and direction, place by place? A bank of Gabor filters.

As a descriptor of digits in Wahid, Shahriar, Sobuj 2022, arXiv 2201.10102. A filter is a wave under a bell, and its bell is round, so
that bell and wave are products of a function of the row and one of the column: filtering an image is two small matrix products, border
included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lineament.core.checks import listed, number, one_of, require, show
from lineament.handcrafted.images import batch_of, by_part, cell_weights, check_grid, grey_of

BORDERS = ("reflect", "mirror", "nearest", "wrap", "constant")
Border = Literal["reflect", "mirror", "nearest", "wrap", "constant"]
# Bytes of one part of the responses.
_PART = 1 << 26


def gabor(
    images: Tensor,
    frequencies: Sequence[float] = (0.1, 0.2, 0.3),
    orientations: int | Sequence[float] = 6,
    *,
    grid: int | None = 4,
    bandwidth: float = 1.0,
    dc: bool = False,
    border: Border = "reflect",
) -> Tensor:
    """Mean and standard deviation of each filter's response magnitude, in each cell of a grid.

    Args:
        images: [n, height, width], or with channels, which become grey; intensities in [0, 1]; integers are taken as they are.
        frequencies: cycles a pixel.
        orientations: how many, evenly over 180 degrees, or the angles in radians.
        grid: cells along a side; ``None`` takes the whole image, which is far too coarse for digits.
        bandwidth: of each filter in octaves.
        dc: take each filter's response to constant brightness out, which scikit-image leaves in.
        border: what lies outside the image, in SciPy's words.

    Returns:
        [n, 2 * filters * cells]: by filter (frequency first, then orientation), then mean or deviation, then cell. Differentiable.

    >>> gabor(torch.rand(2, 32, 32)).shape
    torch.Size([2, 576])
    """
    images = batch_of(images, keep_bytes=True)
    height, width = images.shape[-2:]
    cells = 1 if grid is None else check_grid(grid, images)
    like = images.new_empty(0, dtype=torch.float64) if images.dtype == torch.uint8 else images
    rows, columns = (cell_weights(size, cells, like) for size in (height, width))
    filters = len(frequencies_of(frequencies)) * len(angles_of(orientations))

    def described(part: Tensor) -> Tensor:
        found = responses(part, frequencies, orientations, bandwidth=bandwidth, dc=dc, border=border)
        power = found.square().sum(2)
        still = power == 0  # where the root has no slope
        size = torch.where(still, 0, torch.where(still, 1, power).sqrt())
        mean = rows @ size @ columns.mT
        # By deviations from the cell's mean, as a difference of squares cancels.
        spread = rows @ (size - _spread_out(mean, size)).square() @ columns.mT
        flat = spread <= torch.finfo(spread.dtype).eps ** 2 * mean.square()
        spread = torch.where(flat, 0, torch.where(flat, 1, spread).sqrt())
        return torch.stack([mean, spread], 2).flatten(1)

    made = list(by_part(described, images, max(1, _PART // (16 * filters * height * width))))
    return torch.cat(made) if made else like.new_zeros(0, 2 * filters * cells**2)


def responses(
    images: Tensor,
    frequencies: Sequence[float],
    orientations: int | Sequence[float],
    *,
    bandwidth: float = 1.0,
    n_stds: float = 3,
    offset: float = 0.0,
    dc: bool = False,
    border: Border = "reflect",
) -> Tensor:
    """Real and imaginary parts of the response to every :func:`gabor_kernel` (a true convolution), [n, filters, 2, height, width].

    >>> responses(torch.rand(1, 8, 8), [0.2], [0.0]).shape
    torch.Size([1, 1, 2, 8, 8])
    """
    grey = grey_of(images)
    one_of("border", border, BORDERS)
    angles = angles_of(orientations)
    bank = [(float(f), float(t)) for f in frequencies_of(frequencies) for t in angles]
    sides = tuple(grey.shape[1:])
    kind = (bandwidth, number("n_stds", n_stds, low=0, open_low=True), border)
    left, right = _operators(tuple(bank), sides, *kind, offset)
    found = _through(grey, left.to(grey), right.to(grey))
    if dc:
        # The bell alone, scaled to the filter's own answer to constant brightness.
        bells, ratios = [], []
        for frequency, theta in bank:
            kernel = gabor_kernel(frequency, theta, bandwidth=bandwidth, n_stds=n_stds, offset=offset)
            bells.append((0.0, theta, frequency))
            ratios.append(kernel.sum() / kernel.abs().sum())
        left, right = _operators(tuple(bells), sides, *kind)
        bell = _through(grey, left.to(grey), right.to(grey))[:, :, :1]
        ratio = torch.view_as_real(torch.stack(ratios)).to(grey)[..., None, None]
        found = found - ratio * bell
    return found


def gabor_kernel(
    frequency: float,
    theta: float = 0.0,
    *,
    bandwidth: float = 1.0,
    n_stds: float = 3,
    offset: float = 0.0,
) -> Tensor:
    """A filter by its frequency, complex128 [rows, columns], as scikit-image has it.

    ``exp(-(x² + y²) / 2σ²) / 2πσ² * exp(i (2π f x' + offset))`` with ``x' = x cos θ + y sin θ`` and
    ``σ f = sqrt(ln 2 / 2) / π * (2^b + 1) / (2^b - 1)``.

    Args:
        frequency: f, in cycles a pixel; theta: radians; bandwidth: b, in octaves; n_stds: half the size in σ; offset: phase in radians.

    >>> gabor_kernel(0.25).shape
    torch.Size([15, 15])
    """
    number("frequency", frequency, low=0, open_low=True)
    number("theta", theta)
    number("n_stds", n_stds, low=0, open_low=True)
    sigma = _sigma(frequency, bandwidth)
    x = _taps(sigma, theta, n_stds)
    y = x[:, None]
    wave = 2 * math.pi * frequency * (x * math.cos(theta) + y * math.sin(theta)) + offset
    bell = torch.exp(-(x**2 + y**2) / (2 * sigma**2)) / (2 * math.pi * sigma**2)
    return torch.polar(bell, wave)


def gabor_kernel_opencv(
    size: int | tuple[int, int],
    sigma: float,
    theta: float,
    wavelength: float,
    aspect: float,
    phase: float = math.pi / 2,
) -> Tensor:
    """A filter by its wavelength, float64 [rows, columns], as OpenCV's ``getGaborKernel`` has it: not normalised, turned by 180 degrees.

    ``exp(-(x'² + γ² y'²) / 2σ²) cos(2π x' / λ + ψ)``, with x' = x cos θ + y sin θ and y' = -x sin θ + y cos θ, where the first row is
    the largest y and the first column the largest x.

    Args:
        size: rows and columns, odd; sigma, theta, wavelength, aspect, phase: σ, θ, λ, γ, ψ.

    >>> gabor_kernel_opencv(9, 2.0, 0.0, 5.0, 0.5, 0.0)[4, 4].item()
    1.0
    """
    rows, columns = (size, size) if isinstance(size, int) else size
    for side in (rows, columns):
        require(
            isinstance(side, int) and side > 0 and side % 2 == 1,
            f"size: got {show(size)}, expected odd sizes",
        )
    number("sigma", sigma, low=0, open_low=True)
    number("wavelength", wavelength, low=0, open_low=True)
    y = rows // 2 - torch.arange(rows, dtype=torch.float64)[:, None]
    x = columns // 2 - torch.arange(columns, dtype=torch.float64)
    along = x * math.cos(theta) + y * math.sin(theta)
    across = -x * math.sin(theta) + y * math.cos(theta)
    bell = torch.exp(-(along**2 + (aspect * across) ** 2) / (2 * sigma**2))
    return bell * torch.cos(2 * math.pi * along / wavelength + phase)


def _sigma(frequency: float, bandwidth: float) -> float:
    number("bandwidth", bandwidth, low=0, open_low=True)
    return math.sqrt(math.log(2) / 2) / math.pi * (2**bandwidth + 1) / (2**bandwidth - 1) / frequency


def _taps(sigma: float, theta: float, n_stds: float) -> Tensor:
    """Where a kernel has its rows, and its columns: so many deviations to both sides, along the wave."""
    half = math.ceil(max(abs(n_stds * sigma * math.cos(theta)), abs(n_stds * sigma * math.sin(theta)), 1))
    return torch.arange(-half, half + 1, dtype=torch.float64)


def frequencies_of(frequencies: Sequence[float]) -> list[float]:
    """At least one, each above 0."""
    found = listed("frequencies", frequencies, "numbers of cycles a pixel")
    return [number("frequencies", f, low=0, open_low=True) for f in found]


def angles_of(orientations: int | Sequence[float]) -> list[float]:
    """In radians, where their number is given evenly over 180 degrees."""
    if isinstance(orientations, (int, np.integer)):
        number("orientations", orientations, low=1, integer=True)
        return [math.pi * k / orientations for k in range(orientations)]
    found = listed("orientations", orientations, "angles, or how many of them")
    return [number("orientations", angle) for angle in found]


def _spread_out(means: Tensor, like: Tensor) -> Tensor:
    """Each pixel's cell mean."""
    grid, (height, width) = means.shape[-1], like.shape[-2:]
    at = [torch.arange(size, device=like.device) * grid // size for size in (height, width)]
    return means[..., at[0][:, None], at[1]]


def _through(grey: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """``left[f] @ image @ right[f]`` in complex numbers; both are [filters, 2, side, side]."""
    count, height, width = grey.shape
    filters = len(left)
    half = (left.view(-1, height) @ grey).view(count, filters, 2, height, width)
    half = half.permute(1, 0, 2, 3, 4).reshape(filters, -1, width)
    real, imaginary = (half @ right[:, part] for part in (0, 1))
    real, imaginary = (v.view(filters, count, 2, height, width) for v in (real, imaginary))
    found = torch.stack([real[:, :, 0] - imaginary[:, :, 1], real[:, :, 1] + imaginary[:, :, 0]], 2)
    return found.transpose(0, 1)


@lru_cache(maxsize=8)
def _operators(
    bank: tuple[tuple[float, ...], ...],
    sides: tuple[int, int],
    bandwidth: float,
    n_stds: float,
    border: str,
    offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """What each filter does to rows, and to columns: float64 [filters, 2 (real, imaginary), side, side].

    A third number in the bank is the frequency that sets the bell's width, for a bell without a wave.
    """
    made: list[list[Tensor]] = [[], []]
    for frequency, theta, *bell in bank:
        sigma = _sigma(bell[0] if bell else frequency, bandwidth)
        at = _taps(sigma, theta, n_stds)
        profile = torch.exp(-(at**2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
        ways = ((math.sin(theta), offset), (math.cos(theta), 0.0))
        for found, side, (turn, phase) in zip(made, sides, ways):
            wave = torch.view_as_real(torch.polar(profile, 2 * math.pi * frequency * turn * at + phase))
            found.append(_convolution(wave, side, border))
    # Columns are multiplied from the right.
    return torch.stack(made[0]), torch.stack(made[1]).mT.contiguous()


def _convolution(profile: Tensor, side: int, border: str) -> Tensor:
    """[2, side, side]: convolution with a profile [taps, 2], the border folded in."""
    half = len(profile) // 2
    out = torch.arange(side)[:, None]
    source = out - torch.arange(-half, half + 1)
    inside = (source >= 0) & (source < side)
    if border == "reflect":  # d c b a | a b c d | d c b a
        source = source.remainder(2 * side)
        source = torch.where(source >= side, 2 * side - 1 - source, source)
    elif border == "mirror":  # d c b | a b c d | c b a
        period = max(2 * side - 2, 1)
        source = source.remainder(period)
        source = torch.where(source >= side, period - source, source)
    elif border == "wrap":
        source = source.remainder(side)
    source = source.clamp(0, side - 1)
    taps = profile.T[:, None].expand(2, side, len(profile))
    if border == "constant":
        taps = taps * inside
    return torch.zeros(2, side, side, dtype=torch.float64).scatter_add_(
        2, source.expand(2, side, len(profile)), taps
    )
