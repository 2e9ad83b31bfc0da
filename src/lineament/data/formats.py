"""Arrays of images in the forms in which data sets are distributed: `.npz`, IDX, CIFAR's binary records, JPEG files in one array."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from lineament.core.checks import InputError, require


def folder_of(data_folder: str | Path | None) -> Path | None:
    """The given folder, or else the environment's ``LINEAMENT_DATA``."""
    given = data_folder or os.environ.get("LINEAMENT_DATA")
    return Path(given) if given else None


def read_npz(path: Path, names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """The named arrays of an `.npz` file; never unpickled.

    Raises:
        InputError: the file is damaged, or an array that is not optional is missing.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            if not set(names) <= set(stored.files):
                wanted = " and ".join(map(repr, names))
                raise InputError(f"{path}: holds {stored.files}, expected {wanted}")
            return {name: stored[name] for name in (*names, *optional) if name in stored.files}
    except InputError:
        raise
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: damaged, or not an .npz file ({error})") from error


def read_images(path: Path, images: str, labels: str) -> dict[str, np.ndarray]:
    """Images as bytes, (sample, channel, height, width), and labels from an `.npz` file; its ``groups`` too, where there are any.

    Raises:
        InputError: a damaged file, missing arrays, or images of another form.
    """
    found = read_npz(path, (images, labels), ("groups",))
    x, y = found[images], found[labels].astype(np.int64)
    if x.ndim == 3:
        x = x[:, None]
    good = x.dtype == np.uint8 and x.ndim == 4 and bool({1, 3} & {x.shape[1], x.shape[3]})
    require(
        good and y.shape == x.shape[:1],
        f"{path}: {images} is {x.dtype} of shape {x.shape}, expected uint8 images with 1 or 3 channels, one for each of {len(y)} labels",
    )
    return {**found, "x": x if x.shape[1] in (1, 3) else x.transpose(0, 3, 1, 2), "y": y}


def read_jpegs(path: Path) -> dict[str, np.ndarray]:
    """Images from JPEG files laid end to end: image i is the file ``bytes[offsets[i]:offsets[i + 1]]``; with labels ``y``."""
    found = read_npz(path, ("bytes", "offsets", "y"))
    files = (found["bytes"][a:b].tobytes() for a, b in itertools.pairwise(found["offsets"]))
    try:
        images = [np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files]
        return {"x": np.stack(images).transpose(0, 3, 1, 2), "y": found["y"].astype(np.int64)}
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: holds no JPEG images of one size ({error})") from error


def read_cifar(paths: Sequence[Path], label_bytes: int) -> dict[str, np.ndarray]:
    """CIFAR's binary version: each record is ``label_bytes`` bytes, the last of them the label, and 3 x 32 x 32 pixels.

    Raises:
        InputError: a file that is no whole number of records.
    """
    parts = []
    for path in paths:
        raw = np.fromfile(path, dtype=np.uint8)
        require(
            raw.size > 0 and raw.size % (label_bytes + 3072) == 0,
            f"{path}: {raw.size:,} bytes are no whole number of CIFAR's binary records of {label_bytes + 3072} bytes",
        )
        parts.append(raw.reshape(-1, label_bytes + 3072))
    rows = np.concatenate(parts)
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32)
    return {"x": images, "y": rows[:, label_bytes - 1].astype(np.int64)}


def read_idx(path: Path) -> np.ndarray:
    """The array of bytes in an IDX file, gzipped or not.

    Raises:
        InputError: another magic number, or not as many bytes as the header says.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    require(
        len(raw) >= 4 and raw[:3] == b"\0\0\x08",
        f"{path}: starts with {raw[:4]!r}, expected an IDX file of bytes",
    )
    start = 4 + 4 * raw[3]
    shape = tuple(np.frombuffer(raw[4:start], ">u4").tolist())
    values = np.frombuffer(raw, np.uint8, offset=min(start, len(raw)))
    require(
        len(shape) == raw[3] and values.size == int(np.prod(shape, dtype=np.int64)),
        f"{path}: holds {values.size} bytes, expected {shape} by its header; is the download whole?",
    )
    return values.reshape(shape)
