"""Two latents as grey levels of two objects in an image: a disc (shortcut) and a square (core), whose sizes are their availability.

The pixel-footprint data of Hermann, Mobahi, Fel, Mozer (ICLR 2024, arXiv 2310.16228): the larger the disc, the more pixels say what the shortcut is,
while its predictivity stays. Grey levels come from one fixed affine map for all samples; a map fitted to each class or split would erase the class.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.data.two_latents import TwoLatents

CYAN = (0.0, 1.0, 1.0)


def footprint(
    factor: float = 1.0,
    *,
    predictivity: tuple[float, float] = (0.85, 0.9),
    correlation: float = 0.6,
    size: int = 32,
    base: int = 5,
    background: tuple[float, float, float] = CYAN,
    span: float = 4.5,
    seed: int = 0,
) -> TwoLatents:
    """Images (3, ``size``, ``size``) in [0, 1] with two objects that do not overlap, at random places.

    Args:
        factor: the disc's diameter over the square's side; the shortcut's availability.
        predictivity: (ρ_s, ρ_c), each in (1/2, 1).
        correlation: of the latents within a class.
        size: of the images; the paper has 224 with ``base=20``.
        base: the square's side in pixels.
        background: its red, green and blue.
        span: the grey of both objects is (z + span)/2 span, clipped to [0, 1].
        seed: of the places.

    Raises:
        InputError: objects that cannot lie side by side; as for :func:`~lineament.data.two_latents.two_latents`.

    >>> images = footprint(2.0).draw(4).inputs
    >>> tuple(images.shape), images[0, 1, 0, 0].item()
    ((4, 3, 32, 32), 1.0)
    """
    checks.number("factor", factor, low=0, open_low=True)
    checks.number("size", size, low=4, integer=True)
    checks.number("base", base, low=1, integer=True)
    checks.number("span", span, low=0, open_low=True)
    checks.seed("seed", seed)
    checks.require(len(background) == 3, f"background: got {background!r}, expected red, green and blue")
    disc = max(1, round(base * factor))
    checks.require(
        disc + base <= size,
        f"factor: got {factor:g}, a disc of {disc} pixels beside a square of {base}, expected both to fit side by side into {size} pixels",
    )
    embed = PixelFootprint(size, base, disc, background, span, seed)
    return TwoLatents(
        embed, predictivity, correlation, name=f"two objects, the disc {factor:g} times as large"
    )


class PixelFootprint:
    """Latents as grey levels of a disc and a square; the places are the same for the same latents and seed.

    >>> draw = PixelFootprint(16, 3, 6, CYAN, 4.5, 0)
    >>> draw(torch.tensor([[9.0, -9.0]])).amin((2, 3)).tolist()
    [[0.0, 0.0, 0.0]]
    """

    def __init__(
        self, size: int, base: int, disc: int, background: tuple[float, float, float], span: float, seed: int
    ):
        self.size, self.base, self.disc = size, base, disc
        self.background, self.span, self.seed = background, span, seed

    def __call__(self, z: Float[Tensor, "sample 2"]) -> Float[Tensor, "sample 3 size size"]:
        found = torch.empty(len(z), 3, self.size, self.size)
        found[:] = torch.tensor(self.background)[:, None, None]
        grey = ((z.float() + self.span) / (2 * self.span)).clamp(0, 1)
        for mask, level in zip(self.masks(z), grey.unbind(1)):
            found += mask[:, None] * (level[:, None, None, None] - found)
        return found

    def masks(self, z: Float[Tensor, "sample 2"]) -> tuple[Tensor, Tensor]:
        """Where the disc is, and where the square: two masks (sample, size, size) of 0 and 1."""
        disc, square = self._corners(z)
        at = torch.arange(self.size, dtype=torch.float32)
        middle = disc + (self.disc - 1) / 2
        down, across = ((at - c[:, None]).square() for c in middle.unbind(1))
        round_ = down[:, :, None] + across[:, None, :] <= (self.disc / 2) ** 2
        top, left = ((at >= c[:, None]) & (at < c[:, None] + self.base) for c in square.unbind(1))
        return round_.float(), (top[:, :, None] & left[:, None, :]).float()

    def _corners(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Top and left of each object's box, drawn until the boxes do not overlap."""
        content = zlib.crc32(np.ascontiguousarray(z.detach().double().cpu().numpy()).tobytes())
        draw = np.random.default_rng([self.seed, 3, content])
        count = len(z)
        sizes = np.array([self.disc, self.base])
        corners = np.zeros((count, 2, 2))
        left = np.arange(count)
        while len(left):
            corners[left] = np.floor(draw.random((len(left), 2, 2)) * (self.size - sizes + 1)[None, :, None])
            gap = corners[left, 1] - corners[left, 0]
            apart = (gap >= self.disc) | (-gap >= self.base)
            left = left[~apart.any(1)]
        first, second = torch.from_numpy(corners).float().unbind(1)
        return first, second
