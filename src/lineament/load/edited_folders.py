"""Folders that :func:`lineament.edit.save` wrote of a Hugging Face model whose layers are of several widths: the class and the configuration it was built from,
what was taken out, and the weights that are left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lineament.core import surgery
from lineament.core.checks import InputError, require
from lineament.core.files import write_json
from lineament.core.surgery.saving import STEPS

# The class and the configuration of a Hugging Face model before anything was taken out.
BUILT_FROM = "built_from.json"


def transformers_class(name: str) -> Any:
    """A model of transformers by the name of its class, ``None`` where there is none.

    >>> transformers_class("GPT2LMHeadModel").__name__, transformers_class("AutoConfig")
    ('GPT2LMHeadModel', None)
    """
    import transformers

    found = getattr(transformers, name, None)
    return found if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel) else None


def is_edited(folder: str | Path) -> bool:
    """Whether a folder holds an edited Hugging Face model that ``from_pretrained`` cannot open.

    >>> is_edited("no/such/folder")
    False
    """
    return all((Path(folder) / name).is_file() for name in (BUILT_FROM, STEPS))


def tell_built_from(folder: Path, model: Any) -> None:
    """Write what a Hugging Face model is built from beside its weights; nothing for other networks."""
    config: Any = getattr(model, "config", None)
    if config is not None and transformers_class(type(model).__name__) is type(model):
        told = {"class": type(model).__name__, "config": json.loads(config.to_json_string(use_diff=False))}
        write_json(folder / BUILT_FROM, told)


def built_from(folder: str | Path) -> tuple[str, dict[str, Any]]:
    """The name of the class and the configuration that an edited model is built from.

    Raises:
        InputError: a damaged file.
    """
    file = Path(folder) / BUILT_FROM
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        return str(told["class"]), dict(told["config"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"folder: {str(file)!r} does not say what the network is built from ({type(error).__name__}: {error})"
        ) from error


def edited(folder: str | Path) -> Any:
    """The edited model of such a folder, in eval mode.

    Raises:
        InputError: a damaged file; a class that this transformers does not have; weights of other shapes.
    """
    name, config = built_from(folder)
    kind = transformers_class(name)
    require(kind is not None, f"folder: this transformers has no {name}; install one that has, or pass build")
    return surgery.load(folder, lambda: kind(kind.config_class.from_dict(config))).eval()
