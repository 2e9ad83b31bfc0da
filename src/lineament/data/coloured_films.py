"""Short films of textured shapes that move, leave and come back, whose colours only a picture in colour can tell.

Every surface has a grey level and a colour of its own, drawn anew for each film. Within a film the grey level says which surface it is, unless two of the
shapes share one: then a table from grey to colour, read off the first frame, is wrong for both.
"""

from __future__ import annotations

import torch
from jaxtyping import UInt8
from torch import Tensor

from lineament.core import checks
from lineament.core.checks import number
from lineament.core.pictures import lab_to_rgb

_LEVELS = (32.0, 46.0, 60.0, 74.0)  # of L: the background's and the shapes', in any order
_CHROMA = 45.0
_TEXTURE = 3.0


def coloured_films(
    films: int, *, frames: int = 24, size: int = 64, shared: bool = False, seed: int = 0
) -> UInt8[Tensor, "films frames size size 3"]:
    """Films as bytes, three shapes over a background.

    Args:
        size: of a side. shared: two of the shapes have the same grey level, and opposite colours.

    >>> coloured_films(2, frames=3, size=32).shape
    torch.Size([2, 3, 32, 32, 3])
    """
    for name, value in (("films", films), ("frames", frames)):
        number(name, value, low=1, integer=True)
    number("size", size, low=16, integer=True)
    generator = torch.Generator().manual_seed(checks.seed("seed", seed))
    return torch.stack([_film(frames, size, shared, generator) for _ in range(films)])


def _film(frames: int, size: int, shared: bool, generator: torch.Generator) -> Tensor:
    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    level = torch.tensor(_LEVELS)[torch.randperm(4, generator=generator)]
    angle = 2 * torch.pi * uniform(4)
    if shared:
        level[2], angle[2] = level[1], angle[1] + torch.pi
    colour = _CHROMA * (0.6 + 0.4 * uniform(4, 1)) * torch.stack([angle.cos(), angle.sin()], 1)
    time = torch.arange(frames).float()[:, None, None]
    # Places run past the border by a third of a side, so that shapes leave and come back.
    start, speed = uniform(3, 2), (uniform(3, 2) - 0.5) * 0.12
    where = start + speed * time  # [frames, shapes, 2]
    span = 5 / 3
    where = (where + 1 / 3) % (2 * span)
    where = torch.where(where > span, 2 * span - where, where) - 1 / 3
    radius = 0.17 + 0.09 * uniform(3)
    rows, columns = torch.meshgrid(*[(torch.arange(size) + 0.5) / size] * 2, indexing="ij")
    surface = torch.zeros(frames, size, size, dtype=torch.long)
    texture = _waves(rows, columns, uniform(3)).expand(frames, -1, -1).clone()
    for k in range(3):
        down, right = (axis - where[:, k, i, None, None] for i, axis in enumerate((rows, columns)))
        inside = (down.abs().maximum(right.abs()) if k == 1 else (down**2 + right**2).sqrt()) < radius[k]
        surface[inside] = k + 1
        texture = torch.where(inside, _waves(down, right, uniform(3)), texture)
    lab = torch.cat([(level[surface] + _TEXTURE * texture)[:, None], colour[surface].movedim(3, 1)], 1)
    rgb = lab_to_rgb(lab).clamp(0, 1)
    return (255 * rgb).round().to(torch.uint8).movedim(1, 3)


def _waves(rows: Tensor, columns: Tensor, drawn: Tensor) -> Tensor:
    """A wave of any direction and of three to eight periods a side."""
    direction, periods = 2 * torch.pi * drawn[0], 3 + 5 * drawn[1]
    along = direction.cos() * rows + direction.sin() * columns
    return (2 * torch.pi * (periods * along + drawn[2])).sin()
