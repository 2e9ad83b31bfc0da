"""Hugging Face data sets, saved to disk or by name (extra ``hub``)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lineament.core.checks import InputError, require, suggest
from lineament.data.samples import Samples
from lineament.load.columns import BUILT_IN, Choose, as_inputs, as_targets, find_column, with_groups
from lineament.load.folders import stacked
from lineament.load.hub import findable, first_line
from lineament.load.texts import TEXTS, TextReader, text_samples
from lineament.load.token_targets import TAGS, WORDS, listed, masked_samples, tagged_samples

_INPUTS = ("image", "img", "images", "pixel_values", "x", "inputs", "data", "features")
_TARGETS = ("label", "labels", "y", "target", "targets", "class", "fine_label")
_ORDER = ("test", "validation", "valid", "val", "train")


def saved_data_set(path: Path, choose: Choose, *, split: str | None, **options: Any) -> Samples:
    """Samples of a data set that ``save_to_disk`` wrote.

    Raises:
        InputError: the package datasets is not installed, or the folder holds no readable data set, split or column.
    """
    datasets = _library()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:
        raise InputError(f"data: {str(path)!r} is no readable Hugging Face data set ({error})") from error
    return _samples(found, path.name, choose, split=split, **options)


def named_data_set(name: str, choose: Choose, *, split: str | None, **options: Any) -> Samples:
    """Samples of a data set on the Hugging Face hub, or of one in its cache.

    Raises:
        InputError: the package datasets is not installed, or there is no such data set, split or column.
    """
    datasets = _library()
    findable("data", name, "data", BUILT_IN)
    try:
        found = datasets.load_dataset(name)
    except Exception as error:
        raise InputError(
            f"data: {name!r} is no file or folder here, and as a Hugging Face data set it cannot be loaded ({first_line(error)})"
        ) from error
    return _samples(found, name, choose, split=split, **options)


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "data: Hugging Face data sets need the package 'datasets'; install lineament[hub]"
        ) from error
    datasets.disable_progress_bars()
    return datasets


def _samples(
    found: Any,
    source: str,
    choose: Choose,
    *,
    inputs: str | None,
    targets: str | None,
    groups: str | None,
    split: str | None,
    size: tuple[int, int] | None,
    reader: TextReader | None = None,
) -> Samples:
    import datasets

    notes = []
    if isinstance(found, dict):
        chosen = split or next((name for name in _ORDER if name in found), next(iter(found), ""))
        require(chosen in found, f"split: {chosen!r} is not in the data{suggest(chosen, found)}")
        notes.append(f"split {chosen!r}")
        found = found[chosen]
    elif split is not None:
        raise InputError(f"split: {split!r} was asked for, but the data set has one part only")
    columns = list(found.column_names)
    pictures = [name for name in columns if isinstance(found.features[name], datasets.Image)]
    coded_columns = [name for name in columns if isinstance(found.features[name], datasets.ClassLabel)]
    if reader is not None and reader.task != "classes":
        return _token_targets(found, source, choose, reader, inputs, targets, groups, tuple(notes))
    first = inputs or (pictures[0] if pictures else None)
    first = find_column("inputs", first, _INPUTS if reader is None else TEXTS, columns)
    usual = next((name for name in _TARGETS if name in columns), None)
    second = find_column(
        "targets", targets or usual or (coded_columns[0] if coded_columns else None), _TARGETS, columns
    )
    rows = choose(len(found))
    part = found.select(rows)
    x = None
    if reader is None and isinstance(found.features[first], datasets.Image):
        # Undecoded first, so that a broken picture is named by its row and not by a library's traceback.
        raw = part.cast_column(first, datasets.Image(decode=False))
        pictures = ((f"row {row}", _picture(item, row)) for row, item in zip(rows, raw[first]))
        x = stacked(pictures, size, len(rows))
    elif reader is None:
        try:
            values = np.asarray(part.with_format("numpy")[first][:])
        except ValueError as error:
            raise InputError(f"data: column {first!r} holds rows of different shapes ({error})") from error
        if getattr(found.features[first], "dtype", "") == "uint8":
            values = values.astype(np.uint8)  # the numpy format widens it
        x = as_inputs(f"column {first!r}", values)
    names, values = _class_names(found.features[second]), np.asarray(part[second][:])
    if values.dtype.kind == "U":
        # Names are numbered by all of them: a rare one that was not chosen keeps its place.
        names = tuple(sorted(found.unique(second)))
    labels, classes = as_targets(f"column {second!r}", values, names)
    rest: dict[str, Any] = {
        "targets": labels,
        "index": torch.from_numpy(rows),
        "total": len(found),
        "source": source,
        "classes": classes,
        "notes": (*notes, f"inputs are column {first!r}, targets column {second!r}"),
    }
    if x is None and reader is not None:
        result = text_samples(part[first][:], reader.tokenizer, **rest)
    else:
        result = Samples(inputs=x, **rest)  # pyright: ignore[reportArgumentType]
    return result if groups is None else with_groups(result, _groups(found, part, groups))


def _groups(found: Any, part: Any, groups: str) -> np.ndarray:
    values = np.asarray(part[find_column("groups", groups, (), list(found.column_names))][:])
    names = _class_names(found.features[groups])
    return np.asarray([names[int(v)] for v in values]) if names else values


def _token_targets(
    found: Any,
    source: str,
    choose: Choose,
    reader: TextReader,
    inputs: str | None,
    targets: str | None,
    groups: str | None,
    notes: tuple[str, ...],
) -> Samples:
    """Texts whose words have tags, or whose words are hidden."""
    columns = list(found.column_names)
    first = find_column("inputs", inputs, WORDS, columns)
    rows = choose(len(found))
    part = found.select(rows)
    rest: dict[str, Any] = {
        "index": torch.from_numpy(rows),
        "total": len(found),
        "source": source,
        "notes": (*notes, f"texts are column {first!r}"),
    }
    if groups is not None:
        blank = Samples(torch.zeros(len(rows), 1), torch.zeros(len(rows)))
        named = with_groups(blank, _groups(found, part, groups))
        rest |= {"groups": named.groups, "group_names": named.group_names}
    if reader.task == "masked":
        return masked_samples(
            [text if isinstance(text, str) else " ".join(text) for text in part[first][:]], reader, **rest
        )
    second = find_column("targets", targets, TAGS, [name for name in columns if name != first])
    names = _class_names(getattr(found.features[second], "feature", None))
    return tagged_samples(list(map(listed, part[first][:])), part[second][:], reader, names=names, **rest)


def _class_names(feature: Any) -> tuple[str, ...]:
    import datasets

    return tuple(map(str, feature.names)) if isinstance(feature, datasets.ClassLabel) else ()


def _picture(item: Any, row: int) -> Any:
    from PIL import Image

    try:
        source = io.BytesIO(item["bytes"]) if item["bytes"] is not None else item["path"]
        with Image.open(source) as picture:
            picture.load()
            return picture.copy()
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"data: the image of row {row} cannot be read ({error})") from error
