"""Edited networks on disk, without pickle: a folder that ``from_pretrained`` opens where it can, else weights and the list of what was taken out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lineament.core import surgery
from lineament.core.checks import InputError, require
from lineament.core.files import output_folder
from lineament.core.surgery.saving import STEPS
from lineament.load.hub import quiet_transformers
from lineament.load.narrowed import load_narrowed, note_origin, origin


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write an edited network.

    A Hugging Face model whose configuration says the new sizes is written by ``save_pretrained``, so that ``from_pretrained`` opens the folder. Layers of several
    widths are beyond a configuration, and any other network is its user's own: their weights are written with the list of what was taken out.

    >>> import tempfile, torch
    >>> net = nn.Linear(2, 1)
    >>> again = load(save(net, tempfile.mkdtemp()), lambda: nn.Linear(2, 1))
    >>> torch.equal(again.weight, net.weight)
    True
    """
    folder = output_folder(folder)
    if opens_alone(model):
        hugging: Any = model
        with quiet_transformers("model", "hub"):
            hugging.save_pretrained(folder)
        return folder
    surgery.save(model, folder)
    note_origin(model, folder)
    return folder


def load(folder: str | Path, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The network that :func:`save` wrote.

    Args:
        build: makes the network as it was before it was edited; its weights do not matter. ``None`` for a Hugging Face model, whose configuration
            lies in the folder.

    Raises:
        InputError: no such folder, a network of other shapes, or no ``build`` where one is needed.

    >>> import tempfile
    >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))
    >>> from lineament.edit import prune
    >>> small = prune(net, torch.randn(20, 2), keep=0.5)
    >>> load(small.save(tempfile.mkdtemp()), lambda: nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)))[0]
    Linear(in_features=2, out_features=2, bias=True)
    """
    folder = Path(folder)
    require(folder.is_dir(), f"folder: {str(folder)!r} does not exist")
    if (folder / "config.json").is_file():
        import transformers

        kind = json.loads((folder / "config.json").read_text())["architectures"][0]
        return getattr(transformers, kind).from_pretrained(folder)
    require(
        (folder / STEPS).is_file(),
        f"folder: {str(folder)!r} has no {STEPS}; pass a folder that save(model, folder) wrote",
    )
    if build is None and origin(folder) is not None:
        return load_narrowed(folder)
    if build is None:
        raise InputError(
            f"build: {str(folder)!r} holds weights and what was taken out of a network; pass the function that makes that network"
        )
    return surgery.load(folder, build)


def opens_alone(model: nn.Module) -> bool:
    """Whether the network that its own configuration describes has the same shapes."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return False
    with torch.device("meta"):
        fresh = type(model)(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    return shapes == {name: tensor.shape for name, tensor in fresh.state_dict().items()}
