"""Where the reference numbers are, and that every file of a method is read."""

from __future__ import annotations

import os
from pathlib import Path


def files(slug: str) -> list[Path]:
    """Every data file of a method, from ``$LINEAMENT_GOLDEN`` or the project's copy."""
    root = Path(os.environ.get("LINEAMENT_GOLDEN", Path(__file__).parent / "data"))
    found = sorted(p for p in (root / slug).iterdir() if p.suffix in (".npz", ".json"))
    assert found, f"no golden files in {root / slug}"
    return found
