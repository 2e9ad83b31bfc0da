"""Folders of images: one folder per class, or the labels in a ``labels.csv``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from lineament.core.checks import InputError, require
from lineament.data.samples import Samples
from lineament.load.columns import Choose, find_column, with_groups

_PIXELS = 64_000_000
_FILES = ("file", "filename", "file_name", "image", "path", "img", "name", "id", "image_id")
_IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}


def image_folder(path: Path, choose: Choose, *, size: tuple[int, int] | None = None) -> Samples:
    """Samples from ``path/CLASS/**/*.png`` (or jpg ...); classes in the order of their names.

    Raises:
        InputError: no class folders, no image that can be read, images of different sizes without ``size``.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("cat", "dog"):
    ...     (folder / name).mkdir()
    ...     Image.new("L", (6, 4)).save(folder / name / "1.png")
    >>> found = image_folder(folder, np.arange)
    >>> found.classes, tuple(found.inputs.shape)
    (('cat', 'dog'), (2, 4, 6))
    """
    folders, files = files_by_class(path)
    filled = {number for _, number in files}
    rows = choose(len(files))
    notes = []
    empty = [folder.name for number, folder in enumerate(folders) if number not in filled]
    if empty:
        notes.append(
            f"classes without an image, which keep their place among the model's outputs: {', '.join(map(repr, empty[:5]))}"
            + (" ..." if len(empty) > 5 else "")
        )
    pictures = ((str(files[row][0].relative_to(path)), files[row][0]) for row in rows)
    images, kept, left_out = readable(pictures, size, len(rows))
    notes += left_out
    rows = rows[kept]
    return Samples(
        inputs=images,
        targets=torch.tensor([files[row][1] for row in rows]),
        index=torch.from_numpy(rows),
        total=len(files),
        source=path.name or str(path),
        classes=tuple(folder.name for folder in folders),
        extras=_facts(files[row][0] for row in rows),
        notes=tuple(notes),
    )


def files_by_class(path: Path) -> tuple[list[Path], list[tuple[Path, int]]]:
    """The class folders in ``path`` by name, and every image below them with its folder's number; none is opened.

    Raises:
        InputError: no folder with images, or folders that are splits.
    """
    folders = sorted(
        (p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")), key=lambda p: p.name
    )
    listed = {folder: images_below(folder) for folder in folders}
    filled = [folder for folder in folders if listed[folder]]
    if not filled:
        arrays = sorted(path.glob("*.npz"))
        require(
            not arrays,
            f"data: {str(path)!r} holds no folders with images but {len(arrays)} .npz files; pass one: {', '.join(repr(str(file)) for file in arrays[:3])}",
        )
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
    return folders, [(file, number) for number, folder in enumerate(folders) for file in listed[folder]]


def labelled_folder(
    path: Path, choose: Choose, *, size: tuple[int, int] | None = None, **named: str | None
) -> Samples:
    """Samples from the images that ``path/labels.csv`` names, one a row, with its label.

    Args:
        named: ``inputs``, the column of file names; ``targets`` and ``groups``; by their usual names by default.

    Raises:
        InputError: no such column, a file outside the folder; as :func:`image_folder` and :func:`lineament.load.tables.read_table`.
    """
    from lineament.load.tables import TARGETS, CsvTable, surveyed, targets_of

    table = CsvTable(path / "labels.csv")
    first = find_column("inputs", named.get("inputs"), _FILES, table.names)
    second = find_column("targets", named.get("targets"), TARGETS, table.names)
    group = named.get("groups")
    columns = [first, second, *([find_column("groups", group, (), table.names)] if group else [])]
    total, classes = surveyed(table, [second])
    rows = choose(total)
    cells = list(table.walk(columns, set(rows.tolist())))
    files = [_inside(path, row[0]) for row in cells]
    pictures = ((row[0], file) for row, file in zip(cells, files))
    images, kept, notes = readable(pictures, size, len(rows))
    labels, names = targets_of([[cells[k][1] for k in kept]], classes)
    found = Samples(
        inputs=images,
        targets=labels,
        index=torch.from_numpy(rows[kept]),
        total=total,
        source=path.name or str(path),
        classes=names,
        extras=_facts(files[k] for k in kept),
        notes=(*notes, f"inputs are the files of column {first!r} in labels.csv, targets column {second!r}"),
    )
    return with_groups(found, np.array([cells[k][2] for k in kept])) if group else found


def _facts(files: Iterable[Path]) -> dict[str, torch.Tensor]:
    """What a file says of its sample before it is looked at, and a network should not learn: bytes, and width over height as stored."""
    rows = []
    for file in files:
        with Image.open(file) as picture:
            rows.append((float(file.stat().st_size), picture.width / picture.height))
    size, shape = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return {"file_size": size, "aspect_ratio": shape}


def _inside(folder: Path, name: str) -> Path:
    """The file of that name in a folder, with or without its ending."""
    file = folder / name
    inside = folder.resolve() in file.resolve().parents
    require(inside, f"data: labels.csv names {name!r}, expected files in {str(folder)!r}")
    ends = ("", *sorted(_IMAGES)) if file.suffix.lower() not in _IMAGES else ("",)
    places = (folder / part / f"{name}{end}" for end in ends for part in ("", "images"))
    return next((place for place in places if place.is_file()), file)


def readable(
    files: Iterable[tuple[str, Path]], size: tuple[int, int] | None, count: int
) -> tuple[torch.Tensor, list[int], list[str]]:
    """The images of some files, which of the files they are, and what is said of those that cannot be read, which are left out."""
    kept: list[int] = []
    resized: list[int] = []
    broken: list[str] = []

    def pictures() -> Iterator[tuple[str, Image.Image]]:
        for number, (name, file) in enumerate(files):
            try:
                picture = _read(file)
            except InputError as error:
                broken.append(str(error).removeprefix("data: "))
                continue
            kept.append(number)
            if size is not None and picture.size != (size[1], size[0]):
                resized.append(number)
            yield name, picture

    try:
        images = stacked(pictures(), size, count)
    except _NoImages:
        raise InputError(f"data: none of {len(broken)} images can be read; {broken[0]}") from None
    several = f" and {len(broken) - 2} more" if len(broken) > 2 else ""
    notes = (
        [f"{len(broken)} of {count} images are left out: {'; '.join(broken[:2])}{several}"] if broken else []
    )
    if resized and size is not None:
        notes.append(f"{len(resized)} of {len(kept)} images are brought to {size[0]} x {size[1]} pixels")
    return images, kept, notes


class _NoImages(InputError):
    """Not one image."""


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
    if not arrays:
        raise _NoImages("data: holds no images")
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


def images_below(folder: Path) -> list[Path]:
    """All images in a folder and in those within it, by their paths."""
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
