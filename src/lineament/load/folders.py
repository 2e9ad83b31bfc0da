"""A folder with one folder of images per class."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lineament.core.checks import InputError, require
from lineament.data.samples import Samples
from lineament.load.columns import Choose

_PIXELS = 64_000_000
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def image_folder(path: Path, choose: Choose, *, size: tuple[int, int] | None = None) -> Samples:
    """Samples from ``path/CLASS/**/*.png`` (or jpg ...); classes in the order of their names.

    Raises:
        InputError: no class folders, an image that cannot be read, images of different sizes without ``size``.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     Image.new("L", (6, 4)).save(folder / name / "1.png")
    >>> found = image_folder(folder, np.arange)
    >>> found.classes, tuple(found.inputs.shape)
    (('cat', 'dog'), (2, 4, 6))
    """
    folders = sorted(
        (p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name
    )
    listed = {folder: _images(folder) for folder in folders}
    filled = [folder for folder in folders if listed[folder]]
    if not filled:
        raise InputError(
            f"data: {str(path)!r} holds no folders with images; expected one folder a class with "
            f"{', '.join(sorted(_IMAGES)[:4])} ... files, an .npz file, or a Hugging Face data set"
        )
    splits = {"train", "test", "val", "valid", "validation"} & {folder.name for folder in filled}
    if len(splits) == len(filled):
        example = path / sorted(splits)[0]
        raise InputError(
            f"data: {str(path)!r} holds the splits {', '.join(sorted(splits))}, not classes; pass one: {str(example)!r}"
        )
    # A folder without images keeps its number: leaving it out would move every class behind it to its neighbour's output.
    files = [(file, number) for number, folder in enumerate(folders) for file in listed[folder]]
    rows = choose(len(files))
    notes = []
    empty = [folder.name for folder in folders if not listed[folder]]
    if empty:
        notes.append(
            f"classes without an image, which keep their place among the model's outputs: {', '.join(map(repr, empty[:5]))}"
            + (" ..." if len(empty) > 5 else "")
        )
    pictures = ((str(files[row][0].relative_to(path)), _read(files[row][0])) for row in rows)
    return Samples(
        inputs=stacked(pictures, size, len(rows)),
        targets=torch.tensor([files[row][1] for row in rows]),
        index=torch.from_numpy(rows),
        total=len(files),
        source=path.name or str(path),
        classes=tuple(folder.name for folder in folders),
        notes=tuple(notes),
    )


def stacked(
    pictures: Iterable[tuple[str, Image.Image]], size: tuple[int, int] | None, count: int = 1
) -> torch.Tensor:
    """Images (name, picture) as one uint8 tensor (sample, height, width[, 3]): grey if all are grey, else RGB.

    They are taken one by one and brought to ``size`` at once, so that photographs are never all held as they were taken.

    Raises:
        InputError: images of different sizes without ``size``, pixels that are no bytes, or ``count`` images of that size that no memory holds.
    """
    if size is not None:
        _room(size, count)
    arrays: list[np.ndarray] = []
    first: Image.Image | None = None
    for name, picture in pictures:
        first = first or picture
        if size is None and picture.size != first.size:
            raise InputError(
                f"data: images of different sizes (the first is {_by(first)}, {name!r} is {_by(picture)}); "
                "say what the model takes as `image_size` (height, width)"
            )
        plain = _bytes(name, picture)
        if size is not None and plain.size != (size[1], size[0]):
            plain = plain.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(plain, dtype=np.uint8))
    if any(array.ndim == 3 for array in arrays):
        arrays = [array if array.ndim == 3 else np.repeat(array[..., None], 3, 2) for array in arrays]
    return torch.from_numpy(np.stack(arrays))


def _room(size: tuple[int, int], count: int) -> None:
    """Refuse a size at which the system would end the process for want of memory."""
    height, width = size
    require(
        height * width <= _PIXELS,
        f"image_size: {height} x {width} are {height * width:,} pixels an image, expected at most 64 million",
    )
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return
    need = 3 * height * width * count
    require(
        need <= memory / 2,
        f"image_size: {count} images of {height} x {width} pixels take {need / 2**30:.0f} GiB, more than half of this machine's memory; "
        "choose a smaller size or fewer `samples`",
    )


def _bytes(name: str, picture: Image.Image) -> Image.Image:
    """A picture in grey or RGB with values from 0 to 255."""
    if picture.mode.startswith("I"):
        # Pillow clips 16-bit values at 255, which turns a scan white.
        values = np.asarray(picture)
        require(
            int(values.min()) >= 0 and int(values.max()) < 1 << 16,
            f"data: image {name!r} holds values from {values.min()} to {values.max()}, expected 8 or 16 bits a channel",
        )
        return Image.fromarray((values >> 8).astype(np.uint8))
    require(
        picture.mode != "F",
        f"data: image {name!r} holds real numbers, whose black and white are not known, expected 8 or 16 bits a channel; "
        "pass real-valued images as arrays in an .npz file",
    )
    return picture.convert("L" if picture.mode in ("L", "1") else "RGB")


def _images(folder: Path) -> list[Path]:
    found = [p for p in folder.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file()]
    return sorted(found, key=lambda p: str(p.relative_to(folder)))


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            require(
                picture.width * picture.height <= _PIXELS,
                f"data: image {str(file)!r} has {picture.width} x {picture.height} pixels, expected at most 64 million",
            )
            picture.load()
            return picture.copy()
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"data: image {str(file)!r} cannot be read ({error})") from error


def _by(picture: Image.Image) -> str:
    return f"{picture.height} x {picture.width}"
