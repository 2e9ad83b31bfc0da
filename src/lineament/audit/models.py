"""Trained networks as users have them: a factory with weights, a `torch.export` file, a Hugging Face model.

Nothing here unpickles: weights are safetensors, and a `.pt2` archive is refused when a part of it would need a pickle. A user's
own factory is code that the user asks to run, and is run.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import json
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lineament.core.checks import InputError, require, show, suggest

_CONVERT = (
    "convert it once, where you trust the file: "
    "safetensors.torch.save_file(torch.load({name!r}, weights_only=True), 'model.safetensors')"
)


@dataclass(frozen=True)
class Loaded:
    """A network and what its files say about its inputs.

    ``size`` is the (height, width) it wants, ``mean`` and ``std`` what images are normalised with (after scaling to [0, 1]), ``classes``
    its names of the classes, ``batch`` the only batch size it takes (``None``: any).
    """

    model: nn.Module
    source: str
    kind: str
    size: tuple[int, int] | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    classes: tuple[str, ...] = ()
    batch: int | None = None
    notes: tuple[str, ...] = field(default=())


def load(model: str | nn.Module, *, weights: str | Path | None = None) -> Loaded:
    """Bring up a trained network in eval mode.

    Args:
        model: ``package.module:factory`` or ``file.py:factory`` (a function or class that takes no arguments), a ``torch.export``
            file ``.pt2``, a Hugging Face directory or name (an image classifier), or an ``nn.Module``.
        weights: a ``.safetensors`` file with exactly the module's parameters and buffers.

    Raises:
        InputError: what cannot be found, read or matched; pickles; NaN in the weights.
    """
    if isinstance(model, nn.Module):
        found = Loaded(model, type(model).__name__, "module")
    else:
        require(
            isinstance(model, str) and bool(model),
            f"MODEL: got {show(model)}, expected a string or a torch.nn.Module",
        )
        found = _from_text(model, weights)
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
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    require(path.is_file(), f"--weights: {str(path)!r} does not exist, expected a .safetensors file")
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
            _listing("missing in the file", missing),
            _listing("unexpected in the file", unexpected),
            _listing("of another shape", shapes),
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
        return _exported(path)
    if path.is_dir():
        return _hugging_face(model, local=True)
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
    return _hugging_face(model, local=False)


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
    except Exception as error:
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
        except Exception as error:
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


def _exported(path: Path) -> Loaded:
    require(path.is_file(), f"MODEL: {str(path)!r} does not exist")
    _no_pickles(path)
    try:
        program = torch.export.load(path)
        inputs = [node for node in program.graph.nodes if node.op == "placeholder"][-1].meta["val"]
        try:
            model = torch.export.unflatten(program)
        except Exception:
            model = program.module()
    except Exception as error:
        raise InputError(
            f"MODEL: {str(path)!r} is corrupt or was written by another version of torch.export ({type(error).__name__}: {error})"
        ) from error
    shape: tuple[Any, ...] = tuple(getattr(inputs, "shape", ()))
    batch = shape[0] if shape and isinstance(shape[0], int) else None
    size = (shape[2], shape[3]) if len(shape) == 4 and all(isinstance(s, int) for s in shape[2:]) else None
    notes = ["exported by torch.export: modules are those that the export kept"]
    if batch is not None:
        notes.append(f"exported for batches of {batch} only; export with dynamic_shapes to lift that")
    return Loaded(model, path.name, "export", size=size, batch=batch, notes=tuple(notes))


def _no_pickles(path: Path) -> None:
    """Refuse an archive that ``torch.export.load`` would unpickle without restriction."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            risky = [n for n in names if Path(n).name.startswith(("custom_obj_", "opaque_obj_"))]
            pickled = [n for n in names if n.endswith(".pt")]
            for name in names:
                if name.endswith("_config.json"):
                    for entry in json.loads(archive.read(name)).get("config", {}).values():
                        if entry.get("use_pickle"):
                            pickled += [n for n in names if Path(n).name == entry["path_name"]]
            for name in pickled:
                data = archive.read(name)
                try:
                    if data:
                        torch.load(io.BytesIO(data), weights_only=True)
                except Exception:
                    risky.append(name)
    except (zipfile.BadZipFile, OSError, ValueError, AttributeError, KeyError) as error:
        raise InputError(f"MODEL: {str(path)!r} is corrupt or no torch.export file ({error})") from error
    require(
        not risky,
        f"MODEL: {str(path)!r} holds pickled Python objects ({', '.join(risky[:3])}), which can run code when loaded; "
        "export a module whose parts are tensors only",
    )


def _hugging_face(name: str, *, local: bool) -> Loaded:
    if local:
        require(
            (Path(name) / "config.json").is_file(),
            f"MODEL: folder {name!r} holds no config.json, expected a Hugging Face model saved with save_pretrained",
        )
        files = {p.name for p in Path(name).iterdir()}
        has = any(f.endswith(".safetensors") for f in files)
        if not has and any(f.endswith((".bin", ".pt", ".pth")) for f in files):
            raise InputError(
                f"MODEL: {name!r} holds a pickle (pytorch_model.bin) where safetensors is expected; convert it once, where you trust it: "
                "load it and call model.save_pretrained(folder, safe_serialization=True)"
            )
        require(has, f"MODEL: {name!r} holds no model.safetensors")
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "MODEL: Hugging Face models need the package 'transformers'; install lineament[hub]"
        ) from error
    quiet = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            name,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = (
            "cannot be loaded as an image classifier"
            if local
            else "is no file or folder here, and as a Hugging Face model it cannot be loaded; without network, pass a saved directory"
        )
        raise InputError(f"MODEL: {name!r} {where} ({reason})") from error
    finally:
        transformers.logging.set_verbosity(quiet)
    problems = [
        text
        for text in (
            _listing("missing in the file", sorted(map(str, info.get("missing_keys", ())))),
            _listing("unexpected in the file", sorted(map(str, info.get("unexpected_keys", ())))),
            _listing(
                "of another shape",
                sorted(str(m[0] if isinstance(m, tuple) else m) for m in info.get("mismatched_keys", ())),
            ),
        )
        if text
    ]
    require(
        not problems,
        f"MODEL: the weights of {name!r} do not fit {type(model).__name__}: {'; '.join(problems)}",
    )
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
                raise InputError(f"MODEL: {str(file)!r} is no JSON ({error})") from error
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


def _finite(model: nn.Module) -> None:
    bad = [
        name
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor) and value.is_floating_point() and not bool(torch.isfinite(value).all())
    ]
    require(
        not bad,
        f"MODEL: NaN or infinite values in {_listing('weights', bad)}; was the training stable and the file whole?",
    )


def _listing(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"{what}: {', '.join(names[:4])}{more}"
