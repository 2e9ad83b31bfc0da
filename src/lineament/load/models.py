"""Trained networks as users have them: a factory with weights, a `torch.export` file, a Hugging Face model.

Nothing here unpickles without restriction: see :mod:`lineament.load.checkpoints` for weights; a `.pt2` archive is refused when a part of it would need a
pickle. A user's own factory is code that the user asks to run, and is run.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from lineament.core import surgery
from lineament.core.checks import InputError, require, show
from lineament.core.files import like_files
from lineament.core.models import held_weights, takes_hooks, unwrapped
from lineament.core.surgery.saving import STEPS
from lineament.load.checkpoints import ENDINGS, kind_of, listed, read_checkpoint, tensors_by_path
from lineament.load.exported import exported
from lineament.load.hub import findable, first_line
from lineament.load.hub_models import hugging_face, text_classifier
from lineament.load.loaded import Loaded
from lineament.load.user_code import named_in
from lineament.load.weights import load_weights, require_finite

_DATA = (".npz", ".npy", ".csv", ".tsv", ".jsonl", ".parquet")


def load_model(model: Any, *, weights: str | Path | None = None) -> Loaded:
    """Bring up a trained network in eval mode.

    Args:
        model: ``package.module:factory`` or ``file.py:factory`` (a function or class that takes no arguments, or a network itself), a ``torch.export``
            file ``.pt2``, a TorchScript archive, an ONNX file (extra ``onnx``), a Hugging Face directory or name (a classifier of images or texts), an ``nn.Module``, or for texts a pair (module, tokenizer).
        weights: a checkpoint with exactly the module's parameters and buffers, see :func:`lineament.load.checkpoints.read_checkpoint`; or a folder that
            :func:`lineament.edit.save` wrote, whose surgery is repeated on the module.

    Raises:
        InputError: what cannot be found, read or matched; pickles; NaN in the weights; lazy layers that have no weights yet.

    >>> found = load_model(nn.Linear(4, 2))
    >>> found.source, found.kind, found.model.training
    ('Linear', 'module', True)
    """
    if isinstance(model, (tuple, list)) and len(model) == 2 and isinstance(model[0], nn.Module):
        own = unwrapped(model[0])
        found = text_classifier(own, model[1], type(own).__name__, "module")
    elif isinstance(model, nn.Module):
        found = Loaded(_hookable(unwrapped(model)), type(unwrapped(model)).__name__, "module")
    else:
        require(
            isinstance(model, str) and bool(model),
            f"model: got {show(model)}, expected a string or a torch.nn.Module",
        )
        found = _from_text(str(model), weights)
    lazy = [name for name, parameter in found.model.named_parameters() if is_lazy(parameter)]
    require(
        not lazy,
        f"model: weights without a shape yet: {listed(lazy)}; run the network once on an input before the factory returns it",
    )
    if weights is not None:
        require(
            found.kind in ("factory", "module"),
            f"weights: {found.source!r} brings its own weights, so give none",
        )
        if (Path(weights) / STEPS).is_file():
            found = replace(found, model=surgery.load(weights, lambda: found.model))
        else:
            found = replace(found, notes=(*found.notes, *load_weights(found.model, weights)))
    elif found.kind == "factory" and not found.notes:
        found = replace(found, notes=("no weights given: the network is as the factory makes it",))
    require_finite(held_weights(found.model))
    if found.kind != "module":
        found.model.eval()
    return found


def _from_text(model: str, weights: str | Path | None) -> Loaded:
    path = Path(model)
    place, colon, factory = model.rpartition(":")
    if colon and factory.isidentifier() and not path.exists():
        return _made(place, factory, model)
    if path.suffix == ".pt2":
        return exported(path)
    if path.suffix == ".onnx" and path.is_file():
        return _from_onnx(path)
    if path.is_dir():
        return hugging_face(model, local=True)
    if path.is_file():
        if path.suffix == ".py":
            raise InputError(
                f"model: {model!r} names no factory; expected {model + ':NAME'!r}, where NAME() makes the network"
            )
        if kind_of(path) == "script":
            return _from_script(path)
        raise _no_network(path)
    if path.suffix in (".py", ".onnx", *ENDINGS) or model.startswith(("/", "./", "../", "~")):
        raise InputError(
            f"model: {model!r} does not exist{like_files(model)}; expected package.module:factory, file.py:factory, a .pt2, TorchScript or .onnx file, or a Hugging Face directory or name"
        )
    cached_only = findable("model", model, "factory")
    return hugging_face(model, local=False, cached_only=cached_only)


def _no_network(path: Path) -> InputError:
    """What to pass where a file of weights, or of something else, was given as the model."""
    factory = (
        f"pass a function that makes the network, and {str(path)!r} as `weights`: 'net.py:make' with, in net.py,\n    def make():\n"
        "        return Network()  # of the class and the sizes that were trained"
    )
    if path.suffix.lower() in _DATA:
        return InputError(
            f"model: {str(path)!r} holds data, expected a network: file.py:factory, a .pt2, TorchScript or .onnx file, or a Hugging Face directory; MODEL comes before DATA"
        )
    if not kind_of(path):
        return InputError(
            f"model: {str(path)!r} is a file of kind {path.suffix!r}, expected file.py:factory, a .pt2, TorchScript or .onnx file, or a Hugging Face directory"
        )
    try:
        names = [name for name, _ in tensors_by_path(read_checkpoint(path, "model"))]
    except InputError as error:
        # A whole module, or a damaged file: the reason is told as it is for weights.
        return InputError(f"{error}\n    Then {factory}" if "\n" in str(error) else str(error))
    held = f"{len(names)} tensors: {listed(names)}" if names else "no tensors"
    return InputError(f"model: {str(path)!r} holds weights without a network ({held}); {factory}")


def _from_script(path: Path) -> Loaded:
    """A TorchScript archive as the network that it is; its code is TorchScript's own and no pickle's."""
    try:
        network = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"model: {str(path)!r} is a TorchScript archive that this PyTorch ({torch.__version__}) cannot load ({first_line(error)})"
        ) from error
    note = "a TorchScript archive: it runs, and shows no module to look into; a factory of the network it was made from shows more"
    return Loaded(_hookable(network), path.name, "script", notes=(note,))


def _from_onnx(path: Path) -> Loaded:
    """An ONNX file as a module, through onnx2torch (extra ``onnx``)."""
    try:
        import onnx2torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"model: {str(path)!r} is an ONNX file, which needs the package 'onnx2torch' ({first_line(error)}); install lineament[onnx], or export the network with torch.export"
        ) from error
    try:
        network = onnx2torch.convert(str(path))
    except Exception as error:
        raise InputError(
            f"model: {str(path)!r} cannot be converted from ONNX ({first_line(error)})"
        ) from error
    note = "converted from ONNX: modules are those that onnx2torch makes of its operators"
    return Loaded(network, path.name, "onnx", notes=(note,))


def _made(place: str, name: str, source: str) -> Loaded:
    """What a factory makes, or the network itself where the name is one."""
    made, notes = named_in("model", place, name), ()
    if isinstance(made, nn.Module):
        notes = (f"{source!r} is a network, not a factory: it is taken as it is",)
    else:
        require(callable(made), f"model: {name!r} in {place!r} is {show(made)}, expected a function or class")
        wanted = _required(made)
        require(
            not wanted,
            f"model: {place}:{name} needs {' and '.join(map(repr, wanted))}, expected a function or class that takes no arguments; write one beside it that "
            f"returns {name}({', '.join(f'{each}=...' for each in wanted)})",
        )
        try:
            made = made()
        except (Exception, SystemExit) as error:
            raise InputError(
                f"model: {place}:{name}() failed ({type(error).__name__}: {error}); it must make the network without arguments"
            ) from error
    require(
        isinstance(made, nn.Module),
        f"model: {place}:{name}() returned {show(made)} ({type(made).__name__}), expected a torch.nn.Module",
    )
    return Loaded(_hookable(unwrapped(made)), source, "factory", notes=notes)


def _required(made: Callable[..., object]) -> list[str]:
    """The arguments without which it cannot be called."""
    try:
        taken = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):  # some built-in ones do not say
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in taken if each.default is each.empty and each.kind not in optional]


class Scripted(nn.Module):
    """A TorchScript network in a module of plain PyTorch, which takes hooks as it does not; what lies in it stays out of reach."""

    def __init__(self, network: torch.jit.ScriptModule):
        super().__init__()
        self.network = network
        self.train(network.training)

    def forward(self, *inputs: Any) -> Any:
        return self.network(*inputs)


def _hookable(model: Any) -> nn.Module:
    if not isinstance(model, torch.jit.ScriptModule):
        return model
    if takes_hooks(model):
        # A traced network takes hooks that never run; as a file brings it back, it refuses them.
        held = io.BytesIO()
        torch.jit.save(model, held)
        held.seek(0)
        model = torch.jit.load(held)
    return Scripted(model)
