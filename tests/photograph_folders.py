"""A small folder of photographs in the form that recipes take: train/CLASS[/PART]/*.png and val/CLASS[/PART]/*.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

TINY = {"image_size": 14, "depths": (1, 1), "widths": (8, 16)}


def draw(root: Path, classes: int, train: int, val: int, *, parts: int = 1) -> Path:
    """Classes (and their parts) are colours of four patches, every other picture is wide; noise on all."""
    for split, count in (("train", train), ("val", val)):
        for k in range(classes * parts * count):
            name, part = k % classes, k // classes % parts
            patches = np.random.default_rng((name, part)).uniform(30, 220, (2, 2, 3)).repeat(8, 0)
            wide = patches.repeat(8 if k % 2 else 10, 1)
            picture = wide + np.random.default_rng((k, count)).normal(0, 20, wide.shape)
            folder = root / split / f"c{name:02}" / (f"p{part}" if parts > 1 else "")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(folder / f"{k}.png")
    return root
