"""Hugging Face models whose layers were narrowed to widths that no configuration can say: the class, the configuration before, and the surgery, in one folder.

``from_pretrained`` cannot open such a folder. Here the whole model is made from its configuration, the surgery is repeated, and the weights are loaded strictly.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from lineament.core import surgery
from lineament.core.checks import InputError, require
from lineament.core.files import write_json

BUILT_FROM = (
    "built_from.json"  # the class and the configuration of a Hugging Face model before anything was taken out
)


def hugging_class(name: str) -> Any:
    """A model of transformers by the name of its class, ``None`` where there is none."""
    import transformers

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def note_origin(model: nn.Module, folder: Path) -> None:
    """Write what a Hugging Face model was made from; nothing for other networks."""
    config: Any = getattr(model, "config", None)
    if config is not None and hugging_class(type(model).__name__) is type(model):
        told = {"class": type(model).__name__, "config": json.loads(config.to_json_string(use_diff=False))}
        write_json(folder / BUILT_FROM, told)


def origin(folder: Any) -> dict[str, Any] | None:
    """What a folder's model was made from, ``None`` where it says nothing of it.

    >>> origin("no/such/folder")
    """
    file = Path(folder) / BUILT_FROM
    if not file.is_file():
        return None
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return {"class": str(told["class"]), "config": dict(told["config"])}
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"folder: {str(file)!r} is damaged ({type(error).__name__}: {error})") from error


def load_narrowed(folder: str | Path, *, attention: str | None = None) -> Any:
    """The model of such a folder in eval mode.

    Args:
        attention: the implementation to choose.

    Raises:
        InputError: a damaged folder, or a class that this transformers does not have.
    """
    told = origin(folder)
    assert told is not None
    kind = hugging_class(told["class"])
    require(
        kind is not None,
        f"folder: this transformers has no {told['class']}; install one that has, or pass build",
    )
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}

    def build() -> Any:
        return kind._from_config(kind.config_class.from_dict(told["config"]), **options)

    return surgery.load(folder, build).eval()
