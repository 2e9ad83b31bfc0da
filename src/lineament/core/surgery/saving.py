"""Operated networks on disk, without pickle: their weights in safetensors, and what was done to the network in ``surgery.json``."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lineament.core.checks import InputError, require
from lineament.core.files import atomic_write, output_folder, write_json
from lineament.core.surgery.groups import ChannelGroup, Entry, plain_network
from lineament.core.surgery.rewriting import RECORD, rewrite

WEIGHTS, STEPS = "model.safetensors", "surgery.json"


def without(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy in which these modules, such as folded batch norms, are replaced by the identity."""
    new = copy.deepcopy(model)
    for name in names:
        require(
            name in dict(new.named_modules()),
            f"surgery: the network has no module {name!r}; build the one that was operated on",
        )
        parent, _, child = name.rpartition(".")
        setattr(new.get_submodule(parent), child, nn.Identity())
    setattr(new, RECORD, [*getattr(model, RECORD, []), {"kind": "identity", "modules": names}])
    return new


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write an operated network into a folder: ``model.safetensors`` and ``surgery.json``.

    Returns:
        The folder.

    >>> import tempfile
    >>> from lineament.core.surgery import channel_groups, load, remove
    >>> build = lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> net = build()
    >>> small = remove(net, {channel_groups(net, torch.ones(1, 2))["0"]: [1]})
    >>> again = load(save(small, tempfile.mkdtemp()), build)
    >>> torch.equal(again[0].weight, small[0].weight)
    True
    """
    model = plain_network(model)
    folder = output_folder(folder)
    state, places = {}, {}
    aliases: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = places.setdefault(id(tensor), name)
        if first == name:
            state[name] = tensor.detach().cpu().contiguous().clone()
        else:
            aliases[name] = first
    with atomic_write(folder / WEIGHTS) as path:
        save_file(state, path)
    write_json(folder / STEPS, {"steps": getattr(model, RECORD, []), "tied": aliases})
    return folder


def load(folder: str | Path, build: Callable[[], nn.Module]) -> nn.Module:
    """The network of a folder that :func:`save` wrote: the user's own network, the same surgery, the saved weights.

    Args:
        folder: where :func:`save` wrote.
        build: makes the network as it was before the surgery; its weights do not matter.

    Raises:
        InputError: no such folder, or a network of other shapes.
    """
    folder = Path(folder)
    for name in (WEIGHTS, STEPS):
        require(
            (folder / name).is_file(),
            f"folder: {str(folder)!r} has no {name}; pass a folder that save(model, folder) wrote",
        )
    told = json.loads((folder / STEPS).read_text())
    model = build()
    for step in told["steps"]:
        model = _repeated(model, step)
    state = load_file(folder / WEIGHTS)
    state.update({name: state[first] for name, first in told["tied"].items()})
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise InputError(
            f"build: the network does not have the saved shapes ({str(error).splitlines()[-1].strip()})"
        ) from error
    return model


def _repeated(model: nn.Module, step: Mapping[str, Any]) -> nn.Module:
    if step["kind"] == "identity":
        return without(model, step["modules"])
    if step["kind"] == "bias":
        return with_biases(model, step["modules"])
    changes = {}
    for told in step["groups"]:
        entries = [
            Entry(e["parameter"], e["axis"], torch.tensor(e["slots"]), "write") for e in told["entries"]
        ]
        group = ChannelGroup(
            told["group"], told["of"], tuple(entries), told["heads"], keys=told.get("keys", 0)
        )
        write = torch.eye(told["of"])[: told["size"]]
        changes[group] = write, write.T
    return rewrite(model, changes)


def with_biases(model: nn.Module, names: list[str]) -> nn.Module:
    """A copy in which these layers have a bias, of zeros."""
    new = copy.deepcopy(model)
    for name in names:
        modules: dict[str, Any] = dict(new.named_modules())
        require(
            name in modules,
            f"surgery: the network has no layer {name!r}; build the one that was operated on",
        )
        layer = modules[name]
        if layer.bias is None:
            count = getattr(layer, "out_channels", None) or layer.out_features
            layer.bias = nn.Parameter(layer.weight.new_zeros(count), requires_grad=layer.weight.requires_grad)
    setattr(new, RECORD, [*getattr(model, RECORD, []), {"kind": "bias", "modules": names}])
    return new
