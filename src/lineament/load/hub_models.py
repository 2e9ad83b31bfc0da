"""Classifiers of images, texts and words of Hugging Face, and masked language models, from a saved directory or by name: safetensors only, no code of the repository's."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lineament.core.checks import InputError, require, show
from lineament.load.checkpoints import read_checkpoint
from lineament.load.hub import architectures, first_line, quiet_transformers, text_task
from lineament.load.language_models import load_language_model
from lineament.load.loaded import Loaded
from lineament.load.narrowed import load_narrowed, origin
from lineament.load.weight_names import mismatches


def hugging_face(name: str, *, local: bool, cached_only: bool = False) -> Loaded:
    """A classifier with its names of the classes: of images with its processor's size and normalisation, of texts with its tokenizer."""
    safe, narrowed = True, local and origin(name) is not None
    if local and not narrowed:
        require(
            (Path(name) / "config.json").is_file(),
            f"model: folder {name!r} holds no config.json, expected a Hugging Face model saved with save_pretrained",
        )
        # Refuses what only an unrestricted pickle could read, before transformers tries.
        safe = any(Path(name).glob("*.safetensors"))
        if not safe:
            read_checkpoint(name, "model")
    texts = text_task(architectures(name))
    if texts == "masked":
        model, tokenizer = load_language_model(name, masked=True)
        return text_classifier(model, tokenizer, name, "hugging face")
    kinds = {
        "classes": ("AutoModelForSequenceClassification", "a text classifier"),
        "tokens": ("AutoModelForTokenClassification", "a token classifier"),
        "": ("AutoModelForImageClassification", "an image classifier"),
    }
    kind, what = kinds[texts]
    tokenizer = None
    with quiet_transformers("model", "hub") as transformers:
        try:
            model, info = (
                (load_narrowed(name), {})
                if narrowed
                else getattr(transformers, kind).from_pretrained(
                    name,
                    use_safetensors=safe,
                    local_files_only=cached_only,
                    trust_remote_code=False,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                )
            )
        except InputError:
            raise
        except Exception as error:
            where = (
                f"cannot be loaded as {what}"
                if local
                else "is no file or folder here, and as a Hugging Face model it cannot be loaded; without network, pass a saved directory"
            )
            raise InputError(f"model: {name!r} {where} ({first_line(error)})") from error
        if texts:
            tokenizer = load_tokenizer(transformers, name, cached_only)
    problems = mismatches(
        missing=sorted(map(str, info.get("missing_keys", ()))),
        unexpected=sorted(map(str, info.get("unexpected_keys", ()))),
        shapes=sorted(str(m[0] if isinstance(m, tuple) else m) for m in info.get("mismatched_keys", ())),
    )
    require(not problems, f"model: the weights of {name!r} do not fit {type(model).__name__}: {problems}")
    if texts:
        return text_classifier(model, tokenizer, name, "hugging face")
    size, mean, std, notes = _processor(name, local)
    config = model.config
    wanted = getattr(config, "image_size", None)
    if size is None and wanted is not None:
        size = (wanted, wanted) if isinstance(wanted, int) else (int(wanted[0]), int(wanted[1]))
    return Loaded(model, name, "hugging face", size, mean, std, class_names(config), None, tuple(notes))


def text_classifier(model: Any, tokenizer: Any, source: str, kind: str) -> Loaded:
    """A classifier of texts or words, or a masked language model, with its tokenizer, which is told how many tokens the model takes.

    Raises:
        InputError: no tokenizer.
    """
    require(
        callable(tokenizer) and hasattr(tokenizer, "decode"),
        f"model: got {show(tokenizer)} beside the network, expected its tokenizer",
    )
    config = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    padding = getattr(config, "pad_token_id", None)
    if isinstance(most, int) and most > 0:
        # RoBERTa and its kin number positions from behind the padding's.
        offset = (padding or 0) + 1 if "roberta" in str(getattr(config, "model_type", "")) else 0
        tokenizer = copy.copy(tokenizer)
        tokenizer.model_max_length = min(most - offset, tokenizer.model_max_length)
    task = text_task([type(model).__name__]) or "classes"
    # A masked model's configuration names two classes that it does not have.
    classes = () if task == "masked" else class_names(config)
    return Loaded(model, source, kind, classes=classes, tokenizer=tokenizer, text_task=task)


def class_names(config: Any) -> tuple[str, ...]:
    """The classes as a configuration names them; none where it only numbers them."""
    named = getattr(config, "id2label", None) or {}
    classes = tuple(str(named[key]) for key in sorted(named))
    return () if all(label == f"LABEL_{key}" for key, label in enumerate(classes)) else classes


def load_tokenizer(transformers: Any, name: str, cached_only: bool) -> Any:
    """The tokenizer that belongs to a text classifier.

    Raises:
        InputError: there is none.
    """
    try:
        words = transformers.AutoTokenizer.from_pretrained(name, local_files_only=cached_only)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"model: {name!r} is a text classifier, and no tokenizer could be loaded from it ({first_line(error)})"
        ) from error
    # Where there are no tokenizer files, transformers makes one that knows no word.
    require(
        len(words) > len(words.all_special_ids),
        f"model: {name!r} is a text classifier without a tokenizer; save it there too",
    )
    return words


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
