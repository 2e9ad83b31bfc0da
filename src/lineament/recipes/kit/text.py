"""The text that small language models are trained on."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from lineament.core.checks import require
from lineament.data.formats import folder_of

_SHAKESPEARE = "tinyshakespeare.txt"


def read_text(path: str | None) -> str:
    """A text file, tinyshakespeare.txt of the environment's ``LINEAMENT_DATA``, or the sources of Python's standard library.

    >>> read_text("poem.txt")
    Traceback (most recent call last):
    ...
    lineament.core.checks.InputError: text: 'poem.txt' is no file
    """
    if path is not None:
        require(Path(path).is_file(), f"text: {path!r} is no file")
        return Path(path).read_text(encoding="utf-8", errors="replace")
    folder = folder_of(None)
    if folder is not None and (folder / _SHAKESPEARE).is_file():
        return (folder / _SHAKESPEARE).read_text(encoding="utf-8")
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return "".join(
        s for s in (p.read_text(encoding="utf-8", errors="replace") for p in sources) if s.isascii()
    )
