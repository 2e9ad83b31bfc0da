"""Photographs with the place of each class in them: PASCAL VOC and COCO, read from the user's own folders.

Nothing is downloaded. VOC: ``FOLDER/JPEGImages``, ``Annotations`` and ``ImageSets/Main/SPLIT.txt``, boxes as masks. COCO:
``FOLDER/annotations/instances_SPLIT.json`` and ``FOLDER/SPLIT``, polygons and run lengths as masks. Images come one at a time.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image, ImageDraw
from torch import Tensor

from lineament.core import checks
from lineament.core.results import Readable

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


@dataclass(frozen=True)
class Located(Readable):
    """One photograph: pixels in [0, 1], and where each class in it is. ``hard`` names classes whose boxes are all flagged difficult."""

    name: str
    pixels: Float[Tensor, "3 height width"]
    masks: dict[str, Bool[Tensor, "height width"]]
    hard: frozenset[str] = frozenset()


def voc(folder: str | Path, split: str = "test", *, limit: int | None = None) -> Iterator[Located]:
    """The photographs of a VOC split, with boxes filled as masks.

    Args:
        folder: a ``VOC2007`` folder.
        split: a name in ``ImageSets/Main``.
        limit: at most this many.

    Raises:
        InputError: a missing or unreadable file, named.
    """
    folder = Path(folder)
    names = _read(folder / "ImageSets" / "Main" / f"{split}.txt").split()
    for name in names[:limit]:
        path = folder / "Annotations" / f"{name}.xml"
        try:
            root = ElementTree.fromstring(_read(path))
        except ElementTree.ParseError as error:
            raise checks.InputError(f"{path}: not an XML annotation ({error})") from error
        pixels = _pixels(folder / "JPEGImages" / f"{name}.jpg")
        masks: dict[str, Tensor] = {}
        easy: set[str] = set()
        for entry in root.iter("object"):
            label = entry.findtext("name", "").strip()
            corners = [entry.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
            if not label or None in corners:
                raise checks.InputError(f"{path}: an object without a name or a box")
            left, top, right, bottom = (round(float(str(c))) for c in corners)
            mask = masks.setdefault(label, torch.zeros(pixels.shape[-2:], dtype=torch.bool))
            # VOC counts pixels from one, both ends included.
            mask[max(top - 1, 0) : bottom, max(left - 1, 0) : right] = True
            if entry.findtext("difficult", "0").strip() != "1":
                easy.add(label)
        yield Located(name, pixels, masks, frozenset(masks) - easy)


def coco(folder: str | Path, split: str = "val2014", *, limit: int | None = None) -> Iterator[Located]:
    """The photographs of a COCO split, with their segmentations as masks.

    Args:
        folder: holds ``annotations/instances_SPLIT.json`` and the images in ``SPLIT/``.
        split: ``"val2014"`` or another.
        limit: at most this many.

    Raises:
        InputError: a missing or unreadable file, named.
    """
    folder = Path(folder)
    path = folder / "annotations" / f"instances_{split}.json"
    try:
        raw = json.loads(_read(path))
        labels = {entry["id"]: str(entry["name"]) for entry in raw["categories"]}
        shapes: dict[int, list[Any]] = {}
        for entry in raw["annotations"]:
            shapes.setdefault(entry["image_id"], []).append(entry)
        listed = [(entry["id"], Path(str(entry["file_name"])).name) for entry in raw["images"]]
    except (ValueError, KeyError, TypeError) as error:
        raise checks.InputError(f"{path}: not a COCO annotation file ({error})") from error
    for number, name in listed[:limit]:
        pixels = _pixels(folder / split / name)
        height, width = pixels.shape[-2:]
        masks: dict[str, Tensor] = {}
        for entry in shapes.get(number, []):
            label = labels[entry["category_id"]]
            mask = masks.setdefault(label, torch.zeros(height, width, dtype=torch.bool))
            mask |= _segment(entry["segmentation"], height, width)
        yield Located(name, pixels, masks)


def _segment(shape: Any, height: int, width: int) -> Bool[Tensor, "height width"]:
    """A COCO segmentation: polygons, or uncompressed run lengths down the columns."""
    if isinstance(shape, dict):
        counts = shape["counts"]
        if not isinstance(counts, list):
            raise checks.InputError("COCO: got compressed run lengths, expected lists of counts or polygons")
        values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
        return torch.from_numpy(values.reshape(width, height).T.copy())
    canvas = Image.new("1", (width, height))
    for polygon in shape:
        ImageDraw.Draw(canvas).polygon([float(p) for p in polygon], fill=1, outline=1)
    return torch.from_numpy(np.array(canvas))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise checks.InputError(f"{path}: cannot be read ({error})") from error


def _pixels(path: Path) -> Float[Tensor, "3 height width"]:
    try:
        with Image.open(path) as image:
            values = np.asarray(image.convert("RGB"))
    except OSError as error:
        raise checks.InputError(f"{path}: not an image that can be read ({error})") from error
    return torch.from_numpy(values.copy()).permute(2, 0, 1).float() / 255
