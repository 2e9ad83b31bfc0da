"""Films in colour to learn from: a folder of videos and of folders of pictures, each as bytes that are read from disk as they are needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lineament.core.batching import progress
from lineament.core.checks import require
from lineament.core.files import atomic_write
from lineament.load.film_frames import FilmFrame
from lineament.load.picture_films import PictureFilm, in_natural_order, is_picture
from lineament.load.video import Film

VIDEOS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv")


def films_in(folder: str | Path) -> list[Film | PictureFilm]:
    """The videos of a folder and its folders of pictures, in natural order; or the folder's own pictures as one film."""
    folder = Path(folder)
    require(
        folder.is_dir(),
        f"films: {str(folder)!r} is no folder; expected one of videos or of folders of pictures",
    )
    found: list[Film | PictureFilm] = []
    for path in in_natural_order(folder.iterdir()):
        if path.is_dir() and any(map(is_picture, path.iterdir())):
            found.append(PictureFilm(path))
        elif path.suffix.lower() in VIDEOS and not path.name.startswith("."):
            found.append(Film(path, colour=True))
    if not found and any(map(is_picture, folder.iterdir())):
        found.append(PictureFilm(folder))
    require(
        bool(found), f"films: {str(folder)!r} holds no video ({', '.join(VIDEOS)}) and no folder of pictures"
    )
    return found


def stored_frames(film: Film | PictureFilm, path: Path, side: int) -> Tensor:
    """The frames of a film as bytes [frames, height, width, 3], made so small that the shorter side has ``side`` pixels, in a file that is made once.

    Raises:
        InputError: fewer than two frames, or none that has colours.
    """
    if not path.is_file():
        with atomic_write(path) as temporary:
            _store(film, temporary, side)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def _store(film: Film | PictureFilm, path: Path, side: int) -> None:
    count, coloured, rows = film.length, False, None
    require(count > 1, f"films: {str(film.path)!r} has {count} frames, expected at least two")
    for frame in progress(film.frames(), f"reading {film.path.name}", total=count):
        picture = _small(frame, side)
        coloured |= bool((picture.max(2) - picture.min(2)).max() > 8)
        if rows is None:
            rows = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *picture.shape))
        rows[frame.index] = picture
    require(coloured, f"films: {str(film.path)!r} has no colours to learn from")
    assert rows is not None
    rows.flush()


def _small(frame: FilmFrame, side: int) -> np.ndarray:
    picture = frame.picture if isinstance(frame.picture, Image.Image) else Image.fromarray(frame.picture)
    factor = side / min(picture.size)
    picture = picture.convert("RGB")
    if factor < 1:
        width, height = (max(side, round(factor * length)) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(picture)
