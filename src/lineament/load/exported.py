"""Networks saved by ``torch.export``: an archive is refused when a part of it would need a pickle."""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from lineament.core.checks import InputError, require
from lineament.core.files import like_files
from lineament.load.loaded import Loaded


def exported(path: Path) -> Loaded:
    """A program of ``torch.export``, refused where loading it would unpickle."""
    require(path.is_file(), f"model: {str(path)!r} does not exist{like_files(path)}")
    _no_pickles(path)
    try:
        with warnings.catch_warnings():
            # Deprecations inside torch are not the user's concern.
            warnings.simplefilter("ignore", FutureWarning)
            program = torch.export.load(path)
            inputs = [node for node in program.graph.nodes if node.op == "placeholder"][-1].meta["val"]
            model = _modules(program)
    except Exception as error:
        raise InputError(
            f"model: {str(path)!r} is corrupt or was written by another version of torch.export ({type(error).__name__}: {error})"
        ) from error
    shape: tuple[Any, ...] = tuple(getattr(inputs, "shape", ()))
    batch = shape[0] if shape and isinstance(shape[0], int) else None
    size = (shape[2], shape[3]) if len(shape) == 4 and all(isinstance(s, int) for s in shape[2:]) else None
    notes = ["exported by torch.export: modules are those that the export kept"]
    if batch is not None:
        notes.append(f"exported for batches of {batch} only; export with dynamic_shapes to lift that")
    return Loaded(model, path.name, "export", size=size, batch=batch, notes=tuple(notes))


def _modules(program: Any) -> Any:
    """The program as nested modules; as one flat module where it cannot be nested."""
    try:
        return torch.export.unflatten(program)
    except Exception:
        flat = program.module()
        # torch forbids switching it to eval mode, where it already is: the export fixed what it does.
        for name in ("train", "eval"):
            vars(flat).pop(name, None)
        return flat


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
        raise InputError(f"model: {str(path)!r} is corrupt or no torch.export file ({error})") from error
    require(
        not risky,
        f"model: {str(path)!r} holds pickled Python objects ({', '.join(risky[:3])}), which can run code when loaded; "
        "export a module whose parts are tensors only",
    )
