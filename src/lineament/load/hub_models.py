"""Image classifiers of Hugging Face, from a saved directory or by name: safetensors only, no code of the repository's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError, require
from lineament.load.checkpoints import read_checkpoint
from lineament.load.hub import first_line, quiet_transformers
from lineament.load.loaded import Loaded
from lineament.load.weight_names import mismatches


def hugging_face(name: str, *, local: bool, cached_only: bool = False) -> Loaded:
    """An image classifier with its processor's size and normalisation and its names of the classes."""
    safe = True
    if local:
        require(
            (Path(name) / "config.json").is_file(),
            f"model: folder {name!r} holds no config.json, expected a Hugging Face model saved with save_pretrained",
        )
        # Refuses what only an unrestricted pickle could read, before transformers tries.
        safe = any(Path(name).glob("*.safetensors"))
        if not safe:
            read_checkpoint(name, "model")
    with quiet_transformers("model", "hub") as transformers:
        try:
            model, info = transformers.AutoModelForImageClassification.from_pretrained(
                name,
                use_safetensors=safe,
                local_files_only=cached_only,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
        except Exception as error:
            where = (
                "cannot be loaded as an image classifier"
                if local
                else "is no file or folder here, and as a Hugging Face model it cannot be loaded; without network, pass a saved directory"
            )
            raise InputError(f"model: {name!r} {where} ({first_line(error)})") from error
    problems = mismatches(
        missing=sorted(map(str, info.get("missing_keys", ()))),
        unexpected=sorted(map(str, info.get("unexpected_keys", ()))),
        shapes=sorted(str(m[0] if isinstance(m, tuple) else m) for m in info.get("mismatched_keys", ())),
    )
    require(not problems, f"model: the weights of {name!r} do not fit {type(model).__name__}: {problems}")
    size, mean, std, notes = _processor(name, local)
    config = model.config
    wanted = getattr(config, "image_size", None)
    if size is None and wanted is not None:
        size = (wanted, wanted) if isinstance(wanted, int) else (int(wanted[0]), int(wanted[1]))
    named = getattr(config, "id2label", None) or {}
    classes = tuple(str(named[key]) for key in sorted(named))
    if all(label == f"LABEL_{key}" for key, label in enumerate(classes)):
        classes = ()
    return Loaded(model, name, "hugging face", size, mean, std, classes, None, tuple(notes))


def _processor(name: str, local: bool) -> tuple[Any, tuple[float, ...], tuple[float, ...], list[str]]:
    """Size, mean and deviation from ``preprocessor_config.json``, where there is one."""
    raw: Mapping[str, Any] = {}
    if local:
        file = Path(name) / "preprocessor_config.json"
        if file.is_file():
            try:
                raw = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"model: {str(file)!r} is no JSON ({error})") from error
    else:
        from transformers import ImageProcessingMixin

        try:
            raw = ImageProcessingMixin.get_image_processor_dict(name)[0]
        except (OSError, ValueError):
            raw = {}
    if not raw:
        return None, (), (), ["no preprocessor_config.json: images are scaled to [0, 1] only"]
    size = raw.get("size")
    if isinstance(size, Mapping):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    elif isinstance(size, int):
        size = (size, size)
    crop = raw.get("crop_size")
    if raw.get("do_center_crop") and isinstance(crop, Mapping):
        size = (crop.get("height"), crop.get("width"))
    if (
        not raw.get("do_resize", True)
        or not isinstance(size, tuple)
        or not all(isinstance(s, int) for s in size)
    ):
        size = None
    normal = raw.get("do_normalize", True)

    def values(key: str) -> tuple[float, ...]:
        value = raw.get(key) if normal else None
        return tuple(
            float(v) for v in (value if isinstance(value, list) else [] if value is None else [value])
        )

    return (
        size,
        values("image_mean"),
        values("image_std"),
        ["size and normalisation from preprocessor_config.json"],
    )
