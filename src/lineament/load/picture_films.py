"""A folder of pictures as a film: one a frame, in the order of the numbers in their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from lineament.core.checks import InputError, number, require
from lineament.load.film_frames import FULL, FilmFrame, Format, has_colours, luma_of, usual_matrix

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


@dataclass
class PictureFilm:
    """A folder of pictures, one a frame, in the order of the numbers in their names; ``coloured``: whether one of them has colours."""

    path: Path
    rate: Fraction = Fraction(25)
    gaps: list[str] = field(default_factory=list)
    coloured: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self.files = picture_folder(self.path)
        number("fps", float(self.rate), low=0, open_low=True)
        sides = {}
        # Each is read whole: a damaged one is said now, not after hours of work on those before it.
        for file in self.files:
            picture = read_picture("film", file)
            sides.setdefault(picture.size, file.name)
            if not self.coloured and picture.mode[0] not in "1LI":
                self.coloured = has_colours(np.asarray(picture.convert("RGB")))
        (size, name), *others = [*sides.items(), ((0, 0), "")]
        require(
            len(sides) < 2,
            f"film: {others[0][1]!r} is {others[0][0][0]} x {others[0][0][1]}, {name!r} is {size[0]} x {size[1]} (width x height); expected pictures of one size",
        )

    @property
    def length(self) -> int:
        """How many pictures there are."""
        return len(self.files)

    @property
    def format(self) -> Format:
        """What a written film takes over: luma of the full range, so that it keeps its values."""
        frame = next(self.frames())
        colours = {"color_range": FULL, "colorspace": frame.matrix}
        sides = (frame.luma.shape[1], frame.luma.shape[0])
        return Format(1 / self.rate, self.rate, sides, frame.depth, frame.alpha is not None, colours)

    def left_out(self, out: Any) -> list[str]:
        """Nothing: there are only pictures."""
        return []

    def frames(self, out: Any = None) -> Iterator[FilmFrame]:
        """The pictures, one by one."""
        for index, file in enumerate(self.files):
            picture = read_picture("film", file)
            luma = _luma_plane(picture)
            yield FilmFrame(
                index, index, luma, 8 * luma.itemsize, True, usual_matrix(len(luma)), _alpha_plane(picture), 0, picture
            )  # fmt: skip


def read_picture(what: str, path: Path) -> Image.Image:
    """A picture, upright; ``what`` is the argument that named it."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{what}: the picture {str(path)!r} cannot be read: {error}") from error


def _luma_plane(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):  # 16 bits
        return np.asarray(picture).astype(np.uint16)
    if picture.mode in ("1", "L", "LA"):
        return np.asarray(picture.convert("L"))
    rgb = torch.from_numpy(np.array(picture.convert("RGB"))).double()
    return luma_of(rgb, usual_matrix(picture.height)).round().to(torch.uint8).numpy()


def _alpha_plane(picture: Image.Image) -> np.ndarray | None:
    if "transparency" in picture.info and picture.mode != "RGBA":
        picture = picture.convert("RGBA")
    return np.asarray(picture.getchannel("A")) if "A" in picture.getbands() else None


def picture_folder(path: str | Path) -> list[Path]:
    """The pictures of a folder, in the order of the numbers in their names: 2.png before 10.png."""
    path = Path(path)
    found = [p for p in path.iterdir() if is_picture(p)]
    require(
        bool(found), f"film: {str(path)!r} holds no pictures; expected {', '.join(PICTURES)}, or a video file"
    )
    return in_natural_order(found)


def is_picture(path: Path) -> bool:
    """Whether a file's name is a picture's."""
    return path.suffix.lower() in PICTURES and not path.name.startswith(".")


def in_natural_order(paths: Iterable[Path]) -> list[Path]:
    """In the order of the numbers in their names.

    >>> [path.name for path in in_natural_order([Path("f10"), Path("f2")])]
    ['f2', 'f10']
    """
    return sorted(paths, key=lambda p: [int(x) if x.isdecimal() else x for x in re.split(r"(\d+)", p.name)])
