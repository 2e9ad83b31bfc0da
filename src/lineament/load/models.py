"""Trained networks as users have them: a factory with weights, a `torch.export` file, a Hugging Face model.

Nothing here unpickles: weights are safetensors, and a `.pt2` archive is refused when a part of it would need a pickle. A user's
own factory is code that the user asks to run, and is run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lineament.core.checks import InputError, require, show, suggest
from lineament.load.exported import exported
from lineament.load.hub_models import hugging_face
from lineament.load.loaded import Loaded, listing

_CONVERT = (
    "convert it once, where you trust the file: "
    "safetensors.torch.save_file(torch.load({name!r}, weights_only=True), 'model.safetensors')"
)


def load(model: str | nn.Module, *, weights: str | Path | None = None) -> Loaded:
    """Bring up a trained network in eval mode.

    Args:
        model: ``package.module:factory`` or ``file.py:factory`` (a function or class that takes no arguments), a ``torch.export``
            file ``.pt2``, a Hugging Face directory or name (an image classifier), or an ``nn.Module``.
        weights: a ``.safetensors`` file with exactly the module's parameters and buffers.

    Raises:
        InputError: what cannot be found, read or matched; pickles; NaN in the weights; lazy layers that have no weights yet.

    >>> found = load(nn.Linear(4, 2))
    >>> found.source, found.kind, found.model.training
    ('Linear', 'module', True)
    """
    if isinstance(model, nn.Module):
        found = Loaded(model, type(model).__name__, "module")
    else:
        require(
            isinstance(model, str) and bool(model),
            f"MODEL: got {show(model)}, expected a string or a torch.nn.Module",
        )
        found = _from_text(model, weights)
    lazy = [name for name, parameter in found.model.named_parameters() if is_lazy(parameter)]
    require(
        not lazy,
        f"MODEL: {listing('weights without a shape yet', lazy)}; run the network once on an input before the factory returns it",
    )
    if weights is not None:
        require(
            found.kind in ("factory", "module"),
            f"--weights: {found.source!r} brings its own weights; leave --weights out",
        )
        load_weights(found.model, weights)
    _finite(found.model)
    if found.kind != "module":
        found.model.eval()
    return found


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load a safetensors file into a module; every key must match.

    Raises:
        InputError: a missing file, a pickle (with the conversion to make), a corrupt file, keys or shapes that do not match.

    >>> import tempfile; from safetensors.torch import save_file
    >>> path = f"{tempfile.mkdtemp()}/net.safetensors"
    >>> save_file({"weight": torch.full((1, 2), 3.0), "bias": torch.zeros(1)}, path)
    >>> net = nn.Linear(2, 1)
    >>> load_weights(net, path)
    >>> net.weight.tolist()
    [[3.0, 3.0]]
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    require(
        path.is_file(),
        f"--weights: {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}, expected a .safetensors file",
    )
    with path.open("rb") as file:
        start = file.read(8)
    if start[:1] == b"\x80" or start[:2] == b"PK":
        raise InputError(
            f"--weights: {str(path)!r} is a pickle (torch.save), which can run code when loaded, expected safetensors; "
            + _CONVERT.format(name=str(path))
        )
    try:
        state = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"--weights: {str(path)!r} is no safetensors file or is corrupt ({error})"
        ) from error
    own = model.state_dict()
    # safetensors holds a shared tensor once; the module's other names for it are not missing.
    shared = {tensor.data_ptr() for name, tensor in own.items() if name in state and tensor.numel()}
    missing = [name for name in own if name not in state and own[name].data_ptr() not in shared]
    unexpected = [name for name in state if name not in own]
    shapes = [
        f"{name} is {tuple(state[name].shape)} in the file and {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = [
        text
        for text in (
            listing("missing in the file", missing),
            listing("unexpected in the file", unexpected),
            listing("of another shape", shapes),
        )
        if text
    ]
    require(
        not problems, f"--weights: {str(path)!r} does not fit {type(model).__name__}: {'; '.join(problems)}"
    )
    model.load_state_dict(state, strict=False)


def digest(model: nn.Module) -> str:
    """A fingerprint of a network: its architecture as it prints, and every parameter and buffer."""
    found = hashlib.sha256(repr(model).encode())
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            found.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _from_text(model: str, weights: str | Path | None) -> Loaded:
    path = Path(model)
    place, colon, factory = model.rpartition(":")
    if colon and factory.isidentifier() and not path.exists():
        return Loaded(_factory(place, factory), model, "factory")
    if path.suffix == ".pt2":
        return exported(path)
    if path.is_dir():
        return hugging_face(model, local=True)
    if path.is_file():
        if path.suffix == ".py":
            raise InputError(
                f"MODEL: {model!r} names no factory; expected {model + ':NAME'!r}, where NAME() makes the network"
            )
        if path.suffix == ".safetensors":
            raise InputError(
                f"MODEL: {model!r} holds weights without a network; pass 'file.py:factory --weights {model}' or a Hugging Face directory"
            )
        if path.suffix in (".pt", ".pth", ".pkl", ".pickle", ".bin", ".ckpt"):
            raise InputError(
                f"MODEL: {model!r} is a pickle, which can run code when loaded, and is never opened; pass "
                "'file.py:factory --weights model.safetensors'. To get there, " + _CONVERT.format(name=model)
            )
        raise InputError(
            f"MODEL: {model!r} is a file of kind {path.suffix!r}, expected file.py:factory, a .pt2 file, or a Hugging Face directory"
        )
    if path.suffix in (".py", ".pt", ".pth", ".safetensors", ".onnx") or model.startswith(
        ("/", "./", "../", "~")
    ):
        raise InputError(
            f"MODEL: {model!r} does not exist; expected package.module:factory, file.py:factory, a .pt2 file, or a Hugging Face directory or name"
        )
    return hugging_face(model, local=False)


def _factory(place: str, name: str) -> nn.Module:
    path = Path(place) if place.endswith(".py") else None
    require(path is None or path.is_file(), f"MODEL: file {place!r} does not exist")
    # A user's file imports what lies beside it; a module is looked for where the command was called.
    folder = str(Path.cwd() if path is None else path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(place) if path is None else _run_file(path)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        # A script that ends itself would end the audit too, and with the status of work that was done.
        raise InputError(f"MODEL: importing {place!r} failed ({type(error).__name__}: {error})") from error
    finally:
        sys.path.remove(folder)
    public = [key for key in vars(module) if not key.startswith("_")]
    require(hasattr(module, name), f"MODEL: {place!r} has no {name!r}{suggest(name, public)}")
    made = getattr(module, name)
    if not isinstance(made, nn.Module):
        require(callable(made), f"MODEL: {name!r} in {place!r} is {show(made)}, expected a function or class")
        try:
            made = made()
        except (Exception, SystemExit) as error:
            raise InputError(
                f"MODEL: {place}:{name}() failed ({type(error).__name__}: {error}); it must make the network without arguments"
            ) from error
    require(
        isinstance(made, nn.Module),
        f"MODEL: {place}:{name}() returned {show(made)} ({type(made).__name__}), expected a torch.nn.Module",
    )
    return made


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"lineament_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"MODEL: {str(path)!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses and pickles look up their module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _finite(model: nn.Module) -> None:
    bad = [
        name
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    require(
        not bad,
        f"MODEL: NaN or infinite values in {listing('weights', bad)}; was the training stable and the file whole?",
    )
