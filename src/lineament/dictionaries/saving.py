"""A dictionary in a folder: its tensors (safetensors) and ``config.json``, which says what they are and how they were made."""

from __future__ import annotations

import hashlib
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from lineament.core.checks import InputError, one_of, require, show
from lineament.core.files import atomic_write, output_folder, write_json
from lineament.core.models import unwrapped
from lineament.core.shards import place_in_training
from lineament.dictionaries.topk.shards import divided, whole

CONFIG, WEIGHTS = "config.json", "dictionary.safetensors"
FORMAT = "lineament dictionary"

# Where each kind is defined; a file chooses among these and nothing else.
KINDS = {
    **dict.fromkeys(("TopK", "BatchTopK", "ReLU", "JumpReLU", "Gated", "Neurons"), "autoencoders"),
    "Normalised": "normalised",
    **dict.fromkeys(("NMF", "SemiNMF", "ConvexNMF", "PCA"), "factorisations"),
}


def made_by_kind(kind: Any, settings: dict[str, Any], **options: Any) -> Any:
    """A dictionary of one of :data:`KINDS`, with its weights as they begin."""
    one_of("kind", kind, KINDS)
    made: Any = getattr(import_module(f"lineament.dictionaries.{KINDS[kind]}"), kind)
    return made(**settings, **options)


class Saved(nn.Module):
    """A dictionary that knows its site and what made it, and can be written and read.

    Attributes:
        site: where in the model its activations pass; ``None`` where that was not said.
        info: plain values that say how it was made: model, hash of its weights, data, training; written into ``config.json``.
        settings: the arguments of its constructor, plain values.
    """

    site: str | None
    info: dict[str, Any]
    settings: dict[str, Any]

    def __init__(self, *, site: str | None = None, **settings: Any):
        super().__init__()
        self.site, self.info, self.settings = site, {}, settings

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``dictionary.safetensors`` and ``config.json``, which ends the write: a folder without it holds no whole dictionary.

        Of a dictionary whose features lie with several processes all must call it; the first writes, and the others return when it has.
        """
        state = self.state_dict()
        several = any(divided(value) for value in state.values())
        tensors = {name: whole(value).contiguous() for name, value in state.items()}
        if not several or place_in_training()[0] == 0:
            self._write(Path(folder), tensors)
        if several:
            torch.distributed.barrier()

    def _write(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        folder = output_folder(folder)
        content = save(tensors, {"format": FORMAT})
        with atomic_write(folder / WEIGHTS) as temporary:
            temporary.write_bytes(content)
        config = {
            "format": FORMAT,
            "version": 1,
            "kind": type(self).__name__,
            "settings": self.settings,
            "site": self.site,
            "conventions": conventions(self),
            "info": self.info,
            "sha256": hashlib.sha256(content).hexdigest(),
        }
        write_json(folder / CONFIG, config)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Any:
        """The dictionary that :meth:`save_pretrained` wrote.

        Raises:
            InputError: what is missing or damaged, or another kind than this class.
        """
        found = read(folder)
        require(
            isinstance(found, cls),
            f"folder: {str(folder)!r} holds a {type(found).__name__}, expected a {cls.__name__}; use {type(found).__name__}.from_pretrained",
        )
        return found


def conventions(dictionary: Saved) -> str:
    """One sentence for readers of ``config.json`` without this library."""
    if not isinstance(getattr(dictionary, "W_enc", None), Tensor):
        return "x is written as codes @ atoms + mean, in the units of x"
    centre = "x - b_dec" if dictionary.settings.get("subtract_bias", True) else "x"
    return f"z = ({centre}) @ W_enc.T + b_enc; x is written as codes @ W_dec + b_dec; one atom a row; all in the units of x"


def read(folder: str | Path) -> Any:
    """The dictionary in a folder, of whichever kind.

    Raises:
        InputError: no such folder, a file that is missing, damaged or of another version.
    """
    folder = Path(folder)
    require(folder.is_dir(), f"folder: {str(folder)!r} is no folder; expected one that save_pretrained wrote")
    for name in (CONFIG, WEIGHTS):
        require(
            (folder / name).is_file(), f"folder: {str(folder)!r} has no {name!r}; is the dictionary whole?"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"folder: {CONFIG!r} in {str(folder)!r} is damaged ({error})") from error
    require(
        isinstance(config, dict) and config.get("format") == FORMAT,
        f"folder: {CONFIG!r} in {str(folder)!r} is not of a dictionary that save_pretrained wrote",
    )
    require(
        config.get("version") == 1,
        f"folder: the dictionary in {str(folder)!r} is of version {show(config.get('version'))}, expected 1",
    )
    kind = one_of("kind", config.get("kind"), KINDS)
    content = (folder / WEIGHTS).read_bytes()
    require(
        hashlib.sha256(content).hexdigest() == config.get("sha256"),
        f"folder: {WEIGHTS!r} in {str(folder)!r} is not the file that {CONFIG!r} describes (its SHA-256 differs); is it whole?",
    )
    try:
        tensors = load(content)
        dictionary = made_by_kind(kind, config["settings"], site=config["site"])
        dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
        dictionary.to(dtype).load_state_dict(tensors)
    except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise InputError(
            f"folder: the dictionary in {str(folder)!r} cannot be read ({str(error).splitlines()[0]})"
        ) from error
    dictionary.info = dict(config.get("info") or {})
    return dictionary


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, by which a dictionary knows it again.

    >>> weights_hash(nn.Linear(1, 1, bias=False).requires_grad_(False)) == weights_hash(nn.Linear(1, 1, bias=False))
    False
    """
    digest = hashlib.sha256()
    for name, value in sorted(unwrapped(model).state_dict().items()):
        if isinstance(value, Tensor) and not value.is_meta:
            held = whole(value).contiguous()
            digest.update(f"{name} {tuple(held.shape)} {held.dtype}".encode())
            digest.update(held.view(torch.uint8).numpy().tobytes() if held.ndim else held.numpy().tobytes())
    return digest.hexdigest()
