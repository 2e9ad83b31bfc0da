"""A film's frames as they are stored: luma, its range and matrix, and the chroma that belongs to a colour."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

BT601, BT709, FULL = 6, 1, 2
LARGEST = 178_956_970  # pixels of a frame, as Pillow has it of pictures: a few bytes can claim any number
DEPTHS = (8, 9, 10, 12, 14, 16)
# Kr and Kb of the matrices that are met in films: BT.709, BT.601 (two numbers), BT.2020.
MATRIX = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}


def usual_matrix(height: int) -> int:
    """The matrix of a film that names none.

    >>> usual_matrix(480), usual_matrix(1080)
    (6, 1)
    """
    return BT709 if height >= 720 else BT601


@dataclass(frozen=True)
class FilmFrame:
    """A frame: when it is shown, and its planes as stored, [height, width].

    Attributes:
        index, pts: its number, and its time in units of the film's time base.
        luma, depth: the plane, of so many bits. full_range, matrix: what its numbers mean.
        alpha: a plane of opacity, where there is one.
        turns: quarter turns, counter-clockwise, that show it upright.
        picture: what was read, of a folder's pictures.
    """

    index: int
    pts: int
    luma: np.ndarray
    depth: int
    full_range: bool
    matrix: int
    alpha: np.ndarray | None = None
    turns: int = 0
    picture: Any = None

    @property
    def grey(self) -> Tensor:
        """The luma as an upright grey picture in [0, 1]."""
        low, width = luma_range(self.depth, self.full_range)
        grey = ((torch.from_numpy(self.luma.astype(np.float32)) - low) / width).clamp(0, 1)
        return torch.rot90(grey, self.turns)

    @property
    def shown(self) -> Any:
        """What is to be coloured: the picture, or the luma."""
        return self.grey if self.picture is None else self.picture


@dataclass(frozen=True)
class Format:
    """What a written film takes over from the one that was read."""

    time_base: Fraction
    rate: Fraction
    sides: tuple[int, int]  # width, height
    depth: int
    alpha: bool
    colours: dict[str, int]
    aspect: Fraction | None = None
    rotation: int = 0
    metadata: dict[str, str] = field(default_factory=dict)


def has_colours(rgb: np.ndarray) -> bool:
    """Whether more than a hundredth of a picture's pixels, bytes [height, width, 3], are clearly no grey.

    >>> has_colours(np.full((4, 4, 3), 90, np.uint8)), has_colours(np.full((4, 4, 3), (90, 90, 140), np.uint8))
    (False, True)
    """
    return float((np.ptp(rgb, axis=-1) > 16).mean()) > 0.01


def luma_range(depth: int, full_range: bool) -> tuple[int, int]:
    """The value of black, and how far above it white lies.

    >>> luma_range(8, False), luma_range(10, True)
    ((16, 219), (0, 1023))
    """
    scale = 2 ** (depth - 8)
    return (0, 2**depth - 1) if full_range else (16 * scale, 219 * scale)


def chroma_of(rgb: Tensor, matrix: int) -> tuple[Tensor, Tensor]:
    """Cb and Cr in [0, 1], 0.5 being grey, of RGB [height, width, 3] in [0, 1].

    >>> [round(float(x), 3) for x in chroma_of(torch.tensor([[[0.0, 0.0, 1.0]]]), 1)]
    [1.0, 0.454]
    """
    kr, kb = MATRIX.get(matrix, MATRIX[BT709])
    y = luma_of(rgb, matrix)
    return 0.5 + (rgb[..., 2] - y) / (2 * (1 - kb)), 0.5 + (rgb[..., 0] - y) / (2 * (1 - kr))


def luma_of(rgb: Tensor, matrix: int) -> Tensor:
    """Y in [0, 1] of RGB [height, width, 3] in [0, 1].

    >>> luma_of(torch.ones(1, 1, 3), 1).tolist()
    [[1.0]]
    """
    kr, kb = MATRIX.get(matrix, MATRIX[BT709])
    r, g, b = rgb.unbind(-1)
    return kr * r + (1 - kr - kb) * g + kb * b
