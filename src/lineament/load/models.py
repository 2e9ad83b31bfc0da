"""Trained networks as users have them: a factory with weights, a `torch.export` file, a Hugging Face model.

Nothing here unpickles: weights are safetensors, and a `.pt2` archive is refused when a part of it would need a pickle. A user's
own factory is code that the user asks to run, and is run.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from torch import nn
from torch.nn.parameter import is_lazy

from lineament.core.checks import InputError, require, show, suggest
from lineament.core.models import unwrapped
from lineament.load.exported import exported
from lineament.load.hub_models import hugging_face
from lineament.load.loaded import Loaded
from lineament.load.weights import CONVERT, listed, load_weights, require_finite


def load_model(model: str | nn.Module, *, weights: str | Path | None = None) -> Loaded:
    """Bring up a trained network in eval mode.

    Args:
        model: ``package.module:factory`` or ``file.py:factory`` (a function or class that takes no arguments, or a network itself), a ``torch.export``
            file ``.pt2``, a Hugging Face directory or name (an image classifier), or an ``nn.Module``.
        weights: a ``.safetensors`` file with exactly the module's parameters and buffers.

    Raises:
        InputError: what cannot be found, read or matched; pickles; NaN in the weights; lazy layers that have no weights yet.

    >>> found = load_model(nn.Linear(4, 2))
    >>> found.source, found.kind, found.model.training
    ('Linear', 'module', True)
    """
    if isinstance(model, nn.Module):
        found = Loaded(unwrapped(model), type(unwrapped(model)).__name__, "module")
    else:
        require(
            isinstance(model, str) and bool(model),
            f"model: got {show(model)}, expected a string or a torch.nn.Module",
        )
        found = _from_text(model, weights)
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
        load_weights(found.model, weights)
    require_finite(found.model.state_dict())
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
    if path.is_dir():
        return hugging_face(model, local=True)
    if path.is_file():
        if path.suffix == ".py":
            raise InputError(
                f"model: {model!r} names no factory; expected {model + ':NAME'!r}, where NAME() makes the network"
            )
        if path.suffix == ".safetensors":
            raise InputError(
                f"model: {model!r} holds weights without a network; pass it as `weights` of 'file.py:factory', or pass a Hugging Face directory"
            )
        if path.suffix in (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"):
            raise InputError(
                f"model: {model!r} is a pickle, which can run code when loaded, and is never opened; pass "
                "'file.py:factory' and `weights` in safetensors. To get there, " + CONVERT.format(name=model)
            )
        raise InputError(
            f"model: {model!r} is a file of kind {path.suffix!r}, expected file.py:factory, a .pt2 file, or a Hugging Face directory"
        )
    if path.suffix in (".py", ".pt", ".pth", ".safetensors", ".onnx") or model.startswith(
        ("/", "./", "../", "~")
    ):
        raise InputError(
            f"model: {model!r} does not exist; expected package.module:factory, file.py:factory, a .pt2 file, or a Hugging Face directory or name"
        )
    return hugging_face(model, local=False)


def _made(place: str, name: str, source: str) -> Loaded:
    """What a factory makes, or the network itself where the name is one."""
    path = Path(place) if place.endswith(".py") else None
    require(path is None or path.is_file(), f"model: file {place!r} does not exist")
    # A user's file imports what lies beside it; a module is looked for where the command was called.
    folder = str(Path.cwd() if path is None else path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(place) if path is None else _run_file(path)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        # A script that exits would end this process too, and with the status of work that was done.
        raise InputError(f"model: importing {place!r} failed ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(folder)
    public = [key for key in vars(module) if not key.startswith("_")]
    require(hasattr(module, name), f"model: {place!r} has no {name!r}{suggest(name, public)}")
    made, notes = getattr(module, name), ()
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
    return Loaded(unwrapped(made), source, "factory", notes=notes)


def _required(made: Callable[..., object]) -> list[str]:
    """The arguments without which it cannot be called."""
    try:
        taken = inspect.signature(made).parameters.values()
    except (TypeError, ValueError):  # some built-in ones do not say
        return []
    optional = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in taken if each.default is each.empty and each.kind not in optional]


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lineament_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"model: {str(path)!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses and pickles look up their module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
