"""The work of ``lineament colorize``: frames coloured in segments that a killed run keeps, and joined into a film or written as pictures."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from lineament.cli.console import note
from lineament.core.batching import progress, progress_lines
from lineament.core.checkpoint import Checkpoint
from lineament.core.files import atomic_write, output_folder, write_json
from lineament.core.models import usable
from lineament.core.pictures import lab_to_rgb, rgb_to_lab
from lineament.load.film_frames import FilmFrame
from lineament.load.picture_films import PictureFilm, read_picture
from lineament.load.video import Film
from lineament.load.video_writing import VideoOutput
from lineament.modules.colormnet.colorize import Colorizer, ColouredFrame, as_rgb
from lineament.modules.colormnet.film import Colorizing
from lineament.modules.colormnet.naming import from_official
from lineament.modules.colormnet.network import ColorMNet

_SEGMENT = 24  # frames after which a killed run goes on


def model_of(a: argparse.Namespace, dtype: torch.dtype | None = None) -> ColorMNet:
    """The network of ``--weights``, of ``--precision`` unless another dtype is given; its licence is printed."""
    load = ColorMNet.from_pretrained if Path(a.weights).is_dir() else from_official
    model = load(a.weights)
    if model.licence:
        print(model.licence, file=sys.stderr)
    with usable(a.device):
        return model.to(a.device, dtype or getattr(torch, a.precision))


def picture_names(film: Film | PictureFilm, length: int) -> list[str]:
    """The files of coloured pictures: the folder's own names, or the numbers of a video's frames."""
    if isinstance(film, PictureFilm):
        return [f"{file.stem}.png" for file in film.files]
    return [f"{index:06d}.png" for index in range(length)]


def colour(
    a: argparse.Namespace,
    film: Film | PictureFilm,
    length: int,
    output: VideoOutput | None,
    out: Path,
    work: Path,
    exemplars: dict[int, Path],
) -> int:
    """Colour a film of so many frames into ``output``, or as pictures into ``out``; the exit status."""
    gaps = [*film.gaps]  # of the walk that counted the frames
    settings = {"every": a.every, "max_side": a.max_side, "guided": a.guided, "flip": a.flip, "cuts": a.cuts}
    options = Colorizing.published(**settings) if a.parity else Colorizing(**settings)
    pictures = {frame: read_picture("exemplars", path) for frame, path in exemplars.items()}
    key = {
        "settings": settings, "scenes": a.scenes, "parity": a.parity, "luma": a.luma, "device": a.device, "precision": a.precision,
        "frames": length, "layout": None if output is None else output.layout,
        "files": [_stamp(Path(path)) for path in (a.film, a.weights, *exemplars.values())], "at": sorted(exemplars),
    }  # fmt: skip
    model = model_of(a)
    colorizer = Colorizer(model, options, truncate=a.parity)
    checkpoint = Checkpoint(work / "state", key)
    names, facts, segments = picture_names(film, length), [], -(-length // _SEGMENT)
    if output is None:
        _clear(output_folder(out), {name.removesuffix(".png") for name in names})
    loop = checkpoint.loop("film", segments, {"colorizer": colorizer, "facts": facts}, every=1)
    # Without those that an earlier process coloured.
    left = (frame for frame in film.frames() if frame.index >= colorizer.done)
    shown = progress(left, "colouring frames", length, before=lambda frame: frame.index)
    with progress_lines(note), closing(shown) as frames:
        for segment in loop:
            rows = []
            for frame in frames:
                last = frame.index == length - 1
                found = colorizer.frame(
                    frame.shown, pictures.get(frame.index), scene=frame.index in a.scenes, last=last
                )
                facts.append([frame.index, found.confidence, found.cut])
                if output is None:
                    _write_picture(out / names[frame.index], found.picture, frame)
                else:
                    rows.append(output.planes(frame, _rgb(found, frame), luma=a.luma == "lab"))
                if last or colorizer.done == (segment + 1) * _SEGMENT:
                    break
            if rows:
                _write_segment(work / f"{segment:06d}.npz", rows)
    if output is not None:
        joined = replace(output, path=work / f"joined{out.suffix}")
        joined.write(_stored(work))
        joined.path.replace(out)
    own = ["the film has colours of its own, which are replaced"] * film.coloured
    notes = [*own, *(output.notes if output else ()), *gaps]
    _finish(a, out, facts, exemplars, model.licence, notes)
    checkpoint.finish()
    _clear(work, {"joined", *(f"{segment:06d}" for segment in range(segments))})
    for path in work.glob("*.npz"):
        path.unlink()
    work.rmdir()
    return 1 if gaps else 0


def _clear(folder: Path, stems: set[str]) -> None:
    """Remove what a killed run was writing of these files."""
    for path in folder.iterdir():
        if path.name.startswith(".") and path.name[1:].rpartition("-")[0] in stems:
            path.unlink()


def _stamp(path: Path) -> list[Any]:
    if path.is_dir():
        return [str(path.resolve()), *(_stamp(p) for p in sorted(path.iterdir()) if p.is_file())]
    return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]


def _write_picture(path: Path, picture: torch.Tensor, frame: FilmFrame) -> None:
    image = Image.fromarray(picture.cpu().numpy())
    if frame.alpha is not None:
        opacity = np.rot90(frame.alpha, frame.turns) >> (frame.depth - 8 if frame.alpha.itemsize > 1 else 0)
        image.putalpha(Image.fromarray(opacity.astype(np.uint8)))
    with atomic_write(path) as temporary:
        image.save(temporary)


def _rgb(found: ColouredFrame, frame: FilmFrame) -> torch.Tensor:
    """A frame's lightness with the predicted chroma, [height, width, 3] in [0, 1]."""
    lightness = rgb_to_lab(as_rgb("frame", frame.shown))[:1].to(found.ab)
    return lab_to_rgb(torch.cat([lightness, found.ab])).movedim(0, -1)


def _write_segment(path: Path, rows: list[list[np.ndarray]]) -> None:
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, *(np.stack(plane) for plane in zip(*rows)))


def _stored(work: Path) -> Callable[[FilmFrame], list[np.ndarray]]:
    """The planes of each frame, from the segments that were written."""
    held: dict[int, list[np.ndarray]] = {}

    def planes(frame: FilmFrame) -> list[np.ndarray]:
        segment, row = divmod(frame.index, _SEGMENT)
        if segment not in held:
            held.clear()
            with np.load(work / f"{segment:06d}.npz", allow_pickle=False) as stored:
                held[segment] = [stored[name] for name in stored.files]
        return [plane[row] for plane in held[segment]]

    return planes


def _finish(
    a: argparse.Namespace,
    out: Path,
    facts: list[Any],
    exemplars: dict[int, Path],
    licence: str,
    notes: list[str],
) -> None:
    confidence = [row[1] for row in facts]
    # The frames that are least sure, far from one another: half as sure as the film's middle.
    limit, wanted = statistics.median(confidence) / 2, []
    for index in sorted(range(len(facts)), key=confidence.__getitem__):
        if confidence[index] < limit and all(abs(index - other) > _SEGMENT for other in wanted):
            wanted.append(index)
    wanted = sorted(wanted[:5])
    report = out / "colorize.json" if out.is_dir() else out.with_name(f"{out.name}.colorize.json")
    write_json(
        report,
        {
            "film": str(a.film), "frames": len(facts), "exemplars": {str(k): str(v) for k, v in exemplars.items()},
            "weights": str(a.weights), "licence": licence, "confidence": [round(x, 6) for x in confidence],
            "cuts": [row[0] for row in facts if row[2]], "frames_that_want_an_exemplar": wanted, "notes": notes,
        },
    )  # fmt: skip
    for told in notes:
        print(f"note: {told}", file=sys.stderr)
    print(f"{len(facts)} frame{'s' * (len(facts) != 1)} coloured: {out} (confidence of each frame: {report})")
    if wanted:
        print("these frames want an exemplar: " + ", ".join(map(str, wanted)))
