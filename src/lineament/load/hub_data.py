"""Hugging Face data sets, saved to disk or by name (extra ``hub``)."""

from __future__ import annotations

import io
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lineament.core.checks import InputError, require, show, suggest
from lineament.data.samples import Samples
from lineament.load.data import Budget, coded, named_one, with_groups
from lineament.load.folders import stacked

_INPUTS = ("image", "img", "images", "pixel_values", "x", "inputs", "data", "features")
_TARGETS = ("label", "labels", "y", "target", "targets", "class", "fine_label")
BUILT_IN = ("digits", "shortcut-digits")
_ORDER = ("test", "validation", "valid", "val", "train")


def saved(path: Path, budget: Budget, *, split: str | None, **options: Any) -> Samples:
    """Samples of a data set that ``save_to_disk`` wrote.

    Raises:
        InputError: the package datasets is not installed, or the folder holds no readable data set, split or column.
    """
    datasets = _library()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"DATA: {str(path)!r} is no readable Hugging Face data set ({error})") from error
    return _samples(found, path.name, budget, split=split, **options)


def named(name: str, budget: Budget, *, split: str | None, **options: Any) -> Samples:
    """Samples of a data set on the Hugging Face hub, or of one in its cache.

    Raises:
        InputError: the package datasets is not installed, or there is no such data set, split or column.
    """
    datasets = _library()
    try:
        found = datasets.load_dataset(name)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        near = get_close_matches(name, BUILT_IN, n=1)
        raise InputError(
            f"DATA: {name!r} is no file or folder here, and as a Hugging Face data set it cannot be loaded ({reason}); "
            f"without network, use a data set saved with save_to_disk{f'; nearest of those built in: {near[0]!r}' if near else ''}"
        ) from error
    return _samples(found, name, budget, split=split, **options)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "DATA: Hugging Face data sets need the package 'datasets'; install lineament[hub]"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _samples(
    found: Any,
    source: str,
    budget: Budget,
    *,
    inputs: str | None,
    targets: str | None,
    groups: str | None,
    split: str | None,
    size: tuple[int, int] | None,
) -> Samples:
    import datasets

    notes = []
    if isinstance(found, dict):
        chosen = split or next((name for name in _ORDER if name in found), next(iter(found), ""))
        require(chosen in found, f"--split: {chosen!r} is not in the data{suggest(chosen, found)}")
        notes.append(f"split {chosen!r}")
        found = found[chosen]
    elif split is not None:
        raise InputError(f"--split: {split!r} was asked for, but the data set has one part only")
    columns = list(found.column_names)
    pictures = [name for name in columns if isinstance(found.features[name], datasets.Image)]
    coded_columns = [name for name in columns if isinstance(found.features[name], datasets.ClassLabel)]
    first = inputs or (pictures[0] if pictures else None)
    first = named_one("inputs", first, _INPUTS, columns)
    usual = next((name for name in _TARGETS if name in columns), None)
    second = named_one(
        "targets", targets or usual or (coded_columns[0] if coded_columns else None), _TARGETS, columns
    )
    rows = budget.choose(len(found))
    part = found.select(rows)
    if isinstance(found.features[first], datasets.Image):
        # Undecoded first, so that a broken picture is named by its row and not by a library's traceback.
        raw = part.cast_column(first, datasets.Image(decode=False))
        x = stacked(
            ((f"row {row}", _picture(item, row)) for row, item in zip(rows, raw[first])), size, len(rows)
        )
    else:
        try:
            values = np.asarray(part.with_format("numpy")[first][:])
        except ValueError as error:
            raise InputError(f"DATA: column {first!r} holds rows of different shapes ({error})") from error
        require(
            values.dtype.kind in "iubf",
            f"DATA: column {first!r} holds {show(values)}, expected images or numbers; choose with --inputs NAME",
        )
        x = torch.from_numpy(values if values.dtype == np.uint8 else values.astype(np.float32))
    feature = found.features[second]
    names = tuple(str(n) for n in feature.names) if isinstance(feature, datasets.ClassLabel) else ()
    labels, classes = coded(f"DATA: column {second!r}", np.asarray(part[second][:]), names)
    result = Samples(
        inputs=x,
        targets=labels,
        index=torch.from_numpy(rows),
        total=len(found),
        source=source,
        classes=classes,
        notes=(*notes, f"inputs are column {first!r}, targets column {second!r}"),
    )
    if groups is None or (groups not in columns and Path(groups).is_file()):
        return result
    named_one("groups", groups, (), columns)
    feature = found.features[groups]
    values = np.asarray(part[groups][:])
    if isinstance(feature, datasets.ClassLabel):
        values = np.asarray([feature.int2str(int(v)) for v in values])
    return with_groups(result, values)


def _picture(item: Any, row: int) -> Any:
    from PIL import Image

    try:
        source = io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]
        with Image.open(source) as picture:
            picture.load()
            return picture.copy()
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"DATA: the image of row {row} cannot be read ({error})") from error
