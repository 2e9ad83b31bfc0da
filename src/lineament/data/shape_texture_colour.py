"""Images of one object with an independent shape, texture and colour, all to be named: which of them fills a vision network's features?

The vision task of Lampinen, Chan, Hermann (TMLR 2024, arXiv 2405.05847) in 32 x 32 pixels: an object of random place, size and rotation on plain grey.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import require
from lineament.data.samples import Samples

SHAPES = ("disc", "triangle", "square", "pentagon", "star", "cross", "ring", "half disc")
TEXTURES = ("plain", "stripes", "bars", "diagonal", "checks", "dots", "rings", "wedges")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "violet", "pink")


def shape_texture_colour(
    samples: int,
    *,
    shapes: int = 8,
    textures: int = 8,
    colours: int = 8,
    size: int = 32,
    noise: float = 0.02,
    seed: int = 0,
) -> Samples:
    """Images (sample, 3, size, size) in [0, 1]; ``extras`` hold each one's shape, texture and colour, of which the shape is the target.

    Args:
        shapes, textures, colours: how many of :data:`SHAPES`, :data:`TEXTURES` and :data:`COLOURS`, from the first on; each is drawn by itself.
        size: pixels of a side, at least 16.
        noise: standard deviation, clipped to [0, 1] after it.
        seed: of everything.

    >>> x = shape_texture_colour(6)
    >>> tuple(x.inputs.shape), sorted(x.extras)
    ((6, 3, 32, 32), ['colour', 'shape', 'texture'])
    """
    checks.number("samples", samples, low=1, integer=True)
    checks.number("size", size, low=16, integer=True)
    checks.number("noise", noise, low=0)
    draw = torch.Generator().manual_seed(checks.seed("seed", seed))
    labels = []
    for name, count, there in (
        ("shapes", shapes, SHAPES),
        ("textures", textures, TEXTURES),
        ("colours", colours, COLOURS),
    ):
        checks.number(name, count, low=1, high=len(there), integer=True)
        labels.append(torch.randint(count, (samples,), generator=draw))
    require(
        max(shapes, textures, colours) > 1,
        "shapes, textures, colours: got one of each, expected at least two of some",
    )
    shape, texture, colour = labels
    radius = (0.45 + 0.3 * torch.rand(samples, generator=draw))[:, None, None]
    angle = (2 * math.pi * torch.rand(samples, generator=draw))[:, None, None]
    centre = (2 * torch.rand(samples, 2, generator=draw) - 1) * (0.95 - radius[:, 0])
    at = torch.linspace(-1, 1, size)
    down, across = torch.broadcast_tensors(
        at[:, None] - centre[:, 0, None, None], at - centre[:, 1, None, None]
    )
    u = (angle.cos() * across + angle.sin() * down) / radius
    v = (angle.cos() * down - angle.sin() * across) / radius
    inside = torch.stack(_shapes(u, v), 1)[torch.arange(samples), shape]
    # Textures are fixed to the image, so that a rotation does not turn one into another; their scale is the object's.
    pattern = torch.stack(_textures(across / radius, down / radius), 1)[torch.arange(samples), texture]
    paint = _hue(colour.float() / len(COLOURS))[:, :, None, None] * (0.35 + 0.65 * pattern[:, None])
    images = torch.where(inside[:, None], paint, torch.full_like(paint, 0.5))
    images = (images + noise * torch.randn(images.shape, generator=draw)).clamp(0, 1)
    return Samples(
        images,
        shape,
        SHAPES[:shapes],
        extras={"shape": shape, "texture": texture, "colour": colour},
        source="shapes with textures and colours",
    )


def _shapes(u: Tensor, v: Tensor) -> list[Tensor]:
    """Whether each pixel is inside each shape of radius 1."""
    r, phi = torch.hypot(u, v), torch.atan2(v, u)

    def polygon(sides: int) -> Tensor:
        wedge = 2 * math.pi / sides
        return r * torch.cos((phi % wedge) - wedge / 2) < math.cos(wedge / 2)

    star = r < 0.45 + 0.55 * torch.cos(2.5 * phi).abs() ** 3
    cross = ((u.abs() < 0.3) | (v.abs() < 0.3)) & (u.abs().maximum(v.abs()) < 0.9)
    return [r < 0.9, polygon(3), polygon(4), polygon(5), star, cross, (r < 1) & (r > 0.55), (r < 1) & (v < 0)]


def _textures(x: Tensor, y: Tensor) -> list[Tensor]:
    """The brightness of each texture, 0 or 1."""
    wave = 2.5 * math.pi
    a, b = torch.sin(wave * x) > 0, torch.sin(wave * y) > 0
    found = [
        torch.ones_like(x) > 0, b, a, torch.sin(wave * (x + y) / 2**0.5) > 0, a ^ b,
        (torch.sin(wave * x) * torch.sin(wave * y)).abs() < 0.5, torch.sin(wave * torch.hypot(x, y)) > 0,
        torch.sin(4 * torch.atan2(y, x)) > 0,
    ]  # fmt: skip
    return [v.float() for v in found]


def _hue(share: Float[Tensor, " samples"]) -> Float[Tensor, "samples 3"]:
    """Fully saturated colours around the circle."""
    place = (share[:, None] * 6 + torch.tensor([0.0, 4.0, 2.0])) % 6
    return ((place - 3).abs() - 1).clamp(0, 1)
