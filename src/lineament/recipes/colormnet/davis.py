"""The same networks, trained on, and real films: sequences of DAVIS 2016, of which two at a time are left out and judged.

Perazzi et al., CVPR 2016. The file ``davis_val_216p.npz`` holds each sequence's frames as JPEG files laid end to end.
"""

from __future__ import annotations

import io
import itertools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lineament.core.checks import InputError, require
from lineament.data.formats import folder_of
from lineament.recipes.colormnet.experiments import Learned, answers_of, decibels, parts, restored, trained

_FILE = "davis_val_216p.npz"
PAIR = 2


@dataclass(frozen=True)
class Filmed:
    """Two sequences that were left out: their names, and {way: for each, the PSNR of ab of each frame but the first}."""

    sequences: list[str]
    decibels: dict[str, list[list[float]]]


def davis_films(data_folder: str | None, side: int) -> dict[str, Tensor]:
    """The sequences by name, bytes [frames, height, width, 3]; the shorter side has ``side`` pixels, the longer a multiple of 16.

    Raises:
        InputError: no such file, or a damaged one.
    """
    folder = folder_of(data_folder)
    path = None if folder is None else Path(folder) / _FILE
    if path is None or not path.is_file():
        raise InputError(
            f"data_folder: no {_FILE} there; give its folder, or set LINEAMENT_DATA, or leave out davis"
        )
    films = {}
    try:
        with np.load(path, allow_pickle=False) as stored:
            for name in sorted(key.removesuffix(".bytes") for key in stored.files if key.endswith(".bytes")):
                data, offsets = stored[f"{name}.bytes"], stored[f"{name}.offsets"]
                frames = [
                    np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB"))
                    for a, b in itertools.pairwise(offsets)
                ]
                films[name] = _small(torch.from_numpy(np.stack(frames)), side)
    except (
        zipfile.BadZipFile,
        OSError,
        ValueError,
        KeyError,
        EOFError,
        Image.DecompressionBombError,
    ) as error:
        raise InputError(f"{path}: damaged, or not sequences of JPEG files ({error})") from error
    require(len(films) > PAIR, f"{path}: holds {len(films)} sequences, expected at least {PAIR + 1}")
    return films


def _small(frames: Tensor, side: int) -> Tensor:
    height, width = frames.shape[1:3]
    scale = side / min(height, width)
    size = [side if n == min(height, width) else 16 * round(n * scale / 16) for n in (height, width)]
    small = F.interpolate(frames.movedim(3, 1).float(), size=size, mode="area")
    return small.round().to(torch.uint8).movedim(1, 3).contiguous()


def left_out(config: Any, pair: int, found: dict[str, Learned]) -> Filmed:
    """The networks of the first seed trained on, with all sequences but two, and judged on these; each at the step size that the generated films chose."""
    films = davis_films(config.data_folder, config.size)
    names = list(films)
    judged = names[PAIR * pair : PAIR * (pair + 1)]
    rest = [film for name, film in films.items() if name not in judged]
    seed, models = config.seeds[0], {}
    for name, held in found.items():
        model = restored(config, name, seed, held)
        models[name], _ = trained(
            config, model, rest, name, seed, rate=held.rate, epochs=1, clips=config.batch_size * config.davis_steps, scale=0.6
        )  # fmt: skip
    lightness, ab = parts(torch.stack([films[name] for name in judged]))
    answers = answers_of(models, lightness, ab)
    return Filmed(judged, {name: decibels(x, ab[:, 1:]) for name, x in answers.items()})
