"""Where the reference numbers are, and that every file of a method is read."""

from __future__ import annotations

import os
from pathlib import Path


def files(slug: str) -> list[Path]:
    """Every file of a method but its README, from ``$LINEAMENT_GOLDEN`` or the project's copy; so none is passed over."""
    root = Path(os.environ.get("LINEAMENT_GOLDEN", Path(__file__).parent / "data"))
    found = sorted(p for p in (root / slug).iterdir() if p.is_file() and p.suffix != ".md")
    assert found, f"no golden files in {root / slug}"
    return found
