"""What a user names as ``file.py:name`` or ``package.module:name``: code that the user asks to run, and is run."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lineament.core.checks import InputError, require, suggest
from lineament.core.engines import USER_MODULE
from lineament.core.files import like_files


def named_in(argument: str, place: str, name: str) -> Any:
    """What ``name`` is in a file or a module.

    Raises:
        InputError: no such file, an import that fails, no such name (names the nearest).

    >>> named_in("model", "torch.nn", "Linear").__name__
    'Linear'
    """
    path = Path(place) if place.endswith(".py") else None
    require(path is None or path.is_file(), f"{argument}: file {place!r} does not exist{like_files(place)}")
    # A user's file imports what lies beside it; a module is looked for where the command was called.
    folder = str(Path.cwd() if path is None else path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        module = importlib.import_module(place) if path is None else _run_file(path, argument)
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        # A script that exits would end this process too, and with the status of work that was done.
        raise InputError(
            f"{argument}: importing {place!r} failed ({type(error).__name__}: {error})"
        ) from error
    finally:
        sys.path.remove(folder)
    public = [key for key in vars(module) if not key.startswith("_")]
    require(hasattr(module, name), f"{argument}: {place!r} has no {name!r}{suggest(name, public)}")
    return getattr(module, name)


def _run_file(path: Path, argument: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(USER_MODULE + path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{argument}: {str(path)!r} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses and pickles look up their module by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
