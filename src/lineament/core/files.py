"""Atomic writes: every output goes to a temporary file beside its place and is renamed when it is complete."""

from __future__ import annotations

import difflib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lineament.core.checks import require


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A with-block that yields a temporary path and renames it to ``path`` at the end; removed on an exception.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> with atomic_write(folder / "a.txt") as temporary:
    ...     _ = temporary.write_text("whole")
    >>> (folder / "a.txt").read_text(), len(list(folder.iterdir()))
    ('whole', 1)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes the file private; a result is as readable as any other file of the user's.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; missing folders are made.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "new" / "a.txt"
    >>> write_text(path, "ü"); path.read_bytes()
    b'\\xc3\\xbc'
    """
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON (indented, keys in the given order) atomically.

    Raises:
        ValueError: NaN or infinity, which JSON has none of.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"b": 1}); json.loads(path.read_text())
    {'b': 1}
    """
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def like_files(path: str | Path) -> str:
    """``"; nearest: 'net.py'"`` for the files of the same ending beside ``path`` whose names are most like its own; empty where there are none.

    >>> like_files("no/such/folder/net.py")
    ''
    """
    path = Path(path).expanduser()
    try:
        if path.exists():
            return ""
        present = [each.name for each in path.parent.iterdir() if each.suffix == path.suffix]
    except OSError:
        return ""
    near = difflib.get_close_matches(path.name, present, n=3, cutoff=0.6)
    return "; nearest: " + ", ".join(repr(str(path.with_name(name))) for name in near) if near else ""


def possible_folder(path: str | Path) -> Path:
    """``path``, if it can become a folder that can be written; it is not made.

    Raises:
        InputError: an empty name, a file, or a place that this user cannot write to.
    """
    require(str(path) != "", "out: got an empty name, expected a folder to write into ('.' for this one)")
    path = Path(path)
    require(not path.is_file(), f"out: {str(path)!r} is a file, expected a folder to write into")
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    require(
        nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK),
        f"out: {str(path)!r} cannot be written ({str(nearest)!r} is closed to this user or no folder); "
        "choose a folder that can be",
    )
    return path


def possible_file(what: str, path: str | Path) -> Path:
    """``path``, if it can become a file that can be written; it is not made. ``what`` is the argument that named it.

    Raises:
        InputError: an empty name, a folder, or a place that this user cannot write to.
    """
    require(str(path) != "", f"{what}: got an empty name, expected that of a file")
    path = Path(path)
    require(not path.is_dir(), f"{what}: {str(path)!r} is a folder, expected the name of a file")
    try:
        with tempfile.TemporaryFile(dir=next(place for place in path.absolute().parents if place.exists())):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        require(False, f"{what}: {str(path)!r} cannot be written ({reason}); choose a place that can be")
    return path


def output_folder(path: str | Path) -> Path:
    """``path``, made a folder that can be written.

    Raises:
        InputError: an empty name, a file, or a place that this user cannot write to.
    """
    path = possible_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or str(error)
        require(False, f"out: {str(path)!r} cannot be written ({reason}); choose a folder that can be")
    return path
