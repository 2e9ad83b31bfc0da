"""A folder with one folder of images per class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lineament.core.checks import InputError, require
from lineament.data.loading import Budget, Samples

_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def image_folder(path: Path, budget: Budget, *, size: tuple[int, int] | None = None) -> Samples:
    """Samples from ``path/CLASS/**/*.png`` (or jpg ...); classes in the order of their names.

    Raises:
        InputError: no class folders, an image that cannot be read, images of different sizes without ``size``.
    """
    folders = sorted(
        (p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name
    )
    listed = {folder: _images(folder) for folder in folders}
    classes = [folder for folder in folders if listed[folder]]
    if not classes:
        raise InputError(
            f"DATA: {str(path)!r} holds no folders with images; expected one folder a class with "
            f"{', '.join(sorted(_IMAGES)[:4])} ... files, an .npz file, or a Hugging Face data set"
        )
    splits = {"train", "test", "val", "valid", "validation"} & {folder.name for folder in classes}
    if len(splits) == len(classes):
        example = path / sorted(splits)[0]
        raise InputError(
            f"DATA: {str(path)!r} holds the splits {', '.join(sorted(splits))}, not classes; pass one: {str(example)!r}"
        )
    files = [(file, number) for number, folder in enumerate(classes) for file in listed[folder]]
    rows = budget.choose(len(files))
    notes = []
    empty = [folder.name for folder in folders if not listed[folder]]
    if empty:
        notes.append(f"{len(empty)} folders without images were left out")
    pictures = [(str(files[row][0].relative_to(path)), _read(files[row][0])) for row in rows]
    return Samples(
        inputs=stacked(pictures, size),
        targets=torch.tensor([files[row][1] for row in rows]),
        index=torch.from_numpy(rows),
        total=len(files),
        source=path.name or str(path),
        classes=tuple(folder.name for folder in classes),
        notes=tuple(notes),
    )


def stacked(pictures: list[tuple[str, Image.Image]], size: tuple[int, int] | None) -> torch.Tensor:
    """Images (name, picture) as one uint8 tensor (sample, height, width[, 3]): grey if all are grey, else RGB."""
    sizes = {picture.size for _, picture in pictures}
    if size is None and len(sizes) > 1:
        name = next(n for n, picture in pictures if picture.size != pictures[0][1].size)
        raise InputError(
            f"DATA: images of {len(sizes)} different sizes (the first is {_by(pictures[0][1])}, {name!r} is not); "
            "say what the model takes with --image-size HEIGHT,WIDTH"
        )
    grey = all(picture.mode in ("L", "1", "I;16", "I") for _, picture in pictures)
    arrays = []
    for _, picture in pictures:
        plain = picture.convert("L" if grey else "RGB")
        if size is not None and plain.size != (size[1], size[0]):
            plain = plain.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        arrays.append(np.asarray(plain, dtype=np.uint8))
    return torch.from_numpy(np.stack(arrays))


def _images(folder: Path) -> list[Path]:
    found = [p for p in folder.rglob("*") if p.suffix.lower() in _IMAGES and p.is_file()]
    return sorted(found, key=lambda p: str(p.relative_to(folder)))


def _read(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            require(
                picture.width * picture.height <= 64_000_000,
                f"DATA: image {str(file)!r} has {picture.width} x {picture.height} pixels, expected at most 64 million",
            )
            picture.load()
            return picture.copy()
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"DATA: image {str(file)!r} cannot be read ({error})") from error


def _by(picture: Image.Image) -> str:
    return f"{picture.height} x {picture.width}"
